"""What each token adds to the text, and the bytes of those that hold only a part of a character."""

import re
from typing import Any

from trainers.tokens.text_stream import Detokenizer

_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


def describe_tokens(tokenizer: Any, ids: list[int]) -> list[dict[str, Any]]:
    """[{"id", "text"}] whose texts, joined, are the decoded whole, special tokens included.

    A character that several tokens share is the text of the last of them; each has its `bytes` in hex, where
    the vocabulary tells them.
    """
    stream = Detokenizer(tokenizer, skip_special_tokens=False)
    described: list[dict[str, Any]] = []
    begun = 0  # the first token of which no text has come yet
    for position, token_id in enumerate(ids):
        text = stream.push([token_id], last=position == len(ids) - 1)
        described.append({"id": token_id, "text": text})
        if text:
            _tell_bytes(tokenizer, described[begun:])
            begun = position + 1
    return described


def _tell_bytes(tokenizer: Any, sharing: list[dict[str, Any]]) -> None:
    spelled = [tokenizer.convert_ids_to_tokens(token["id"]) for token in sharing]
    found = [_read_bytes(text) for text in spelled]
    if all(found) and (len(sharing) > 1 or sharing[-1]["text"].endswith("\ufffd")):
        for token, data in zip(sharing, found, strict=True):
            token["bytes"] = data.hex(" ")


def _read_bytes(spelled: str) -> bytes:
    """The bytes that a token stands for; none where its spelling does not tell."""
    if single := _BYTE_TOKEN.fullmatch(spelled):
        return bytes.fromhex(single[1])
    return bytes(_ALPHABET[char] for char in spelled) if _ALPHABET.keys() >= set(spelled) else b""


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's letters for bytes: those that can be printed stand for themselves, the others from 256 on."""
    printed = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printed]
    return {chr(byte): byte for byte in printed} | {chr(0x100 + n): byte for n, byte in enumerate(others)}


_ALPHABET = _byte_alphabet()
