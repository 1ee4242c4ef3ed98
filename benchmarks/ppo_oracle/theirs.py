"""Trains with TRL 1.12.0's PPOTrainer, in the oracle's environment: `python theirs.py TASK.json OUT.jsonl`.

The task is what benchmarks/ppo_oracle.py gives to both trainers. What comes out is one line an update, at its
end: its mean score, and its KL summed over an answer.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainerCallback,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer


class Record(TrainerCallback):
    """Writes what each update's log says."""

    def __init__(self, out: Path):
        self._out = out

    def on_log(self, _args: Any, _state: Any, _control: Any, logs: Any = None, **_: Any) -> None:
        if logs and "objective/scores" in logs:
            update = {"kl": logs["objective/kl"], "reward": logs["objective/scores"]}
            with self._out.open("a") as file:
                file.write(json.dumps(update) + "\n")


def main(task: dict[str, Any], out: Path) -> None:
    torch.manual_seed(task["seed"])
    tokenizer = AutoTokenizer.from_pretrained(task["base"])
    tokenizer.padding_side = "left"
    tokenizer.pad_token_id = task["pad_id"]  # not that of the end: TRL would take one for the other
    texts = [
        tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        for messages in task["prompts"]
    ]
    rows = Dataset.from_dict({"input_ids": tokenizer(texts, add_special_tokens=False)["input_ids"]})
    policy = AutoModelForCausalLM.from_pretrained(task["base"], dtype=torch.float32)
    reward, value = (
        AutoModelForSequenceClassification.from_pretrained(task["reward"], dtype=torch.float32)
        for _ in range(2)
    )
    with tempfile.TemporaryDirectory() as folder:
        trainer = PPOTrainer(
            args=configure(task, folder),
            processing_class=tokenizer,
            model=policy,
            ref_model=None,
            reward_model=reward,
            value_model=value,
            train_dataset=rows,
            eval_dataset=rows,
            peft_config=LoraConfig(
                task_type="CAUSAL_LM", r=task["rank"], lora_alpha=task["alpha"], target_modules="all-linear"
            ),
            callbacks=[Record(out)],
        )
        trainer.train()


def configure(task: dict[str, Any], folder: str) -> PPOConfig:
    """TRL's own defaults but for what the task sets, and what makes its sampling that of the policy."""
    return PPOConfig(
        output_dir=folder,
        per_device_train_batch_size=task["batch"],
        local_rollout_forward_batch_size=task["batch"],
        num_ppo_epochs=task["passes"],
        num_mini_batches=1,
        total_episodes=task["updates"] * task["batch"],
        response_length=task["answer_tokens"],
        temperature=1.0,
        stop_token="eos",  # noqa: S106
        kl_coef=task["kl_coef"],
        learning_rate=task["learning_rate"],
        lr_scheduler_type="constant",
        logging_steps=1,
        num_sample_generations=0,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        seed=task["seed"],
    )


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_bytes()), Path(sys.argv[2]))
