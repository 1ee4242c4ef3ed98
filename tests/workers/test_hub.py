"""Models and data from a hub: a real server that speaks its language, the worker's code, real children."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from db import files, registry
from db.models import File, Model
from db.sources import HubSource
from tests.db.world import World
from tests.hub import COMMIT, Hub, serve_hub
from tests.tiny import chat_rows
from tests.trainers.importing import hostile
from workers import datasets, importing
from workers.hub import hide_token
from workers.settings import WorkerSettings

TOKEN = "hf_canary_7d1c0a"
CARD = """---
configs:
- config_name: good
  default: true
  data_files:
  - split: train
    path: good/train.jsonl
  - split: test
    path: good/test.jsonl
- config_name: here
  data_files: "{here}"
- config_name: elsewhere
  data_files: "{elsewhere}"
---
"""


@pytest.fixture
def database(sqlite_database: Any) -> Any:
    return sqlite_database


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serve_hub() as hub:
        yield hub


@pytest.fixture
def settings(world: World, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> WorkerSettings:
    """What the environment of a worker would be."""
    monkeypatch.setenv("RESIDENCY_HOME", str(world.home))
    monkeypatch.setenv("RESIDENCY_REDIS_URL", "redis+socket:///nonexistent/residency.sock")
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return WorkerSettings(hub=True, heartbeat_s=0.2)


@pytest.fixture
def import_model(world: World, settings: WorkerSettings) -> Any:
    def run(source: str, *, base_id: str | None = None) -> Model:
        with world.database.write() as session:
            model = registry.start_import(
                session, org_id=world.org_id, model_id="new", source=source, base_id=base_id
            )
        importing.run(world.database, world.take("cpu"), settings)
        with world.database.read() as session:
            found = session.get_one(Model, model.pk)
        assert TOKEN not in everything_in(world.home), "the token is on disk"
        assert list((world.home / "scratch").iterdir()) == []
        return found

    return run


@pytest.fixture
def import_file(world: World, settings: WorkerSettings) -> Any:
    def run(
        repo: str,
        *,
        config: str | None = None,
        split: str = "train",
        said: dict[str, Any] | None = None,
        **changes: Any,
    ) -> File:
        source = HubSource(repo, config=config, split=split)
        with world.database.write() as session:
            file_id = files.start_import(session, org_id=world.org_id, source=source, **(said or {})).id
        datasets.check(world.database, world.take("cpu"), settings.model_copy(update=changes))
        with world.database.read() as session:
            found = session.get_one(File, file_id)
        assert TOKEN not in everything_in(world.home), "the token is on disk"
        assert list((world.home / "scratch").iterdir()) == []
        return found

    return run


def everything_in(folder: Path) -> str:
    texts = [path.read_bytes() for path in folder.rglob("*") if path.is_file()]
    return b"\n".join(texts).decode(errors="replace")


def jsonl(rows: list[dict]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def test_a_model_is_fetched_at_one_commit(tiny_model: Path, hub: Hub, import_model: Any) -> None:
    repo = hub.add_model("org/tiny", tiny_model)
    repo.files |= {"pytorch_model.bin": b"pickle", "onnx/model.onnx": b"onnx", "README.md": b"# Tiny"}
    model = import_model("hf://org/tiny@v1")
    assert (model.status, model.error) == ("ready", None)
    assert model.details is not None
    assert model.details["revision"] == COMMIT
    names = {path.name for path in Path(str(model.path)).iterdir()}
    assert names == {path.name for path in tiny_model.iterdir()}
    fetched = [request for request in hub.requests if "/resolve/" in request]
    assert all(f"/resolve/{COMMIT}/" in request for request in fetched)
    assert not [request for request in fetched if "bin" in request or "onnx" in request]
    assert f"Bearer {TOKEN}" in hub.tokens


def test_an_adapter_is_fetched_and_merged(
    tiny_model: Path, hub: Hub, world: World, import_model: Any, tmp_path: Path
) -> None:
    from tests.trainers.test_merge import write_adapter

    write_adapter(tmp_path / "adapter", base=tiny_model, scale=0.1)
    hostile.edit_json(tmp_path / "adapter" / "adapter_config.json", base_model_name_or_path="org/tiny")
    hub.add_model("org/adapter", tmp_path / "adapter")
    world.add_model("local", path=str(tiny_model), source="hf://org/tiny@main", root_id="local")
    model = import_model("hf://org/adapter", base_id="local")
    assert (model.status, model.error) == ("ready", None)
    assert (model.kind, model.public, model.parent_id, model.root_id) == ("merged", False, "local", "local")


def test_an_adapter_for_another_base(
    tiny_model: Path, hub: Hub, world: World, import_model: Any, tmp_path: Path
) -> None:
    from tests.trainers.test_merge import write_adapter

    write_adapter(tmp_path / "adapter", base=tiny_model, scale=0.1)
    hostile.edit_json(tmp_path / "adapter" / "adapter_config.json", base_model_name_or_path="org/another")
    hub.add_model("org/adapter", tmp_path / "adapter")
    world.add_model("local", path=str(tiny_model), source="hf://org/tiny@main", root_id="local")
    model = import_model("hf://org/adapter", base_id="local")
    assert (model.error or {})["code"] == "wrong_base"


@pytest.mark.parametrize(
    ("source", "code"),
    [
        ("hf://org/none", "hub_not_found"),
        ("hf://org/tiny@nowhere", "hub_not_found"),
        ("hf://org/gated", "hub_gated"),
        ("hf://org/pickled", "unsafe_weights"),
        ("hf://org/empty", "no_safetensors"),
        ("hf://org/coded", "remote_code"),
    ],
)
def test_models_that_cannot_be_had(
    source: str, code: str, tiny_model: Path, hub: Hub, import_model: Any, world: World
) -> None:
    hub.add_model("org/tiny", tiny_model)
    hub.add_model("org/gated", tiny_model, gated=True)
    hub.add("models/org/pickled", {"config.json": b"{}", "pytorch_model.bin": b"x"})
    hub.add("models/org/empty", {"config.json": b"{}"})
    coded = hub.add_model("org/coded", tiny_model)
    config = json.loads(coded.files["config.json"]) | {"auto_map": {"AutoConfig": "evil.Evil"}}
    coded.files["config.json"] = json.dumps(config).encode()
    model = import_model(source)
    assert (model.status, (model.error or {})["code"]) == ("failed", code)
    assert TOKEN not in json.dumps(model.error)
    with world.database.read() as session, pytest.raises(ValueError, match=f"failed: .*{code}"):
        registry.get_ready(session, "new", org_id=world.org_id)


def test_a_hub_that_is_broken_or_away(hub: Hub, import_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.broken = True
    assert import_model("hf://org/tiny").error["code"] == "hub_unreachable"
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert import_model("hf://org/tiny").error["code"] == "hub_unreachable"


def test_a_worker_without_hub_asks_nobody(hub: Hub, import_model: Any, settings: WorkerSettings) -> None:
    settings.hub = False
    assert import_model("hf://org/tiny").error["code"] == "hub_disabled"
    assert hub.requests == []


@pytest.fixture
def data(hub: Hub, tmp_path: Path) -> Hub:
    """`org/data`, whose description also lists what is none of its business."""
    (tmp_path / "secret.jsonl").write_bytes(jsonl(chat_rows(3)))
    hub.add("datasets/org/other", {"rows.jsonl": jsonl(chat_rows(3))})
    elsewhere = f"{hub.url}/datasets/org/other/resolve/main/rows.jsonl"
    card = CARD.format(here=tmp_path / "secret.jsonl", elsewhere=elsewhere)
    files = {"good/train.jsonl": jsonl(chat_rows(20)), "good/test.jsonl": jsonl(chat_rows(25)[20:])}
    loader = b"raise SystemExit('code of a data set ran')"
    hub.add("datasets/org/data", files | {"README.md": card.encode(), "loader.py": loader})
    return hub


@pytest.mark.usefixtures("data")
def test_data_is_fetched_as_jsonl_and_checked(import_file: Any, world: World) -> None:
    file = import_file("org/data")
    assert (file.status, file.status_details, file.rows) == ("processed", None, 20)
    assert file.source == "hf://org/data@main?split=train"
    stored = world.blobs_dir / world.org_id / file.sha256[:2] / file.sha256
    assert stored.stat().st_size == file.bytes
    assert [json.loads(line) for line in stored.read_text().splitlines()] == chat_rows(20)


@pytest.mark.usefixtures("data")
def test_a_config_and_a_split(import_file: Any) -> None:
    file = import_file("org/data", config="good", split="test")
    assert (file.status, file.rows) == ("processed", 5)
    assert file.source == "hf://org/data@main?config=good&split=test"


def test_keys_that_only_some_rows_have(hub: Hub, import_file: Any, world: World, tmp_path: Path) -> None:
    """Tables give every row every column; nulls that nobody wrote must not reach the check."""
    import pyarrow
    import pyarrow.parquet

    rows = chat_rows(2)
    message = {"role": pyarrow.string(), "content": pyarrow.string(), "tool_calls": pyarrow.string()}
    kinds = pyarrow.schema({"messages": pyarrow.list_(pyarrow.struct(message)), "id": pyarrow.string()})
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, kinds), tmp_path / "a.parquet")
    hub.add("datasets/org/data", {"train.parquet": (tmp_path / "a.parquet").read_bytes()})
    file = import_file("org/data")
    assert (file.status, file.status_details) == ("processed", None)
    stored = world.blobs_dir / world.org_id / file.sha256[:2] / file.sha256
    assert [json.loads(line) for line in stored.read_text().splitlines()] == rows


def test_what_a_broken_download_printed_is_told_without_the_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert hide_token(f"exit status 1: Bearer {TOKEN}\n") == "exit status 1: Bearer (token)\n"
    monkeypatch.delenv("HF_TOKEN")
    assert hide_token("exit status 1") == "exit status 1"


def test_parquet(hub: Hub, import_file: Any, tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"prompt": ["a", "b"], "completion": ["c", "d"]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    hub.add("datasets/org/data", {"data/train-0.parquet": (tmp_path / "a.parquet").read_bytes()})
    file = import_file("org/data")
    assert (file.status, file.rows) == ("processed", 2)


def test_rows_that_are_wrong_are_named(hub: Hub, import_file: Any) -> None:
    hub.add("datasets/org/data", {"train.jsonl": jsonl([*chat_rows(2), {"messages": []}])})
    file = import_file("org/data")
    assert (file.status, file.bytes > 0) == ("error", True)
    assert str(file.status_details).startswith("Line 3: ")


def test_csv(hub: Hub, import_file: Any) -> None:
    hub.add("datasets/org/data", {"train.csv": b"instruction,output\nWhy?,So.\nAnd?,\n"})
    file = import_file("org/data")
    assert (file.status, file.rows) == ("error", 1)
    assert file.status_details == "Line 2: 'output' is missing"


def test_rows_are_read_as_the_importer_said(hub: Hub, import_file: Any) -> None:
    hub.add("datasets/org/data", {"train.csv": b"Frage,Antwort\nWhy?,So.\nAnd?,\nWho?,You.\n"})
    columns = {"prompt": "Frage", "completion": "Antwort"}
    said = {"format": "prompt_completion", "column_map": columns, "max_invalid_fraction": 0.4}
    file = import_file("org/data", said=said)
    assert (file.status, file.status_details, file.rows) == ("processed", None, 2)


@pytest.mark.parametrize(
    ("repo", "options", "code"),
    [
        ("org/none", {}, "hub_not_found"),
        ("org/gated", {}, "hub_gated"),
        ("org/data", {"config": "none"}, "unsupported_data"),
        ("org/data", {"split": "none"}, "unsupported_data"),
        ("org/data", {"config": "here"}, "unsupported_data"),
        ("org/data", {"config": "elsewhere"}, "unsupported_data"),
        ("org/data", {"max_upload_bytes": 1000}, "file_too_large"),
        ("org/script", {}, "unsupported_data"),
        ("org/text", {}, "unsupported_data"),
        ("org/pickle", {}, "hub_not_found"),
        ("org/damaged", {}, "unsupported_data"),
        ("org/data", {"hub": False}, "hub_disabled"),
    ],
)
def test_data_that_cannot_be_had(
    repo: str, options: dict[str, Any], code: str, data: Hub, import_file: Any, world: World
) -> None:
    data.add("datasets/org/gated", {"train.jsonl": b"{}"}, gated=True)
    data.add("datasets/org/script", {"script.py": b"raise SystemExit", "train.csv": b"a\n1\n"})
    data.add("datasets/org/text", {"train.txt": b"Hello."})
    data.add("datasets/org/pickle", {"train.pkl": b"cos\nsystem\n(S'true'\ntR."})
    data.add("datasets/org/damaged", {"train.parquet": b"PAR1" + bytes(40) + b"PAR1"})
    file = import_file(repo, **options)
    assert (file.status, file.sha256, file.bytes) == ("error", "", 0)
    assert str(file.status_details).endswith(f"({code})"), file.status_details
    assert TOKEN not in str(file.status_details)
    assert world.task(file.id, "validate").status == "closed"
    world.delete_file(file.id)


def test_a_job_waits_for_the_bytes_and_fails_without_them(world: World, settings: WorkerSettings) -> None:
    with world.database.write() as session:
        source = HubSource("org/none", split="train")
        file_id = files.start_import(session, org_id=world.org_id, source=source).id
    job = world.add_job(file_id)
    assert job.status == "validating_files"
    datasets.check(world.database, world.take("cpu"), settings)
    after = world.job(job.id)
    assert (after.status, (after.error or {})["code"]) == ("failed", "invalid_training_file")
    assert "hub_not_found" in (after.error or {})["message"]
