"""What a hostile client can put on a wire: the right refusal, in time, and nothing of it left (G18, G19)."""

import json
import re
import socket
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import httpx
import pytest

from api.multipart import FORM_OVERHEAD_BYTES
from db.models import File
from tests.api.test_files import BOUNDARY, form, leftovers, wait_until

IDLE_S = 0.4
MIN_BYTES_PER_S = 2000
RAW = "/v1/files?filename=a.jsonl&purpose=batch"
FORM_TYPE = f"multipart/form-data; boundary={BOUNDARY}"


@pytest.fixture
def settings(settings):
    return settings.model_copy(update={"body_idle_s": IDLE_S, "body_min_bytes_per_s": MIN_BYTES_PER_S})


@pytest.fixture
def address(server) -> tuple[str, int]:
    url = httpx.URL(server)
    return url.host, url.port or 80


@pytest.fixture
def head_of(client, world) -> Callable[..., bytes]:
    """Makes the head of a request to a route that takes bodies."""
    wishes = {"filename": "a.jsonl", "purpose": "batch", "bytes": 150_000}
    upload_id = client.post("/v1/uploads", json=wishes).json()["id"]
    targets = {
        "raw": ("PUT", RAW, "application/octet-stream"),
        "form": ("POST", "/v1/files", FORM_TYPE),
        "part": ("POST", f"/v1/uploads/{upload_id}/parts", FORM_TYPE),
        "json": ("POST", "/v1/uploads", "application/json"),
    }

    def make(route: str, **headers: str) -> bytes:
        method, target, kind = targets[route]
        fields = {"Host": "a", "Authorization": f"Bearer {world.user}", "Content-Type": kind}
        fields |= {name.replace("_", "-"): value for name, value in headers.items()}
        lines = [f"{name}: {value}" for name, value in fields.items()]
        return "\r\n".join([f"{method} {target} HTTP/1.1", *lines, "", ""]).encode()

    return make


def body_of(route: str, content: bytes) -> bytes:
    if route == "form":
        return form(("purpose", None, b"batch"), ("file", "a.jsonl", content))
    if route == "part":
        return form(("data", "blob", content))
    if route == "json":
        return json.dumps({"filename": content.decode(), "purpose": "batch", "bytes": 5}).encode()
    return content


@contextmanager
def connect(address: tuple[str, int]) -> Iterator[socket.socket]:
    with socket.create_connection(address, timeout=10) as connection:
        yield connection


def read_answer(connection: socket.socket) -> tuple[int, dict]:
    """The status and the body of the next answer."""
    stream = connection.makefile("rb")
    status = int(stream.readline().split()[1])
    length = 0
    while (line := stream.readline()) != b"\r\n":
        name, _, value = line.partition(b":")
        length = int(value) if name.lower() == b"content-length" else length
    return status, json.loads(stream.read(length))


def files(world) -> int:
    with world.database.read() as session:
        return session.query(File).count()


@pytest.mark.parametrize("route", ["raw", "form", "part"])
def test_an_endless_chunked_body_is_cut_at_the_limit(address, head_of, world, route, monkeypatch):
    monkeypatch.setattr("api.uploads.PART_MAX_BYTES", world.settings.max_upload_bytes)
    monkeypatch.setattr("api.intake.LOAD_BYTES", 8192)
    chunk = b"%x\r\n%s\r\n" % (8192, b"x" * 8192)
    begun = body_of(route, b"x" * 100)[:-50]  # a form's last line is shorter than that
    most = 0
    with connect(address) as connection:
        connection.sendall(head_of(route, Transfer_Encoding="chunked"))
        connection.sendall(b"%x\r\n%s\r\n" % (len(begun), begun))
        for _ in range(200):  # eight times the limit
            connection.sendall(chunk)
            most = max([most, *(path.stat().st_size for path in leftovers_now(world))])
        status, answer = read_answer(connection)
    assert (status, answer["error"]["type"]) == (413, "invalid_request_error")
    assert most <= world.settings.max_upload_bytes + FORM_OVERHEAD_BYTES
    wait_until(lambda: leftovers(world.settings) == [])
    assert files(world) == 0


