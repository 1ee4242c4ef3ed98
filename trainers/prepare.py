"""`python -m trainers.prepare RUN_DIR`: tokenizes once into a shared cache, picks the checkpoint to resume.

Needs no GPU. Writes RUN_DIR/prepared.json; a fault in the user's data goes to exit.json and exits 3.
"""

import logging
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from trainers.folders.artifacts import digest_file, write_json
from trainers.folders.cache import digest_tokenizer, name_entry, published
from trainers.folders.checkpoints import Checkpoint, latest_valid
from trainers.folders.events import Events
from trainers.folders.exits import BAD_DATA_EXIT, DataError, Outcome, write_exit
from trainers.rows.files import RowError, Rows
from trainers.rows.formats import AnyRow, Prompt, Row, RowKind
from trainers.specs import METHODS, RunSpec, SpecError, load_run_spec
from trainers.specs.mixture import Share
from trainers.tokens import mixing, overlap
from trainers.tokens.examples import Encoder, Example
from trainers.tokens.inputs import InputFile, choose_inputs
from trainers.tokens.prepared import INFO_FILE, ROWS_FILE, Counts, add_counts, read_cached

_BATCH_ROWS = 64
_LISTED_LINES = 20
log = logging.getLogger("trainers.prepare")


def prepare(run_dir: Path, *, events: Events) -> dict[str, Any]:
    """Writes and returns prepared.json. Raises DataError for what the owner of the data can mend."""
    spec = load_run_spec(run_dir)
    events.phase("preparing")
    # Only now: what is wrong with the spec is told without torch.
    from trainers.tokens.eval_prompts import choose_prompts
    from trainers.tokens.run_tokenizer import obtain_tokenizer, report_compression

    train, validation = choose_inputs(spec, events=events)
    tokenizer = obtain_tokenizer(train, spec=spec, events=events)
    train_parts = [encode_file(file, tokenizer, spec=spec, events=events) for file in train]
    valid_parts = [encode_file(file, tokenizer, spec=spec, events=events) for file in validation]
    if valid_parts:
        overlap.report_overlap(
            [part.folder for part in train_parts],
            [part.folder for part in valid_parts],
            limit=spec.settings().max_validation_overlap,
            events=events,
        )
    settings = spec.settings()
    train_rows = train_parts[0]
    if spec.mixture:  # also of one file: its share and the limit are not known to its encoding
        limit = settings.max_train_samples
        train_rows = _join(train_parts, spec.mixture, max_rows=limit, spec=spec, events=events)
    report_compression(tokenizer, train_rows.folder / ROWS_FILE, events=events)
    prepared: dict[str, Any] = {
        "tokenizer": tokenizer.name_or_path,
        "train": str(train_rows.folder),
        "validation": None,
        "counts": asdict(train_rows.counts),
        "cache_hit": {"train": train_rows.was_cached},
    }
    if valid_parts:
        once = [Share()] * len(valid_parts)
        valid_rows = valid_parts[0]
        if len(valid_parts) > 1:
            limit = settings.max_eval_samples
            valid_rows = _join(valid_parts, once, max_rows=limit, spec=spec, events=events)
        prepared["validation"] = str(valid_rows.folder)
        prepared["validation_counts"] = asdict(valid_rows.counts)
        prepared["cache_hit"]["validation"] = valid_rows.was_cached
    prepared["prompts"] = choose_prompts(spec, tokenizer, validation)
    checkpoint = pick_checkpoint(run_dir, spec=spec, events=events)
    prepared["resume_from"] = str(checkpoint.path) if checkpoint else None
    write_json(run_dir / "prepared.json", prepared)
    return prepared


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


@dataclass(frozen=True)
class Encoded:
    """A folder of the cache with encoded rows, what was counted of them, whether it was there already."""

    folder: Path
    counts: Counts
    was_cached: bool


def _join(
    parts: list[Encoded], shares: Sequence[Share], *, max_rows: int | None, spec: RunSpec, events: Events
) -> Encoded:
    """The rows of several files, mixed."""
    files = [(part.folder, part.counts) for part in parts]
    folder, taken = mixing.mix(
        files, list(shares), seed=spec.seed, max_rows=max_rows, cache_dir=spec.cache_dir
    )
    events.message(
        f"{sum(taken)} rows of {len(parts)} files: "
        + ", ".join(f"{count} of {part.counts.used}" for count, part in zip(taken, parts, strict=True)),
        code="mixed",
        taken=taken,
        of=[part.counts.used for part in parts],
    )
    counts = replace(add_counts([part.counts for part in parts]), used=sum(taken))
    return Encoded(folder, counts, all(part.was_cached for part in parts))


