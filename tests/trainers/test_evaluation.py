"""What a model says before, while and after it is trained, as evaluation.json keeps it."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.tiny import chat_rows
from tests.trainers.test_reward import pairs
from tests.trainers.test_sft import adapter_of, equal, train
from trainers.folders.checkpoints import list_checkpoints
from trainers.folders.evaluation import Evaluation
from trainers.folders.events import Events
from trainers.folders.exits import DataError, Outcome
from trainers.merge import merge_run
from trainers.prepare import prepare
from trainers.specs import load_run_spec
from trainers.training.answers import answer_prompts
from trainers.training.attempt import Attempt
from trainers.training.loop import Guarded
from trainers.training.ranks import StopRequest

ASKED = ["Patient 3 has a rash. What now?", "What helps with nausea?"]
SETTINGS: dict[str, Any] = {"learning_rate": 1e-2, "max_steps": 8, "eval_max_tokens": 12}


def steps_of(folder: Path) -> dict[int, dict[str, Any]]:
    steps = json.loads((folder / "evaluation.json").read_text())["steps"]
    return {facts["step"]: facts for facts in steps}


def greedy(model: Any, tokenizer: Any, ids: list[int], *, max_tokens: int) -> tuple[str, str]:
    """An answer token by token, without cache or padding, and why it ended."""
    answer: list[int] = []
    while len(answer) < max_tokens:
        with torch.no_grad():
            token = int(model(torch.tensor([ids + answer])).logits[0, -1].argmax())
        if token == tokenizer.eos_token_id:
            return tokenizer.decode(answer, skip_special_tokens=True), "stop"
        answer.append(token)
    return tokenizer.decode(answer, skip_special_tokens=True), "length"


@pytest.fixture
def answered(make_run) -> Path:
    """A run with prompts of its own."""
    run_dir = make_run(eval_prompts=ASKED, lora_dropout=0.1, **SETTINGS)
    assert train(run_dir)["reason"] == "done"
    return run_dir


def test_prompts_are_answered_before_at_each_checkpoint_and_at_the_end(
    answered: Path, tiny_model: Path, events_of, tmp_path: Path
) -> None:
    steps = steps_of(answered / "output")
    assert list(steps) == [0, 4, 8]
    tokenizer = AutoTokenizer.from_pretrained(answered / "output")
    for step, facts in steps.items():
        assert [answer["prompt"] for answer in facts["answers"]] == ASKED
        model: Any = AutoModelForCausalLM.from_pretrained(tiny_model)
        if step:
            model = PeftModel.from_pretrained(model, answered / "checkpoints" / f"step-{step}")
        for given in facts["answers"]:
            ids = tokenizer.apply_chat_template(
                [{"role": "user", "content": given["prompt"]}], add_generation_prompt=True
            )["input_ids"]
            expected = greedy(model, tokenizer, ids, max_tokens=12)
            assert (given["answer"], given["finish_reason"]) == expected
        assert facts["valid_perplexity"] == pytest.approx(math.exp(facts["valid_loss"]), rel=1e-6)
    assert steps[0]["answers"] != steps[8]["answers"]
    # Each checkpoint has what was known by then, the merged model everything.
    assert list(steps_of(answered / "checkpoints" / "step-4")) == [0, 4]
    merge_run(answered, out_dir=tmp_path / "merged")
    assert steps_of(tmp_path / "merged") == steps
    told = [e["data"] for e in events_of(answered, "message") if e["data"].get("code") == "evaluation"]
    assert [(event["step"], event["answers"]) for event in told] == [
        (step, facts["answers"]) for step, facts in steps.items()
    ]


def test_answering_does_not_change_the_training(answered: Path, make_run, curve_of) -> None:
    silent = make_run("2", eval_prompts=[], lora_dropout=0.1, **SETTINGS)
    train(silent)
    assert curve_of(answered) == curve_of(silent)
    assert equal(adapter_of(answered / "output"), adapter_of(silent / "output"))
    assert "answers" not in steps_of(silent / "output")[8]


def test_a_model_answers_by_itself_and_is_left_as_it_was(make_run, tiny_model: Path) -> None:
    """Prompts of unequal lengths; dropout, and settings of the model's own that would say something else."""
    asked = ["rash", "What helps with nausea, dizziness and fatigue, and when does one see a doctor?" * 3]
    run_dir = make_run(eval_prompts=asked, eval_max_tokens=6)
    prompts = prepare(run_dir, events=Events(None))["prompts"]
    attempt = Attempt(
        run_dir,
        spec=load_run_spec(run_dir),
        events=Events(None),
        stop=StopRequest(),
        outcome=Outcome("error"),
    )
    model: Any = build_talker(tiny_model)
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.9
    own = model.generation_config
    own.suppress_tokens = list(range(100, 512))
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    state = torch.get_rng_state()
    assert answer_prompts(model.train(), attempt, tokenizer=tokenizer, step=0)
    assert model.training
    assert model.generation_config is own
    assert torch.equal(torch.get_rng_state(), state)
    attempt.evaluation.write(run_dir)
    attempt.stop.requested = True
    assert not answer_prompts(None, attempt, tokenizer=tokenizer, step=1)  # nobody is asked
    model.eval()
    assert [(given["answer"], given["finish_reason"]) for given in steps_of(run_dir)[0]["answers"]] == [
        greedy(model, tokenizer, prompt["ids"], max_tokens=6) for prompt in prompts
    ]


