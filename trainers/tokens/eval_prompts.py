"""The fixed prompts that a model answers before, during and after its training."""

from collections.abc import Iterator
from itertools import chain, islice
from typing import Any

from transformers import AutoConfig

from trainers.folders.exits import DataError
from trainers.rows.files import RowError
from trainers.rows.formats import AnyRow, Document, Labelled, Pair, Prompt
from trainers.specs import METHODS, RunSpec
from trainers.tokens.inputs import InputFile
from trainers.tokens.prompts import PromptEncoder

_CHOSEN = 3  # of the validation file
_SEARCHED_ROWS = 100
_CHOSEN_LIMIT_TOKENS = 1024
_OPENING_CHARS = 120
_SHOWN_CHARS = 2000


def choose_prompts(spec: RunSpec, tokenizer: Any, validation: list[InputFile]) -> list[dict[str, Any]]:
    """[{"prompt": text as it is shown, "ids": its tokens up to where the answer begins}].

    They are the job's `eval_prompts` or, where it has none, of the first rows of the validation file: the
    conversation up to its last answer, or the opening of a document. A reward model answers nothing.
    Raises DataError for a given prompt that leaves no room for an answer in the model's context.
    """
    settings = spec.settings()
    if spec.method == "reward":
        return []
    config: Any = AutoConfig.from_pretrained(spec.model_dir, local_files_only=True, trust_remote_code=False)
    context = getattr(config.get_text_config(), "max_position_embeddings", None) or 2**31
    room = context - settings.eval_max_tokens
    plain = METHODS[spec.method].learns_from == "document"
    if settings.eval_prompts is None:
        found = chain.from_iterable(map(_read_rows, validation))
        limit, wanted = min(room, _CHOSEN_LIMIT_TOKENS), _CHOSEN
    else:
        found = (_as_asked(text, line=n, plain=plain) for n, text in enumerate(settings.eval_prompts, 1))
        limit, wanted = room, len(settings.eval_prompts)
    encoder = PromptEncoder(tokenizer, max_length=limit)
    chosen: dict[str, list[int]] = {}
    for prompt in islice(found, max(wanted, _SEARCHED_ROWS)):
        if len(chosen) == wanted:
            break
        text = prompt.text if isinstance(prompt, Document) else str(prompt.messages[-1]["content"])
        if isinstance(prompt, Document):
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]  # as packing writes it
        else:
            ids = next(encoder.encode([prompt])).prompt_ids
        if 0 < len(ids) <= limit:
            chosen.setdefault(text[:_SHOWN_CHARS], ids)
        elif settings.eval_prompts is not None:
            raise DataError(
                f"eval_prompts: number {prompt.line} has {len(ids)} tokens; with an answer of "
                f"eval_max_tokens {settings.eval_max_tokens}, the model's context has room for 1 to {room}"
            )
    return [{"prompt": text, "ids": ids} for text, ids in chosen.items()]


def _as_asked(text: str, *, line: int, plain: bool) -> Document | Prompt:
    return Document(line, text) if plain else Prompt(line, [{"role": "user", "content": text}])


def _read_rows(source: InputFile) -> Iterator[Document | Prompt]:
    """Each row up to where the model's own words would begin."""
    for row in source.read()[1]:
        if not isinstance(row, RowError):
            yield _without_answer(row)


def _without_answer(row: AnyRow) -> Document | Prompt:
    if isinstance(row, Document):
        return Document(row.line, _open(row.text))
    if isinstance(row, Pair | Labelled):
        return Prompt(row.line, row.prompt, row.tools)
    return row if isinstance(row, Prompt) else Prompt(row.line, row.messages[:-1], row.tools)


def _open(text: str) -> str:
    """The beginning of a text, at most half of it, cut between words where it has any."""
    opening = text[: min(_OPENING_CHARS, max(1, len(text) // 2))]
    return opening.rpartition(" ")[0].rstrip() or opening
