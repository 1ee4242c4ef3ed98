"""`python -m trainers.prepare RUN_DIR`: tokenizes once into a shared cache, picks the checkpoint to resume.

Needs no GPU. Writes RUN_DIR/prepared.json; a fault in the user's data goes to exit.json and exits 3.
"""

import json
import logging
import os
import random
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainers.artifacts import digest_file, write_json
from trainers.cache import digest_tokenizer, name_entry, published
from trainers.checkpoints import Checkpoint, latest_valid
from trainers.events import Events
from trainers.examples import Encoder, Example
from trainers.exits import BAD_DATA_EXIT, DataError, Outcome, explain, write_exit
from trainers.row_formats import AnyRow
from trainers.rows import RowError, Rows, count_rows
from trainers.specs import METHODS, RunSpec, SpecError, load_run_spec
from trainers.specs.resolution import count_held_out

ROWS_FILE = "rows.arrow"
INFO_FILE = "info.json"
_BATCH_ROWS = 64
_LISTED_LINES = 20
if TYPE_CHECKING:
    from trainers.run_tokenizer import InputFile

log = logging.getLogger("trainers.prepare")


@dataclass
class Counts:
    rows: int = 0
    used: int = 0
    dropped: int = 0  # rows without a token to train on
    dropped_lines: list[int] = field(default_factory=list)  # the first of them
    refused: int = 0  # rows that are wrong and may be left out
    refused_lines: list[int] = field(default_factory=list)  # the first of them
    truncated: int = 0
    blank_lines: int = 0
    tokens: int = 0
    trainable_tokens: int = 0
    longest: int = 0  # tokens of the longest row before truncation


def prepare(run_dir: Path, *, events: Events) -> dict[str, Any]:
    """Writes and returns prepared.json. Raises DataError for what the owner of the data can mend."""
    spec = load_run_spec(run_dir)
    events.phase("preparing")
    # Only now: what is wrong with the spec is told without torch.
    from trainers.eval_prompts import choose_prompts
    from trainers.run_tokenizer import obtain_tokenizer, report_compression

    train, validation = choose_inputs(spec, events=events)
    tokenizer = obtain_tokenizer(train, spec=spec, events=events)
    train_dir, counts, train_hit = encode_file(train, tokenizer, spec=spec, events=events)
    report_compression(tokenizer, train_dir / ROWS_FILE, events=events)
    prepared: dict[str, Any] = {
        "tokenizer": tokenizer.name_or_path,
        "train": str(train_dir),
        "validation": None,
        "counts": asdict(counts),
        "cache_hit": {"train": train_hit},
    }
    if validation:
        folder, validation_counts, hit = encode_file(validation, tokenizer, spec=spec, events=events)
        prepared["validation"] = str(folder)
        prepared["validation_counts"] = asdict(validation_counts)
        prepared["cache_hit"]["validation"] = hit
    prepared["prompts"] = choose_prompts(spec, tokenizer, validation)
    checkpoint = pick_checkpoint(run_dir, spec=spec, events=events)
    prepared["resume_from"] = str(checkpoint.path) if checkpoint else None
    write_json(run_dir / "prepared.json", prepared)
    return prepared


def choose_inputs(spec: RunSpec, *, events: Events) -> tuple["InputFile", "InputFile | None"]:
    """What is trained on, and what is evaluated: another file, or rows held out of it. Raises DataError."""
    from trainers.run_tokenizer import InputFile, Part

    settings = spec.settings()
    train = InputFile(spec.train_file, spec.train_layout, settings.max_train_samples)
    if spec.validation_file:
        return train, InputFile(spec.validation_file, spec.validation_layout, settings.max_eval_samples)
    percentage = settings.validation_split_percentage
    if not percentage:
        return train, None
    n_rows = count_rows(spec.train_file, spec.train_layout)
    n_held_out = count_held_out(n_rows, percentage)
    if n_held_out < 1:
        raise DataError("validation_split_percentage: the training file has too few rows to hold one out")
    # Rows, not what is made of them: neither a document nor a pair of answers is on both sides.
    held_out = frozenset(random.Random(spec.seed).sample(range(n_rows), n_held_out))  # noqa: S311
    events.message(
        f"{n_held_out} of {n_rows} rows are held out for validation",
        code="held_out",
        rows=n_held_out,
        of=n_rows,
    )
    kept = replace(train, part=Part(held_out, is_held_out=False))
    return kept, replace(kept, max_rows=settings.max_eval_samples, part=Part(held_out, is_held_out=True))


