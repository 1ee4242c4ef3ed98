"""The tokenizer of a run: the model's own, with new tokens or a chat template where the job wants them."""

import json
import os
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from trainers.folders.cache import digest_tokenizer, name_entry, published
from trainers.folders.events import Events
from trainers.folders.exits import DataError
from trainers.models import vocabulary
from trainers.rows.files import RowError
from trainers.rows.formats import Document
from trainers.specs import METHODS, RunSpec
from trainers.tokens.conversations import load_tokenizer
from trainers.tokens.inputs import InputFile

TEMPLATES_DIR = Path(__file__).with_name("templates")


def obtain_tokenizer(train: list[InputFile], *, spec: RunSpec, events: Events) -> Any:
    """What rows are encoded with, what is trained with and what is kept with the result.

    Its `name_or_path` is the folder it is in: the model's, or one in the cache. Raises DataError.
    """
    settings = spec.settings()
    template, new_tokens = (getattr(settings, name, None) for name in ("chat_template", "new_tokens"))
    needs_template = METHODS[spec.method].learns_from != "document" and not template
    tokenizer = load_tokenizer(spec.model_dir, for_chat=needs_template)
    if new_tokens:
        folder = _extend(tokenizer, train, count=new_tokens, cache_dir=spec.cache_dir, events=events)
        return load_tokenizer(folder, for_chat=False)
    if template:
        folder = _give_template(tokenizer, template, cache_dir=spec.cache_dir)
        return load_tokenizer(folder)
    return tokenizer


def read_template(name: str, tokenizer: Any) -> str:
    """The named chat template, whose turns end with a token that the tokenizer has.

    Where the family's own end of turn is not among its tokens, the end-of-text token takes its place: a turn
    that ends with several ordinary tokens would not end a generation.
    """
    text = (TEMPLATES_DIR / f"{name}.jinja").read_text()
    first, rest = text.split("\n", 1)
    end_of_turn = first.split("'")[1] if "'" in first else None
    if end_of_turn is not None and end_of_turn not in tokenizer.get_vocab():
        first = "{%- set end_of_turn = eos_token -%}"
    if "eos_token" in first and tokenizer.eos_token is None:
        raise DataError(f"the model's tokenizer has no token that could end a turn of the {name} template")
    return f"{first}\n{rest}"


def _give_template(tokenizer: Any, name: str, *, cache_dir: Path) -> Path:
    tokenizer.chat_template = read_template(name, tokenizer)
    key = name_entry(
        tokenizer=digest_tokenizer(Path(tokenizer.name_or_path)), chat_template=tokenizer.chat_template
    )
    folder = cache_dir / "tokenizers" / key
    if not folder.is_dir():
        with published(folder) as work:
            tokenizer.save_pretrained(work)
    os.utime(folder)
    return folder


def _extend(tokenizer: Any, train: list[InputFile], *, count: int, cache_dir: Path, events: Events) -> Path:
    key = name_entry(
        files=[file.name_facts() for file in train],
        tokenizer=digest_tokenizer(Path(tokenizer.name_or_path)),
        new_tokens=count,
    )
    folder = cache_dir / "tokenizers" / key
    hit = folder.is_dir()
    if not hit:
        tokens = vocabulary.learn_tokens(tokenizer, chain.from_iterable(map(_texts, train)), count=count)
        if not tokens:
            raise DataError("nothing occurs twice in the training file: there are no new tokens to learn")
        with published(folder) as work:
            vocabulary.save_extended(tokenizer, tokens, work)
    os.utime(folder)
    learnt = json.loads((folder / vocabulary.PIECES_FILE).read_bytes())
    events.message(
        f"{len(learnt)} new tokens" + (" (already learnt)" if hit else ""),
        level="info" if len(learnt) == count else "warn",
        code="vocabulary_extended",
        new_tokens=len(learnt),
        asked=count,
    )
    return folder


def report_compression(tokenizer: Any, rows_file: Path, *, events: Events) -> None:
    """Tells how many tokens the encoded text takes, and how many it took before there were new ones.

    rows_file: Arrow stream with a column `input_ids`. A tokenizer without new tokens is passed over.
    """
    import pyarrow

    path = Path(tokenizer.name_or_path) / vocabulary.PIECES_FILE
    if not path.is_file():
        return
    n_pieces = {int(token_id): len(pieces) for token_id, pieces in json.loads(path.read_bytes()).items()}
    before = after = 0
    with rows_file.open("rb") as file, pyarrow.ipc.open_stream(file) as stream:
        for batch in stream:
            for found in batch.column("input_ids").flatten().value_counts().to_pylist():
                after += found["counts"]
                before += found["counts"] * n_pieces.get(found["values"], 1)
    events.message(
        f"The text takes {after} tokens, {before} without the new ones",
        code="vocabulary_compression",
        tokens_before=before,
        tokens_after=after,
    )


def _texts(source: InputFile) -> Iterator[str]:
    for row in source.read()[1]:
        if isinstance(row, RowError) and not source.passes_over(row):
            raise source.fault(row)
        if isinstance(row, Document):
            yield row.text
