"""Bodies of requests and answers about votes. Times are Unix seconds."""

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, Field, ValidationInfo, field_validator

from api.schemas.common import Body, Id


def _check_said(text: str) -> str:
    if not text.strip():
        raise ValueError("it is empty")
    return text


Said = Annotated[str, AfterValidator(_check_said)]


class PromptMessage(Body):
    """A message of the conversation before the two answers."""

    role: Literal["system", "user", "assistant"]
    content: Said


class Answer(Body):
    """What a model answered."""

    model: Id
    content: Said


class CreateVote(Body):
    """Two answers to one prompt, and which one was preferred."""

    prompt: list[PromptMessage] = Field(
        min_length=1, max_length=1000, description="The conversation up to the user's last message."
    )
    chosen: Answer
    rejected: Answer

    @field_validator("prompt")
    @classmethod
    def _awaits_answer(cls, prompt: list[PromptMessage]) -> list[PromptMessage]:
        if prompt[-1].role != "user":
            raise ValueError(f"the last message must be the user's, not the {prompt[-1].role}'s")
        return prompt

    @field_validator("rejected")
    @classmethod
    def _differs(cls, rejected: Answer, info: ValidationInfo) -> Answer:
        chosen = info.data.get("chosen")
        if chosen is not None and chosen.content.strip() == rejected.content.strip():
            raise ValueError("the two answers are the same: there is nothing to prefer")
        return rejected


class AnswerObject(BaseModel):
    """What a model answered."""

    model: str
    content: str


class PromptMessageObject(BaseModel):
    """A message of the conversation before the two answers."""

    role: str
    content: str


class VoteObject(BaseModel):
    """Two answers to one prompt, and which one was preferred."""

    id: str
    object: Literal["vote"] = "vote"
    created_at: int
    prompt: list[PromptMessageObject]
    chosen: AnswerObject
    rejected: AnswerObject


class VoteList(BaseModel):
    """A page of votes."""

    object: Literal["list"] = "list"
    data: list[VoteObject]
    first_id: str | None
    last_id: str | None
    has_more: bool
