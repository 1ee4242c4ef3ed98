"""What a job was asked for and what it left: parameters, checkpoints, answers to fixed prompts, lineage."""

from typing import Any
from urllib.parse import quote

from nicegui import ui

from api.dashboard import job_words as words
from api.dashboard.client import Api, Refused, locate
from api.dashboard.elements import Facts, empty, link
from api.dashboard.formats import duration, moment, number, plain
from api.dashboard.table import Cell, Column, Table, text_cell

_CHECKPOINTS = 20
_MOST_ANCESTORS = 20


class Parameters:
    """Everything that was asked for; once the job runs, with the numbers that "auto" became."""

    def __init__(self) -> None:
        self._asked = Facts()
        ui.separator()
        self._hyper = Facts()

    def show(self, job: dict[str, Any]) -> None:
        """Show them in place."""
        method = words.method_of(job)
        hyper = (job["method"].get(method) or {}).get("hyperparameters") or {}
        files = job.get("training_files") or [{"file": job["training_file"]}]
        self._asked.show(
            {
                "Method": method,
                "Base": job["model"],
                "Training data": "; ".join(plain(file) if len(file) > 1 else file["file"] for file in files),
                "Validation data": plain(job["validation_file"]),
                "Seed": str(job["seed"]),
                "Processes": plain(job["resources"]),
                "Priority": number(job["priority"]),
                "Metadata": plain(job["metadata"]),
                **({"Without effect": plain(job["ignored"])} if job["ignored"] else {}),
            }
        )
        self._hyper.show({name: plain(value) for name, value in sorted(hyper.items()) if value is not None})


class Checkpoints:
    """Saved states, each a model that can be chatted with; below, what the model answered at each."""

    def __init__(self) -> None:
        self._table = Table(
            [
                Column("step", "Step", "right"),
                Column("metrics", "Measured", wraps=True),
                Column("model", "As a model", wraps=True),
                Column("when", "Saved", "right"),
            ]
        )
        with ui.element("div").classes("full-width") as self._nothing:
            empty(
                "No checkpoint yet",
                "One is saved every `save_steps` steps, when the job pauses, and at its end.",
            )

    @staticmethod
    async def fetch(api: Api, job_id: str) -> list[dict[str, Any]]:
        """The newest checkpoints, newest first."""
        return (await api.get(words.url_of(job_id, "checkpoints"), limit=_CHECKPOINTS))["data"]

    def show(self, found: list[dict[str, Any]]) -> None:
        """Show them in place."""
        self._table.show([_checkpoint_row(one) for one in found])
        self._table.element.set_visibility(bool(found))
        self._nothing.set_visibility(not found)


def _checkpoint_row(one: dict[str, Any]) -> dict[str, Cell]:
    measured = [
        f"{name.replace('_', ' ')} {number(value)}"
        for name, value in one["metrics"].items()
        if name != "step" and not name.startswith("full_valid_") and isinstance(value, int | float)
    ]
    model = one["fine_tuned_model_checkpoint"]
    return {
        "id": one["id"],
        "step": number(one["step_number"]),
        "metrics": ", ".join(measured),
        "model": text_cell(model, href=f"/playground?model={quote(model, safe='')}", title="Chat with it"),
        "when": words.when_cell(one["created_at"]),
    }


class Samples:
    """What the model answered to the same prompts as it learnt, newest first."""

    def __init__(self) -> None:
        self._table = Table(
            [
                Column("step", "Step", "right"),
                Column("prompt", "Prompt", wraps=True),
                Column("answer", "Answer", wraps=True),
            ]
        )
        with ui.element("div").classes("full-width") as self._nothing:
            empty(
                "No answers yet",
                "With `eval_prompts`, or a validation file, the model answers the same prompts before its "
                "first step, at each checkpoint and at the end.",
            )

    def show(self, events: list[dict[str, Any]]) -> None:
        """Show the answers that the events tell."""
        rows: list[dict[str, Cell]] = [
            {
                "id": f"{event['id']}-{i}",
                "step": number(event["data"].get("step")),
                "prompt": _prompt_text(answer.get("prompt")),
                "answer": (answer.get("answer") or "").strip() or "(nothing)",
            }
            for event in events
            if event["data"].get("code") == "evaluation"
            for i, answer in enumerate(event["data"].get("answers") or [])
        ]
        self._table.show(rows)
        self._table.element.set_visibility(bool(rows))
        self._nothing.set_visibility(not rows)


