"""What may be asked of an engine: OpenAI's request bodies, refusing what would otherwise be ignored."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
_NEUTRAL = (None, False, [], {}, "")
# Parameters that change the answer and are not implemented, with the values that ask for nothing.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "tools": (),
    "tool_choice": ("none", "auto"),
    "functions": (),
    "function_call": ("none", "auto"),
    "top_logprobs": (0,),
    "response_format": ({"type": "text"},),
    "logit_bias": (),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "reasoning_effort": ("none",),
    "suffix": (),
    "echo": (),
    "best_of": (1,),
    "use_beam_search": (),
    "repetition_penalty": (1, 1.0),
    "length_penalty": (1, 1.0),
    "min_p": (0, 0.0),
    "min_tokens": (0,),
    "ignore_eos": (),
    "stop_token_ids": (),
    "structured_outputs": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "chat_template": (),
    "chat_template_kwargs": (),
    "continue_final_message": (),
    "documents": (),
    "mm_processor_kwargs": (),
}


class BadRequest(ValueError):
    """The request cannot be served; `status` is 400 unless it names something that does not exist."""

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None, status: int = 400):
        super().__init__(message)
        self.param = param
        self.code = code
        self.status = status


class StreamOptions(BaseModel):
    include_usage: bool | None = None


class TextPart(BaseModel):
    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    model_config = ConfigDict(extra="allow")

    role: str
    content: str | list[TextPart] | None = None

    def to_template(self, index: int) -> dict[str, str]:
        """The message as a chat template takes it. Parts are one text in pieces, as in training."""
        if self.role not in ROLES:
            raise BadRequest(
                f"Messages of role {self.role!r} are not supported; use one of {', '.join(ROLES)}.",
                param=f"messages.{index}.role",
                code="unsupported_value",
            )
        for key in ("tool_calls", "function_call"):
            if (self.model_extra or {}).get(key):
                raise BadRequest(
                    f"{key} is not supported.", param=f"messages.{index}.{key}", code="unsupported_parameter"
                )
        if self.content is None:
            raise BadRequest("content is missing.", param=f"messages.{index}.content", code="invalid_value")
        content = (
            self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        )
        if any("\ud800" <= character <= "\udfff" for character in content):
            raise BadRequest(
                "content is not Unicode text.", param=f"messages.{index}.content", code="invalid_value"
            )
        return {"role": ROLES[self.role], "content": content}


StopText = Annotated[str, Field(min_length=1, max_length=1000)]
TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]


class SamplingRequest(BaseModel):
    """What chat and plain completions have in common. Unknown extras are ignored, known ones refused."""

    model_config = ConfigDict(extra="allow", strict=True)

    model: str
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=-1)
    n: int | None = Field(None, ge=1, le=128)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: StopText | Annotated[list[StopText], Field(max_length=4)] | None = None
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    def refuse_unsupported(self) -> None:
        """Raises BadRequest for a parameter that would change the answer if it were implemented."""
        for name, value in (self.model_extra or {}).items():
            if name in UNSUPPORTED and value not in _NEUTRAL and value not in UNSUPPORTED[name]:
                raise BadRequest(f"{name} is not supported.", param=name, code="unsupported_parameter")
        if self.stream_options is not None and not self.stream:
            raise BadRequest(
                "stream_options needs stream: true.", param="stream_options", code="invalid_value"
            )


class ChatRequest(SamplingRequest):
    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None

    @property
    def token_limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    def refuse_unsupported(self) -> None:
        super().refuse_unsupported()
        if self.logprobs:
            raise BadRequest("logprobs is not supported.", param="logprobs", code="unsupported_parameter")


class CompletionRequest(SamplingRequest):
    prompt: str | TokenIds | list[str] | list[TokenIds]
    logprobs: int | None = None

    @property
    def token_limit(self) -> int | None:
        return self.max_tokens or 16  # OpenAI's default here

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [self.prompt]  # pyright: ignore[reportReturnType]
        return self.prompt  # pyright: ignore[reportReturnType]

    def refuse_unsupported(self) -> None:
        super().refuse_unsupported()
        if self.logprobs is not None:
            raise BadRequest("logprobs is not supported.", param="logprobs", code="unsupported_parameter")
        if not self.prompts:
            raise BadRequest("prompt is empty.", param="prompt", code="invalid_value")


class TokenizeRequest(BaseModel):
    model: str | None = None
    prompt: str | None = None
    messages: list[ChatMessage] | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True

    @model_validator(mode="after")
    def _check(self) -> "TokenizeRequest":
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages")
        return self
