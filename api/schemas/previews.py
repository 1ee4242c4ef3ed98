"""Answers about what a model and a method see in a file."""

from typing import Any, Literal

from pydantic import BaseModel, Field


class TokenObject(BaseModel):
    """A token of a text."""

    id: int
    text: str = Field(description="What it adds to the text; nothing where a later token ends its character.")
    bytes: str | None = Field(
        default=None, description="Its bytes in hex, where several tokens share a character."
    )
    trained: bool = Field(description="Whether the loss is measured on it.")


class TextObject(BaseModel):
    """A text that is trained on."""

    name: str = Field(
        description="`text`, or what it ends with: `chosen`, `rejected`, `good`, `bad`; or `prompt`."
    )
    text: str = Field(description="What the chat template wrote, as far as the tokens are shown.")
    tokens: list[TokenObject]
    tokens_left_out: int = Field(description="Tokens after those that are shown.")


class PreviewRow(BaseModel):
    """A row as training sees it; of plain text, a block of packed documents."""

    row: int = Field(description="Counts from 1; blank lines do not count.")
    line: int = Field(description="Line of the file; of a block, where it ends.")
    used: bool = Field(description="Whether anything of it is trained.")
    error: str | None = Field(description="Why the row is refused or left out.")
    truncated: bool
    tokens: int
    trainable_tokens: int
    full_tokens: int = Field(description="Tokens of its longest text before it was cut.")
    texts: list[TextObject]


class Sight(BaseModel):
    """Whose view of which file it is."""

    file_id: str
    model: str
    method: str
    hyperparameters: dict[str, Any] = Field(description="Those that shape rows, complete.")
    notes: list[str] = Field(description="What else is to be known.")


class FilePreview(Sight):
    """Rows of a file, token by token."""

    object: Literal["file.preview"]
    rows: list[PreviewRow]


class RefusedLine(BaseModel):
    """A line that a job would be refused for, or would leave out where its owner tolerates that."""

    line: int
    message: str


class Bucket(BaseModel):
    """How many lengths are above the bucket before it and at most `up_to`."""

    up_to: int | None = Field(description="Tokens; null for all that are longer.")
    count: int


class FileTokens(Sight):
    """How many tokens the rows of a file take. Lengths are counted before anything is cut."""

    object: Literal["file.tokens"]
    rows: int
    measured_rows: int
    sampled: bool = Field(description="Whether the file is so long that only a sample of its rows counts.")
    seed: int | None = Field(description="Of the sample, which is the same each time.")
    refused: int = Field(description="Measured rows that are refused.")
    refused_lines: list[RefusedLine] = Field(description="The first of them.")
    examples: int = Field(description="What is made of the rows: texts, pairs, answers, blocks of documents.")
    dropped: int = Field(description="Examples without a token to train on, which a job leaves out.")
    dropped_lines: list[int] = Field(description="The first of their lines.")
    truncated: int
    truncated_share: float | None
    tokens: int = Field(description="Of all examples that are used.")
    trainable_tokens: int | None = Field(description="Null for prompts: the answers are the model's own.")
    trainable_share: float | None
    percentiles: dict[str, int] = Field(description="Lengths that so many percent do not exceed.")
    histogram: list[Bucket]
