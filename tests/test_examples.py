"""The examples are what they say: every stage of the pipeline may be asked for, and learns from its files."""

from pathlib import Path

import pytest
import yaml

from trainers.rows.files import RowError, Rows
from trainers.specs import METHODS, Layout, parse_method

EXAMPLES = Path(__file__).parents[1] / "examples"
STAGES = yaml.safe_load((EXAMPLES / "pipeline.yaml").read_text())["stages"]


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage["name"])
def test_a_stage_of_the_example_fits_its_files(stage: dict) -> None:
    names = [found["name"] for found in STAGES]
    kind = stage["method"]["type"]
    given = stage["method"][kind]["hyperparameters"]
    if "reward_model" in given:
        assert given["reward_model"]["stage"] in names
        given = given | {"reward_model": "judge"}
    parse_method({"type": kind, kind: {"hyperparameters": given}}, None)
    assert stage["model"] == "smollm2-135m-instruct" or stage["model"]["stage"] in names
    for key in ("training_file", "validation_file"):
        rows = Rows(EXAMPLES / stage[key], Layout.of(stage[key]))
        found = list(rows)
        assert len(found) >= 4
        assert not [row for row in found if isinstance(row, RowError)]
        assert METHODS[kind].takes(rows.kind)
