"""The stages of a pipeline as a graph: what each starts from and makes, with states that change in place."""

from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

from nicegui import ui

from api.dashboard import job_words as words
from api.dashboard.elements import Bar, Pill, link

_WIDTH_PX, _HEIGHT_PX, _APART_PX, _BELOW_PX = 215, 224, 40, 20  # four side by side at 1280
_MODEL_FIELDS = {"model": "starts from", "reward_model": "judged by"}


@dataclass
class Node:
    """A stage in its place: `needs` maps what it takes to the stage that makes it."""

    stage: dict[str, Any]
    job: dict[str, Any]
    needs: dict[str, str] = field(default_factory=dict)
    level: int = 0
    lane: int = 0


def arrange(stages: list[dict[str, Any]], jobs: dict[str, dict[str, Any]]) -> list[Node]:
    """The stages with what leads to them, upstream first; `jobs` by id, each as a single one."""
    nodes = {stage["name"]: Node(stage, jobs[stage["job_id"]]) for stage in stages}
    for node in nodes.values():
        for parameter, model in _taken(node).items():
            maker = next((name for name, other in nodes.items() if _makes(other.stage, model)), None)
            if maker is not None and maker != node.stage["name"]:
                node.needs[parameter] = maker
    placed: list[Node] = []
    waiting = list(nodes.values())
    while waiting:
        names = {node.stage["name"] for node in waiting}
        # The API accepts no circle, so some stage is always free.
        ready = [node for node in waiting if not names & set(node.needs.values())] or waiting
        for node in ready:
            node.level = 1 + max((nodes[name].level for name in node.needs.values()), default=-1)
            node.lane = sum(other.level == node.level for other in placed)
            placed.append(node)
        waiting = [node for node in waiting if node not in ready]
    return sorted(placed, key=lambda node: (node.level, node.lane))


def _taken(node: Node) -> dict[str, str]:
    inner = node.job["method"].get(words.method_of(node.job)) or {}
    judge = (inner.get("hyperparameters") or {}).get("reward_model")
    return {"model": node.stage["model"]} | ({"reward_model": judge} if isinstance(judge, str) else {})


def _makes(stage: dict[str, Any], model: str) -> bool:
    """Whether `model` is what the stage makes, or will: such names end with the end of the job's id."""
    if stage["fine_tuned_model"]:
        return stage["fine_tuned_model"] == model
    return model.startswith("ft:") and model.endswith(f":{stage['job_id'][-8:]}")


class Graph:
    """Cards joined by lines; on narrow screens cards below each other, which name what they start from."""

    def __init__(self, nodes: list[Node], file_names: dict[str, str]) -> None:
        columns = 1 + max(node.level for node in nodes)
        lanes = 1 + max(node.lane for node in nodes)
        width = columns * (_WIDTH_PX + _APART_PX) - _APART_PX
        height = lanes * (_HEIGHT_PX + _BELOW_PX) - _BELOW_PX
        with ui.element("div").classes("graph-box"):
            with ui.element("div").classes("graph").style(f"--w: {width}px; --h: {height}px"):
                ui.html(_lines(nodes, width, height), sanitize=False).classes("lines")
                self._cards = {node.stage["name"]: _Card(node, file_names) for node in nodes}

    def show(self, stages: list[dict[str, Any]], jobs: dict[str, dict[str, Any]]) -> None:
        """Show how far the stages are."""
        for stage in stages:
            self._cards[stage["name"]].show(stage, jobs[stage["job_id"]])


