"""Graders: rules that give an answer a number, as OpenAI's reinforcement jobs write them, and one more.

Their texts may hold `{{item.key}}`, a value of the training row, and `{{sample.output_text}}`, the answer.
"""

import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import re2
from pydantic import BeforeValidator, Field, TypeAdapter, ValidationError

from trainers.specs.faults import SpecError
from trainers.specs.fields import Strict

_REFERENCE = re.compile(r"\{\{([^{}]*)\}\}")
_ITEM = re.compile(r"item((?:\.[^.{}\s]+)+)")
ANSWER = "sample.output_text"

Name = Annotated[str, Field(min_length=1, max_length=256)]
Template = Annotated[str, Field(min_length=1, max_length=20_000)]


class StringCheck(Strict):
    """1 where two texts agree, else 0. `like`: the reference is in the input; `ilike`: in any case."""

    type: Literal["string_check"]
    name: Name = "string_check"
    input: Template
    reference: Template
    operation: Literal["eq", "ne", "like", "ilike"]


class TextSimilarity(Strict):
    """How alike two texts are, between 0 and 1."""

    type: Literal["text_similarity"]
    name: Name = "text_similarity"
    input: Template
    reference: Template
    evaluation_metric: Literal[
        "fuzzy_match", "bleu", "gleu", "rouge_1", "rouge_2", "rouge_3", "rouge_4", "rouge_5", "rouge_l"
    ]


class RegexMatch(Strict):
    """1 where a regular expression is found in the input, else 0. In RE2's syntax: no pattern takes long."""

    type: Literal["regex"]
    name: Name = "regex"
    input: Template = f"{{{{{ANSWER}}}}}"
    pattern: Annotated[str, Field(min_length=1, max_length=2_000)]


class MissingItem(ValueError):
    """A row lacks a value that the grader reads."""


Grader = StringCheck | TextSimilarity | RegexMatch
_GRADERS: TypeAdapter[Grader] = TypeAdapter(Annotated[Grader, Field(discriminator="type")])


def load_grader(config: dict[str, Any]) -> Grader:
    """A grader that read_grader has let pass."""
    return _GRADERS.validate_python(config)


def find_references(text: str) -> list[str]:
    """What is written between double braces, in order."""
    return [found.strip() for found in _REFERENCE.findall(text)]


def fill_references(text: str, values: dict[str, str]) -> str:
    """The text with a value in place of each reference."""
    return _REFERENCE.sub(lambda found: values[found[1].strip()], text)


def compile_pattern(pattern: str) -> Any:
    """A pattern that is ready to be searched for. Raises re2.error."""
    options = re2.Options()
    options.log_errors = False  # they are told to whoever asked
    return re2.compile(pattern, options)


def grader_schema() -> dict[str, Any]:
    """JSON schema of a grader."""
    return _GRADERS.json_schema()


def read_grader(value: Any) -> Any:
    """The value of `grader`, complete and checked. The `param` of a SpecError is inside it."""
    if value is None:
        return None
    if not isinstance(value, dict):
        raise SpecError("must be an object")
    try:
        grader = _GRADERS.validate_python(value)
    except ValidationError as error:
        raise _first_problem(error) from None
    for field, text in _templates(grader):
        for reference in find_references(text):
            if reference != ANSWER and not _ITEM.fullmatch(reference):
                raise SpecError(
                    f"{{{{{reference}}}}} is unknown: there are {{{{{ANSWER}}}}} and {{{{item.KEY}}}}",
                    param=field,
                )
    if not any(ANSWER in find_references(text) for _, text in _templates(grader)):
        raise SpecError(f"it never looks at the answer, {{{{{ANSWER}}}}}", param="input")
    if isinstance(grader, RegexMatch):
        try:
            compile_pattern(grader.pattern)
        except re2.error as error:
            problem = error.args[0].decode() if isinstance(error.args[0], bytes) else error
            raise SpecError(f"is no regular expression of RE2: {problem}", param="pattern") from None
    return grader.model_dump()


def read_items(row: dict[str, Any], grader: Grader) -> dict[str, str]:
    """What a grader reads of a row, by the reference that names it. Raises MissingItem."""
    return {".".join(["item", *path]): _follow(row, path) for path in _item_paths(grader)}


def _item_paths(grader: Grader) -> list[list[str]]:
    """Where in a row the values are that a grader reads, as keys from the outside in."""
    found = {match for _, text in _templates(grader) for match in find_references(text) if match != ANSWER}
    return [reference.split(".")[1:] for reference in sorted(found)]


def _follow(row: dict[str, Any], path: list[str]) -> str:
    value: Any = row
    for key in path:
        if not isinstance(value, dict) or key not in value:
            raise MissingItem(f"the grader reads {'.'.join(['item', *path])}, which this row does not have")
        value = value[key]
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise MissingItem(f"{'.'.join(['item', *path])} must be a text or a number for the grader")
    return str(value)


def _templates(grader: Grader) -> Iterator[tuple[str, str]]:
    yield "input", grader.input
    if not isinstance(grader, RegexMatch):
        yield "reference", grader.reference


def _first_problem(error: ValidationError) -> SpecError:
    problem = error.errors(include_url=False)[0]
    # The first part names the kind of grader, unless that is what is wrong.
    field = str(problem["loc"][-1]) if problem["loc"] else "type"
    message = {"extra_forbidden": "is not a field of this grader", "missing": "is missing"}
    return SpecError(message.get(problem["type"], problem["msg"]), param=field)


GraderConfig = Annotated[dict[str, Any] | None, BeforeValidator(read_grader)]
