"""PPO on the tiny model: its arithmetic by hand, its roles on one base, and that it learns and resumes."""

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
)

from tests.tiny import SYMPTOMS
from trainers import recipe
from trainers.adapters import TRAINED_HEAD_KEY
from trainers.artifacts import write_json
from trainers.checkpoints import list_checkpoints
from trainers.merge import merge_run
from trainers.ppo import choose_rows
from trainers.ppo_losses import (
    KlController,
    estimate_advantages,
    explain_variance,
    mask_responses,
    place_rewards,
    policy_loss,
    value_loss,
    whiten,
)
from trainers.ppo_reward import ScorerBeside, ScorerOnBase, load_scorer
from trainers.ppo_roles import Policy, Texts
from trainers.ranks import StopRequest
from trainers.rows import Rows
from trainers.run import run
from trainers.specs import RunSpec, SpecError, load_run_spec, parse_method, resolve

EOS, PAD = 2, 0
PROMPTS = [[1, 40, 41], [1, 50, 51, 52, 53, 54], [1, 60]]
QUESTIONS = [{"question": f"Patient {i} has {SYMPTOMS[i % 8]}. What now?"} for i in range(16)]


def tensor(*rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows)


# The arithmetic


def test_a_response_ends_with_its_first_stop_token() -> None:
    tokens = torch.tensor([[5, EOS, PAD, PAD], [5, 6, 7, 8], [EOS, EOS, 5, 5]])
    mask, ended = mask_responses(tokens, [EOS])
    assert mask.int().tolist() == [[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]]
    assert ended.tolist() == [True, False, True]
    padded_with_eos, _ = mask_responses(torch.tensor([[5, EOS, EOS, EOS]]), [EOS])
    assert padded_with_eos.int().tolist() == [[1, 1, 0, 0]]


def test_rewards_are_the_penalty_of_each_token_and_the_score_on_the_last() -> None:
    mask = torch.tensor([[True, True, False], [True, True, True]])
    rewards = place_rewards(
        tensor([-1.0, -2.0, -9.0], [-1.0, -1.0, -1.0]),
        tensor([-2.0, -1.0, -5.0], [-1.0, -1.0, -1.5]),
        torch.tensor([3.0, -1.0]),
        mask=mask,
        at=mask.sum(1) - 1,
        kl_coef=0.5,
    )
    torch.testing.assert_close(rewards, tensor([-0.5, 3.5, 0.0], [0.0, 0.0, -1.25]))


def test_advantages_by_hand() -> None:
    rewards, values = tensor([0.0, 0.0, 1.0, 0.0]), tensor([0.5, 0.4, 0.2, 0.0])
    torch.testing.assert_close(
        estimate_advantages(rewards, values, gamma=1.0, lam=0.5), tensor([0.0, 0.2, 0.8, 0.0])
    )
    torch.testing.assert_close(
        estimate_advantages(rewards, values, gamma=0.5, lam=1.0), tensor([-0.25, 0.1, 0.8, 0.0])
    )


def test_whitening_leaves_the_padding_out() -> None:
    mask = torch.tensor([[True, True], [True, False]])
    torch.testing.assert_close(
        whiten(tensor([1.0, 2.0], [3.0, 100.0]), mask), tensor([-1.0, 0.0], [1.0, 0.0])
    )


def test_the_coefficient_follows_the_kl_by_a_fifth_at_most() -> None:
    kl = KlController(0.2, target=0.1, horizon=1000)
    kl.update(0.05, n_responses=100)
    assert kl.coefficient == pytest.approx(0.196)
    kl = KlController(0.2, target=0.1, horizon=1000)
    kl.update(0.11, n_responses=100)
    assert kl.coefficient == pytest.approx(0.202)