def _prompt_text(prompt: Any) -> str:
    if isinstance(prompt, list):  # messages
        return "\n".join(str(message.get("content")) for message in prompt)
    return str(prompt)


class Lineage:
    """From the first base to what came of it: models as a chain, with what went in."""

    def __init__(self) -> None:
        self._chain = ui.element("ol").classes("chain")
        self._shown: list[str] = []

    @staticmethod
    async def fetch(api: Api, job: dict[str, Any]) -> list[dict[str, Any]]:
        """The models that the job starts from, the oldest first. A deleted one ends the chain."""
        found: list[dict[str, Any]] = []
        name: str | None = job["model"]
        while name and len(found) < _MOST_ANCESTORS:
            try:
                model = await api.get(locate("models", name))
            except Refused as refused:
                if refused.status != 404:
                    raise
                return [{"id": name, "kind": "deleted"}, *found]
            found.insert(0, model)
            name = model.get("parent")
        return found

    def show(self, ancestors: list[dict[str, Any]], job: dict[str, Any]) -> None:
        """Draw the chain anew if it is another one."""
        made = job["fine_tuned_model"]
        steps = [*(model["id"] for model in ancestors), job["id"], made or ""]
        if steps == self._shown:
            return
        self._shown = steps
        self._chain.clear()
        with self._chain:
            for model in ancestors:
                with ui.element("li"):
                    link(model["id"], f"/models/{quote(model['id'], safe='')}")
                    ui.label(_kind_of(model)).classes("soft small")
            with ui.element("li").classes("here"):
                ui.label(words.name_of(job)).classes("strong")
                self._inputs(job)
            if made:
                with ui.element("li"):
                    link(made, f"/models/{quote(made, safe='')}")
                    ui.label("what this job made").classes("soft small")

    @staticmethod
    def _inputs(job: dict[str, Any]) -> None:
        with ui.element("div").classes("row-of small"):
            ui.label(f"{words.method_of(job)} on").classes("soft")
            for file in job.get("training_files") or [{"file": job["training_file"]}]:
                link(file["file"], f"/data/{file['file']}")
        for label, target in (("tries again", job["retry_of"]), ("adapter from", _adapter_of(job))):
            if target:
                with ui.element("div").classes("row-of small"):
                    ui.label(label).classes("soft")
                    link(target, words.path_of(target)) if target.startswith("ftjob-") else ui.label(target)
        if job["pipeline_id"]:
            with ui.element("div").classes("row-of small"):
                ui.label(f"stage {job['stage']} of").classes("soft")
                link(job["pipeline_id"], f"/pipelines/{job['pipeline_id']}")


def _kind_of(model: dict[str, Any]) -> str:
    return {"base": "base model", "merged": "trained here"}.get(model["kind"], str(model["kind"]))


def _adapter_of(job: dict[str, Any]) -> str | None:
    inner = job["method"].get(words.method_of(job)) or {}
    return (inner.get("hyperparameters") or {}).get("init_adapter")


def times_of(job: dict[str, Any]) -> dict[str, str]:
    """When it was submitted, and when it ended."""
    times = {"Submitted": moment(job["created_at"])}
    if job["finished_at"] is not None:
        span = duration(job["finished_at"] - job["created_at"])
        times["Ended"] = f"{moment(job['finished_at'])}, after {span}"
    return times