def encode_file(source: InputFile, tokenizer: Any, *, spec: RunSpec, events: Events) -> Encoded:
    """The file in the cache, encoded now unless it was there. Raises DataError."""
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
    counts = read_cached(folder)
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
    return Encoded(folder, counts, hit)


def _encode_into(
    folder: Path, source: InputFile, *, tokenizer: Any, spec: RunSpec, settings: dict[str, Any]
) -> Counts:
    """Encodes a file beside its place in the cache, then moves it there."""
    encoder = make_encoder(tokenizer, spec=spec, settings=settings)
    with published(folder) as work:
        counts = _write_rows(work / ROWS_FILE, source, encoder=encoder, method=spec.method)
        info = {"bytes": (work / ROWS_FILE).stat().st_size, "counts": asdict(counts)}
        write_json(work / INFO_FILE, info)
    return counts


def make_encoder(tokenizer: Any, *, spec: RunSpec, settings: dict[str, Any]) -> Encoder:
    """The encoder of what the method learns from."""
    from trainers.tokens.conversations import ConversationEncoder, find_stop_ids
    from trainers.tokens.labelled import LabelledEncoder
    from trainers.tokens.packing import PackingEncoder
    from trainers.tokens.pairs import PairEncoder
    from trainers.tokens.prompts import PromptEncoder

    kind = METHODS[spec.method].learns_from
    if kind == "document":
        return PackingEncoder(tokenizer, **settings)
    if kind == "prompt":
        return PromptEncoder(tokenizer, **settings)
    encoders = {"preference": PairEncoder, "labelled": LabelledEncoder, "conversation": ConversationEncoder}
    return encoders[kind](tokenizer, stop_ids=find_stop_ids(tokenizer, spec.model_dir), **settings)


def _write_rows(target: Path, source: InputFile, *, encoder: Encoder, method: str) -> Counts:
    import pyarrow

    schema = pyarrow.schema({name: pyarrow.list_(pyarrow.int32()) for name in encoder.columns})
    counts = Counts()
    rows, used = source.read()
    fingerprints, asks_only = overlap.Fingerprints(), METHODS[method].learns_from == "prompt"

    def write(stream: Any, examples: Iterator[Example]) -> None:
        kept = [example for example in examples if counts.add(example)]
        columns = {name: [example.columns[name] for example in kept] for name in encoder.columns}
        stream.write_table(pyarrow.table(columns, schema=schema))

    with target.open("wb") as file:
        with pyarrow.ipc.new_stream(file, schema) as stream:
            kept_rows = _leave_out(used, source=source, counts=counts)
            for batch in _batches(source, rows, kept_rows, method=method):
                for row in batch:
                    fingerprints.add(_see_as_prompt(row) if asks_only else row)
                write(stream, encoder.encode(batch))
            write(stream, encoder.finish())
        file.flush()
        os.fsync(file.fileno())
    fingerprints.write(target.with_name(overlap.FINGERPRINTS_FILE))
    counts.blank_lines = rows.blank_lines
    return counts


def _see_as_prompt(row: AnyRow) -> AnyRow:
    """A row as methods see it that answer it themselves."""
    from trainers.tokens.prompts import cut_prompt

    return cut_prompt(row, items={}) if isinstance(row, Row | Prompt) else row


def _leave_out(used: Iterator[AnyRow | RowError], *, source: InputFile, counts: Counts) -> Iterator[AnyRow]:
    """The rows that are trained on. The others are counted, where they may be left out, or a DataError."""
    for row in used:
        if not isinstance(row, RowError):
            yield row
        elif source.passes_over(row):
            counts.refuse(row.line)
        else:
            raise source.fault(row)


def _batches(source: InputFile, rows: Rows, used: Iterator[AnyRow], *, method: str) -> Iterator[list[AnyRow]]:
    batch: list[AnyRow] = []
    for row in used:
        check_kind(rows.kind, method=method, where=source.locate(row.line), line=row.line)
        batch.append(row)
        if len(batch) == _BATCH_ROWS:
            yield batch
            batch = []
    if batch:
        yield batch


def check_kind(kind: RowKind | None, *, method: str, where: str, line: int | None = None) -> None:
    """Raises DataError, naming the place, for a row that the method does not learn from."""
    if not METHODS[method].takes(kind):
        wanted = METHODS[method].learns_from
        raise DataError(f"{where}: this is a {kind} row, but {method} learns from {wanted} rows", line=line)


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
        _tell(error, run_dir=run_dir)
        log.error("%s", error)
        return BAD_DATA_EXIT
    except Exception as error:  # whatever it is, the supervisor is told the reason; then it is raised
        _tell(error, run_dir=run_dir)
        raise
    finally:
        events.close()
    return 0


def _tell(error: Exception, *, run_dir: Path) -> None:
    outcome = Outcome("error")
    outcome.blame(error, run_dir=run_dir)
    write_exit(run_dir, outcome)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
