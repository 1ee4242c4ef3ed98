"""Pipelines as YAML: read, files found by their names, and where in the text something is wrong."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

_MOST_CHARS = 100_000
_MOST_NESTED = 30
_SINGLE = ("training_file", "validation_file")
EXAMPLE = """\
# Two trainings, the second from what the first makes.
name: medical
stages:
  - name: pt
    model: {model}
    training_file: medical_text.txt
    method:
      type: pretraining
      pretraining:
        hyperparameters:
          block_size: 128
          max_steps: 6
          learning_rate: 5.0e-4
  - name: sft
    model: {{stage: pt}}
    training_file: medical_qa_train.jsonl
    validation_file: medical_qa_heldout.jsonl
    method:
      type: supervised
      supervised:
        hyperparameters:
          max_length: 160
          batch_size: 2
          max_steps: 12
          learning_rate: 1.0e-3
"""


class Misfit(Exception):
    """What is wrong with a text, and the line, from 1, where that is known."""

    def __init__(self, message: str, *, line: int | None = None, where: str = "") -> None:
        super().__init__(message)
        self.line, self.where = line, where


@dataclass
class Text:
    """A pipeline with its text, which tells where in it each value stands."""

    pipeline: dict[str, Any]
    root: yaml.Node

    def misfit(self, message: str, param: str | None) -> Misfit:
        """What the API says of the value at `param` (`stages.1.method.type`), as a place in the text."""
        line, where = self._locate(param or "")
        return Misfit(message, line=line, where=where)

    def _locate(self, param: str) -> tuple[int | None, str]:
        node, line, told = self.root, None, []
        parts = [part for part in param.split(".") if part]
        for position, part in enumerate(parts):
            found = _inner(node, part)
            if found is None:  # a value that is missing: the line of what should hold it
                told += parts[position:]
                break
            line, node = found
            told.append(part)
        if len(told) > 1 and told[0] == "stages" and told[1].isdecimal():
            told = [f"stage {self._name_of(int(told[1]))}", ".".join(told[2:])]
        return line, ", ".join(part for part in told if part)

    def _name_of(self, position: int) -> str:
        stages = self.pipeline.get("stages")
        stage = stages[position] if isinstance(stages, list) and position < len(stages) else None
        name = stage.get("name") if isinstance(stage, dict) else None
        return str(name or position + 1)


def _inner(node: yaml.Node, part: str) -> tuple[int, yaml.Node] | None:
    """The line and the value of a member or an item."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if key.value == part:
                return key.start_mark.line + 1, value
    if isinstance(node, yaml.SequenceNode) and part.isdecimal() and int(part) < len(node.value):
        item = node.value[int(part)]
        return item.start_mark.line + 1, item
    return None


def read(text: str) -> Text:
    """The pipeline in a text. Raises `Misfit`."""
    if len(text) > _MOST_CHARS:
        raise Misfit(f"The text has more than {_MOST_CHARS:,} characters.")
    try:
        _check_shape(text)
        pipeline = yaml.safe_load(text)
        root = yaml.compose(text, yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        raise Misfit(f"This is not YAML: {error.problem}.", line=mark.line + 1 if mark else None) from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise Misfit(f"This is not YAML: {error}") from None
    if root is None or not isinstance(pipeline, dict) or not all(isinstance(key, str) for key in pipeline):
        raise Misfit("This is not a pipeline: it must have a name and stages.")
    return Text(pipeline, root)


def _check_shape(text: str) -> None:
    """Refuse what makes a small text a huge value, or takes the parser ages. Raises `Misfit`."""
    depth = 0
    for event in yaml.parse(text, yaml.SafeLoader):
        line = event.start_mark.line + 1
        if isinstance(event, yaml.AliasEvent):
            raise Misfit("Aliases (*name) are not taken here: write the values out.", line=line)
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _MOST_NESTED:
            raise Misfit("Values are nested too deeply here.", line=line)


def name_files(text: Text, ids: Mapping[str, str]) -> dict[str, Any]:
    """The pipeline with ids in place of names of files. Raises `Misfit` for a name that is nowhere."""
    stages = text.pipeline.get("stages")
    if not isinstance(stages, list):
        return text.pipeline  # the server says what is wrong with it
    return text.pipeline | {"stages": [_name(text, stage, i, ids) for i, stage in enumerate(stages)]}


def _name(text: Text, stage: Any, position: int, ids: Mapping[str, str]) -> Any:
    if not isinstance(stage, dict):
        return stage

    def find(named: Any, param: str) -> Any:
        if not isinstance(named, str) or named.startswith("file-"):
            return named
        if named not in ids:
            message = f"No file with the name '{named}' was uploaded. Upload it on the page Data."
            raise text.misfit(message, f"stages.{position}.{param}")
        return ids[named]

    found = {key: find(stage[key], key) for key in _SINGLE if key in stage}
    mixed = stage.get("training_files")
    if isinstance(mixed, list):
        found["training_files"] = [
            part | {"file": find(part["file"], f"training_files.{i}.file")}
            if isinstance(part, dict) and "file" in part
            else part
            for i, part in enumerate(mixed)
        ]
    return stage | found
