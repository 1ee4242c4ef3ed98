"""Fixtures that the trainer tests share."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import build_tokenizer, chat_rows
from trainers.specs import Layout


@pytest.fixture
def write_jsonl(tmp_path: Path) -> Callable[..., Path]:
    """Writes rows (dicts, or raw strings and bytes as they are) to a file, one a line."""

    def write(rows: list, *, name: str = "train") -> Path:
        lines = [
            row if isinstance(row, bytes) else (row if isinstance(row, str) else json.dumps(row)).encode()
            for row in rows
        ]
        path = tmp_path / name
        path.write_bytes(b"".join(line + b"\n" for line in lines))
        return path

    return write


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def make_run(tmp_path: Path, tiny_model: Path, cache_dir: Path) -> Callable[..., Path]:
    """Writes the spec.json of a run of the tiny model and returns its RUN_DIR."""
    from trainers.specs import RunSpec, parse_method, resolve, write_method

    def make(
        name: str = "1",
        *,
        method: str = "supervised",
        rows: list | None = None,
        valid_rows: list | None = None,
        n_valid: int = 6,
        layout: Layout | None = None,
        nproc: int = 1,
        resume_roots: tuple[Path, ...] = (),
        model_dir: Path = tiny_model,
        **hyperparameters: object,
    ) -> Path:
        run_dir = tmp_path / "runs" / name
        run_dir.mkdir(parents=True)
        rows = chat_rows(22) if rows is None else rows
        train, valid = run_dir / "train", run_dir / "valid"
        train.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
        valid_rows = chat_rows(40 + n_valid)[40:] if valid_rows is None else valid_rows
        valid.write_text(
            "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in valid_rows)
        )
        wanted = {
            "batch_size": 4,
            "n_epochs": 2,
            "dtype": "float32",
            "save_steps": 4,
            "eval_steps": 4,
            "eval_prompts": [],  # answering costs more than training the tiny model
            "max_validation_overlap": 1,  # whether a test learns is what most ask
        }
        asked = parse_method(write_method(method, wanted | hyperparameters), None)
        spec = RunSpec(
            job_id="ftjob-test",
            attempt=int(name) if name.isdigit() else 1,
            method=method,
            hyperparameters=resolve(asked, n_examples=len(rows), seed=3, nproc_per_node=nproc),
            seed=3,
            resources={"nproc_per_node": nproc},  # pyright: ignore[reportArgumentType]
            model_dir=model_dir,
            model_id="tiny",
            train_file=train,
            train_layout=layout or Layout(),
            validation_layout=layout or Layout(),
            validation_file=valid if n_valid else None,
            cache_dir=cache_dir,
            resume_roots=list(resume_roots),
        )
        (run_dir / "spec.json").write_text(spec.model_dump_json())
        return run_dir

    return make


@pytest.fixture(scope="session")
def reward_run(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `run`, a run of our own reward method on the tiny model, and `merged`, what it made."""
    from tests.trainers.judged import train_reward_model

    return train_reward_model(tiny_model, tmp_path_factory.mktemp("reward"))


@pytest.fixture
def reward_model(tiny_model: Path, tmp_path: Path) -> Path:
    from tests.trainers.judged import make_reward_model

    return make_reward_model(tiny_model, tmp_path / "reward-model")


@pytest.fixture
def make_ppo_run(make_run, reward_model: Path) -> Callable[..., Path]:
    """Writes the spec.json of a short PPO run and returns its RUN_DIR."""
    from tests.trainers.judged import QUESTIONS
    from trainers.folders.artifacts import write_json

    def make(name: str = "1", **settings: Any) -> Path:
        spec_fields = {
            "reward_model_dir": str(settings.pop("reward_model_dir", reward_model)),
            "reward_adapter_dir": settings.pop("reward_adapter_dir", None),
            "reward_model_digest": settings.pop("reward_model_digest", "abc"),
        }
        usual = {
            "batch_size": 8,
            "micro_batch_size": 4,
            "output_max_length": 6,
            "ppo_epochs": 2,
            "learning_rate": 5e-3,
            "warmup_ratio": 0,
            "n_valid": 0,
        }
        rows = settings.pop("rows", QUESTIONS)
        run_dir = make_run(name, method="ppo", rows=rows, **usual | settings)
        spec = json.loads((run_dir / "spec.json").read_text())
        spec.update({k: str(v) if isinstance(v, Path) else v for k, v in spec_fields.items()})
        write_json(run_dir / "spec.json", spec)
        return run_dir

    return make


def read_events(run_dir: Path, kind: str | None = None) -> list[dict]:
    events = [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]
    return [event for event in events if kind is None or event["type"] == kind]


def loss_curve(run_dir: Path) -> dict[int, float]:
    """Training loss by step."""
    return {
        event["step"]: event["data"]["train_loss"]
        for event in read_events(run_dir, "metrics")
        if "train_loss" in event["data"]
    }


@pytest.fixture
def events_of() -> Callable[..., list[dict]]:
    return read_events


@pytest.fixture
def curve_of() -> Callable[[Path], dict[int, float]]:
    return loss_curve


@pytest.fixture
def rows_of() -> Callable[[int], list[dict]]:
    return chat_rows


@pytest.fixture
def tokenizer_with(tiny_model: Path, tmp_path: Path) -> Callable[[str | None], Path]:
    """A copy of the tiny model whose tokenizer has another chat template, or none."""

    def copy(chat_template: str | None) -> Path:
        folder = tmp_path / "other-template"
        shutil.copytree(tiny_model, folder)
        (folder / "chat_template.jinja").unlink()
        build_tokenizer(folder, chat_template=chat_template)
        return folder

    return copy
