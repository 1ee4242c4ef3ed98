"""Prepared data is seen while it is whole, and goes when no run uses it."""

import json
import os
import time
from pathlib import Path

from db import prepared, upkeep
from db.settings import DatabaseSettings
from tests.db.world import World

DAY_S = 24 * 3600.0


def make_entry(world: World, name: str, *, age_s: float = 0.0, kind: str = "tokenized") -> Path:
    folder = world.home / "cache" / kind / name
    folder.mkdir(parents=True)
    (folder / "rows.arrow").write_bytes(b"r" * 10)
    (folder / "info.json").write_text(json.dumps({"bytes": 10, "counts": {"used": 3, "tokens": 21}}))
    used_at = time.time() - age_s
    os.utime(folder, (used_at, used_at))
    return folder


def collect(world: World) -> None:
    upkeep.run(world.database, DatabaseSettings(home=world.home, prepared_unused_s=7 * DAY_S))


def names(world: World) -> set[str]:
    return {path.name for path in (world.home / "cache").glob("*/*")}


def test_what_is_whole_is_listed_latest_use_first(world: World) -> None:
    make_entry(world, "old", age_s=60)
    new = make_entry(world, "new")
    make_entry(world, "half.x.tmp")
    (make_entry(world, "broken") / "info.json").unlink()
    found = prepared.list_prepared(world.home / "cache")
    assert [one.id for one in found] == ["new", "old"]
    assert (found[0].rows, found[0].tokens) == (3, 21)
    assert found[0].bytes == sum(file.stat().st_size for file in new.iterdir())


def test_what_no_run_has_used_for_long_is_collected(world: World) -> None:
    for kind in ("tokenized", "tokenizers"):
        make_entry(world, f"{kind}-old", age_s=8 * DAY_S, kind=kind)
        make_entry(world, f"{kind}-new", age_s=6 * DAY_S, kind=kind)
    collect(world)
    assert names(world) == {"tokenized-new", "tokenizers-new"}


def test_what_a_running_job_reads_is_kept(world: World) -> None:
    job = world.add_job()
    lease = world.take()
    folders = {part: make_entry(world, part, age_s=30 * DAY_S) for part in ("train", "validation")}
    folders["tokenizer"] = make_entry(world, "tokenizer", age_s=30 * DAY_S, kind="tokenizers")
    run_dir = world.home / "runs" / job.id / str(lease.token)
    run_dir.mkdir(parents=True)
    (run_dir / "prepared.json").write_text(json.dumps({part: str(path) for part, path in folders.items()}))
    collect(world)
    assert names(world) == {"train", "validation", "tokenizer"}
    world.train(lease)
    world.merge(world.take("cpu"))
    collect(world)
    assert names(world) == set()


def test_what_a_killed_trainer_left_is_collected_after_a_day(world: World) -> None:
    make_entry(world, "a.1.tmp", age_s=2 * DAY_S)
    make_entry(world, "b.2.tmp", age_s=DAY_S / 2)
    collect(world)
    assert names(world) == {"b.2.tmp"}
