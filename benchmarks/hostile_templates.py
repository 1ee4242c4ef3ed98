"""What a hostile chat template costs others: the API's latency while one is imported, over that when idle.

`python benchmarks/hostile_templates.py [--rounds 9] [--requests 500] [--out FILE]` starts its own service.
Idle and importing rounds take turns, with one request at a time.
"""

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.stack import Stack, start_stack, wait_for  # noqa: E402
from tests.tiny import build_model  # noqa: E402
from tests.trainers.importing.hostile import TEMPLATES  # noqa: E402
from trainers.models.chat_template import TemplateRefused, check_chat_template  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = measure(Path(folder), rounds=options.rounds, requests=options.requests)
    text = json.dumps(result, indent=2)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")


def measure(folder: Path, *, rounds: int, requests: int) -> dict[str, Any]:
    """Refusal times of every hostile template, and latencies with and without an import of the worst."""
    load = os.getloadavg()[0]  # what others do to the machine meanwhile
    refusals = {name: time_refusal(template) for name, template in TEMPLATES.items()}
    build_model(folder / "good")
    hostile = Path(shutil.copytree(folder / "good", folder / "hostile"))
    (hostile / "chat_template.jinja").write_text(TEMPLATES["nested range"])
    stack = start_stack(folder / "home", import_dirs=[folder])
    pairs: list[tuple[list[float], list[float]]] = []
    try:
        with stack.http() as client:
            ask(client, n=requests)  # warm up
            for number in range(rounds):
                idle = ask(client, n=requests)
                importing = ask_during_import(stack, client, source=hostile, model_id=f"hostile-{number}")
                pairs.append((idle, importing))
                sys.stderr.write(f"round {number}: {len(importing)} requests during the import\n")
    finally:
        stack.stop()
    return {
        "benchmark": "hostile_templates",
        "date": datetime.now(UTC).date().isoformat(),
        "machine": {"cpus": os.cpu_count(), "load_before": round(load, 2)},
        "refusal_s": {
            "median": round(statistics.median(refusals.values()), 3),
            "max": max(refusals.values()),
            "by_template": refusals,
        },
        "requests": [sum(len(pair[which]) for pair in pairs) for which in (0, 1)],
        "p50": describe_ratios(pairs, percent=50),
        "p99": describe_ratios(pairs, percent=99),
    }


def time_refusal(template: str) -> float:
    """Seconds until the check has refused `template`."""
    started = time.perf_counter()
    try:
        check_chat_template(template, special_tokens={})
    except TemplateRefused:
        return round(time.perf_counter() - started, 3)
    raise AssertionError("a hostile template passed")


def ask(client: httpx.Client, *, n: int, until: Callable[[], bool] = lambda: False) -> list[float]:
    """Latencies in milliseconds of up to `n` requests, one after the other, until `until` holds."""
    latencies = []
    while len(latencies) < n and not until():
        started = time.perf_counter()
        assert client.get("/models").status_code == 200
        latencies.append(1000 * (time.perf_counter() - started))
    return latencies


def ask_during_import(stack: Stack, client: httpx.Client, *, source: Path, model_id: str) -> list[float]:
    """Latencies from the moment when the importer's process is there until the model is refused."""
    log = stack.home / "models"
    before = set(log.glob("base-*.log"))
    answer = client.post("/models/import", json={"id": model_id, "source": str(source)})
    assert answer.status_code == 200, answer.text
    wait_for(lambda: set(log.glob("base-*.log")) - before, within_s=30, what="the importer", every_s=0.005)
    latencies: list[float] = []
    while (model := client.get(f"/models/{model_id}").json())["status"] == "importing":
        latencies += ask(client, n=20)
    assert model["error"]["code"] == "bad_chat_template", model
    return latencies


def describe_ratios(pairs: list[tuple[list[float], list[float]]], *, percent: int) -> dict[str, Any]:
    """A percentile in ms while idle and while importing, and the second over the first, by round."""
    both = [[statistics.quantiles(rows, n=100)[percent - 1] for rows in pair] for pair in pairs]
    ratios = sorted(round(busy / quiet, 2) for quiet, busy in both)
    return {
        "idle_ms": round(statistics.median(quiet for quiet, _ in both), 2),
        "importing_ms": round(statistics.median(busy for _, busy in both), 2),
        "ratio": {"median": statistics.median(ratios), "min": ratios[0], "max": ratios[-1]},
    }


if __name__ == "__main__":
    main()
