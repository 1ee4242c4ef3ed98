"""A hub on this machine: as much of the Hub's HTTP interface as its own clients use to read."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

COMMIT = "c0ffee" + "0" * 34


@dataclass
class Repo:
    """A repository at one commit, which `main` and `v1` name."""

    files: dict[str, bytes]
    gated: bool = False
    sha: str = COMMIT

    def knows(self, revision: str) -> bool:
        return revision in ("main", "v1", self.sha)


@dataclass
class Hub:
    """The repositories of a hub by kind and name (`models/org/name`), and what was asked of it."""

    url: str = ""
    repos: dict[str, Repo] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    tokens: set[str] = field(default_factory=set)
    broken: bool = False

    def add_model(self, name: str, folder: Path, **options: Any) -> Repo:
        files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.*")}
        return self.add(f"models/{name}", files, **options)

    def add(self, name: str, files: dict[str, bytes], **options: Any) -> Repo:
        self.repos[name] = Repo(files, **options)
        return self.repos[name]


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.hub.requests.append(f"{self.command} {self.path}")
        self.hub.tokens.add(self.headers.get("authorization", ""))
        url = urlsplit(self.path)
        parts = unquote(url.path).strip("/").split("/")
        if self.hub.broken:
            self._refuse(500, "Broken")
        elif parts[0] == "api" and len(parts) >= 4:
            self._answer_api(f"{parts[1]}/{parts[2]}/{parts[3]}", parts[4:], dict(parse_qsl(url.query)))
        else:
            kind, rest = ("datasets", parts[1:]) if parts[0] == "datasets" else ("models", parts)
            if len(rest) > 4 and rest[2] == "resolve":
                self._send_file(f"{kind}/{rest[0]}/{rest[1]}", rest[3], "/".join(rest[4:]))
            else:
                self._refuse(404, "NotFound")

    do_HEAD = do_POST = do_GET

    def _find(self, name: str, revision: str) -> Repo | None:
        repo = self.hub.repos.get(name)
        if repo is None:
            self._refuse(404 if self.headers.get("authorization") else 401, "RepoNotFound")
        elif repo.gated:
            self._refuse(403, "GatedRepo")
        elif not repo.knows(revision):
            self._refuse(404, "RevisionNotFound")
        else:
            return repo
        return None

    def _answer_api(self, name: str, rest: list[str], query: dict[str, str]) -> None:
        action = rest[0] if rest else "revision"
        repo = self._find(name, rest[1] if len(rest) > 1 else "main")
        if repo is None:
            return
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        if action == "revision":
            siblings = [{"rfilename": path, "size": len(data)} for path, data in repo.files.items()]
            facts = {"id": name.partition("/")[2], "sha": repo.sha, "siblings": siblings}
            self._send_json(facts | {"private": False, "gated": False, "tags": [], "downloads": 0})
        elif action == "tree":
            below = "/".join(rest[2:])
            deep = query.get("recursive", "").lower() in ("true", "1")
            self._send_tree(repo, f"{below}/" if below else "", recursive=deep)
        elif action == "paths-info":
            asked = (
                json.loads(body)["paths"]
                if body.startswith(b"{")
                else [v for _, v in parse_qsl(body.decode())]
            )
            self._send_json([entry for path in asked for entry in _entries(repo, path)])
        else:
            self._refuse(404, "NotFound")

    def _send_tree(self, repo: Repo, below: str, *, recursive: bool) -> None:
        entries: dict[str, Any] = {}
        for path in sorted(repo.files):
            if not path.startswith(below):
                continue
            folder, slash, _ = path.removeprefix(below).partition("/")
            if slash:
                entries[below + folder] = {"type": "directory", "path": below + folder, "oid": "0", "size": 0}
            if not slash or recursive:
                entries[path] = _entries(repo, path)[0]
        if below and not entries:
            self._refuse(404, "EntryNotFound")
        else:
            self._send_json(list(entries.values()))

    def _send_file(self, name: str, revision: str, path: str) -> None:
        repo = self._find(name, revision)
        if repo is None:
            return
        data = repo.files.get(path)
        if data is None:
            self._refuse(404, "EntryNotFound")
            return
        start, end = 0, len(data)
        if (wanted := self.headers.get("range", "")).startswith("bytes="):
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            start, end = int(first), int(last) + 1 if last else len(data)
        self.send_response(206 if wanted else 200)
        self.send_header("etag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("x-repo-commit", repo.sha)
        self.send_header("accept-ranges", "bytes")
        if wanted:
            self.send_header("content-range", f"bytes {start}-{end - 1}/{len(data)}")
        self._finish(data[start:end])

    def _send_json(self, value: Any) -> None:
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self._finish(json.dumps(value).encode())

    def _refuse(self, status: int, code: str) -> None:
        # A careless hub repeats what it was sent.
        said = f"{code}: you sent {self.headers.get('authorization')}"
        self.send_response(status)
        self.send_header("x-error-code", code)
        self.send_header("x-error-message", said)
        self._finish(json.dumps({"error": said}).encode())

    def _finish(self, body: bytes) -> None:
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: ARG002
        return


def _entries(repo: Repo, path: str) -> list[dict[str, Any]]:
    if path in repo.files:
        data = repo.files[path]
        return [{"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}]  # noqa: S324
    if any(name.startswith(f"{path}/") for name in repo.files):
        return [{"type": "directory", "path": path, "oid": "0", "size": 0}]
    return []


@contextmanager
def serve_hub() -> Iterator[Hub]:
    """Run a hub without repositories."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
