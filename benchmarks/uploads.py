"""What uploads cost others (G18): latency of `GET /fine_tuning/jobs`, the API's memory, and bytes a second.

`python benchmarks/uploads.py [--mib 1024] [--clients 100] [--client-mib 50] [--out FILE]` starts a service of
its own. One request at a time is measured while nothing else happens, then during uploads by curl.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import psutil

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.stack import Stack, processes_of, start_stack  # noqa: E402
from tests.tiny import build_model, chat_rows  # noqa: E402

JOBS = 20  # what a page of them holds
IDLE_REQUESTS = 1000
MIB = 1 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mib", type=int, default=1024, help="size of the one large file")
    parser.add_argument("--clients", type=int, default=100, help="uploads at once")
    parser.add_argument("--client-mib", type=int, default=50, help="size of each of those")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = measure(Path(folder), options)
    text = json.dumps(result, indent=2)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")


def measure(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Latencies and rates: when idle, during a raw upload, a form, and many raw ones at once."""
    model, large, small = folder / "model", folder / "large.bin", folder / "small.bin"
    build_model(model)
    for path, mib in ((large, options.mib), (small, options.client_mib)):
        with path.open("wb") as out:
            for _ in range(mib):
                out.write(os.urandom(MIB))
    limit_bytes = max(options.mib, options.client_mib) * MIB
    stack = start_stack(folder / "home", import_dirs=[folder], RESIDENCY_MAX_UPLOAD_BYTES=str(limit_bytes))
    try:
        stack.import_model(model, model_id="tiny")
        make_jobs(stack)
        api = api_process(stack)
        idle = watch(stack, api, until=lambda seen: seen >= IDLE_REQUESTS)
        raw = during(stack, api, [send_raw(stack, large)], sent_bytes=options.mib * MIB)
        form = during(stack, api, [send_form(stack, large)], sent_bytes=options.mib * MIB)
        many = during(
            stack,
            api,
            [send_raw(stack, small)] * options.clients,
            sent_bytes=options.clients * options.client_mib * MIB,
        )
    finally:
        stack.stop()
    return {
        "benchmark": "uploads",
        "date": datetime.now(UTC).date().isoformat(),
        "machine": {"cpus": len(os.sched_getaffinity(0)), "python": sys.version.split()[0]},
        "mib": options.mib,
        "clients": options.clients,
        "client_mib": options.client_mib,
        "idle": idle,
        "raw": raw,
        "form": form,
        "many_raw": many,
        "target": {"p99_ms": 300, "memory_growth_mib": 150},
    }


def make_jobs(stack: Stack) -> None:
    """Jobs to list, all over: none of them competes."""
    rows = "".join(json.dumps(row) + "\n" for row in chat_rows(8)).encode()
    with stack.http() as http:
        asked = {"purpose": "fine-tune"}
        file = http.post("/files", data=asked, files={"file": ("rows.jsonl", rows)}).json()
        for number in range(JOBS):
            body = {"model": "tiny", "training_file": file["id"], "seed": number}
            job = http.post("/fine_tuning/jobs", json=body).json()
            http.post(f"/fine_tuning/jobs/{job['id']}/cancel").raise_for_status()
        while any(job["finished_at"] is None for job in http.get("/fine_tuning/jobs").json()["data"]):
            time.sleep(0.2)


def api_process(stack: Stack) -> psutil.Process:
    """The process that answers."""
    (found,) = [process for process in processes_of(stack.home) if "api.server" in process.cmdline()]
    return found


def send_raw(stack: Stack, path: Path) -> list[str]:
    target = f"{stack.url}/files?filename={path.name}&purpose=user_data"
    return [
        "curl",
        "-sf",
        "--noproxy",
        "*",
        "-H",
        f"Authorization: Bearer {stack.key}",
        "-T",
        str(path),
        target,
    ]


def send_form(stack: Stack, path: Path) -> list[str]:
    head = ["curl", "-sf", "--noproxy", "*", "-H", f"Authorization: Bearer {stack.key}"]
    return [*head, "-F", "purpose=user_data", "-F", f"file=@{path}", f"{stack.url}/files"]


def during(
    stack: Stack, api: psutil.Process, commands: list[list[str]], *, sent_bytes: int
) -> dict[str, Any]:
    """Latencies while `commands` run at once, how fast they were, and how much the API grew."""
    started_s = time.perf_counter()
    running = [subprocess.Popen(command, stdout=subprocess.DEVNULL) for command in commands]
    seen = watch(stack, api, until=lambda _: all(process.poll() is not None for process in running))
    took_s = time.perf_counter() - started_s
    failed = sum(process.returncode != 0 for process in running)
    return {
        **seen,
        "took_s": round(took_s, 2),
        "gb_per_s": round(sent_bytes / took_s / 1e9, 3),
        "failed": failed,
    }


def watch(stack: Stack, api: psutil.Process, *, until: Callable[[int], bool]) -> dict[str, Any]:
    """List jobs again and again: latencies, and the growth of the API's resident memory."""
    before_bytes = most_bytes = api.memory_info().rss
    took_ms: list[float] = []
    with stack.http() as http:
        while not until(len(took_ms)):
            started_s = time.perf_counter()
            answer: httpx.Response = http.get("/fine_tuning/jobs")
            took_ms.append((time.perf_counter() - started_s) * 1000)
            answer.raise_for_status()
            most_bytes = max(most_bytes, api.memory_info().rss)
    cuts = statistics.quantiles(took_ms, n=100, method="inclusive") if len(took_ms) > 1 else took_ms * 99
    return {
        "requests": len(took_ms),
        "p50_ms": round(cuts[49], 2),
        "p99_ms": round(cuts[98], 2),
        "max_ms": round(max(took_ms), 2),
        "memory_growth_mib": round((most_bytes - before_bytes) / MIB, 1),
    }


if __name__ == "__main__":
    main()
