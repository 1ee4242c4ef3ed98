"""What cannot work together is refused when it is asked for, by the name of the parameter to blame."""

import copy
from typing import Any

import pytest

from trainers.specs import SpecError, parse_method, resolve

PATH = "method.supervised.hyperparameters"
# What the reference's README hands to --deepspeed: fp16 with a linear schedule.
REFERENCE: dict[str, Any] = {
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "weight_decay": "auto", "torch_adam": True}},
    "scheduler": {"type": "WarmupDecayLR", "params": {"warmup_max_lr": "auto", "total_num_steps": "auto"}},
    "fp16": {"enabled": True, "loss_scale": 0, "initial_scale_power": 16},
    "zero_optimization": {"stage": 2, "reduce_bucket_size": "auto", "allgather_bucket_size": 2e8},
    "gradient_clipping": "auto",
    "train_batch_size": "auto",
    "steps_per_print": 1000,
}


def ask(method: str = "supervised", **hyperparameters: object) -> Any:
    wish = {"type": method, method: {"hyperparameters": hyperparameters}}
    return parse_method(wish, None)


def refusal(method: str = "supervised", **hyperparameters: object) -> SpecError:
    with pytest.raises(SpecError) as caught:
        ask(method, **hyperparameters)
    return caught.value


@pytest.mark.parametrize(
    ("method", "asked", "param", "part"),
    [
        ("supervised", {"load_in_4bit": True, "load_in_8bit": True}, "load_in_4bit", "give one"),
        ("ppo", {"load_in_8bit": True}, "load_in_8bit", "not available for ppo"),
        ("supervised", {"load_in_4bit": True, "deepspeed": "zero3"}, "load_in_4bit", "ZeRO-3"),
        ("supervised", {"load_in_8bit": True, "deepspeed": "zero3"}, "load_in_8bit", "ZeRO-3"),
        ("supervised", {"load_in_4bit": True, "use_peft": False}, "load_in_4bit", "only an adapter"),
        ("supervised", {"load_in_8bit": True, "modules_to_save": ["mlp"]}, "modules_to_save", "8 bits"),
        ("pretraining", {"deepspeed": "zero3", "new_tokens": 8}, "new_tokens", "use zero2"),
        ("ppo", {"deepspeed": "zero2"}, "deepspeed", "not available for ppo"),
        ("dpo", {"dtype": "float16"}, "dtype", "bfloat16"),
        ("dpo", {"fp16": True}, "fp16", "bfloat16"),
        ("kto", {"dtype": "float16"}, "dtype", "bfloat16"),
        ("kto", {"use_peft": False}, "use_peft", "its own reference"),
        ("kto", {"batch_size": 1}, "batch_size", "at least 2"),
        ("kto", {"per_device_train_batch_size": 1}, "per_device_train_batch_size", "at least 2"),
        ("reward", {"eval_prompts": ["Hello"]}, "eval_prompts", "answers nothing"),
        ("reward", {"eval_max_tokens": 8}, "eval_max_tokens", "answers nothing"),
        ("ppo", {"dtype": "float16"}, "dtype", "would vanish"),
        ("ppo", {"fp16": True}, "fp16", "would vanish"),
        ("grpo", {"batch_size": 12}, "batch_size", "multiple of num_generations"),
        ("grpo", {"use_peft": False, "beta": 0.1}, "beta", "no reference"),
        ("grpo", {"deepspeed": "zero2"}, "deepspeed", "not available for grpo"),
        ("grpo", {"fp16": True}, "fp16", "bfloat16"),
        ("supervised", {"deepspeed": REFERENCE}, "deepspeed.fp16.enabled", "set dtype to float16"),
        ("supervised", {"deepspeed": REFERENCE, "fp16": True}, "deepspeed.scheduler.type", "cosine"),
    ],
)
def test_what_excludes_each_other_is_refused(method: str, asked: dict, param: str, part: str) -> None:
    error = refusal(method, **asked)
    assert error.param == f"method.{method}.hyperparameters.{param}"
    assert part in error.message


def test_a_grader_and_a_reward_model_are_one_too_many() -> None:
    grader = {"type": "regex", "pattern": "a"}
    asked = {"grader": grader, "hyperparameters": {"reward_model": "judge"}}
    with pytest.raises(SpecError, match="name one of the two") as caught:
        parse_method({"type": "grpo", "grpo": asked}, None)
    assert caught.value.param == "method.grpo.hyperparameters.reward_model"


