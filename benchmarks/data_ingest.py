"""Training data in: from the first byte of a PUT to a checked file; and prepared data, made and used again.

`python benchmarks/data_ingest.py [--out FILE]` starts its own service, sends 1 GB of conversations as JSON
lines, and waits for the report: hashed, every row checked, exact duplicates counted. Before each round one
thread hashes and decodes the same bytes with nothing to do beside it: `of_decoding` is what part of that
speed the service has. The last thing before a PUT is to write the same bytes to the same disk and to remove
them: a virtual machine may get its memory only when it first touches it, at a tenth of the speed, and this is
not about that. In a round of its own, since looking takes time too, the memory of the processes that see the
bytes. Then `trainers.prepare`'s own functions tokenize rows twice.
"""

import argparse
import hashlib
import json
import os
import random
import statistics
import sys
import tempfile
import threading
import time
from contextlib import nullcontext
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import msgspec
import psutil

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.stack import Stack, start_stack, wait_for  # noqa: E402
from tests.tiny import build_tokenizer  # noqa: E402

WORDS = (
    "aspirin tablet patient rest fever dose morning evening doctor case water blood pressure heart lung "
    "kidney liver cough headache nausea allergy rash swelling infection antibiotic vaccine insulin glucose"
).split()
CHUNK_BYTES = 1 << 20
SAMPLE_S = 0.1
# Processes that see the bytes of an upload, by what stands in their command lines.
WATCHED = {
    "api": "api.server",
    "worker": "-Q cpu",
    "check": "trainers.validate",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--megabytes", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=20_000, help="that are prepared twice")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = folder / "rows.jsonl"
        n_rows = write_rows(rows, n_bytes=options.megabytes * 10**6)
        result: dict[str, Any] = {
            "benchmark": "data_ingest",
            "cpus": len(os.sched_getaffinity(0)),
            "bytes": rows.stat().st_size,
            "rows": n_rows,
            "ingest": ingest(folder, rows, n_rounds=options.rounds),
            "prepare": prepare_twice(folder, n_rows=options.rows, n_rounds=options.rounds),
        }
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


def write_rows(path: Path, *, n_bytes: int) -> int:
    """Conversations of about a kilobyte, the last of each hundred a duplicate of the one before; how many."""
    chance = random.Random(0)  # noqa: S311
    written = count = 0
    with path.open("wb") as file:
        while written < n_bytes:
            said = [" ".join(chance.choices(WORDS, k=n_words)) for n_words in (40, 90)]
            row = {
                "messages": [
                    {"role": "user", "content": f"Case {count}: {said[0]}"},
                    {"role": "assistant", "content": said[1]},
                ]
            }
            line = json.dumps(row).encode() + b"\n"
            for _ in range(2 if count % 100 == 98 else 1):
                written += file.write(line)
                count += 1
    return count


def measure_parts(path: Path) -> dict[str, float]:
    """What the machine does in one thread and nothing else: hash the bytes, and decode each line."""
    decode, digest = msgspec.json.Decoder(dict[str, list[dict[str, str]]]).decode, hashlib.sha256()
    began = time.perf_counter()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    hashed = time.perf_counter()
    with path.open("rb") as file:
        for line in file:
            decode(line)
    decoded = time.perf_counter()
    size = path.stat().st_size / 1e9
    return {"sha256": size / (hashed - began), "msgspec": size / (decoded - hashed)}


def ingest(folder: Path, rows: Path, *, n_rounds: int) -> dict[str, Any]:
    """Seconds and bytes of each round; every round is a service of its own, so that nothing is there yet."""
    size = rows.stat().st_size
    rounds = []
    memory = Memory()
    for n in range(n_rounds + 1):
        alone = measure_parts(rows)
        stack = start_stack(folder / f"home-{n}", import_dirs=[], RESIDENCY_MAX_UPLOAD_BYTES=str(2 * size))
        try:
            with memory if n == n_rounds else nullcontext():
                rounds.append({"alone_gb_per_s": alone} | send(stack, rows))
        finally:
            stack.stop()
        print(json.dumps(rounds[-1]), flush=True)
    watched = rounds.pop()
    speeds = [size / one["total_s"] / 1e9 for one in rounds]
    decoding = [one["alone_gb_per_s"]["msgspec"] for one in rounds]
    return {
        "gb_per_s": spread(speeds),
        "of_decoding": spread([speed / alone for speed, alone in zip(speeds, decoding, strict=True)]),
        "rounds": rounds,
        "watched": watched | {"growth_bytes": memory.growth()},
    }


def send(stack: Stack, rows: Path) -> dict[str, Any]:
    """One upload until its report is there."""
    with stack.http() as http:
        warm = http.put(
            "/files?filename=a.jsonl&purpose=fine-tune", content=b'{"prompt": "a", "completion": "b"}\n'
        )
        assert warm.status_code == 200, warm.text
        wait_for(lambda: checked(http, warm.json()["id"]), within_s=60, what="the first check")
        written = write_alone(rows, stack.home)
        began = time.perf_counter()
        file_id = put(stack, rows)
        sent_s = time.perf_counter() - began
        file = wait_for(lambda: checked(http, file_id), within_s=120, what="the check", every_s=0.05)
        total_s = time.perf_counter() - began
        report = http.get(f"/files/{file_id}/report").json()
    assert file
    assert file["status"] == "processed", file
    assert report["duplicates"]["count"] == report["rows"] // 100, report["duplicates"]["count"]
    return {"written_gb_per_s": written, "sent_s": sent_s, "total_s": total_s}


def write_alone(path: Path, folder: Path) -> float:
    """GB/s of one thread that writes the same bytes to disk, and has them there; they are removed again."""
    copy = folder / "copy"
    began = time.perf_counter()
    with path.open("rb") as source, copy.open("wb") as target:
        while chunk := source.read(CHUNK_BYTES):
            target.write(chunk)
        target.flush()
        os.fsync(target.fileno())
    took_s = time.perf_counter() - began
    copy.unlink()
    return path.stat().st_size / took_s / 1e9


def put(stack: Stack, path: Path) -> str:
    """Upload a file with as little work for the client as there can be; the file's id."""
    client = HTTPConnection("127.0.0.1", stack.port, blocksize=CHUNK_BYTES)
    headers = {"Authorization": f"Bearer {stack.key}", "Content-Length": str(path.stat().st_size)}
    with path.open("rb") as file:
        client.request("PUT", "/v1/files?filename=rows.jsonl&purpose=fine-tune", body=file, headers=headers)
        answer = client.getresponse()
        made = json.loads(answer.read())
    client.close()
    assert answer.status == 200, made
    return str(made["id"])


def checked(http: Any, file_id: str) -> dict[str, Any] | None:
    """The file, once it is checked."""
    file = http.get(f"/files/{file_id}").json()
    return file if file["status"] != "uploaded" else None


class Memory:
    """Looks at the resident memory of the processes that see the bytes while it is entered."""

    def __enter__(self) -> "Memory":
        self._first: dict[int, tuple[str, int]] = {}
        self._peak: dict[int, int] = {}
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._done.set()
        self._thread.join()

    def growth(self) -> dict[str, int]:
        """By kind of process, how much the one that grew most did; of a part of a check, over its parent."""
        grown: dict[str, int] = {}
        for pid, (kind, first) in self._first.items():
            grown[kind] = max(grown.get(kind, 0), self._peak[pid] - first)
        return grown

    def _watch(self) -> None:
        while not self._done.wait(SAMPLE_S):
            for process in psutil.process_iter():
                try:
                    line = " ".join(process.cmdline())
                    kind = next((kind for kind, part in WATCHED.items() if part in line), None)
                    if kind is None:
                        continue
                    memory = process.memory_info()
                    used = memory.rss - memory.shared
                except psutil.Error:
                    continue
                self._first.setdefault(process.pid, (kind, used))
                self._peak[process.pid] = max(self._peak.get(process.pid, 0), used)


def prepare_twice(folder: Path, *, n_rows: int, n_rounds: int) -> dict[str, Any]:
    """Seconds of a first and of a second use of the same prepared data, imports left out."""
    from transformers import AutoTokenizer

    from trainers.folders.events import Events
    from trainers.prepare import encode_file
    from trainers.specs import Layout, RunSpec, parse_method, resolve
    from trainers.tokens.inputs import InputFile

    model_dir = folder / "model"
    build_tokenizer(model_dir)
    source = folder / "prepare.jsonl"
    write_rows(source, n_bytes=n_rows * 950)
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    rounds = []
    for n in range(n_rounds):
        spec = RunSpec(
            job_id="bench",
            attempt=1,
            method="supervised",
            hyperparameters=resolve(parse_method(None, None), n_examples=n_rows, seed=0),
            seed=0,
            model_dir=model_dir,
            model_id="tiny",
            train_file=source,
            cache_dir=folder / f"cache-{n}",
        )
        times = []
        for _ in range(2):
            began = time.perf_counter()
            encode_file(InputFile(source, Layout()), tokenizer, spec=spec, events=Events(None))
            times.append(time.perf_counter() - began)
        rounds.append({"first_s": times[0], "second_s": times[1]})
    return {
        "bytes": source.stat().st_size,
        "times_faster": spread([one["first_s"] / one["second_s"] for one in rounds]),
        "rounds": rounds,
    }


def spread(values: list[float]) -> dict[str, float]:
    """Median and range."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


if __name__ == "__main__":
    main()