def pick_checkpoint(run_dir: Path, *, spec: RunSpec, events: Events) -> Checkpoint | None:
    """The newest valid checkpoint of this and the earlier attempts; the damaged ones are reported."""
    found, corrupt = latest_valid([run_dir / "checkpoints", *spec.resume_roots])
    for broken in corrupt:
        events.message(
            f"checkpoint {broken.path.name} is damaged and is passed over: {broken.problem}",
            level="warn",
            code="checkpoint.corrupt",
            path=str(broken.path),
            problem=broken.problem,
        )
    return found


def encode_file(
    source: "InputFile", tokenizer: Any, *, spec: RunSpec, events: Events
) -> tuple[Path, Counts, bool]:
    """(folder of the encoded file in the cache, its counts, whether it was there already)."""
    settings = spec.settings().model_dump(include=METHODS[spec.method].shaping)
    stops = spec.model_dir / "generation_config.json"
    key = name_entry(
        learns_from=METHODS[spec.method].learns_from,
        **source.name_facts(),
        tokenizer=digest_tokenizer(Path(tokenizer.name_or_path)),
        stops=digest_file(stops) if stops.is_file() else None,
        chat_template=str(tokenizer.chat_template),
        settings=settings,
    )
    folder = spec.cache_dir / "tokenized" / key
    counts = _read_cached(folder)
    hit = counts is not None
    if counts is None:
        counts = _encode_into(folder, source, tokenizer=tokenizer, spec=spec, settings=settings)
    limit = METHODS[spec.method].row_length(spec.settings())
    _report(counts, events=events, limit=limit, path=source.path, hit=hit)
    if counts.used == 0:
        raise DataError(
            f"none of the {counts.rows} rows has a token to train on within max_length {limit}: "
            "raise max_length"
        )
    return folder, counts, hit


def _read_cached(folder: Path) -> Counts | None:
    """The counts of a cached file, or None when it is absent or not whole."""
    try:
        info = json.loads((folder / INFO_FILE).read_bytes())
        if (folder / ROWS_FILE).stat().st_size != info["bytes"]:
            shutil.rmtree(folder)
            return None
    except FileNotFoundError:
        return None
    os.utime(folder)  # its age tells whoever clears the cache what is in use
    return Counts(**info["counts"])


def _encode_into(
    folder: Path, source: "InputFile", *, tokenizer: Any, spec: RunSpec, settings: dict[str, Any]
) -> Counts:
    """Encodes a file beside its place in the cache, then moves it there."""
    encoder = _make_encoder(tokenizer, spec=spec, settings=settings)
    with published(folder) as work:
        counts = _write_rows(work / ROWS_FILE, source, encoder=encoder, method=spec.method)
        info = {"bytes": (work / ROWS_FILE).stat().st_size, "counts": asdict(counts)}
        write_json(work / INFO_FILE, info)
    return counts


def _make_encoder(tokenizer: Any, *, spec: RunSpec, settings: dict[str, Any]) -> Encoder:
    """The encoder of what the method learns from."""
    from trainers.data import ConversationEncoder, find_stop_ids
    from trainers.labelled import LabelledEncoder
    from trainers.packing import PackingEncoder
    from trainers.pairs import PairEncoder
    from trainers.prompts import PromptEncoder

    kind = METHODS[spec.method].learns_from
    if kind == "document":
        return PackingEncoder(tokenizer, **settings)
    if kind == "prompt":
        return PromptEncoder(tokenizer, **settings)
    encoders = {"preference": PairEncoder, "labelled": LabelledEncoder, "conversation": ConversationEncoder}
    return encoders[kind](tokenizer, stop_ids=find_stop_ids(tokenizer, spec.model_dir), **settings)


