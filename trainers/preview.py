"""`python -m trainers.preview REQUEST.json --report OUT.json`: rows token by token, as training sees them.

What the user can mend is told in the report, under `error`, and the exit status is 0.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

from pydantic import Field, ValidationError

from trainers.folders.artifacts import write_json
from trainers.folders.events import Events
from trainers.folders.exits import ChangedBytes, DataError
from trainers.prepare import check_kind, make_encoder
from trainers.rows.files import RowError, Rows
from trainers.rows.formats import AnyRow
from trainers.specs import METHODS, Layout, RunSpec, SpecError, parse_method, resolve, write_method
from trainers.specs.fields import Strict
from trainers.tokens.examples import Encoder, Example

SHOWN_TOKENS = 4096  # of one text
_FIRST_ROWS = [1, 2, 3]
_BLOCKS_LIMIT_TOKENS = 10_000_000  # that are encoded on the way to a block

Report = dict[str, Any]
Line = Annotated[int, Field(ge=1)]


class Request(Strict):
    """What is to be shown. `hyperparameters` are those of a job; rows count from 1, blank lines left out."""

    model_dir: Path
    file: Path
    sha256: str = ""  # what the file must have, where somebody has said
    layout: Layout = Layout()
    method: str = "supervised"
    hyperparameters: dict[str, Any] = Field(default_factory=dict)
    rows: Annotated[list[Line], Field(min_length=1, max_length=20)] | None = None  # the first three


@dataclass(frozen=True)
class Sight:
    """A file as a method sees it: the encoder that would prepare it for training, and its tokenizer."""

    request: Request
    spec: RunSpec
    tokenizer: Any
    encoder: Encoder
    settings: dict[str, Any]
    notes: list[str]

    @property
    def learns_from(self) -> str:
        """What the rows are to the method."""
        return METHODS[self.spec.method].learns_from

    def read(self) -> Iterator[tuple[int, AnyRow | RowError]]:
        """(number, row) of each row; one that the method cannot learn from is an error."""
        rows = Rows(self.request.file, self.request.layout)
        for row in rows:
            if not isinstance(row, RowError):
                try:
                    check_kind(rows.kind, method=self.spec.method, where=f"line {row.line}")
                except DataError as error:
                    row = RowError(row.line, _without_line(error, row.line))
            yield max(rows.n_rows, 1), row

    def try_encode(self, row: AnyRow) -> list[Example] | RowError:
        """The examples of one row, or why there are none."""
        try:
            return [*self.encoder.encode([row])]
        except DataError as error:
            return RowError(row.line, _without_line(error, row.line))

    def describe(self) -> Report:
        """What every report begins with."""
        return {"method": self.spec.method, "hyperparameters": self.settings, "notes": self.notes}


def open_sight(request: Request, *, cache_dir: Path) -> Sight:
    """The encoder that a job with these hyperparameters would use. Raises SpecError, DataError."""
    from trainers.tokens.inputs import InputFile
    from trainers.tokens.run_tokenizer import obtain_tokenizer

    method = parse_method(write_method(_known(request.method), request.hyperparameters), None)
    # Only what shapes rows: the rest may name what is not here, and changes nothing of what is shown.
    asked = method.hyperparameters.model_dump(include=method.kind.shaping | {"chat_template"})
    shaped = parse_method(write_method(method.type, asked), None)
    spec = RunSpec(
        job_id="preview",
        attempt=1,
        method=method.type,
        hyperparameters=resolve(shaped, n_examples=1, seed=0),
        seed=0,
        model_dir=request.model_dir.absolute(),
        model_id="preview",
        train_file=request.file.absolute(),
        train_layout=request.layout,
        cache_dir=cache_dir.absolute(),
    )
    source = InputFile(spec.train_file, spec.train_layout, sha256=request.sha256)
    if request.sha256:
        source.digest()
    try:
        tokenizer = obtain_tokenizer([source], spec=spec, events=Events(None))
    except OSError as error:
        raise DataError(f"the model's tokenizer cannot be read: {error}") from error
    settings = spec.settings().model_dump(include=method.kind.shaping)
    notes = []
    if getattr(method.hyperparameters, "new_tokens", 0):
        notes.append("new_tokens: tokens that a job would learn from the file are not there yet")
    encoder = make_encoder(tokenizer, spec=spec, settings=settings)
    return Sight(request, spec, tokenizer, encoder, asked, notes)


def preview(sight: Sight) -> Report:
    """The rows that the request asks for. Raises DataError for one that the file does not have."""
    shown = _show_blocks(sight) if sight.learns_from == "document" else _show_rows(sight)
    return sight.describe() | {"rows": shown}


def _show_rows(sight: Sight) -> list[Report]:
    wanted = set(sight.request.rows or _FIRST_ROWS)
    shown: list[Report] = []
    number = 0
    for number, row in sight.read():
        if number in wanted:
            found = row if isinstance(row, RowError) else sight.try_encode(row)
            shown.append(_show(sight, number, row.line, found))
        if number >= max(wanted):
            break
    return _check_all_found(sight, shown, there=number, unit="rows")


def _show_blocks(sight: Sight) -> list[Report]:
    """Documents are packed, so it is blocks that are counted and shown. A line that is
    refused, and that its owner does not tolerate, would end a job.
    """
    wanted = set(sight.request.rows or _FIRST_ROWS)
    if max(wanted) * METHODS[sight.spec.method].row_length(sight.spec.settings()) > _BLOCKS_LIMIT_TOKENS:
        raise DataError(f"blocks that end beyond the first {_BLOCKS_LIMIT_TOKENS} tokens are not shown")
    shown: list[Report] = []
    number = 0
    for number, block in enumerate(_pack(sight), start=1):
        if number in wanted:
            shown.append(_show(sight, number, block.line, [block]))
        if number >= max(wanted):
            break
    return _check_all_found(sight, shown, there=number, unit="blocks")


def _pack(sight: Sight) -> Iterator[Example]:
    for _, row in sight.read():
        if not isinstance(row, RowError):
            yield from sight.encoder.encode([row])
        elif row.ends_file or not sight.request.layout.max_invalid_fraction:
            raise DataError(f"line {row.line}: {row.message}")
    yield from sight.encoder.finish()


def _check_all_found(sight: Sight, shown: list[Report], *, there: int, unit: str) -> list[Report]:
    missing = max(sight.request.rows or [0])
    if missing > there:
        raise SpecError(f"row {missing}: the file has {there} {unit}", param="row")
    return shown


def _show(sight: Sight, number: int, line: int, found: list[Example] | RowError) -> Report:
    """One row. `used`: whether anything of it is trained; `error`: why not."""
    if isinstance(found, RowError):
        return {"row": number, "line": line, "used": False, "error": found.message} | _NOTHING
    used = any(example.n_trainable for example in found)
    limit = METHODS[sight.spec.method].row_length(sight.spec.settings())
    is_prompt = sight.learns_from == "prompt"
    return {
        "row": number,
        "line": line,
        "used": used,
        "error": None if used else f"no token of it can be trained on within max_length {limit}",
        "truncated": any(example.was_cut for example in found),
        "tokens": sum(example.n_tokens for example in found),
        # Of a prompt nothing is: the answers are the model's own.
        "trainable_tokens": 0 if is_prompt else sum(example.n_trainable for example in found),
        "full_tokens": max(example.full_length for example in found),
        "texts": [_describe(sight, *part) for example in found for part in split_parts(example)],
    }


_NOTHING: Report = {"truncated": False, "tokens": 0, "trainable_tokens": 0, "full_tokens": 0, "texts": []}


def split_parts(example: Example) -> Iterator[tuple[str, list[int], list[bool]]]:
    """(name, token ids, which of them are trained) of each text of an example."""
    from trainers.tokens.conversations import IGNORED

    columns = example.columns
    if "labels" in columns:
        yield "text", columns["input_ids"], [label != IGNORED for label in columns["labels"]]
        return
    prompt, is_used = columns["prompt_ids"], example.n_trainable > 0
    answers = {name.removesuffix("_ids"): ids for name, ids in columns.items() if name in _ANSWERS}
    if "label" in columns:
        answers = {"good" if columns["label"][0] else "bad": answers["completion"]}
    for name, answer in answers.items():
        yield name, [*prompt, *answer], [False] * len(prompt) + [is_used] * len(answer)
    if not answers:
        yield "prompt", prompt, [False] * len(prompt)


_ANSWERS = ("chosen_ids", "rejected_ids", "completion_ids")


def _describe(sight: Sight, name: str, ids: list[int], trained: list[bool]) -> Report:
    from trainers.tokens.token_texts import describe_tokens

    tokens = describe_tokens(sight.tokenizer, ids[:SHOWN_TOKENS])
    for token, is_trained in zip(tokens, trained, strict=False):
        token["trained"] = is_trained
    return {
        "name": name,
        "text": "".join(token["text"] for token in tokens),
        "tokens": tokens,
        "tokens_left_out": len(ids) - len(tokens),
    }


def _without_line(error: DataError, line: int) -> str:
    return str(error).removeprefix(f"line {line}: ")


def _known(method: str) -> str:
    if method not in METHODS:
        raise SpecError(
            f"method {method!r} is not available; available: {', '.join(METHODS)}",
            param="method",
            code="unsupported_value",
        )
    return method


def answer(look: Callable[[Sight], Report], arguments: list[str] | None, *, program: str) -> int:
    """Reads a request, looks, and writes the report; what the user can mend goes into it."""
    parser = argparse.ArgumentParser(prog=f"python -m {program}")
    parser.add_argument("request", type=Path, metavar="REQUEST.json")
    parser.add_argument("--report", type=Path, required=True)
    options = parser.parse_args(arguments)
    try:
        request = Request.model_validate_json(options.request.read_bytes())
        with TemporaryDirectory(dir=options.report.absolute().parent) as cache:
            report = look(open_sight(request, cache_dir=Path(cache)))
    except SpecError as error:
        report = {"error": {"code": error.code, "message": error.message, "param": error.param}}
    except ValidationError as error:
        report = {"error": {"code": "invalid_value", "message": str(error), "param": None}}
    except ChangedBytes as error:
        report = {"error": {"code": "content_corrupt", "message": str(error), "param": None}}
    except DataError as error:
        report = {"error": {"code": "invalid_value", "message": str(error), "param": None}}
    write_json(options.report, report)
    return 0


def main(arguments: list[str] | None = None) -> int:
    return answer(preview, arguments, program="trainers.preview")


if __name__ == "__main__":
    sys.exit(main())
