"""The command lines of the reference's README, word for word, as hyperparameters."""

from typing import Any

import pytest

from trainers.specs import SpecError, parse_method, resolve

COMMON: dict[str, Any] = {
    "nproc_per_node": 8,
    "model_name_or_path": "base",
    "tokenizer_name_or_path": "base",
    "dataset_name": "org/medical",
    "validation_split_percentage": 0.001,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 4,
    "do_train": True,
    "seed": 42,
    "fp16": True,
    "max_train_samples": 1000,
    "max_eval_samples": 10,
    "warmup_ratio": 0.05,
    "logging_strategy": "steps",
    "logging_steps": 10,
    "eval_steps": 50,
    "eval_strategy": "steps",
    "save_steps": 500,
    "save_strategy": "steps",
    "save_total_limit": 3,
    "gradient_accumulation_steps": 1,
    "preprocessing_num_workers": 8,
    "overwrite_output_dir": True,
    "ddp_timeout": 30000,
    "logging_first_step": True,
    "lora_rank": 8,
    "lora_alpha": 32,
    "target_modules": "q_proj,v_proj,k_proj,o_proj",
    "lora_dropout": 0.05,
    "torch_dtype": "float16",
    "device_map": "auto",
    "gradient_checkpointing": True,
    "report_to": "tensorboard",
    "ddp_find_unused_parameters": False,
}
STAGES: dict[str, dict[str, Any]] = {
    "pretraining": {
        "dataset_config_name": "pretrain",
        "num_train_epochs": 1.0,
        "learning_rate": 2e-5,
        "weight_decay": 0.01,
        "block_size": 1024,
        "output_dir": "outputs-pt",
    },
    "supervised": {
        "dataset_config_name": "finetune",
        "num_train_epochs": 5.0,
        "learning_rate": 1e-5,
        "weight_decay": 0,
        "max_length": 512,
        "output_dir": "outputs-sft",
    },
    "reward": {
        "dataset_config_name": "reward",
        "num_train_epochs": 5.0,
        "learning_rate": 2e-5,
        "weight_decay": 0,
        "max_length": 512,
        "output_dir": "outputs-reward",
    },
    "ppo": {
        "dataset_config_name": "finetune",
        "num_train_epochs": 5.0,
        "learning_rate": 1.4e-5,
        "reward_model_name_or_path": "judge",
        "mini_batch_size": 1,
        "max_length": 512,
        "output_max_length": 128,
        "early_stopping": True,
        "target_kl": 0.1,
        "reward_baseline": 0.0,
        "save_steps": 50,
        "output_dir": "outputs-rl",
    },
}


@pytest.mark.parametrize("stage", STAGES)
def test_every_parameter_of_its_readme_is_taken(stage: str) -> None:
    given = COMMON | STAGES[stage]
    if stage == "ppo":  # ours says what float16 would do to it
        given = {name: value for name, value in given.items() if name not in ("fp16", "torch_dtype")}
    method = parse_method({"type": stage, stage: {"hyperparameters": given}}, None)
    asked = method.hyperparameters
    assert (method.job_fields.seed, method.job_fields.nproc_per_node) == (42, 8)
    assert (asked.lora_alpha, asked.micro_batch_size, asked.learning_rate) == (32, 4, given["learning_rate"])
    taken = asked.model_dump(exclude_unset=True)
    assert not {"output_dir", "seed", "nproc_per_node"} & taken.keys()
    assert taken["validation_split_percentage"] == 0.001
    assert method.ignored.keys() >= {"output_dir", "overwrite_output_dir", "device_map", "report_to"}
    resolved = resolve(method, n_examples=1000, seed=42, nproc_per_node=8)
    assert resolved["batch_size"] == 32


def test_one_thing_under_two_names_must_be_one_thing() -> None:
    asked = parse_method(None, {"fp16": True, "torch_dtype": "float16"}).hyperparameters
    assert asked.dtype == "float16"
    with pytest.raises(SpecError, match="mean the same"):
        parse_method(None, {"fp16": True, "torch_dtype": "bfloat16"})
