"""docker-compose.yml and Dockerfile keep to what the rest of the project says."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from api.parts import list_parts
from api.settings import ApiSettings
from tests.deploy.compose import ROOT, SECRETS_DIR, commands_of, dockerfile, read_compose, seconds, services
from workers.settings import WorkerSettings

ALL = sorted(read_compose()["services"])
OURS = [name for name in ALL if "build" in read_compose()["services"][name]]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
# A part of `up`, and the services that do its work.
SERVICES_OF = {
    "serve": ["serve", "serve-without-gpu"],
    "worker-cpu": ["worker-cpu"],
    "worker-train": ["worker", "worker-without-gpu"],
    "beat": ["beat"],
    "api": ["api"],
    "dashboard": ["dashboard"],
}
MORE_PROCESSES = ["--workers", "2"]


@pytest.mark.parametrize("name", ALL)
def test_every_service_is_checked_or_ends_by_itself(name: str) -> None:
    service = read_compose()["services"][name]
    assert ("healthcheck" in service) == (service["restart"] != "no")
    assert seconds(service["stop_grace_period"]) >= 10


@pytest.mark.parametrize("name", [name for name in OURS if name not in ("migrate", "dashboard")])
def test_parts_start_when_what_they_need_is_there(name: str) -> None:
    needs = {other: need["condition"] for other, need in services("cpu", "gpu")[name]["depends_on"].items()}
    healthy = "service_healthy"
    assert needs == {"migrate": "service_completed_successfully", "postgres": healthy, "redis": healthy}


def test_the_dashboard_knows_nothing_but_the_api() -> None:
    service = read_compose()["services"]["dashboard"]
    assert service["depends_on"] == {"api": {"condition": "service_healthy"}}
    assert (service["volumes"], service["secrets"]) == ([], [])
    ours = {name: value for name, value in service["environment"].items() if name.startswith("RESIDENCY_")}
    assert ours == {"RESIDENCY_URL": "http://api:8700"}


@pytest.mark.parametrize(
    "part",
    list_parts(home=Path("/data"), host="0.0.0.0", port=8700, workers=1, dashboard_port=8701),  # noqa: S104
)
def test_the_commands_are_those_of_up(part) -> None:
    more = MORE_PROCESSES if part.name == "api" else []
    words = ["python" if word == sys.executable else word for word in part.argv]
    words = [word.replace(f"@{os.uname().nodename}", "@%h") for word in words]  # Celery's name of a host
    for name in SERVICES_OF[part.name]:
        service = read_compose()["services"][name]
        assert service["command"] == words + more
        assert seconds(service["stop_grace_period"]) == part.stop_within_s


@pytest.mark.parametrize("profile", ["cpu", "gpu"])
def test_a_profile_has_every_part_once(profile: str) -> None:
    chosen = services(profile)
    for names in SERVICES_OF.values():
        assert len(set(names) & set(chosen)) == 1
    with_gpus = {name for name in chosen if chosen[name].get("deploy")}
    assert with_gpus == ({"worker", "serve"} if profile == "gpu" else set())


def test_trainers_have_the_time_to_save() -> None:
    grace_s = WorkerSettings.model_fields["stop_grace_s"].default
    for name in SERVICES_OF["worker-train"]:
        assert seconds(read_compose()["services"][name]["stop_grace_period"]) >= grace_s + 20


@pytest.mark.parametrize("name", ALL)
def test_variables_are_settings_and_hold_no_secret(name: str) -> None:
    settings = ApiSettings.model_fields | WorkerSettings.model_fields
    known = {f"RESIDENCY_{field.upper()}" for field in settings} | {"RESIDENCY_SECRETS_DIR", "RESIDENCY_URL"}
    for variable, value in read_compose()["services"][name].get("environment", {}).items():
        assert variable in known or not variable.startswith("RESIDENCY_")
        if re.search("PASSWORD|PEPPER|SECRET|TOKEN|KEY", variable):
            assert value.startswith(SECRETS_DIR)
        assert not re.search(r"//[^/]*:[^/]*@", value), "a password in an address"


def test_secrets_are_files_that_are_never_committed_nor_built_in() -> None:
    for secret in read_compose()["secrets"].values():
        subprocess.run(["git", "check-ignore", "-q", secret["file"]], cwd=ROOT, check=True)  # noqa: S607
    assert (ROOT / ".dockerignore").read_text().splitlines()[0] == "*"


def test_only_those_who_read_keys_get_at_them() -> None:
    every = read_compose()["services"].items()
    assert {name for name, service in every if "residency_key_pepper" in service.get("secrets", [])} == {
        "api",
        "migrate",
    }
    assert {name for name, service in every if "keys:/keys" in service.get("volumes", [])} == {"migrate"}


@pytest.mark.parametrize("name", ALL)
def test_images_are_pinned(name: str) -> None:
    image, _, tag = read_compose()["services"][name]["image"].partition(":")
    if name in OURS:
        assert (image, tag) == ("residency", PROJECT["project"]["version"])
    else:
        assert re.match(r"\d+\.\d+", tag)


def test_what_accepted_work_hangs_on_survives_a_restart() -> None:
    redis = " ".join(services("cpu")["redis"]["command"])
    assert "--appendonly yes" in redis
    assert "--maxmemory-policy noeviction" in redis
    for name, folder in {"redis": "/data", "postgres": "/var/lib/postgresql/data"}.items():
        assert read_compose()["services"][name]["volumes"] == [f"{name}:{folder}"]
    keepers = [name for name in OURS if name != "dashboard"]
    assert all("data:/data" in read_compose()["services"][name]["volumes"] for name in keepers)


def test_the_documentation_names_every_service_and_variable() -> None:
    page = (ROOT / "docs" / "deploy.md").read_text()
    rows = re.findall(r"^\| `([\w-]+)`(?: \(`([\w-]+)`\))? \|.*\| (?:(\d+) s )?\|$", page, re.MULTILINE)
    told = {name: grace_s for *names, grace_s in rows for name in names if name in ALL}
    assert told == {
        name: "" if name == "migrate" else service["stop_grace_period"].removesuffix("s")
        for name, service in read_compose()["services"].items()
    }
    variables = re.findall(r"\$\{(\w+):-", (ROOT / "docker-compose.yml").read_text())
    assert all(f"| `{variable}` |" in page for variable in variables)


# --- Dockerfile ---------------------------------------------------------------------------------------------


def test_the_image_holds_the_tested_pins_and_every_package() -> None:
    steps = dockerfile()
    installs = [
        command for step, text in steps if step == "RUN" for command in commands_of(text) if "pip" in command
    ]
    assert installs
    assert all("-c constraints.txt" in " ".join(command) for command in installs)
    copied = {text.split()[0] for step, text in steps if step == "COPY"}
    packages = {
        pattern.rstrip("*") for pattern in PROJECT["tool"]["setuptools"]["packages"]["find"]["include"]
    }
    assert packages <= copied
    allowed = (ROOT / ".dockerignore").read_text().splitlines()
    for step, text in steps:
        if step == "COPY":
            assert {f"!{source}" for source in text.split()[:-1]} <= set(allowed)


def test_the_image_is_pinned_and_runs_as_nobody_in_particular() -> None:
    steps = dockerfile()
    assert re.fullmatch(r"python:3\.\d+\.\d+-slim-\w+", dict(steps)["FROM"])
    assert steps[-1] == ("USER", "residency")
    assert any(
        "useradd --uid 10001" in text and "-o residency" in text for step, text in steps if step == "RUN"
    )