def build_talker(folder: Path) -> Any:
    """The tiny model with weights so large that its answers depend on every token."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.mul_(8)
    return model


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "pretraining", "rows": [{"text": "Case 1: rest."}] * 20, "new_tokens": 4},
        {"use_peft": False},
    ],
    ids=["new tokens", "all weights"],
)
def test_wider_parts_answer_too(make_run, settings: dict[str, Any]) -> None:
    """Embeddings and head in float32 around layers in bfloat16, under gradient checkpointing."""
    more = {"dtype": "bfloat16", "gradient_checkpointing": True, "max_steps": 1, "n_valid": 0}
    run_dir = make_run(eval_prompts=ASKED, eval_max_tokens=4, **settings | more)
    train(run_dir)
    assert [len(facts["answers"]) for facts in steps_of(run_dir / "output").values()] == [2, 2]


def chosen(run_dir: Path) -> list[dict[str, Any]]:
    """The prompts that a run would answer."""
    return prepare(run_dir, events=Events(None))["prompts"]


def test_by_default_the_first_held_out_questions_are_asked(make_run, tiny_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    answer = {"role": "assistant", "content": "Rest."}
    talk = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "I have a rash."},
        {"role": "assistant", "content": "Since when?"},
        {"role": "user", "content": "Since Monday."},
    ]
    rows = [
        {"messages": [{"role": "user", "content": "nausea " * 500}, answer]},
        {"messages": [*talk, {"role": "assistant", "content": "See a doctor."}]},
        *chat_rows(4),
    ]
    found = chosen(make_run("1", valid_rows=rows, eval_prompts=None))
    assert [prompt["prompt"] for prompt in found] == [
        "Since Monday.",  # the question before it leaves no room for an answer
        *(row["messages"][0]["content"] for row in chat_rows(2)),
    ]
    whole = tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
    assert tokenizer.decode(found[0]["ids"]) == whole
    assert chosen(make_run("2", n_valid=0, eval_prompts=None)) == []
    assert chosen(make_run("3", valid_rows=rows)) == []  # an empty list was given


@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_prompts_of_pairs_are_asked_once_each(make_run, method: str) -> None:
    rows = pairs(4)
    settings = {"method": method, "rows": rows, "valid_rows": rows, "eval_prompts": None}
    assert [prompt["prompt"] for prompt in chosen(make_run(**settings))] == [
        row.get("question", row.get("prompt")) for row in rows[:3]
    ]


def test_texts_are_gone_on_with_as_they_are_written(make_run, tiny_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    settings: dict[str, Any] = {"method": "pretraining", "rows": [{"text": "Rest and drink water."}] * 30}
    texts = [{"text": "Case 1: two tablets were taken."}, {"text": "a"}, {"text": "发烧要多喝水。"}]
    found = chosen(make_run("1", valid_rows=texts, eval_prompts=None, **settings))
    assert [prompt["prompt"] for prompt in found] == ["Case 1: two", "a", "发烧要"]
    (asked,) = chosen(make_run("2", n_valid=0, eval_prompts=["With fever, "], **settings))
    assert asked["ids"] == tokenizer("With fever, ", add_special_tokens=False)["input_ids"]


def test_a_prompt_that_leaves_no_room_for_an_answer_is_refused(make_run) -> None:
    run_dir = make_run(eval_prompts=["Hello", "nausea " * 250], eval_max_tokens=400)
    with pytest.raises(DataError, match=r"number 2 has .* room for 1 to 112"):
        chosen(run_dir)


def test_a_reward_model_scores_held_out_pairs_instead(make_run) -> None:
    held_out = pairs(5, seed=1)
    run_dir = make_run(
        method="reward", rows=pairs(12), valid_rows=held_out, max_steps=4, eval_prompts=None, n_valid=5
    )
    metrics = train(run_dir)["metrics"]
    steps = steps_of(run_dir / "output")
    assert list(steps) == [0, 4]
    assert steps[4]["valid_accuracy"] == metrics["valid_accuracy"]
    assert "answers" not in steps[4]
    for row, pair in zip(held_out, steps[4]["pairs"], strict=False):
        assert row["question"] in pair["prompt"]
        assert (pair["chosen"], pair["rejected"]) == (row["response_chosen"], row["response_rejected"])
    assert len(steps[4]["pairs"]) == 3
    before, after = (steps[step]["pairs"][0]["chosen_score"] for step in (0, 4))
    assert before != after


def test_a_stop_ends_the_answers_and_keeps_the_step(make_run, monkeypatch: pytest.MonkeyPatch) -> None:
    run_dir = make_run(eval_prompts=ASKED, **SETTINGS | {"eval_max_tokens": 60})
    answer, asked = Guarded.answer, []

    class Watched(StopRequest):
        """Asked to stop at the third look within the answers of step 4."""

        def __init__(self) -> None:
            self.looks = 0

        @property
        def requested(self) -> bool:
            if asked == [0, 4]:
                self.looks += 1
            return self.looks >= 3

    def note(trainer: Guarded) -> None:
        asked.append(trainer.state.global_step)
        answer(trainer)

    monkeypatch.setattr(Guarded, "answer", note)
    stop = Watched()
    end = train(run_dir, stop=stop)
    assert (end["reason"], end["step"]) == ("stopped", 4)
    assert stop.looks < 20
    assert [step for step, _ in list_checkpoints(run_dir / "checkpoints")] == [4]
    assert "answers" not in steps_of(run_dir / "checkpoints" / "step-4")[4]


def test_the_first_step_and_the_newest_are_kept(tmp_path: Path) -> None:
    evaluation = Evaluation()
    for step in range(0, 250, 2):
        evaluation.note(step, valid_loss=math.nan if step == 248 else 1.0)
    evaluation.write(tmp_path)
    steps = steps_of(tmp_path)
    assert list(steps) == [0, *range(52, 250, 2)]
    assert steps[248]["valid_loss"] is None