def test_losses_by_hand() -> None:
    mask = torch.tensor([[True, True, True, False]])
    old = tensor([-1.0, -1.0, -1.0, -1.0])
    new = old + torch.tensor([math.log(1.5), math.log(0.5), math.log(1.5), 3.0])
    loss, clipped = policy_loss(new, old, tensor([1.0, -1.0, -1.0, 7.0]), mask=mask, clip=0.2)
    assert float(loss) == pytest.approx(-1.2 + 0.8 + 1.5)
    assert int(clipped) == 2
    error = value_loss(
        tensor([1.0, 0.1, 0.0, 9.0]),
        tensor([0.0, 0.0, 0.0, 0.0]),
        tensor([2.0, 0.5, 0.0, 0.0]),
        mask=mask,
        clip=0.5,
    )
    assert float(error) == pytest.approx(0.5 * (1.5**2 + 0.4**2))


def test_explained_variance() -> None:
    returns, mask = tensor([1.0, 2.0, 3.0, 50.0]), torch.tensor([[True, True, True, False]])
    assert explain_variance(returns, returns, mask) == pytest.approx(1)
    assert explain_variance(torch.zeros_like(returns), returns, mask) == pytest.approx(0)
    assert explain_variance(-returns, returns, mask) == pytest.approx(-3)
    assert explain_variance(returns, torch.ones_like(returns), mask) == 0.0


def test_every_row_comes_once_before_any_comes_again() -> None:
    seen = [row for step in range(10) for row in choose_rows(step, n_rows=5, batch_size=4, seed=3)]
    rounds = [seen[start : start + 5] for start in range(0, 40, 5)]
    assert all(sorted(one) == [0, 1, 2, 3, 4] for one in rounds)
    assert len({tuple(one) for one in rounds}) > 1


# The roles


def make_policy(model_dir: Path, *, seed: int = 0) -> Policy:
    """A policy whose adapter and value head do something."""
    torch.manual_seed(seed)
    lora = recipe.configure_lora(_settings(), task_type="CAUSAL_LM")
    base = AutoModelForCausalLM.from_pretrained(model_dir)
    policy = Policy(base, lora, stop_ids=[EOS], pad_id=PAD)
    for name, parameter in policy.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    torch.nn.init.normal_(policy.head.weight)
    return policy


def _settings() -> Any:
    from trainers.specs.methods import ResolvedPpo

    asked = parse_method({"type": "ppo", "ppo": {"hyperparameters": {"lora_dropout": 0.1}}}, None)
    return ResolvedPpo.model_validate(resolve(asked, n_examples=8, seed=0))


def rows_of_tokens(texts: Texts, row: int) -> tuple[list[int], list[int]]:
    """(prompt, response) without padding."""
    prompt = texts.tokens[row, : texts.n_prompt][texts.attention[row, : texts.n_prompt] == 1]
    return prompt.tolist(), texts.responses[row][texts.mask[row]].tolist()


def test_predictions_are_those_of_each_text_alone(tiny_model: Path) -> None:
    policy = make_policy(tiny_model)
    torch.manual_seed(1)
    texts = policy.sample(PROMPTS, max_new_tokens=7)
    said, reference = policy.predict(texts), policy.predict_reference(texts)
    plain = AutoModelForCausalLM.from_pretrained(tiny_model)
    for i, expected_prompt in enumerate(PROMPTS):
        prompt, response = rows_of_tokens(texts, i)
        assert prompt == expected_prompt
        ids, targets = torch.tensor([prompt + response]), torch.tensor(response)
        output = policy.model(ids, output_hidden_states=True)
        logits = output.logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        values = policy.head(output.hidden_states[-1])[0, len(prompt) - 1 : -1, 0]
        n = len(response)
        torch.testing.assert_close(said.logprobs[i, :n], logits.gather(1, targets[:, None])[:, 0])
        torch.testing.assert_close(said.values[i, :n], values)
        torch.testing.assert_close(said.entropies[i, :n], -(logits.exp() * logits).sum(-1))
        base = plain(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        torch.testing.assert_close(reference[i, :n], base.gather(1, targets[:, None])[:, 0])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_first_ratio_is_exactly_one_and_the_gradient_is_the_policys(
    tiny_model: Path, checkpointing: bool
) -> None:
    policy = make_policy(tiny_model)
    texts = policy.sample(PROMPTS, max_new_tokens=7)
    with torch.no_grad():
        old = policy.predict(texts)
    policy.predict_reference(texts)
    with policy.checkpointing(checkpointing):
        new = policy.predict(texts)
        assert torch.equal((new.logprobs - old.logprobs).exp(), torch.ones_like(old.logprobs))
        ((new.logprobs * texts.mask).sum() + new.values.sum()).backward()
    gradients = {n: p.grad for n, p in policy.model.named_parameters() if p.grad is not None}
    assert {n for n, p in policy.model.named_parameters() if p.requires_grad} == set(gradients)
    assert all(bool(gradient.abs().sum() > 0) for gradient in gradients.values())
    assert policy.head.weight.grad is not None
    # By the book: the plain model in evaluation mode, without checkpointing.
    other = make_policy(tiny_model)
    logits = other.model(
        texts.tokens,
        attention_mask=texts.attention,
        position_ids=(texts.attention.cumsum(1) - 1).clamp(min=0),
    ).logits
    logprobs = (
        logits[:, texts.n_prompt - 1 : -1].log_softmax(-1).gather(2, texts.responses[..., None])[..., 0]
    )
    (logprobs * texts.mask).sum().backward()
    for name, parameter in other.model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-5)


