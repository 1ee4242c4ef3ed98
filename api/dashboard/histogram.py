"""Counts as bars that need no script: a histogram, and parts of a whole."""

import html
from collections.abc import Sequence

from nicegui import ui

from api.dashboard.formats import number


class Histogram:
    """Bars beside each other, each with its label; `show` replaces them in place."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._root = ui.html("", sanitize=False).classes("histogram").props(f'role=img aria-label="{name}"')

    def show(self, counts: Sequence[tuple[str, int]]) -> None:
        """Show (label, count) of each bucket."""
        most = max((count for _, count in counts), default=0) or 1
        self._root.set_content(
            "".join(
                f'<div title="{html.escape(label)}: {number(count)}">'
                f"<em>{number(count) if count else ''}</em>"
                f'<i style="height: {100 * count / most:.1f}px"></i><span>{html.escape(label)}</span></div>'
                for label, count in counts
            )
        )


class Parts:
    """Parts of a whole, the largest first: a name, a bar and a figure each."""

    def __init__(self) -> None:
        self._root = ui.html("", sanitize=False).classes("parts full-width")

    def show(self, parts: Sequence[tuple[str, float, str]]) -> None:
        """Show (name, share from 0 to 1, figure)."""
        self._root.set_content(
            "".join(
                f"<div><span>{html.escape(name)}</span>"
                f'<div class="bar"><i style="width: {100 * share:.1f}%"></i></div>'
                f'<span class="number">{html.escape(figure)}</span></div>'
                for name, share, figure in sorted(parts, key=lambda part: -part[1])
            )
        )
