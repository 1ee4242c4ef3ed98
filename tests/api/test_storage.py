"""Storage, as admins of the host see it: every file once, in its place."""

import os
import shutil
import time
from pathlib import Path

import pytest

from api import storage


def put(path: Path, n_bytes: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x" * n_bytes)
    return path


@pytest.fixture
def home(settings) -> Path:
    """A home with something in every place."""
    home = settings.home_dir
    put(settings.blobs_dir / "org" / "aa" / "aa", 1)
    put(settings.blobs_dir / "incoming" / "b", 2)
    put(settings.cache_dir / "tokenized" / "c" / "data", 40)
    weights = put(settings.models_dir / "base" / "model.safetensors", 800)
    os.link(weights, settings.models_dir / "base" / "again.safetensors")
    put(settings.runs_dir / "ftjob-1" / "1" / "checkpoints" / "step-1" / "adapter", 16_000)
    os.symlink(weights, settings.runs_dir / "ftjob-1" / "link")
    put(home / "logs" / "api.log", 320_000)
    return home


def test_admins_of_the_host_see_what_takes_up_the_disk(client, home, as_admin):
    begun = int(time.time())
    seen = client.get("/v1/storage", headers=as_admin).json()
    disk = shutil.disk_usage(home)
    assert abs(seen.pop("free_bytes") - disk.free) < disk.total / 10
    assert begun <= seen.pop("measured_at") <= time.time()
    link_bytes = (home / "runs" / "ftjob-1" / "link").lstat().st_size
    assert seen == {
        "object": "storage",
        "files_bytes": 3,
        "prepared_bytes": 40,
        "models_bytes": 800,
        "runs_bytes": 16_000 + link_bytes,
        "other_bytes": 320_000,
        "total_bytes": disk.total,
    }


def test_it_is_measured_anew_only_after_some_seconds(client, home, as_admin, monkeypatch):
    def models_bytes() -> int:
        return client.get("/v1/storage", headers=as_admin).json()["models_bytes"]

    assert models_bytes() == 800
    put(home / "models" / "another", 8)
    assert models_bytes() == 800
    monkeypatch.setattr(storage, "_KEPT_S", 0.0)
    assert models_bytes() == 808


def test_what_is_not_there_takes_up_nothing(client, as_admin):
    seen = client.get("/v1/storage", headers=as_admin).json()
    assert {name: seen[name] for name in ("files_bytes", "models_bytes", "runs_bytes")} == {
        "files_bytes": 0,
        "models_bytes": 0,
        "runs_bytes": 0,
    }


def test_users_and_other_organisations_do_not(client, as_stranger):
    for headers in ({}, as_stranger):
        answer = client.get("/v1/storage", headers=headers)
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "insufficient_permissions")