def leftovers_now(world) -> list:
    """Like `leftovers`, of files that may go at any moment."""
    return [path for path in leftovers(world.settings) if path.exists()]


@pytest.mark.parametrize(
    ("route", "reset"), [("raw", False), ("form", False), ("part", False), ("raw", True)]
)
def test_a_body_that_breaks_off_leaves_nothing(address, head_of, world, route, reset):
    with connect(address) as connection:
        connection.sendall(head_of(route, Content_Length="150000") + body_of(route, b"x" * 100_000)[:90_000])
        wait_until(lambda: leftovers(world.settings) != [])
        if reset:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    wait_until(lambda: leftovers(world.settings) == [])
    assert files(world) == 0


def test_a_body_longer_than_said_is_cut_there(address, head_of, world):
    head = head_of("raw", Content_Length="5")
    with connect(address) as connection:
        connection.sendall(head + b"12345")
        status, file = read_answer(connection)
        assert (status, file["bytes"]) == (200, 5)
        connection.sendall(b"GARBAGE\r\n\r\n")
        assert connection.recv(4096).startswith(b"HTTP/1.1 400 ")
        assert connection.recv(4096) == b""
    assert [path.read_bytes() for path in leftovers(world.settings)] == [b"12345"]
    with connect(address) as connection:  # all at once: the server hangs up before it has answered
        connection.sendall(head + b"54321GARBAGE\r\n\r\n")
        assert connection.recv(4096).startswith(b"HTTP/1.1 400 ")
        assert connection.recv(4096) == b""
    wait_until(lambda: len(leftovers(world.settings)) == 1)
    assert files(world) == 1


def test_lengths_that_cannot_be_are_refused(address, head_of, world):
    for lies in (
        {"Content_Length": "-1"},
        {"Content_Length": "5, 6"},
        {"Content_Length": "0x5"},
        {"Content_Length": "5", "Transfer_Encoding": "chunked"},
        {"Transfer_Encoding": "gzip, identity"},
        {"Content_Length": "9" * 30},
    ):
        with connect(address) as connection:
            connection.sendall(head_of("raw", **lies) + b"12345")
            assert re.match(rb"HTTP/1\.1 (400|413) ", connection.recv(4096)), lies
    assert leftovers(world.settings) == []
    assert files(world) == 0


def trickle(connection: socket.socket, piece: bytes, *, every_s: float = 0.05, at_most: int = 400) -> bytes:
    """Send `piece` again and again until an answer comes; the answer."""
    connection.settimeout(every_s)
    for _ in range(at_most):
        connection.sendall(piece)
        try:
            return connection.recv(4096)
        except TimeoutError:
            continue
    raise AssertionError("no answer came")


@pytest.mark.parametrize(
    ("route", "chunked"), [("raw", False), ("raw", True), ("form", True), ("part", False), ("json", False)]
)
def test_a_slow_body_is_given_up(address, head_of, world, route, chunked):
    begun = body_of(route, b"x" * 100)[:90]
    head = head_of(route, **({"Transfer_Encoding": "chunked"} if chunked else {"Content_Length": "150000"}))
    began = time.monotonic()
    with connect(address) as connection:
        connection.sendall(head + (b"%x\r\n%s\r\n" % (len(begun), begun) if chunked else begun))
        answer = trickle(connection, b"1\r\nx\r\n" if chunked else b"x")
        assert answer.startswith(b"HTTP/1.1 408 "), answer
        assert b'"code": "request_timeout"' in answer
        connection.settimeout(10)
        assert connection.recv(4096) == b""  # nobody listens any longer
    assert time.monotonic() - began < 5
    wait_until(lambda: leftovers(world.settings) == [])
    assert files(world) == 0


