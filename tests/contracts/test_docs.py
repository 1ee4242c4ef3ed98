"""The documentation does what it says: every command of docs/api.md, in order, against the whole service."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.contracts.transcripts import Names, read_steps
from tests.stack import Stack, start_stack

PAGE = Path(__file__).parents[2] / "docs" / "api.md"


@pytest.fixture
def fresh_stack(tmp_path: Path, tiny_model: Path) -> Iterator[Stack]:
    """A service of its own: the page shows whole lists, where other tests would leave their things too."""
    stack = start_stack(tmp_path / "home", import_dirs=[tiny_model])
    stack.import_model(tiny_model, model_id="smollm2")
    yield stack
    assert stack.stop() == 0


@pytest.mark.long
@pytest.mark.timeout(900)
def test_every_command_of_the_page_does_what_it_shows(
    fresh_stack: Stack, chat_file: Path, tmp_path: Path
) -> None:
    shutil.copy(chat_file, tmp_path / "train.jsonl")
    names = Names()
    shell = os.environ | {"URL": fresh_stack.url, "KEY": fresh_stack.key, "no_proxy": "*"}
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