class _Card:
    def __init__(self, node: Node, file_names: dict[str, str]) -> None:
        stage, job = node.stage, node.job
        card = ui.element("article").classes("stage").props(f'aria-label="Stage {stage["name"]}"')
        left, top = node.level * (_WIDTH_PX + _APART_PX), node.lane * (_HEIGHT_PX + _BELOW_PX)
        card.style(f"--x: {left}px; --y: {top}px; --cw: {_WIDTH_PX}px; --ch: {_HEIGHT_PX}px")
        with card:
            with ui.element("div").classes("row-of stage-head"):
                link(stage["name"], words.path_of(stage["job_id"])).classes("strong grow wrap")
                self._pill = Pill(stage["status"])
            ui.label(words.method_of(job) + (" · reused" if stage["reused"] else "")).classes("soft small")
            with ui.element("dl").classes("facts small"):
                self._inputs(node, file_names)
                with ui.element("dt"):
                    ui.label("makes")
                with ui.element("dd"):
                    self._made = ui.link("", "").classes("mono")
                    self._not_yet = ui.label().classes("faint")
            self._doing = ui.label().classes("small stage-doing")
            self._bar = Bar()

    @staticmethod
    def _inputs(node: Node, file_names: dict[str, str]) -> None:
        for parameter, label in _MODEL_FIELDS.items():
            maker = node.needs.get(parameter)
            if maker is None and parameter != "model":
                continue
            with ui.element("dt"):
                ui.label(label)
            with ui.element("dd"):
                if maker:
                    ui.label(maker).classes("strong")
                else:
                    model = node.stage["model"]
                    link(model, f"/models/{quote(model, safe='')}").classes("mono")
        with ui.element("dt"):
            ui.label("data")
        with ui.element("dd"):
            for file_id in files_of(node.job):
                link(file_names.get(file_id, file_id), f"/data/{file_id}")

    def show(self, stage: dict[str, Any], job: dict[str, Any]) -> None:
        """Show how far the stage is."""
        status, made = stage["status"], stage["fine_tuned_model"]
        self._pill.set_status(status)
        self._made.set_visibility(bool(made))
        self._not_yet.set_visibility(not made)
        if made:
            self._made.set_text(made)
            self._made.props(f'href="/models/{quote(made, safe="")}"')
        self._not_yet.set_text("nothing" if status in ("failed", "cancelled") else "a model, not yet")
        progress = job.get("progress") or {}
        self._bar.show(1.0 if status == "succeeded" else (progress.get("percent") or 0) / 100)
        self._doing.set_text(_doing(stage, job))
        self._doing.classes(**({"add": "bad-text"} if status == "failed" else {"remove": "bad-text"}))


def files_of(job: dict[str, Any]) -> list[str]:
    """The ids of the files that a job trains on."""
    mixed = job.get("training_files") or []
    return [part["file"] for part in mixed] or [job["training_file"]]


def _doing(stage: dict[str, Any], job: dict[str, Any]) -> str:
    if stage["status"] == "failed":
        return (stage["error"] or {}).get("message") or "It failed."
    if stage["status"] in words.WAITING:
        return words.why_waiting(job)
    if stage["status"] == "running":
        return words.progress_cell(job)["text"]
    if stage["reused"]:
        return "Taken from an older pipeline with the same inputs"
    return ""


def _lines(nodes: list[Node], width: int, height: int) -> str:
    by_name = {node.stage["name"]: node for node in nodes}
    paths = ""
    for node in nodes:
        for parameter, maker in node.needs.items():
            source = by_name[maker]
            x1 = source.level * (_WIDTH_PX + _APART_PX) + _WIDTH_PX
            y1 = source.lane * (_HEIGHT_PX + _BELOW_PX) + 28
            x2 = node.level * (_WIDTH_PX + _APART_PX) - 2
            y2 = node.lane * (_HEIGHT_PX + _BELOW_PX) + (28 if parameter == "model" else 52)
            half = _APART_PX / 2
            bend = f"M{x1} {y1} C{x1 + half} {y1}, {x2 - half} {y2}, {x2} {y2}"
            if node.level - source.level > 1:  # past the cards in between, in the gap below its lane
                lowest = max(n.lane for n in nodes if source.level < n.level < node.level)
                y = (max(lowest, source.lane) + 1) * (_HEIGHT_PX + _BELOW_PX) - _BELOW_PX / 2
                y2 += 48
                bend = (
                    f"M{x1} {y1 + 24} C{x1 + half} {y1 + 24}, {x1 + half} {y}, {x1 + _APART_PX} {y} "
                    f"H{x2 - _APART_PX} C{x2 - half} {y}, {x2 - half} {y2}, {x2} {y2}"
                )
            kind = "" if parameter == "model" else ' class="judge"'
            paths += f'<path d="{bend}"{kind}/><circle cx="{x2}" cy="{y2}" r="3.5"/>'
    return (
        f'<svg width="{width}" height="{height + _BELOW_PX}" aria-hidden="true" '
        f'viewBox="0 0 {width} {height + _BELOW_PX}">{paths}</svg>'
    )
