"""The curves of one job: a chart a measure, which grow in place while it trains."""

from typing import Any

from nicegui import ui

from api.dashboard.charts import LineChart
from api.dashboard.curves import group, lines_of
from api.dashboard.elements import Panel, empty, panel, skeleton

_HEIGHT_PX = 170
_USUAL = ("Loss", "Learning rate", "Gradient norm", "Tokens per second")


class Curves:
    """Charts by title. Those that every method has are there from the beginning, so that nothing moves."""

    def __init__(self) -> None:
        self._charts: dict[str, LineChart] = {}
        self._places: dict[str, ui.element] = {}
        self._panels: dict[str, Panel] = {}
        self._grid = ui.element("div").classes("grid charts")
        with ui.element("div").classes("panel") as self._nothing:
            empty("No curves", "This job ended before its first step was measured.")
        self._nothing.set_visibility(False)
        for title in _USUAL:
            self._add_place(title)

    def show(self, curves: dict[str, Any], *, is_over: bool) -> None:
        """Show what is measured by now."""
        charts = group(lines_of(curves))
        self._grid.set_visibility(bool(charts) or not is_over)
        self._nothing.set_visibility(is_over and not charts)
        for title, lines in charts.items():
            if title not in self._places:
                self._add_place(title)
            if title not in self._charts:
                self._places[title].clear()
                with self._places[title]:
                    self._charts[title] = LineChart(height_px=_HEIGHT_PX, legend=len(lines) > 1)
            self._charts[title].show(lines)
        if is_over:  # nothing more will come for these
            for title, block in self._panels.items():
                block.root.set_visibility(title in self._charts)

    def _add_place(self, title: str) -> None:
        with self._grid, panel(title) as self._panels[title]:
            with ui.element("div").style(f"height: {_HEIGHT_PX}px") as place:
                skeleton(_HEIGHT_PX)
        self._places[title] = place