def _write_rows(target: Path, source: "InputFile", *, encoder: Encoder, method: str) -> Counts:
    import pyarrow

    schema = pyarrow.schema({name: pyarrow.list_(pyarrow.int32()) for name in encoder.columns})
    counts = Counts()
    rows, used = source.read()

    def write(stream: Any, examples: Iterator[Example]) -> None:
        kept = [example for example in examples if _count(example, counts)]
        columns = {name: [example.columns[name] for example in kept] for name in encoder.columns}
        stream.write_table(pyarrow.table(columns, schema=schema))

    with target.open("wb") as file:
        with pyarrow.ipc.new_stream(file, schema) as stream:
            kept_rows = _leave_out(used, source=source, counts=counts)
            for batch in _batches(rows, kept_rows, method=method):
                write(stream, encoder.encode(batch))
            write(stream, encoder.finish())
        file.flush()
        os.fsync(file.fileno())
    counts.blank_lines = rows.blank_lines
    return counts


def _leave_out(used: Iterator[AnyRow | RowError], *, source: "InputFile", counts: Counts) -> Iterator[AnyRow]:
    """The rows that are trained on. The others are counted, where they may be left out, or a DataError."""
    for row in used:
        if not isinstance(row, RowError):
            yield row
            continue
        if not source.passes_over(row):
            raise DataError(f"line {row.line}: {row.message}")
        counts.refused += 1
        if len(counts.refused_lines) < _LISTED_LINES:
            counts.refused_lines.append(row.line)


def _batches(rows: Rows, used: Iterator[AnyRow], *, method: str) -> Iterator[list[AnyRow]]:
    batch: list[AnyRow] = []
    for row in used:
        if not METHODS[method].takes(rows.kind):
            wanted = METHODS[method].learns_from
            raise DataError(
                f"line {row.line}: this is a {rows.kind} row, but {method} learns from {wanted} rows"
            )
        batch.append(row)
        if len(batch) == _BATCH_ROWS:
            yield batch
            batch = []
    if batch:
        yield batch


def _count(example: Example, counts: Counts) -> bool:
    """Adds an example to the counts; False when there is nothing in it to train on."""
    counts.rows += 1
    counts.longest = max(counts.longest, example.full_length)
    counts.truncated += example.was_cut
    if not example.n_trainable:
        counts.dropped += 1
        if len(counts.dropped_lines) < _LISTED_LINES:
            counts.dropped_lines.append(example.line)
        return False
    counts.used += 1
    counts.tokens += example.n_tokens
    counts.trainable_tokens += example.n_trainable
    return True


def _report(counts: Counts, *, events: Events, limit: int, path: Path, hit: bool) -> None:
    events.message(
        f"{counts.used} of {counts.rows} rows, {counts.tokens} tokens, "
        f"{counts.trainable_tokens} of them trained" + (" (already tokenized)" if hit else ""),
        code="prepared",
        file=path.name,
        cache_hit=hit,
        rows=counts.used,
        tokens=counts.tokens,
    )
    if counts.truncated:
        events.message(
            f"{counts.truncated} rows are longer than max_length {limit} and were cut; the longest has "
            f"{counts.longest} tokens",
            level="warn",
            code="rows_truncated",
        )
    if counts.refused:
        events.message(
            f"{counts.refused} rows are wrong and were left out, as max_invalid_fraction allows: "
            f"lines {_list(counts.refused_lines, of=counts.refused)}",
            level="warn",
            code="rows_refused",
            file=path.name,
            rows=counts.refused,
            lines=counts.refused_lines,
        )
    if counts.dropped:
        events.message(
            f"{counts.dropped} rows have no token to train on within max_length {limit} and were left out: "
            f"lines {_list(counts.dropped_lines, of=counts.dropped)}",
            level="warn",
            code="rows_dropped",
            lines=counts.dropped_lines,
        )


def _list(lines: list[int], *, of: int) -> str:
    return ", ".join(map(str, lines)) + (", ..." if of > len(lines) else "")


def main(arguments: list[str]) -> int:
    logging.basicConfig(stream=sys.stderr, level=logging.INFO)
    run_dir = Path(arguments[0]).absolute()
    events = Events(run_dir / "events.jsonl")
    try:
        prepare(run_dir, events=events)
    except (DataError, SpecError) as error:
        events.message(str(error), level="error", code="bad_data")
        write_exit(run_dir, Outcome("bad_data", str(error)))
        log.error("%s", error)
        return BAD_DATA_EXIT
    except Exception as error:  # whatever it is, the supervisor is told the reason; then it is raised
        reason, message = explain(error, run_dir=run_dir)
        write_exit(run_dir, Outcome(reason, message))
        raise
    finally:
        events.close()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
