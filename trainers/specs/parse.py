"""A job's `method` as it was written, read into what we know."""

from difflib import get_close_matches
from typing import Annotated, Any

from pydantic import Field, SerializeAsAny, ValidationError

from trainers.specs.combinations import check_combination
from trainers.specs.faults import SpecError
from trainers.specs.fields import Count, Strict, spell_dtype
from trainers.specs.methods import METHODS, MethodKind
from trainers.specs.names import ALIASES, DTYPE_FLAGS, IGNORED, JOB_FIELDS, REFUSED
from trainers.specs.parameters import ADAPTER_SHAPE, Asked

_SHOWN_CHARS = 200  # of a value that is at fault


class JobFields(Strict):
    """What belongs beside the method, when it was written among the hyperparameters."""

    seed: Annotated[Count, Field(ge=0, lt=2**31)] | None = None
    nproc_per_node: Annotated[Count, Field(ge=1, le=64)] | None = None


class Method(Strict):
    """A method and what was asked of it; `ignored` are accepted names without effect, with the reasons."""

    type: str
    hyperparameters: SerializeAsAny[Asked]
    ignored: dict[str, str] = Field(default_factory=dict)
    job_fields: JobFields = Field(default_factory=JobFields)

    @property
    def kind(self) -> MethodKind:
        """What the method is."""
        return METHODS[self.type]

    def to_request(self) -> dict[str, Any]:
        """As OpenAI writes it; reading it again gives the same.

        What an adapter to start from decides is left out where it was not asked for.
        """
        asked = self.hyperparameters
        written = asked.model_dump(mode="json")
        if asked.init_adapter is not None:
            for name in set(ADAPTER_SHAPE) - asked.model_fields_set:
                del written[name]
        return write_method(self.type, written)


def write_method(name: str, hyperparameters: dict[str, Any]) -> dict[str, Any]:
    """A method as a request has it: what stands beside the hyperparameters is put there."""
    apart = METHODS[name].beside
    beside = {key: value for key, value in hyperparameters.items() if key in apart and value is not None}
    among = {key: value for key, value in hyperparameters.items() if key not in apart}
    return {"type": name, name: {"hyperparameters": among, **beside}}


def parse_method(method: Any, hyperparameters: Any) -> Method:
    """Reads a job's method; `hyperparameters` is the older top-level spelling of the supervised ones.

    Raises SpecError, whose param is the path of the offending field in the request.
    """
    kind, nested, apart = _read_method(method)
    nested_path = f"method.{kind.name}.hyperparameters"
    if nested and hyperparameters:
        raise SpecError(
            f"hyperparameters are given twice: at the top level and in {nested_path}", param="hyperparameters"
        )
    given, path = (nested, nested_path) if nested else (hyperparameters or {}, "hyperparameters")
    if not isinstance(given, dict):
        raise SpecError("must be an object", param=path)
    beside = {name: value for name, value in given.items() if name in JOB_FIELDS}
    given = {name: value for name, value in given.items() if name not in JOB_FIELDS}
    renamed, ignored = _rename(given, known=kind.asked.model_fields.keys() - kind.beside, path=path)
    try:
        asked = kind.asked.model_validate(renamed | apart)
        job_fields = JobFields.model_validate(beside)
    except ValidationError as error:
        raise _first_problem(error, path=path, given=given | beside | apart, kind=kind) from None
    check_combination(kind.name, asked, path=path, spell=lambda name: _spell(name, given=given))
    return Method(type=kind.name, hyperparameters=asked, ignored=ignored, job_fields=job_fields)