def test_sampling_is_from_the_policy_itself(tiny_model: Path) -> None:
    """The model's own settings for generation (greedy, top-k, penalties) have no say."""
    policy = make_policy(tiny_model)
    policy.base.generation_config.update(do_sample=False, top_k=1, repetition_penalty=5.0)
    torch.manual_seed(0)
    texts = policy.sample([[1, 40, 41]] * 512, max_new_tokens=1)
    expected = policy.predict(texts.take(slice(0, 1)))
    surprise = -policy.predict(texts).logprobs.mean().detach()
    assert float(surprise) == pytest.approx(float(expected.entropies[0, 0].detach()), abs=0.15)


# The reward model


def make_reward_model(base_dir: Path, folder: Path, *, trained: bool = True, seed: int = 5) -> Path:
    """A reward model that likes some last tokens better than others, by a direction in their states.

    Beside it, the adapter it was merged from.
    """
    model: Any = AutoModelForSequenceClassification.from_pretrained(base_dir, num_labels=1)
    torch.manual_seed(seed)
    direction = torch.randn_like(model.score.weight)
    model.score.weight.data = direction / direction.norm()
    model.config.pad_token_id = PAD
    if trained:
        setattr(model.config, TRAINED_HEAD_KEY, True)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base_dir).save_pretrained(folder)
    lora = recipe.configure_lora(_settings(), task_type="SEQ_CLS")
    adapter = folder.with_name(f"{folder.name}-adapter")
    get_peft_model(model, lora).save_pretrained(adapter)
    AutoTokenizer.from_pretrained(base_dir).save_pretrained(adapter)
    return folder


@pytest.fixture
def reward_model(tiny_model: Path, tmp_path: Path) -> Path:
    return make_reward_model(tiny_model, tmp_path / "reward-model")


