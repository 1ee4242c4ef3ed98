"""What scores the responses: a reward model of ours, on the policy's base where it can be, else beside it."""

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor

from trainers.rl.ppo_roles import POLICY, Policy, number_positions
from trainers.rl.scorers import Scorer, ScorerBeside, refuse_judge, require_head
from trainers.rows.formats import Prompt
from trainers.specs import RunSpec
from trainers.tokens.conversations import load_tokenizer
from trainers.training.draws import Texts

REWARD = "reward"  # the adapter's name on the policy's base


def load_scorer(spec: RunSpec, policy: Policy, *, tokenizer: Any, dtype: torch.dtype) -> Scorer:
    """The job's reward model. Raises SpecError when it has no trained head or does not fit."""
    model_dir, config = require_head(spec)
    if spec.reward_adapter_dir and _reads_alike(spec.reward_adapter_dir, tokenizer):
        return ScorerOnBase(policy, spec.reward_adapter_dir, pad_id=config["pad_token_id"])
    return ScorerBeside(model_dir, tokenizer=tokenizer, device=policy.device, dtype=dtype)


def _reads_alike(adapter_dir: Path, tokenizer: Any) -> bool:
    """Whether the adapter alone makes the reward model, and learnt texts as the policy writes them."""
    config: Any = LoraConfig.from_pretrained(str(adapter_dir))
    heads = {"score", "classifier"}
    judge = load_tokenizer(adapter_dir)
    return set(config.modules_to_save or ()) <= heads and judge.chat_template == tokenizer.chat_template


class ScorerOnBase:
    """A reward model as an adapter and a head on the policy's own base: no second model in memory."""

    where = "an adapter on the policy's base"

    def __init__(self, policy: Policy, adapter_dir: Path, *, pad_id: int):
        self._policy, self._pad_id = policy, pad_id
        weights = load_file(adapter_dir / "adapter_model.safetensors")
        heads = [name for name in weights if name.endswith("score.weight")]
        if len(heads) != 1:
            raise refuse_judge("its adapter has no trained head", method="ppo")
        self._head = weights.pop(heads[0]).to(policy.device).float()
        config: Any = LoraConfig.from_pretrained(str(adapter_dir))
        # PEFT would look for the head in the base, find none, and drop it without a word.
        config.task_type, config.modules_to_save, config.inference_mode = "CAUSAL_LM", None, True
        policy.model.add_adapter(REWARD, config)
        set_peft_model_state_dict(policy.model, weights, adapter_name=REWARD)
        placed = get_peft_model_state_dict(policy.model, adapter_name=REWARD, save_embedding_layers=False)
        if odd := sorted(placed.keys() ^ weights.keys()):
            raise refuse_judge(f"its adapter does not fit the policy's base: {odd[0]}", method="ppo")
        policy.model.eval()
        policy.model.set_adapter(POLICY)

    @torch.no_grad()
    def score(self, texts: Texts, prompts: list[Prompt]) -> Tensor:  # noqa: ARG002 - the same template
        """[rows] scores, read where training read them: at the last token that is not the model's padding."""
        policy = self._policy
        policy.model.set_adapter(REWARD, inference_mode=True)
        try:
            backbone = getattr(policy.base, policy.base.base_model_prefix)
            states = backbone(
                input_ids=texts.tokens,
                attention_mask=texts.attention,
                position_ids=number_positions(texts.attention),
                use_cache=False,
            ).last_hidden_state
        finally:
            policy.model.set_adapter(POLICY)
        is_read = (texts.attention == 1) & (texts.tokens != self._pad_id)
        last = (is_read * torch.arange(is_read.shape[1], device=is_read.device)).argmax(1)
        pooled = states[torch.arange(len(states), device=states.device), last]
        return (pooled.float() @ self._head.T).squeeze(-1)
