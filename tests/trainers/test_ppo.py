"""PPO on the tiny model: its arithmetic by hand, its roles on one base, and what scores the answers."""

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
)

from tests.trainers.judged import (
    PAD,
    QUESTIONS,
    make_reward_model,
    ppo_settings,
)
from trainers.folders.exits import DataError
from trainers.ppo import choose_rows
from trainers.rl.ppo_losses import (
    KlController,
    estimate_advantages,
    explain_variance,
    place_rewards,
    policy_loss,
    value_loss,
    whiten,
)
from trainers.rl.ppo_reward import ScorerOnBase, load_scorer
from trainers.rl.ppo_roles import Policy
from trainers.rl.scorers import ScorerBeside
from trainers.rows.formats import Prompt
from trainers.specs import RunSpec
from trainers.tokens.run_tokenizer import read_template
from trainers.training import recipe
from trainers.training.draws import Texts, mask_responses

EOS = 2
PROMPTS = [[1, 40, 41], [1, 50, 51, 52, 53, 54], [1, 60]]


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
    lora = recipe.configure_lora(ppo_settings(), task_type="CAUSAL_LM")
    base = AutoModelForCausalLM.from_pretrained(model_dir)
    policy = Policy(base, lora, stop_ids=[EOS], pad_id=PAD)
    for name, parameter in policy.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    torch.nn.init.normal_(policy.head.weight)
    return policy


def rows_of_tokens(texts: Texts, row: int) -> tuple[list[int], list[int]]:
    """(prompt, response) without padding."""
    prompt = texts.tokens[row, : texts.n_prompt][texts.attention[row, : texts.n_prompt] == 1]
    return prompt.tolist(), texts.responses[row][texts.mask[row]].tolist()


def test_predictions_are_those_of_each_text_alone(tiny_model: Path) -> None:
    policy = make_policy(tiny_model)
    torch.manual_seed(1)
    texts = policy.sample(PROMPTS, max_new_tokens=7, seeds=[1, 2, 3])
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
        # The head's weights are of size one: its sums are as inexact as its terms are large.
        torch.testing.assert_close(said.values[i, :n], values, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(said.entropies[i, :n], -(logits.exp() * logits).sum(-1))
        base = plain(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        torch.testing.assert_close(reference[i, :n], base.gather(1, targets[:, None])[:, 0])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_first_ratio_is_exactly_one_and_the_gradient_is_the_policys(
    tiny_model: Path, checkpointing: bool
) -> None:
    policy = make_policy(tiny_model)
    texts = policy.sample(PROMPTS, max_new_tokens=7, seeds=[1, 2, 3])
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
    texts = policy.sample([[1, 40, 41]] * 512, max_new_tokens=1, seeds=list(range(512)))
    expected = policy.predict(texts.take(slice(0, 1)))
    surprise = -policy.predict(texts).logprobs.mean().detach()
    assert float(surprise) == pytest.approx(float(expected.entropies[0, 0].detach()), abs=0.15)


def test_an_answer_is_drawn_alike_in_any_company(tiny_model: Path) -> None:
    policy = make_policy(tiny_model)
    seeds = [11, 12, 13]
    together = policy.sample(PROMPTS, max_new_tokens=7, seeds=seeds)
    for i, prompt in enumerate(PROMPTS):
        alone = policy.sample([prompt], max_new_tokens=7, seeds=[seeds[i]])
        assert rows_of_tokens(alone, 0) == rows_of_tokens(together, i)
    other = policy.sample(PROMPTS, max_new_tokens=7, seeds=[21, 22, 23])
    assert not torch.equal(other.tokens, together.tokens)


# The reward model


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
    sampled = policy.sample(prompts, max_new_tokens=9, seeds=[1, 2, 3])
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
    written = [Prompt(1, one) for one in messages]
    together = scorer.score(texts, written)
    torch.testing.assert_close(beside.score(texts, written), together)
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


def test_a_reward_model_on_another_base_reads_the_text_in_a_template_of_its_own(
    tiny_model: Path, tokenizer_with, tmp_path: Path
) -> None:
    base = tokenizer_with(
        "{% for m in messages %}{{ m['role'] + '>' + m['content'] + eos_token }}{% endfor %}"
    )
    other = LlamaForCausalLM(LlamaConfig.from_pretrained(base, hidden_size=32, num_hidden_layers=1))
    other.save_pretrained(base)
    folder = make_reward_model(base, tmp_path / "other-judge")
    policy, tokenizer = make_policy(tiny_model), AutoTokenizer.from_pretrained(tiny_model)
    spec = RunSpec.model_construct(reward_model_dir=folder, reward_adapter_dir=None)
    scorer = load_scorer(spec, policy, tokenizer=tokenizer, dtype=torch.float32)
    answers = ["Rest and drink water.", "See a doctor soon."]
    words = [tokenizer(answer)["input_ids"] for answer in answers]
    responses = [[*words[0], EOS], words[1]]  # the second was cut short
    width = max(map(len, responses))
    tokens = torch.tensor([[1, 40, *r, *[PAD] * (width - len(r))] for r in responses])
    mask = torch.tensor([[i < len(r) for i in range(width)] for r in responses])
    attention = torch.cat([torch.ones(2, 2), mask], 1).long()
    texts = Texts(tokens, attention, 2, mask, torch.tensor([True, False]))
    scores = scorer.score(
        texts, [Prompt(1, [{"role": "user", "content": question}]) for question in ("Flu?", "A rash?")]
    )
    judge: Any = AutoModelForSequenceClassification.from_pretrained(folder)
    for score, text in zip(
        scores,
        (
            "user>Flu?<|im_end|>assistant>Rest and drink water.<|im_end|>",
            "user>A rash?<|im_end|>assistant>See a doctor soon.",
        ),
        strict=True,
    ):
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
        torch.testing.assert_close(score, judge(ids).logits[0, 0], rtol=1e-4, atol=1e-5)


def test_a_reward_model_beside_the_policy_must_be_able_to_read_the_tools(
    tiny_model: Path, reward_run: Path, tmp_path: Path
) -> None:
    knows = tmp_path / "knows"
    shutil.copytree(reward_run / "merged", knows)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    (knows / "chat_template.jinja").write_text(read_template("qwen", tokenizer))
    policy = make_policy(tiny_model)
    tool = {"type": "function", "function": {"name": "look_up", "description": "d"}}
    question = [{"role": "user", "content": "Hi"}]
    texts = policy.sample([tokenizer("Hi")["input_ids"]], max_new_tokens=4, seeds=[1])
    scores = []
    for model_dir in (knows, reward_run / "merged"):
        scorer = ScorerBeside(model_dir, tokenizer=tokenizer, device=policy.device, dtype=torch.float32)
        scores.append(float(scorer.score(texts, [Prompt(1, question)])))
        if model_dir == knows:
            assert float(scorer.score(texts, [Prompt(1, question, [tool])])) != scores[0]
        else:
            with pytest.raises(DataError, match=r"line 1: the reward model .* leaves out tools\[0\]"):
                scorer.score(texts, [Prompt(1, question, [tool])])