@pytest.fixture(scope="module")
def reward_run(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of our own reward method, with its merged model beside it."""

    root = tmp_path_factory.mktemp("reward")
    run_dir = root / "run"
    run_dir.mkdir()
    rows = [
        {**row, "response_chosen": "Rest and drink water.", "response_rejected": f"No {i}"}
        for i, row in enumerate(QUESTIONS)
    ]
    (run_dir / "train").write_text("".join(json.dumps(row) + "\n" for row in rows))
    wanted = {"learning_rate": 5e-3, "max_steps": 6, "batch_size": 8, "dtype": "float32"}
    asked = parse_method({"type": "reward", "reward": {"hyperparameters": wanted}}, None)
    spec = RunSpec(
        job_id="ftjob-reward",
        attempt=1,
        method="reward",
        hyperparameters=resolve(asked, n_examples=len(rows), seed=3),
        seed=3,
        model_dir=tiny_model,
        model_id="tiny",
        train_file=run_dir / "train",
        cache_dir=root / "cache",
    )
    (run_dir / "spec.json").write_text(spec.model_dump_json())
    assert run(run_dir, stop=StopRequest()) == 0
    merge_run(run_dir, out_dir=root / "merged")
    return root


@pytest.mark.parametrize("same", [True, False])
def test_only_what_reads_as_the_policy_writes_shares_its_base(
    tiny_model: Path, reward_run: Path, tmp_path: Path, same: bool
) -> None:
    adapter = shutil.copytree(reward_run / "run" / "output", tmp_path / "adapter")
    if not same:
        (adapter / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    spec = RunSpec.model_construct(reward_model_dir=reward_run / "merged", reward_adapter_dir=adapter)
    scorer = load_scorer(
        spec,
        make_policy(tiny_model),
        tokenizer=AutoTokenizer.from_pretrained(tiny_model),
        dtype=torch.float32,
    )
    assert isinstance(scorer, ScorerOnBase if same else ScorerBeside)


def test_padded_scores_equal_those_one_by_one_in_both_places(tiny_model: Path, reward_run: Path) -> None:
    policy = make_policy(tiny_model)
    torch.manual_seed(2)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    messages = [[{"role": "user", "content": str(row["question"])}] for row in QUESTIONS[:3]]
    messages[1] = [{"role": "user", "content": "Hi"}]
    prompts = [
        tokenizer.apply_chat_template(one, add_generation_prompt=True)["input_ids"] for one in messages
    ]
    sampled = policy.sample(prompts, max_new_tokens=9)
    # What a tokenizer would make of it, and of three lengths, two of them ended.
    tokens, attention, mask = sampled.tokens.clone(), sampled.attention.clone(), sampled.mask.clone()
    words = tokenizer("Rest and drink water.")["input_ids"][:6]
    tokens[:, sampled.n_prompt :], attention[:, sampled.n_prompt :], mask[:] = PAD, 0, False
    ended = torch.tensor([True, True, False])
    for i, response in enumerate([[*words[:2], EOS], [*words[:5], EOS], words]):
        n = len(response)
        tokens[i, sampled.n_prompt : sampled.n_prompt + n] = torch.tensor(response)
        attention[i, sampled.n_prompt : sampled.n_prompt + n] = 1
        mask[i, :n] = True
    texts = Texts(tokens, attention, sampled.n_prompt, mask, ended)
    before = policy.predict(texts)
    scorer = ScorerOnBase(policy, reward_run / "run" / "output", pad_id=PAD)
    beside = ScorerBeside(
        reward_run / "merged", tokenizer=tokenizer, device=policy.device, dtype=torch.float32
    )
    merged = AutoModelForSequenceClassification.from_pretrained(reward_run / "merged")
    together = scorer.score(texts, messages)
    torch.testing.assert_close(beside.score(texts, messages), together)
    for i in range(3):
        prompt, response = rows_of_tokens(texts, i)
        alone = merged(torch.tensor([prompt + response])).logits[0, 0]
        torch.testing.assert_close(together[i], alone, rtol=1e-4, atol=1e-5)
    assert len({round(float(score), 4) for score in together}) == 3
    # The policy is as it was, and the only one that learns.
    after = policy.predict(texts)
    assert torch.equal(before.logprobs, after.logprobs)
    assert not any(".reward." in n and p.requires_grad for n, p in policy.model.named_parameters())
    assert all(p.requires_grad for p in policy.adapter_parameters)


@pytest.fixture
def make_ppo_run(make_run, reward_model: Path) -> Callable[..., Path]:
    def make(name: str = "1", **settings: Any) -> Path:
        spec_fields = {
            "reward_model_dir": str(settings.pop("reward_model_dir", reward_model)),
            "reward_adapter_dir": settings.pop("reward_adapter_dir", None),
            "reward_model_digest": settings.pop("reward_model_digest", "abc"),
        }
        usual = {
            "batch_size": 8,
            "micro_batch_size": 4,
            "output_max_length": 6,
            "ppo_epochs": 2,
            "learning_rate": 5e-3,
            "warmup_ratio": 0,
            "n_valid": 0,
        }
        rows = settings.pop("rows", QUESTIONS)
        run_dir = make_run(name, method="ppo", rows=rows, **usual | settings)
        spec = json.loads((run_dir / "spec.json").read_text())
        spec.update({k: str(v) if isinstance(v, Path) else v for k, v in spec_fields.items()})
        write_json(run_dir / "spec.json", spec)
        return run_dir

    return make


def train(run_dir: Path, *, stop: StopRequest | None = None) -> dict:
    assert run(run_dir, stop=stop or StopRequest()) == 0
    return json.loads((run_dir / "exit.json").read_text())


def build_steerable_model(tiny: Path, folder: Path) -> Path:
    """The tiny model with a head of its own, so that it can say what a reward model may like.

    As it is, its answers are uniform whatever is learned: a hidden state of length 8 against
    embeddings of length 0.16. A longer tied head would repeat the last token; a rotated one does not.
    """
    tied = AutoModelForCausalLM.from_pretrained(tiny)
    config = LlamaConfig.from_pretrained(tiny, tie_word_embeddings=False)
    model = LlamaForCausalLM(config)
    model.model.load_state_dict(tied.model.state_dict())
    torch.manual_seed(0)
    rotation, _ = torch.linalg.qr(torch.randn(64, 64))
    model.lm_head.weight.data = 9.0 * tied.model.embed_tokens.weight.data @ rotation
    model.model.embed_tokens.weight.data *= 3.0
    model.generation_config = tied.generation_config
    shutil.copytree(tiny, folder)
    model.save_pretrained(folder)
    return folder


def test_it_learns_what_the_reward_model_likes_and_stays_near_the_reference(
    make_ppo_run, events_of, tiny_model: Path, tmp_path: Path
) -> None:
    target = 0.6
    base = build_steerable_model(tiny_model, tmp_path / "base")
    run_dir = make_ppo_run(
        model_dir=base,
        reward_model_dir=make_reward_model(base, tmp_path / "rm"),
        reward_adapter_dir=tmp_path / "rm-adapter",
        batch_size=128,
        micro_batch_size=128,
        max_steps=26,
        lr_scheduler_type="linear",
        output_max_length=4,
        init_kl_coef=0.25,
        target_kl=target,
        missing_eos_penalty=0,
    )
    assert train(run_dir)["reason"] == "done"
    steps = [event["data"] for event in events_of(run_dir, "metrics")]
    start, spread = steps[0]["train_reward"], steps[0]["train_reward_std"]
    late = steps[-6:]
    reward = sum(step["train_reward"] for step in late) / len(late)
    assert steps[0]["train_kl"] == pytest.approx(0, abs=1e-5)
    assert reward > start + spread
    assert all(step["train_kl"] < 2 * target for step in late)


def test_a_run_from_spec_to_a_merged_model(make_ppo_run, events_of, reward_run: Path, tmp_path: Path) -> None:
    run_dir = make_ppo_run(
        max_steps=3,
        reward_model_dir=reward_run / "merged",
        reward_adapter_dir=reward_run / "run" / "output",
        mini_batch_size=4,
        gradient_checkpointing=True,
        n_valid=3,
        eval_steps=2,
    )
    end = train(run_dir)
    assert (end["reason"], end["step"]) == ("done", 3)
    data = [event["data"] for event in events_of(run_dir, "metrics")]
    assert {
        "train_reward",
        "train_reward_std",
        "train_kl",
        "train_kl_coef",
        "train_entropy",
        "train_clip_fraction",
        "train_explained_variance",
        "train_response_tokens",
        "train_policy_loss",
        "train_value_loss",
        "train_loss",
        "learning_rate",
    } <= data[1].keys()
    assert [step["optimizer_steps"] for step in data if "optimizer_steps" in step] == [4, 4, 4]
    assert sum("valid_reward" in step for step in data) == 3  # before, at step 2, and at the end
    samples = [e["data"] for e in events_of(run_dir, "message") if e["data"].get("code") == "sample"]
    assert samples
    assert samples[0]["prompt"].startswith("Patient")
    names = {path.name for path in (run_dir / "output").iterdir()}
    assert names >= {
        "adapter_config.json",
        "adapter_model.safetensors",
        "tokenizer.json",
        "trainer_state.json",
    }
    assert names >= {"train_results.json", "eval_results.json", "chat_template.jinja"}
    assert not any("score" in name for name in load_file(run_dir / "output" / "adapter_model.safetensors"))
    config = json.loads((run_dir / "output" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "tiny"
    report = merge_run(run_dir, out_dir=tmp_path / "merged")
    assert report["adapter_rel_effect"] > 0
    assert not list((run_dir / "output").rglob("*.pt"))


class StopAt(StopRequest):
    """Asked to stop once the run has told the numbers of a step."""

    def __init__(self, run_dir: Path, *, step: int):
        self._events = run_dir / "events.jsonl"
        self._step = step

    @property
    def requested(self) -> bool:
        return self._events.exists() and f'"step": {self._step},' in self._events.read_text()


def numbers_of(events: list[dict]) -> dict[int, dict[str, float]]:
    timed = ("step_time_s", "tokens_per_s")
    return {e["step"]: {k: v for k, v in e["data"].items() if k not in timed} for e in events}


def test_a_resumed_run_equals_the_uninterrupted_one(make_ppo_run, events_of) -> None:
    settings = {
        "max_steps": 5,
        "save_steps": 2,
        "horizon": 20,
        "target_kl": 0.01,
        "lr_scheduler_type": "linear",
    }
    straight = make_ppo_run("1", **settings)
    whole = train(straight)
    first = make_ppo_run("2", **settings)
    assert (train(first, stop=StopAt(first, step=3))["reason"], (first / "output").exists()) == (
        "stopped",
        False,
    )
    ((_, _), (step, newest)) = list_checkpoints(first / "checkpoints")
    assert step == 3
    head = load_file(newest / "value_head.safetensors")["weight"]
    assert float(head.abs().sum()) > 0
    second = make_ppo_run("3", resume_roots=(first / "checkpoints",), **settings)
    end = train(second)
    assert (end["reason"], end["resumed_from"]) == ("done", 3)
    one, two = numbers_of(events_of(first, "metrics")), numbers_of(events_of(second, "metrics"))
    assert one | two == numbers_of(events_of(straight, "metrics"))
    coefficients = {n: numbers["train_kl_coef"] for n, numbers in (one | two).items()}
    assert len(set(coefficients.values())) == 5
    assert end["metrics"] == whole["metrics"]
    assert end["trained_tokens"] == whole["trained_tokens"]
    for name in ("adapter_model.safetensors", "value_head.safetensors"):
        ours = load_file(second / "checkpoints" / "step-5" / name)
        theirs = load_file(straight / "checkpoints" / "step-5" / name)
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.long
def test_two_ranks_learn_together(make_ppo_run, events_of) -> None:
    run_dir = make_ppo_run(nproc=2, max_steps=2, micro_batch_size=2, mini_batch_size=2, n_valid=3)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*command, "-m", "trainers.run", run_dir],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    end = json.loads((run_dir / "exit.json").read_text())
    assert (end["reason"], end["step"]) == ("done", 2)
    steps = [e["data"] for e in events_of(run_dir, "metrics") if "train_kl" in e["data"]]
    assert [step["optimizer_steps"] for step in steps] == [4, 4]
    # Counted over both: eight answers a round.
    assert end["trained_tokens"] == pytest.approx(8 * sum(step["train_response_tokens"] for step in steps))
    assert (run_dir / "output" / "adapter_model.safetensors").is_file()


def test_early_stopping_leaves_the_round(make_ppo_run, events_of) -> None:
    settings = {"max_steps": 1, "target_kl": 1e-4, "ppo_epochs": 5, "learning_rate": 2e-2}
    counts = {}
    for name, early in (("1", False), ("2", True)):
        run_dir = make_ppo_run(name, early_stopping=early, **settings)
        train(run_dir)
        counts[early] = events_of(run_dir, "metrics")[0]["data"]["optimizer_steps"]
    assert counts == {False: 5, True: 2}  # the first pass ends before anything has moved


def test_a_reward_model_without_a_trained_head_is_refused(
    make_ppo_run, tiny_model: Path, tmp_path: Path
) -> None:
    untrained = make_reward_model(tiny_model, tmp_path / "untrained", trained=False)
    for name, folder in (("1", untrained), ("2", tiny_model)):
        run_dir = make_ppo_run(name, reward_model_dir=folder)
        assert run(run_dir, stop=StopRequest()) == 3
        end = json.loads((run_dir / "exit.json").read_text())
        assert end["reason"] == "bad_data"
        assert "trained head" in end["message"]


def test_numbers_that_are_none_end_the_run_before_the_weights_do(make_ppo_run, reward_model: Path) -> None:
    broken = AutoModelForSequenceClassification.from_pretrained(reward_model)
    broken.score.weight.data[0, 0] = math.nan
    broken.save_pretrained(reward_model)
    run_dir = make_ppo_run()
    with pytest.raises(ArithmeticError):
        run(run_dir, stop=StopRequest())
    assert json.loads((run_dir / "exit.json").read_text())["reason"] == "nan_loss"
    assert list_checkpoints(run_dir / "checkpoints") == []


def test_another_reward_model_is_another_run(make_ppo_run) -> None:
    one, two = (load_run_spec(make_ppo_run(n, reward_model_digest=d)) for n, d in (("1", "a"), ("2", "b")))
    assert one.settings_sha256() != two.settings_sha256()


# The rows


@pytest.mark.parametrize(
    ("row", "last"),
    [
        ({"question": "Is it flu?"}, "Is it flu?"),
        ({"question": "Is it flu?", "system_prompt": "Be brief."}, "Is it flu?"),
        ({"prompt": "Is it flu?"}, "Is it flu?"),
        ({"prompt": [{"role": "user", "content": "Is it flu?"}]}, "Is it flu?"),
        ({"messages": [{"role": "user", "content": "Is it flu?"}]}, "Is it flu?"),
        ({"instruction": "Is it", "input": "flu?", "output": "Yes"}, "Is it\nflu?"),
        ({"conversations": [{"from": "human", "value": "Flu?"}, {"from": "gpt", "value": "Yes"}]}, "Flu?"),
    ],
)
def test_rows_become_prompts(make_ppo_run, tiny_model: Path, row: dict, last: str) -> None:
    from trainers.events import Events
    from trainers.prepare import prepare
    from trainers.prompts import read_messages

    run_dir = make_ppo_run(rows=[row])
    prepared = prepare(run_dir, events=Events(None))
    (found,) = recipe.load_rows(prepared["train"])
    assert read_messages(found["message_bytes"])[-1] == {"role": "user", "content": last}
    text = AutoTokenizer.from_pretrained(tiny_model).decode(found["prompt_ids"])
    assert text.endswith(f"{last}<|im_end|>\n<|im_start|>assistant\n")


def test_prompts_are_no_conversations(make_run) -> None:
    run_dir = make_run(rows=QUESTIONS)
    assert run(run_dir, stop=StopRequest()) == 3
    message = json.loads((run_dir / "exit.json").read_text())["message"]
    assert message == "line 1: this is a prompt row, but supervised learns from conversation rows"


def test_a_file_of_prompts_may_hold_answered_ones(write_jsonl) -> None:
    user, answer = {"role": "user", "content": "Flu?"}, {"role": "assistant", "content": "Yes."}
    rows = Rows(write_jsonl([{"messages": [user]}, {"messages": [user, answer]}]))
    assert [row.messages for row in rows] == [[user], [user]]
    assert (rows.kind, rows.format) == ("prompt", "prompt_messages")


def test_the_mini_batch_must_divide() -> None:
    asked = parse_method(
        {"type": "ppo", "ppo": {"hyperparameters": {"batch_size": 8, "mini_batch_size": 3}}}, None
    )
    with pytest.raises(SpecError, match="mini_batch_size"):
        resolve(asked, n_examples=8, seed=0)