@pytest.mark.parametrize("route", ["raw", "form", "part"])
def test_a_body_that_stands_still_is_given_up_however_fast_it_was(address, head_of, world, route):
    with connect(address) as connection:
        connection.sendall(head_of(route, Content_Length="150000") + body_of(route, b"x" * 120_000)[:110_000])
        status, answer = read_answer(connection)
    assert (status, answer["error"]["code"]) == (408, "request_timeout")
    wait_until(lambda: leftovers(world.settings) == [])


def test_a_body_at_a_fair_rate_may_take_its_time(address, head_of):
    pieces = 30  # of 4000 bytes a second, for three times as long as a body may stand still
    body = b"x" * 200 * pieces
    with connect(address) as connection:
        connection.sendall(head_of("raw", Content_Length=str(len(body))))
        connection.settimeout(0.05)
        for _ in range(pieces - 1):
            connection.sendall(b"x" * 200)
            with pytest.raises(TimeoutError):
                connection.recv(1)
        connection.settimeout(10)
        connection.sendall(b"x" * 200)
        status, file = read_answer(connection)
    assert (status, file["bytes"]) == (200, len(body))


def test_an_answer_that_takes_long_is_not_a_slow_body(client, server, world):
    """The clock stops with the body."""
    body = {"model": world.base_model(), "training_file": world.file()}
    job_id = client.post("/v1/fine_tuning/jobs", json=body).json()["id"]
    with httpx.Client(base_url=server, headers=client.headers, trust_env=False) as remote:
        answer = remote.get(f"/v1/fine_tuning/jobs/{job_id}?wait={2 * IDLE_S}")
    assert (answer.status_code, answer.json()["status"]) == (200, "queued")


def test_no_route_reads_a_body_before_it_knows_the_key(address, client, world):
    asked = 0
    for path, operations in client.app.openapi()["paths"].items():
        for method, operation in operations.items():
            if "requestBody" not in operation:
                continue
            target = re.sub(r"\{\w+\}", "some-id", path)
            for length in ("Content-Length: 1000", "Transfer-Encoding: chunked"):
                for key in ("", "Authorization: Bearer sk-wrong\r\n"):
                    head = f"{method.upper()} {target} HTTP/1.1\r\nHost: a\r\n{key}{length}\r\n"
                    with connect(address) as connection:
                        connection.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode())
                        status, answer = read_answer(connection)
                    assert (status, answer["error"]["code"]) == (401, "invalid_api_key"), (method, path)
            asked += 1
    assert asked >= 10
    assert not world.settings.blobs_dir.exists()


def test_no_name_becomes_a_path_or_a_header(address, head_of, world):
    for name, shown in (
        (b"n" * 4096, "n" * 255),
        (b"../../etc/x", "x"),
        (b"..%2F..%2Fetc%2Fx", "x"),
        (b"a%00b", "ab"),
        (b"%00", "upload"),
        (b"%FF%FE", "\ufffd\ufffd"),
        (b"%0d%0aX-Evil:%201", "X-Evil: 1"),
    ):
        head = head_of("raw", Content_Length="1").replace(b"filename=a.jsonl", b"filename=" + name)
        with connect(address) as connection:
            connection.sendall(head + b"x")
            status, file = read_answer(connection)
            assert (status, file["filename"]) == (200, shown)
            path = f"GET /v1/files/{file['id']}/content"
            connection.sendall(head_of("json").replace(b"POST /v1/uploads", path.encode()))
            answer = connection.recv(4096)
        assert answer.startswith(b"HTTP/1.1 200 ")
        assert b"\r\nx-evil" not in answer.lower()
        assert [path.name for path in leftovers(world.settings)] == [file["sha256"]]


def test_a_raw_nul_in_the_name_of_a_form_is_dropped(address, head_of, world):
    body = body_of("form", b"x").replace(b"a.jsonl", b"a\x00b.jsonl")
    with connect(address) as connection:
        connection.sendall(head_of("form", Content_Length=str(len(body))) + body)
        status, file = read_answer(connection)
    assert (status, file["filename"]) == (200, "ab.jsonl")
    assert [path.name for path in leftovers(world.settings)] == [file["sha256"]]
