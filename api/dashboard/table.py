"""Dense tables whose rows change in place."""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from nicegui import ui

# A cell is a text or {"text", "href", "pill", "bar", "note", "title", "class"}; all but the text may
# be left out. A bar is a share of 1, drawn below the text.
Cell = str | Mapping[str, Any]
_CELL = """
<q-td :props="props" :class="props.value && props.value.class">
  <template v-if="props.value && typeof props.value === 'object'">
    <a v-if="props.value.href" :href="props.value.href" :title="props.value.title">{{ props.value.text }}</a>
    <span v-else :class="props.value.pill && 'pill ' + props.value.pill" :title="props.value.title">
      {{ props.value.text }}
    </span>
    <div v-if="props.value.bar != null" class="bar">
      <i :style="{width: 100 * props.value.bar + '%'}"></i>
    </div>
    <span v-if="props.value.note" class="note">{{ props.value.note }}</span>
  </template>
  <span v-else>{{ props.value }}</span>
</q-td>
"""


@dataclass(frozen=True)
class Column:
    """A column of a table; `wide` ones are left out on narrow screens, those that wrap hold sentences."""

    name: str
    label: str
    align: Literal["left", "right"] = "left"
    wide: bool = False
    wraps: bool = False

    def describe(self) -> dict[str, Any]:
        """As Quasar takes it."""
        shown = ("wide-only " if self.wide else "") + ("wrap sentence" if self.wraps else "")
        return {
            "name": self.name,
            "label": self.label,
            "field": self.name,
            "align": self.align,
            "classes": shown,
            "headerClasses": shown,
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

    async def _select(self) -> None:
        found = self._on_select(self.selected) if self._on_select else None
        if isinstance(found, Awaitable):
            await found


def text_cell(
    text: str, *, note: str = "", title: str = "", href: str = "", bar: float | None = None
) -> dict[str, Any]:
    """A cell with what is given: a smaller line below, a text that pointing at it shows, a link, a bar."""
    given = {"text": text, "note": note, "title": title, "href": href}
    found: dict[str, Any] = {name: value for name, value in given.items() if value}
    return found if bar is None else found | {"bar": min(max(bar, 0.0), 1.0)}
