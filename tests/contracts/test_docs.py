"""The documentation does what it says: every command of docs/api.md, in order, against the whole service."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.contracts.transcripts import Names, read_steps
from tests.stack import Stack

PAGE = Path(__file__).parents[2] / "docs" / "api.md"


@pytest.mark.long
@pytest.mark.timeout(900)
def test_every_command_of_the_page_does_what_it_shows(
    stack: Stack, tiny_model: Path, chat_file: Path, tmp_path: Path
) -> None:
    stack.import_model(tiny_model, model_id="smollm2")
    shutil.copy(chat_file, tmp_path / "train.jsonl")
    names, shell = Names(), os.environ | {"URL": stack.url, "KEY": stack.key, "no_proxy": "*"}
    steps = list(read_steps(PAGE))
    assert len(steps) > 20
    for step in steps:
        done = subprocess.run(
            ["bash", "-c", names.translate(step.command)],  # noqa: S607
            cwd=tmp_path,
            env=shell,
            capture_output=True,
            text=True,
            timeout=400,
            check=False,
        )
        try:
            assert done.returncode == 0, done.stderr
            names.compare(step.output, done.stdout)
        except (AssertionError, ValueError) as error:
            error.add_note(f"docs/api.md, line {step.line}: {step.command}\n{done.stdout[:3000]}")
            raise
