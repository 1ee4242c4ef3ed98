"""Plain text to blocks of equal length: documents end to end, each closed by a token, nothing lost."""

from collections.abc import Iterator
from typing import Any

from trainers.folders.exits import DataError
from trainers.rows.formats import Document
from trainers.tokens.conversations import make_example
from trainers.tokens.examples import Example


class PackingEncoder:
    """Cuts the stream of all documents into blocks; the last block is as long as what is left.

    Attention is not cut at the ends of documents, as is usual: the end-of-text token tells them apart.
    """

    columns = ("input_ids", "labels")

    def __init__(self, tokenizer: Any, *, block_size: int) -> None:
        if tokenizer.eos_token_id is None:
            raise DataError("the model's tokenizer has no end-of-text token to put between documents")
        self._tokenizer, self._block_size = tokenizer, block_size
        self._held: list[int] = []
        self._line = 0
        self.documents = self.blocks = self.tokens = self.remainder_tokens = 0

    def encode(self, rows: list[Document]) -> Iterator[Example]:
        """The blocks that became full."""
        # No special tokens: some tokenizers put one before each text, some after, some neither.
        encoded = self._tokenizer([row.text for row in rows], add_special_tokens=False)["input_ids"]
        for row, ids in zip(rows, encoded, strict=True):
            self._held += [*ids, self._tokenizer.eos_token_id]
            self._line = row.line
            self.documents += 1
            self.tokens += len(ids) + 1
            while len(self._held) >= self._block_size:
                block, self._held = self._held[: self._block_size], self._held[self._block_size :]
                self.blocks += 1
                yield self._example(block)

    def finish(self) -> Iterator[Example]:
        """The last, shorter block."""
        if self._held:
            self.remainder_tokens = len(self._held)
            yield self._example(self._held)

    def _example(self, block: list[int]) -> Example:
        return make_example(self._line, block, block, len(block))
