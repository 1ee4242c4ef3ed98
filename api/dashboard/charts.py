"""Line charts that take new points in place, in the colours of the theme whichever it is."""

from collections.abc import Mapping, Sequence
from typing import Any

from nicegui import ui

Points = Sequence[tuple[float, float | None]]
_COLOURS = [f"var(--series-{i})" for i in range(1, 7)]
# Named, because the width of a legend is measured before it is in the page.
_SANS = "system-ui, sans-serif"
_FONT = {"fontFamily": _SANS, "fontSize": 11, "color": "var(--ink-soft)"}


class LineChart:
    """Lines over steps. SVG, so that style variables colour it and a change of theme reaches it."""

    def __init__(
        self,
        *,
        height_px: int = 220,
        x_name: str = "step",
        log_scale: bool = False,
        legend: bool = True,
    ) -> None:
        axis = {
            "axisLabel": _FONT | {"hideOverlap": True, "showMaxLabel": False},
            "axisLine": {"lineStyle": {"color": "var(--line-strong)"}},
            "axisTick": {"show": False},
            "splitLine": {"lineStyle": {"color": "var(--line)"}},
        }
        self._options: dict[str, Any] = {
            "animation": False,
            "color": _COLOURS,
            "textStyle": {"fontFamily": _SANS},
            "grid": {"left": 8, "right": 16, "top": 30 if legend else 12, "bottom": 6, "containLabel": True},
            "legend": {"show": legend, "type": "scroll", "top": 0, "left": 4, "icon": "roundRect",
                       "itemWidth": 12, "itemHeight": 3, "textStyle": _FONT, "pageTextStyle": _FONT,
                       "inactiveColor": "var(--ink-faint)"},
            "tooltip": {
                "trigger": "axis",
                "confine": True,
                "backgroundColor": "var(--surface)",
                "borderColor": "var(--line)",
                "textStyle": {"color": "var(--ink)", "fontSize": 12, "fontFamily": "inherit"},
                "axisPointer": {"lineStyle": {"color": "var(--ink-faint)"}},
            },
            "xAxis": axis | {"type": "value", "name": "", "splitLine": {"show": False},
                             "min": "dataMin", "max": "dataMax", "minInterval": 1},
            "yAxis": axis | {"type": "log" if log_scale else "value", "scale": True, "splitNumber": 4},
            "series": [],
        }  # fmt: skip
        self._options["tooltip"][":formatter"] = _tooltip(x_name)
        self._shown: Mapping[str, Points] = {}
        self.element = ui.echart(self._options, renderer="svg")
        self.element.classes("full-width").style(f"height: {height_px}px")

    def show(self, lines: Mapping[str, Points]) -> None:
        """Show these lines, by their names; nothing is drawn anew when nothing changed."""
        if lines == self._shown:
            return
        self._shown = {name: list(points) for name, points in lines.items()}
        few = max((len(points) for points in lines.values()), default=0) < 3
        self.element.options["series"] = [
            {
                "id": name,
                "name": name,
                "type": "line",
                "data": [list(point) for point in points],
                "showSymbol": few,
                "symbolSize": 5,
                "lineStyle": {"width": 1.8},
                "emphasis": {"disabled": True},
            }
            for name, points in lines.items()
        ]
        self.element.update()


def _tooltip(x_name: str) -> str:
    return (
        "items => { const safe = text => String(text).replace(/[&<>]/g, c => '&#' + c.charCodeAt(0) + ';');"
        "const shown = value => value == null ? 'none' : Number(value).toPrecision(4);"
        f"return '<b>{x_name} ' + items[0].value[0] + '</b>' + items.map(item =>"
        " '<br>' + item.marker + safe(item.seriesName) + ' <b>' + shown(item.value[1]) + '</b>').join(''); }"
    )
