"""Tokens of a domain: learnt from its text, added to the tokenizer, given rows in the model.

Byte-pair encoding (Sennrich et al. 2016) goes on where the tokenizer's own training ended. The new merges
come after the old ones, so the old tokens keep their ids and other text is encoded as before.
"""

import heapq
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from trainers.folders.exits import DataError

PIECES_FILE = "new_tokens.json"  # of each new token the old ones that it is made of
_MIN_COUNT = 2  # what occurs once is not of the domain
_MAX_TOKEN_CHARS = 32
_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")

Pair = tuple[int, int]


@dataclass(frozen=True)
class NewToken:
    """A token and how it comes about."""

    id: int
    text: str  # as the tokenizer's vocabulary spells it
    left: str
    right: str
    pieces: tuple[int, ...]  # tokens of the old vocabulary


def learn_tokens(tokenizer: Any, texts: Iterable[str], *, count: int) -> list[NewToken]:
    """At most `count` tokens, the most frequent pair first; fewer when nothing else occurs twice.

    The same texts give the same tokens. Raises DataError for a tokenizer that is not byte-pair encoding.
    """
    backend = tokenizer.backend_tokenizer
    model = json.loads(backend.to_str())["model"]
    if model["type"] != "BPE" or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise DataError(
            "new_tokens needs a tokenizer with plain byte-pair encoding, and this model has another one"
        )
    words = Counter(word for text in texts for word in _split_words(backend, text))
    encoded = {word: [token.id for token in backend.model.tokenize(word)] for word in words}
    known = dict(tokenizer.get_vocab())
    spelled = {token_id: text for text, token_id in known.items()}
    # Stand-ins for single bytes, or for what is not known, are not spelled as what they mean.
    fixed = {i for text, i in known.items() if _BYTE_TOKEN.fullmatch(text)} | set(tokenizer.all_special_ids)
    return _merge_most_frequent(
        [(encoded[word], n) for word, n in sorted(words.items())],
        spelled=spelled,
        known=known,
        fixed=fixed,
        count=count,
    )


def _split_words(backend: Any, text: str) -> Iterator[str]:
    if backend.normalizer is not None:
        text = backend.normalizer.normalize_str(text)
    if backend.pre_tokenizer is not None:
        parts = [part for part, _ in backend.pre_tokenizer.pre_tokenize_str(text)]
    else:
        parts = [text]
    for part in parts:  # SentencePiece marks the beginnings of words, and some do not split at them
        yield from re.findall("▁*[^▁]+|▁+", part)


def _merge_most_frequent(
    words: list[tuple[list[int], int]],
    *,
    spelled: dict[int, str],
    known: dict[str, int],
    fixed: set[int],
    count: int,
) -> list[NewToken]:
    counts: Counter[Pair] = Counter()
    where: defaultdict[Pair, set[int]] = defaultdict(set)
    for i, (ids, n) in enumerate(words):
        for pair in pairwise(ids):
            counts[pair] += n
            where[pair].add(i)
    queue = [(-n, spelled[a], spelled[b], (a, b)) for (a, b), n in counts.items()]
    heapq.heapify(queue)
    made: list[NewToken] = []
    pieces: dict[int, tuple[int, ...]] = {token_id: (token_id,) for token_id in spelled}
    next_id = max(known.values()) + 1
    while queue and len(made) < count:
        negative, left, right, pair = heapq.heappop(queue)
        if counts[pair] < _MIN_COUNT or -negative != counts[pair]:
            continue  # rare, or queued again with the count that it has now
        text = left + right
        if text in known or len(text) > _MAX_TOKEN_CHARS or fixed & set(pair):
            continue
        token = NewToken(next_id, text, left, right, pieces[pair[0]] + pieces[pair[1]])
        made.append(token)
        known[text], spelled[next_id], pieces[next_id] = next_id, text, token.pieces
        for touched in _replace(pair, next_id, words=words, counts=counts, where=where):
            heapq.heappush(queue, (-counts[touched], spelled[touched[0]], spelled[touched[1]], touched))
        next_id += 1
    return made


def _replace(
    pair: Pair, new_id: int, *, words: list[tuple[list[int], int]], counts: Counter[Pair], where: Any
) -> set[Pair]:
    """Puts one token in place of the pair in every word; returns the pairs whose counts changed."""
    touched: set[Pair] = set()
    for i in sorted(where.pop(pair)):
        ids, n = words[i]
        for old in pairwise(ids):
            counts[old] -= n
            touched.add(old)
        merged: list[int] = []
        for token_id in ids:
            if merged and (merged[-1], token_id) == pair:
                merged[-1] = new_id
            else:
                merged.append(token_id)
        words[i] = (merged, n)
        for new in pairwise(merged):
            counts[new] += n
            where[new].add(i)
            touched.add(new)
    counts[pair] = 0
    return {found for found in touched if counts[found] > 0}


def save_extended(tokenizer: Any, tokens: list[NewToken], folder: Path) -> Any:
    """Writes the tokenizer with the new tokens into `folder`, and what they are made of; returns it."""
    from transformers import AutoTokenizer

    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer.json"
    stored = json.loads(path.read_bytes())
    model = stored["model"]
    as_lists = not model["merges"] or isinstance(model["merges"][0], list)
    for token in tokens:
        model["vocab"][token.text] = token.id
        merge = [token.left, token.right]
        model["merges"].append(merge if as_lists else " ".join(merge))
    path.write_text(json.dumps(stored, ensure_ascii=False))
    (folder / PIECES_FILE).write_text(json.dumps({token.id: token.pieces for token in tokens}))
    extended = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    there = extended.get_vocab()
    if any(there.get(token.text) != token.id for token in tokens):
        raise DataError("the model's tokenizer cannot be extended: it does not keep the new tokens")
    return extended


def count_rows(tokenizer: Any) -> int:
    """Rows that an embedding needs for every token to have one."""
    return max(tokenizer.get_vocab().values()) + 1


def add_rows(model: Any, tokenizer: Any) -> None:
    """Makes room for every token of the tokenizer. Rows are only ever added: many models have spare ones."""
    needed = count_rows(tokenizer)
    if needed > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(needed, mean_resizing=False)


def place_tokens(model: Any, tokenizer: Any) -> list[str]:
    """Gives each new token the mean of its old pieces, in the embedding and in the head.

    tokenizer: as `save_extended` wrote it; one without new tokens changes nothing. Returns the names of the
    modules that hold the new rows.
    """
    import torch

    path = Path(tokenizer.name_or_path) / PIECES_FILE
    if not path.is_file():
        return []
    add_rows(model, tokenizer)
    pieces = json.loads(path.read_bytes())
    holders = [model.get_input_embeddings()]
    if (head := model.get_output_embeddings()) is not None and head.weight is not holders[0].weight:
        holders.append(head)
    with torch.no_grad():
        for holder in holders:
            for values in (holder.weight, getattr(holder, "bias", None)):
                if values is None:
                    continue
                for token_id, old in pieces.items():
                    values[int(token_id)] = values[old].float().mean(dim=0).to(values.dtype)
    return [
        name.rpartition(".")[2] for name, module in model.named_modules() if any(module is h for h in holders)
    ]