def test_a_batch_of_answers_is_made_of_whole_groups() -> None:
    for nproc in (1, 2, 3):
        for answers in (2, 7, 8, 64):
            resolved = resolve(
                ask("grpo", num_generations=answers), n_examples=80, seed=1, nproc_per_node=nproc
            )
            assert resolved["batch_size"] % answers == 0
            assert resolved["batch_size"] % (resolved["micro_batch_size"] * nproc) == 0
    with pytest.raises(SpecError, match="not a multiple of num_generations"):
        resolve(ask("grpo", gradient_accumulation_steps=3, micro_batch_size=2), n_examples=80, seed=1)


def test_quantization_and_sharding_are_accepted_where_they_work() -> None:
    wishes = {"load_in_4bit": True}, {"load_in_8bit": True, "deepspeed": "zero2"}, {"deepspeed": "zero3"}
    for method in ("pretraining", "supervised", "reward", "dpo"):
        for asked in wishes:
            resolved = resolve(ask(method, **asked), n_examples=8, seed=1)
            assert resolved.items() >= asked.items()


def test_the_configuration_of_the_reference_agrees_with_a_job_that_says_the_same() -> None:
    method = ask(deepspeed=REFERENCE, fp16=True, lr_scheduler_type="linear")
    assert method.hyperparameters.deepspeed["zero_optimization"]["allgather_bucket_size"] == 200_000_000
    assert (
        ask(**method.to_request()["supervised"]["hyperparameters"]).hyperparameters == method.hyperparameters
    )


def test_the_name_of_a_file_is_answered_with_what_to_give_instead() -> None:
    error = refusal(deepspeed="deepspeed_config.json")
    assert error.param == f"{PATH}.deepspeed"
    assert "give the content of 'deepspeed_config.json'" in error.message


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("zero_optimization.offload_optimizer.device", "nvme"),
        ("zero_optimization.offload_optimizer.nvme_path", "/mnt"),
        ("zero_optimization.offload_param", {"device": "cpu"}),  # of stage 3
        ("zero_optimization.stage", 4),
        ("zero_optimization.stage", 0),
        ("zero_optimization.reduce_bucket_size", -1),
        ("zero_optimization.reduce_bucket_size", "much"),
        ("zero_optimization.sub_group_size", 10**12),
        ("zero_optimization.stage3_gather_16bit_weights_on_model_save", False),
        ("optimizer.type", "Lion"),
        ("optimizer.params.lr", 0.1),
        ("train_batch_size", 64),
        ("gradient_clipping", 2.0),
        ("wall_clock_breakdown", True),
        ("tensorboard", {"enabled": True, "output_path": "out"}),
        ("wandb", {"enabled": True}),
        ("comet", {"enabled": True}),
        ("csv_monitor", {"enabled": True, "output_path": "out"}),
        ("aio", {"block_size": 1}),
        ("checkpoint", {"load_universal": True}),
        ("data_efficiency", {"enabled": True}),
        ("compression_training", {}),
        ("flops_profiler", {"enabled": True, "output_file": "flops.txt"}),
        ("autotuning", {"enabled": True}),
    ],
)
def test_a_configuration_may_hold_known_keys_only(place: str, value: object) -> None:
    config = copy.deepcopy(REFERENCE)
    *parents, last = place.split(".")
    inside = config
    for key in parents:
        inside = inside.setdefault(key, {"device": "cpu"} if key == "offload_optimizer" else {})
    inside[last] = value
    error = refusal(deepspeed=config, fp16=True, lr_scheduler_type="linear")
    blamed = "zero_optimization" if last == "offload_param" else place
    assert error.param == f"{PATH}.deepspeed.{blamed}"


def test_a_configuration_without_a_stage_is_refused() -> None:
    assert refusal(deepspeed={}).param == f"{PATH}.deepspeed.zero_optimization"
    assert refusal(deepspeed={"zero_optimization": {}}).param == f"{PATH}.deepspeed.zero_optimization.stage"
    for value in (3, True, []):
        assert refusal(deepspeed=value).param == f"{PATH}.deepspeed"
