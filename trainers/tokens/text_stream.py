"""Token ids to text, piece by piece: whole characters only, cut at stop strings (no torch)."""

from typing import Any

_REPLACEMENT = "\ufffd"  # what an unfinished UTF-8 character decodes to
_UNFINISHED_LIMIT_TOKENS = 16  # a character has at most 4 bytes; beyond, the bytes are simply no text
_WINDOW_TOKENS = 32
_CONTEXT_TOKENS = 8


class Detokenizer:
    """Decodes a growing list of tokens, always only a window of it, so a long answer costs linear time."""

    def __init__(self, tokenizer: Any, *, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._window: list[int] = []
        self._emitted_chars = 0
        self._unfinished_tokens = 0

    def push(self, token_ids: list[int], *, last: bool = False) -> str:
        """The text that became certain. With `last`, everything that is left."""
        self._window += token_ids
        text = self._decode()
        if not last and text.endswith(_REPLACEMENT):
            self._unfinished_tokens += len(token_ids)
            if self._unfinished_tokens <= _UNFINISHED_LIMIT_TOKENS:
                return ""
            text = text[:-1]
        else:
            self._unfinished_tokens = 0
        new = text[self._emitted_chars :]
        self._emitted_chars = max(self._emitted_chars, len(text))
        if self._unfinished_tokens == 0 and len(self._window) > _WINDOW_TOKENS:
            # The kept tokens give the next ones their context: some tokenizers drop a leading space.
            self._window = self._window[-_CONTEXT_TOKENS:]
            self._emitted_chars = len(self._decode())
        return new

    def _decode(self) -> str:
        return self._tokenizer.decode(
            self._window,
            skip_special_tokens=self._skip_special_tokens,
            clean_up_tokenization_spaces=False,
        )


class StopFilter:
    """Passes text on up to the first stop string, holding back what may become one."""

    def __init__(self, stops: list[str]) -> None:
        self._stops = stops
        self._held = ""
        self.stopped = False

    def push(self, text: str, *, last: bool = False) -> str:
        """The text that may be shown. Sets `stopped` when a stop string was found."""
        self._held += text
        found = [place for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            keep, self._held = self._held[: min(found)], ""
            return keep
        hold = 0 if last else self._count_held_chars()
        split = len(self._held) - hold
        keep, self._held = self._held[:split], self._held[split:]
        return keep

    def _count_held_chars(self) -> int:
        """Length of the longest end of the text that is the beginning of a stop string."""
        longest = max((len(stop) for stop in self._stops), default=0)
        for length in range(min(longest - 1, len(self._held)), 0, -1):
            tail = self._held[-length:]
            if any(stop.startswith(tail) for stop in self._stops):
                return length
        return 0
