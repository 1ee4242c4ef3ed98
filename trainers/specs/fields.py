"""The kinds of values that parameters have."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

Auto = Literal["auto"]

_DTYPES = {
    "fp32": "float32",
    "float": "float32",
    "bf16": "bfloat16",
    "fp16": "float16",
    "half": "float16",
}


class Strict(BaseModel):
    """Known fields only, finite numbers only."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=(), allow_inf_nan=False)


class Resources(Strict):
    """Processes that train side by side."""

    nproc_per_node: int = Field(default=1, ge=1, le=64)
    nnodes: int = Field(default=1, ge=1, le=16)

    @property
    def processes(self) -> int:
        """All of them, on all nodes."""
        return self.nproc_per_node * self.nnodes


def _refuse_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("must be a number, not true or false")
    return value


def spell_dtype(value: Any) -> Any:
    """A dtype under the name that torch gives it; anything else as it is."""
    return _DTYPES.get(value, value) if isinstance(value, str) else value


def _split_names(value: Any) -> Any:
    return [name.strip() for name in value.split(",")] if isinstance(value, str) else value


def _split_modules(value: Any) -> Any:
    return "all-linear" if value in ("all", "all-linear") else _split_names(value)


def _check_split(value: float) -> float:
    if value > 0.5 and (value < 1 or value != int(value)):
        raise ValueError("must be a fraction up to 0.5, or a whole number of rows")
    return value


Count = Annotated[int, BeforeValidator(_refuse_bool)]
Number = Annotated[float, BeforeValidator(_refuse_bool)]
Split = Annotated[Number, Field(gt=0, le=1_000_000_000), AfterValidator(_check_split)] | None
ModuleName = Annotated[str, Field(min_length=1, max_length=200, pattern=r"^[A-Za-z0-9_.]+$")]
ModuleNames = Annotated[list[ModuleName], Field(min_length=1, max_length=64)]
TargetModules = Annotated[Literal["all-linear"] | ModuleNames, BeforeValidator(_split_modules)]
OptionalModules = Annotated[ModuleNames | None, BeforeValidator(_split_names)]
DType = Annotated[Literal["auto", "float32", "bfloat16", "float16"], BeforeValidator(spell_dtype)]
