"""Dense tables whose rows change in place."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from nicegui import ui

# A cell is a text or {"text", "href", "pill", "note", "title", "class"}; all but the text may be left out.
Cell = str | Mapping[str, str]
_CELL = """
<q-td :props="props" :class="props.value && props.value.class">
  <template v-if="props.value && typeof props.value === 'object'">
    <a v-if="props.value.href" :href="props.value.href" :title="props.value.title">{{ props.value.text }}</a>
    <span v-else :class="props.value.pill && 'pill ' + props.value.pill" :title="props.value.title">
      {{ props.value.text }}
    </span>
    <span v-if="props.value.note" class="note">{{ props.value.note }}</span>
  </template>
  <template v-else>{{ props.value }}</template>
</q-td>
"""


@dataclass(frozen=True)
class Column:
    """A column of a table. One that is `wide` is left out on narrow screens."""

    name: str
    label: str
    align: Literal["left", "right"] = "left"
    wide: bool = False

    def describe(self) -> dict[str, Any]:
        """As Quasar takes it."""
        hidden = "wide-only" if self.wide else ""
        return {
            "name": self.name,
            "label": self.label,
            "field": self.name,
            "align": self.align,
            "classes": hidden,
            "headerClasses": hidden,
        }


class Table:
    """Rows by id. `on_select` gets the ids of the rows that are ticked."""

    def __init__(
        self, columns: Sequence[Column], *, on_select: Callable[[list[str]], Any] | None = None
    ) -> None:
        self._on_select = on_select
        self.element = ui.table(
            columns=[column.describe() for column in columns],
            rows=[],
            row_key="id",
            selection="multiple" if on_select else None,
            on_select=self._select if on_select else None,
            pagination={"rowsPerPage": 0},
        )
        self.element.classes("full-width").props("flat dense hide-pagination hide-selected-banner")
        self.element.add_slot("body-cell", _CELL)

    @property
    def selected(self) -> list[str]:
        """The ids of the rows that are ticked."""
        return [row["id"] for row in self.element.selected]

    def show(self, rows: list[dict[str, Cell]]) -> None:
        """Show these rows, each with an `id` and a cell a column; those already there stay where they are."""
        if rows != self.element.rows:
            self.element.rows = rows  # pyright: ignore[reportAttributeAccessIssue]

    def _select(self) -> None:
        if self._on_select:
            self._on_select(self.selected)


def text_cell(text: str, *, note: str = "", title: str = "", href: str = "") -> dict[str, str]:
    """A cell with what is given: a smaller line below, a text that pointing at it shows, a link."""
    given = {"text": text, "note": note, "title": title, "href": href}
    return {name: value for name, value in given.items() if value}
