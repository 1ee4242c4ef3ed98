"""Fields for the hyperparameters of a method, made from what `GET /v1/methods` tells of them."""

from collections.abc import Callable
from typing import Any

from nicegui import ui

from api.dashboard.formats import plain

_YES_NO = {"yes": True, "no": False}
# Asked for first; few change the others.
_FIRST = (
    "n_epochs", "batch_size", "learning_rate", "max_length", "block_size", "beta", "reward_model",
    "num_generations", "output_max_length", "chat_template", "lora_rank", "eval_prompts",
)  # fmt: skip
# The form asks for these in another way.
_ELSEWHERE = {"validation_split_percentage"}


class Field:
    """One hyperparameter: what was typed, as the API takes it."""

    def __init__(self, described: dict[str, Any], *, changed: Callable[[], None]) -> None:
        self._of = described
        self.name = described["name"]
        default = "none" if described["default"] is None else _plain(described["default"])
        hint = " \N{MIDDLE DOT} ".join(
            text for text in (described["description"], range_of(described)) if text
        )
        choices = self._choices()
        if choices:
            options = {"": default} | {choice: choice for choice in choices}
            self.element: Any = ui.select(options, value="", label=self.name, on_change=lambda _: changed())
        elif described["types"] == ["array"]:
            self.element = ui.textarea(self.name, on_change=lambda _: changed()).props("autogrow rows=1")
        else:
            self.element = ui.input(self.name, placeholder=default, on_change=lambda _: changed())
        self.element.props("stack-label").classes("full-width")
        self.element.props["hint"] = hint

    def read(self) -> Any:
        """The value; None where nothing was given. Raises ValueError with what would be right."""
        text = str(self.element.value or "").strip()
        types = self._of["types"]
        if not text:
            return None
        if text in (self._of["choices"] or []):
            return text
        if "boolean" in types and text in _YES_NO:
            return _YES_NO[text]
        if "integer" in types or "number" in types:
            return self._read_number(text)
        if "array" in types:
            parts = text.splitlines() if self.name == "eval_prompts" else text.replace("\n", ",").split(",")
            return [part.strip() for part in parts if part.strip()]
        return text

    def write(self, value: Any) -> None:
        """Show a value that a job had; the default is shown as nothing given."""
        if value is None or value == self._of["default"]:
            return
        if isinstance(value, bool):
            value = "yes" if value else "no"
        elif isinstance(value, list):
            value = ("\n" if self.name == "eval_prompts" else ", ").join(map(str, value))
        if self._choices() is None or value in (self._choices() or []):
            self.element.value = value if isinstance(value, str) else str(value)

    def _choices(self) -> list[str] | None:
        types = set(self._of["types"])
        if types & {"integer", "number", "array"}:
            return None
        choices = list(self._of["choices"] or [])
        if "boolean" in types:
            choices += list(_YES_NO)
        return choices or None

    def _read_number(self, text: str) -> float | int:
        is_whole = "number" not in self._of["types"]
        try:
            value = int(text) if is_whole else float(text)
        except ValueError:
            raise ValueError(f"Give {'a whole number' if is_whole else 'a number'}{_or(self._of)}.") from None
        low, high = self._of["minimum"], self._of["maximum"]
        above, below = self._of["exclusive_minimum"], self._of["exclusive_maximum"]
        fits = (low is None or value >= low) and (high is None or value <= high)
        if not (fits and (above is None or value > above) and (below is None or value < below)):
            raise ValueError(f"Must be {range_of(self._of)}.")
        return value


def range_of(described: dict[str, Any]) -> str:
    """The bounds of a number in words; nothing where it has none."""
    low, high = described["minimum"], described["maximum"]
    above, below = described["exclusive_minimum"], described["exclusive_maximum"]
    words = [
        f"from {plain(low)}" if low is not None else f"above {plain(above)}" if above is not None else "",
        f"to {plain(high)}" if high is not None else f"below {plain(below)}" if below is not None else "",
    ]
    return " ".join(word for word in words if word)


class Fields:
    """All hyperparameters of a method; those that few change are folded."""

    def __init__(self, method: dict[str, Any], *, changed: Callable[[], None]) -> None:
        described = {one["name"]: one for one in method["parameters"] if one["name"] not in _ELSEWHERE}
        first = [name for name in _FIRST if name in described]
        with ui.element("div").classes("grid").style("--least: 230px"):
            made = {name: Field(described[name], changed=changed) for name in first}
        with ui.expansion("Advanced").classes("full-width") as self._fold:
            with ui.element("div").classes("grid full-width").style("--least: 230px"):
                rest = [name for name in described if name not in first]
                made |= {name: Field(described[name], changed=changed) for name in rest}
        self._first = first
        self._fields = made

    def read(self, *, tell: bool) -> tuple[dict[str, Any], bool]:
        """(what was given, whether all of it fits). With `tell`, what does not fit is told at its field."""
        found: dict[str, Any] = {}
        fits = True
        for name, field in self._fields.items():
            try:
                value = field.read()
            except ValueError as problem:
                fits = False
                if tell:
                    self.blame(name, str(problem))
                continue
            if value is not None:
                found[name] = value
        return found, fits

    def write(self, values: dict[str, Any]) -> None:
        """Show these values; names that the method does not know are left out."""
        for name, value in values.items():
            if name in self._fields:
                self._fields[name].write(value)

    def blame(self, name: str, message: str) -> bool:
        """Tell what is wrong with a field, unfolded if need be; whether there is such a field."""
        if name not in self._fields:
            return False
        self._fields[name].element.error = message
        if name not in self._first:
            self._fold.open()
        return True


def _plain(default: Any) -> str:
    return str(default) if type(default) in (int, float) else plain(default)  # as it would be typed


def _or(described: dict[str, Any]) -> str:
    choices = described["choices"]
    return f", or {', '.join(choices)}" if choices else ""