def _read_method(method: Any) -> tuple[MethodKind, Any, dict[str, Any]]:
    """The method's kind, the hyperparameters inside it, and what is beside them, as they were written."""
    if method is None:
        return METHODS["supervised"], {}, {}
    if not isinstance(method, dict):
        raise SpecError("must be an object", param="method")
    name = method.get("type")
    if name is None:
        raise SpecError("method.type is missing", param="method.type", code="missing_required_parameter")
    if not isinstance(name, str) or name not in METHODS:
        raise SpecError(
            f"method type {name!r} is not available here; available: {', '.join(METHODS)}",
            param="method.type",
            code="unsupported_value",
        )
    for key in method:
        if key not in ("type", name):
            raise SpecError(
                f"unknown field {key!r} in a {name} method", param=f"method.{key}", code="unknown_parameter"
            )
    body = {} if method.get(name) is None else method[name]
    if not isinstance(body, dict):
        raise SpecError("must be an object", param=f"method.{name}")
    beside = METHODS[name].beside
    for key in body:
        if key != "hyperparameters" and key not in beside:
            raise SpecError(
                f"unknown field {key!r}; hyperparameters go in method.{name}.hyperparameters",
                param=f"method.{name}.{key}",
                code="unknown_parameter",
            )
    nested = body.get("hyperparameters")
    if nested is not None and not isinstance(nested, dict):
        raise SpecError("must be an object", param=f"method.{name}.hyperparameters")
    return METHODS[name], nested or {}, {key: body[key] for key in beside if key in body}


def _rename(given: dict[str, Any], *, known: Any, path: str) -> tuple[dict[str, Any], dict[str, str]]:
    """The same values under our names, and the names without effect. Nulls mean "not given", as at OpenAI."""
    renamed: dict[str, Any] = {}
    spelled: dict[str, str] = {}
    ignored: dict[str, str] = {}
    for name, value in given.items():
        if value is None:
            continue
        if name in IGNORED:
            ignored[name] = IGNORED[name]
            continue
        ours = ALIASES.get(name, name)
        if name in DTYPE_FLAGS:
            ours, value = "dtype", _read_flag(name, value, path=path)
            if value is None:
                continue
        if ours not in known:
            raise _unknown(name, known=known, path=path)
        if ours in renamed and spell_dtype(renamed[ours]) != spell_dtype(value):
            raise SpecError(f"{name} and {spelled[ours]} mean the same; give one", param=f"{path}.{name}")
        renamed[ours] = value
        spelled[ours] = name
    return renamed, ignored


def _read_flag(name: str, value: Any, *, path: str) -> str | None:
    if not isinstance(value, bool):
        raise SpecError(f"{name} must be true or false", param=f"{path}.{name}")
    return DTYPE_FLAGS[name] if value else None


def _unknown(name: str, *, known: Any, path: str) -> SpecError:
    if name in REFUSED:
        message = f"{name} is not a hyperparameter here: {REFUSED[name]}"
    else:
        names = [*known, *(alias for alias, ours in ALIASES.items() if ours in known)]
        near = get_close_matches(name, names, n=1)
        hint = f"; did you mean {ALIASES.get(near[0], near[0])!r}?" if near else ""
        message = f"unknown hyperparameter {name!r}{hint}"
    return SpecError(message, param=f"{path}.{name}", code="unknown_parameter")


def _first_problem(
    error: ValidationError, *, path: str, given: dict[str, Any], kind: MethodKind
) -> SpecError:
    """The most telling of pydantic's complaints, addressed to the name the user wrote."""
    problems = error.errors(include_url=False)
    field = str(problems[0]["loc"][0]) if problems[0]["loc"] else ""
    # Of a union, every branch complains; "must be 'auto'" is the least useful of them.
    branches = [problem for problem in problems if problem["loc"][:1] == (field,)]
    telling = next((p for p in branches if p["type"] not in ("literal_error", "bool_type")), branches[0])
    if telling["type"] in ("int_parsing", "float_parsing") and len(branches) > 1:
        message = 'must be "auto" or a number'
    else:
        message = telling["msg"].removeprefix("Value error, ")
    if field in kind.beside:
        path = f"method.{kind.name}"
    written = _spell(field, given=given)
    cause = telling.get("ctx", {}).get("error")
    if isinstance(cause, SpecError) and cause.param:  # inside an object
        return SpecError(f"{written}.{cause.param}: {message}", param=f"{path}.{written}.{cause.param}")
    got = repr(given.get(written))
    got = got if len(got) <= _SHOWN_CHARS else f"{got[:_SHOWN_CHARS]}…"
    return SpecError(f"{written}: {message} (got {got})", param=f"{path}.{written}")


def _spell(field: str, *, given: dict[str, Any]) -> str:
    """The name that the user wrote for a field of ours."""
    flags = [name for name in DTYPE_FLAGS if given.get(name)] if field == "dtype" else []
    return next((name for name in given if ALIASES.get(name, name) == field), (*flags, field)[0])
