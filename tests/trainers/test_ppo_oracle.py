"""Our PPO on a rollout that TRL 1.12.0's PPOTrainer recorded (benchmarks/ppo_oracle): the same numbers."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from trainers.rl.ppo_losses import (
    estimate_advantages,
    place_rewards,
    policy_loss,
    value_loss,
    whiten,
)
from trainers.rl.ppo_reward import ScorerOnBase
from trainers.rl.ppo_roles import POLICY, Policy
from trainers.training.draws import Texts, mask_responses

FIXTURE = Path(__file__).parent / "fixtures" / "ppo_oracle.safetensors"
PAD, EOS = 0, 2
LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "up_proj", "down_proj"]}
LEARNING_RATE, VF_COEF, CLIP, KL_COEF, PENALTY = 1e-3, 0.1, 0.2, 0.2, 1.0


@pytest.fixture(scope="module")
def recorded() -> dict[str, Tensor]:
    return load_file(FIXTURE)


def part(recorded: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): v.clone() for n, v in recorded.items() if n.startswith(prefix)}


@pytest.fixture
def policy(recorded: dict[str, Tensor]) -> Policy:
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=False,
    )
    base = LlamaForCausalLM(config)
    base.load_state_dict(part(recorded, "base."))
    policy = Policy(base, LoraConfig(task_type="CAUSAL_LM", **LORA), stop_ids=[EOS], pad_id=PAD)
    set_peft_model_state_dict(policy.model, part(recorded, "policy."), adapter_name=POLICY)
    policy.head.load_state_dict(part(recorded, "value."))
    return policy


@pytest.fixture
def texts(recorded: dict[str, Tensor]) -> Texts:
    tokens, n_prompt = recorded["tokens"], int(recorded["n_prompt"])
    mask, ended = mask_responses(tokens[:, n_prompt:], [EOS])
    attention = torch.cat([tokens[:, :n_prompt] != PAD, mask], 1).long()
    return Texts(tokens, attention, n_prompt, mask, ended)


@pytest.fixture
def with_end(texts: Texts) -> Texts:
    """TRL values the state after an answer's end as well, where there is room, and puts the score there."""
    positions = torch.arange(texts.mask.shape[1])
    return replace(texts, mask=positions <= texts.mask.sum(1, keepdim=True))


def close(ours: Tensor, theirs: Tensor, mask: Tensor) -> None:
    torch.testing.assert_close(ours[mask], theirs[mask], rtol=0, atol=1e-4)


def test_the_roles_agree(recorded, policy: Policy, texts: Texts, with_end: Texts, tmp_path: Path) -> None:
    assert torch.equal(texts.mask, recorded["mask"])
    assert not texts.ended.all()
    assert not texts.mask.all()
    close(policy.predict(texts).logprobs, recorded["logprobs"], texts.mask)
    close(policy.predict_reference(texts), recorded["ref_logprobs"], texts.mask)
    close(policy.predict(with_end).values, recorded["values"], with_end.mask)
    LoraConfig(task_type="SEQ_CLS", **LORA).save_pretrained(str(tmp_path))
    save_file(part(recorded, "reward."), tmp_path / "adapter_model.safetensors")
    scores = ScorerOnBase(policy, tmp_path, pad_id=PAD).score(texts, [])
    close(scores, recorded["scores"], torch.ones_like(texts.ended))


def test_the_advantages_agree(recorded, texts: Texts, with_end: Texts) -> None:
    rewards = place_rewards(
        recorded["logprobs"],
        recorded["ref_logprobs"],
        recorded["scores"] - PENALTY * ~texts.ended,
        mask=texts.mask,
        at=with_end.mask.sum(1) - 1,
        kl_coef=KL_COEF,
    )
    values = recorded["values"] * with_end.mask
    advantages = estimate_advantages(rewards, values, gamma=1.0, lam=0.95)
    close(advantages, recorded["advantages"], with_end.mask)
    close(whiten(advantages, texts.mask), recorded["whitened"], texts.mask)


def test_the_losses_agree_before_and_after_a_step(
    recorded, policy: Policy, texts: Texts, with_end: Texts
) -> None:
    parameters = [*policy.adapter_parameters, *policy.head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0)
    old_values = recorded["values"] * with_end.mask
    returns = (recorded["advantages"] + recorded["values"]) * with_end.mask
    for step in range(2):
        new = policy.predict(with_end)
        loss, clipped = policy_loss(
            new.logprobs, recorded["logprobs"], recorded["whitened"], mask=texts.mask, clip=CLIP
        )
        error = value_loss(new.values, old_values, returns, mask=with_end.mask, clip=CLIP)
        loss, error = loss / texts.mask.sum(), error / with_end.mask.sum()
        assert float(loss.detach()) == pytest.approx(float(recorded["policy_losses"][step]), abs=1e-3)
        assert float(error.detach()) == pytest.approx(float(recorded["value_losses"][step]), abs=1e-3)
        assert float(clipped / texts.mask.sum()) == pytest.approx(
            float(recorded["clip_fractions"][step]), abs=1e-3
        )
        (loss + VF_COEF * error).backward()
        optimizer.step()
        optimizer.zero_grad()
