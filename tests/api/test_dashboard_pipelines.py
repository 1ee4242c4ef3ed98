"""How the dashboard reads pipelines as YAML, finds the place of a mistake, and arranges stages."""

from typing import Any

import pytest

from api.dashboard import pipeline_text
from api.dashboard.pipeline_graph import arrange
from api.dashboard.pipeline_text import Misfit

TEXT = """\
name: two
stages:
  - name: pt
    model: base
    training_file: rows.jsonl
    method: {type: supervised}
  - name: sft
    model: {stage: pt}
    training_files:
      - {file: file-1, weight: 1}
      - file: more.jsonl
"""


def test_names_of_files_become_ids_and_all_else_stays() -> None:
    text = pipeline_text.read(TEXT)
    first, second = pipeline_text.name_files(text, {"rows.jsonl": "file-9", "more.jsonl": "file-8"})["stages"]
    assert first == {
        "name": "pt",
        "model": "base",
        "training_file": "file-9",
        "method": {"type": "supervised"},
    }
    assert second["training_files"] == [{"file": "file-1", "weight": 1}, {"file": "file-8"}]


def test_a_file_that_is_nowhere_is_told_at_its_line() -> None:
    with pytest.raises(Misfit, match=r"'more\.jsonl'") as raised:
        pipeline_text.name_files(pipeline_text.read(TEXT), {"rows.jsonl": "file-9"})
    assert (raised.value.line, raised.value.where) == (11, "stage sft, training_files.1.file")


@pytest.mark.parametrize(
    ("param", "line", "where"),
    [
        ("stages.1.model.stage", 8, "stage sft, model.stage"),
        ("stages.0.method.supervised.hyperparameters", 6, "stage pt, method.supervised.hyperparameters"),
        ("stages.7.model", 2, "stage 8, model"),
        ("name", 1, "name"),
        (None, None, ""),
    ],
)
def test_what_the_api_says_of_a_value_is_found_in_the_text(
    param: str | None, line: int | None, where: str
) -> None:
    misfit = pipeline_text.read(TEXT).misfit("wrong", param)
    assert (misfit.line, misfit.where) == (line, where)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", None),
        ("- a\n", None),
        ("name: x\nstages: [", 2),
        ("name: [", 1),
        ("a: &a [1]\nb: *a\n", 2),
        ("a: !!python/name:os.system\n", 1),
        ("a: " + "[" * 90_000, 1),
        ("a: " + "x" * 300_000, None),
    ],
)
def test_what_is_no_pipeline_is_told(text: str, line: int | None) -> None:
    with pytest.raises(Misfit) as raised:
        pipeline_text.read(text)
    assert raised.value.line == line


def test_the_example_is_a_pipeline() -> None:
    text = pipeline_text.read(pipeline_text.EXAMPLE.format(model="tiny"))
    assert [stage["model"] for stage in text.pipeline["stages"]] == ["tiny", {"stage": "pt"}]


def stage_of(name: str, model: str, *, made: str | None = None) -> dict[str, Any]:
    return {"name": name, "job_id": f"ftjob-0123-{name:_>8}", "model": model, "fine_tuned_model": made}


def job_of(method: str = "supervised", **hyperparameters: Any) -> dict[str, Any]:
    return {"method": {"type": method, method: {"hyperparameters": hyperparameters}}}


def test_stages_stand_after_what_they_start_from_made_or_not() -> None:
    stages = [
        stage_of("rl", "ft:base:default::_____sft"),
        stage_of("rm", "ft:base:default::_____sft"),
        stage_of("sft", "ft:base:default::older"),
        stage_of("pt", "base", made="ft:base:default::older"),
    ]
    jobs = {stage["job_id"]: job_of() for stage in stages}
    jobs[stages[0]["job_id"]] = job_of("ppo", reward_model="ft:base:default::______rm")
    found = {node.stage["name"]: (node.level, node.lane, node.needs) for node in arrange(stages, jobs)}
    assert found == {
        "pt": (0, 0, {}),
        "sft": (1, 0, {"model": "pt"}),
        "rm": (2, 0, {"model": "sft"}),
        "rl": (3, 0, {"model": "sft", "reward_model": "rm"}),
    }


def test_stages_of_one_level_lie_below_each_other() -> None:
    stages = [stage_of("a", "base"), stage_of("b", "base"), stage_of("c", "ft:base:default::_______b")]
    nodes = arrange(stages, {stage["job_id"]: job_of() for stage in stages})
    assert [(node.stage["name"], node.level, node.lane) for node in nodes] == [
        ("a", 0, 0),
        ("b", 0, 1),
        ("c", 1, 0),
    ]
