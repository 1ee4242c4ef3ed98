"""Records one rollout and two passes of TRL 1.12.0's PPOTrainer: what ours must compute of the same answers.

TRL has dropped PPO since, so this runs in an environment of its own (README.md) and writes the fixture that
tests/trainers/test_ppo_oracle.py replays. Its value model is a linear head on the policy's detached state, as
ours is; nothing else of TRL is replaced, its functions are only listened to.
"""

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from tokenizers import Tokenizer, models
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

PAD, BOS, EOS, VOCABULARY = 0, 1, 2, 64
ROWS, RESPONSE = 8, 12
SEED = 6
LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "up_proj", "down_proj"]}


def build_base() -> LlamaForCausalLM:
    """A random llama that is far from uniform, and ends some of its answers early."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    model.lm_head.weight.data *= 10
    return model


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Ids only: nothing is ever written as text."""
    words = {f"w{i}": i for i in range(VOCABULARY)}
    raw = Tokenizer(models.WordLevel(words))
    special = {"pad_token": "w0", "bos_token": "w1", "eos_token": "w2"}
    return PreTrainedTokenizerFast(tokenizer_object=raw, padding_side="left", **special)


def randomize(model: torch.nn.Module, *, seed: int) -> None:
    """Gives the fresh adapter something to say."""
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)


class DetachedValue(torch.nn.Module):
    """A value model that TRL accepts: a linear head on the state of the policy's own layers."""

    base_model_prefix = "layers_of_policy"

    def __init__(self, policy: LlamaForCausalLM):
        super().__init__()
        backbone = policy.model

        def run(**inputs: Any) -> Any:
            with torch.no_grad():
                return backbone(**inputs)

        self.layers_of_policy = run
        self.score = torch.nn.Linear(32, 1)
        torch.manual_seed(3)
        torch.nn.init.normal_(self.score.weight, std=0.3)


def listen(name: str, heard: list[Any], *, alter: Callable[[Any], Any] = lambda result: result) -> None:
    """Keeps what a function of TRL's module returns."""
    function = getattr(ppo_trainer, name)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        heard.append(alter((args, result)))
        return result

    setattr(ppo_trainer, name, wrapped)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", type=Path)
    target = parser.parse_args().target
    base = build_base()
    kept = {f"base.{name}": value.clone() for name, value in base.state_dict().items()}
    reward = LlamaForSequenceClassification(LlamaConfig.from_dict(base.config.to_dict() | {"num_labels": 1}))
    reward.model.load_state_dict(base.model.state_dict())
    torch.manual_seed(4)
    torch.nn.init.normal_(reward.score.weight, std=0.3)
    adapted = get_peft_model(reward, LoraConfig(task_type="SEQ_CLS", **LORA))
    randomize(adapted, seed=2)
    kept |= {f"reward.{name}": value.clone() for name, value in get_peft_model_state_dict(adapted).items()}

    chosen = torch.Generator().manual_seed(5)
    prompts = [torch.randint(3, VOCABULARY, (4 + i % 5,), generator=chosen).tolist() for i in range(ROWS)]
    with tempfile.TemporaryDirectory() as folder:
        trainer = PPOTrainer(
            args=PPOConfig(
                output_dir=folder,
                per_device_train_batch_size=ROWS,
                local_rollout_forward_batch_size=ROWS,
                num_ppo_epochs=2,
                num_mini_batches=1,
                total_episodes=ROWS,
                response_length=RESPONSE,
                temperature=1.0,
                stop_token="eos",  # noqa: S106
                missing_eos_penalty=1.0,
                kl_coef=0.2,
                cliprange=0.2,
                cliprange_value=0.2,
                vf_coef=0.1,
                gamma=1.0,
                lam=0.95,
                learning_rate=1e-3,
                lr_scheduler_type="constant",
                num_sample_generations=0,
                report_to="none",
                save_strategy="no",
                use_cpu=True,
                bf16=False,
                gradient_checkpointing=False,
                seed=0,
            ),
            processing_class=build_tokenizer(),
            model=base,
            ref_model=None,
            reward_model=adapted.merge_and_unload(),
            value_model=DetachedValue(base),
            train_dataset=Dataset.from_dict({"input_ids": prompts}),
            eval_dataset=Dataset.from_dict({"input_ids": prompts}),
            peft_config=LoraConfig(task_type="CAUSAL_LM", **LORA),
        )
        policy = trainer.policy_model
        randomize(policy, seed=1)
        kept |= {f"policy.{name}": value.clone() for name, value in get_peft_model_state_dict(policy).items()}
        kept |= {f"value.{n}": v.clone() for n, v in trainer.value_model.score.state_dict().items()}
        generated: list[Any] = []
        logprobs: list[Any] = []
        rewards: list[Any] = []
        whitened: list[Any] = []
        means: list[Any] = []
        listen("batch_generation", generated)
        listen("selective_log_softmax", logprobs)
        listen("get_reward", rewards)
        listen("masked_mean", means, alter=lambda heard: float(heard[1].detach()))
        # Those within the whitening are not losses.
        listen("masked_whiten", whitened, alter=lambda heard: (means.clear(), heard)[1])
        torch.manual_seed(SEED)
        trainer.train()

    tokens = generated[0][1][0]
    n_prompt = tokens.shape[1] - logprobs[0][1].shape[1]
    (advantages, mask), white = whitened[0]
    response = tokens[:, n_prompt:]
    ended = (response == EOS).any(1)
    assert not ended.all(), "the fixture needs an answer without an end"
    assert not mask.all(), "the fixture needs an answer that ends early"
    stopped = (response == EOS).cumsum(1) - (response == EOS).long() > 0
    assert torch.equal(~stopped, mask), "TRL takes a padding token for the end: draw others"
    kept |= {
        "tokens": tokens,
        "n_prompt": torch.tensor(n_prompt),
        "mask": mask,
        "logprobs": logprobs[0][1],
        "ref_logprobs": logprobs[1][1],
        "values": rewards[0][1][0][:, n_prompt - 1 : -1, 0],
        "scores": rewards[1][1][1],
        "advantages": advantages,
        "whitened": white,
        # In the order of TRL's loop, for each pass: value loss, its clip, policy loss, its clip.
        "value_losses": torch.tensor([0.5 * means[0], 0.5 * means[4]]),
        "policy_losses": torch.tensor([means[2], means[6]]),
        "clip_fractions": torch.tensor([means[3], means[7]]),
    }
    target.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: value.detach().contiguous() for name, value in kept.items()}, target)


if __name__ == "__main__":
    main()
