"""What cannot be combined, and why: told before a job is queued rather than by a traceback in its middle."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from trainers.specs.faults import SpecError
from trainers.specs.zero import SCHEDULES, zero_stage

# Methods whose loop is TRL's: it quantizes and shards. PPO holds several models of its own on one base; and
# weights that are spread over processes would have to be gathered for all the answers that GRPO draws.
SHARDED_METHODS = {"pretraining", "supervised", "reward", "dpo", "kto"}
QUANTIZED_METHODS = {*SHARDED_METHODS, "grpo"}
FULL_METHODS = {"pretraining", "supervised", "reward", "dpo", "grpo"}
# Methods that float16 spoils, and why.
_DIFFERENCES = "differences of log-probabilities do not survive float16, the loss would be 0 or NaN"
WITHOUT_FLOAT16 = {
    "dpo": _DIFFERENCES,
    "kto": _DIFFERENCES,
    "grpo": "probabilities of drawn answers do not survive float16",
    "ppo": "ppo does not scale its losses, so that small gradients would vanish in float16",
}
# Modules that stay as they are when a model is quantized, so that a trained copy of them can be made.
_UNQUANTIZED = {"embed_tokens", "wte", "embed_in", "word_embeddings", "lm_head", "embed_out", "score"}


@dataclass(frozen=True)
class Rule:
    """A combination; the first of its parameters is the one to blame."""

    parameter: str
    forbids: Callable[[str, Any], bool]  # (method, hyperparameters)
    reason: str


def _quantized(asked: Any) -> bool:
    return asked.load_in_4bit or asked.load_in_8bit


def _full(asked: Any) -> bool:
    return not asked.use_peft


def _default(asked: Any, name: str) -> Any:
    return type(asked).model_fields[name].default


def _trains_quantized(asked: Any) -> bool:
    names = asked.modules_to_save or []
    return any(name.rpartition(".")[2] not in _UNQUANTIZED for name in names)


def _half_contradicts(asked: Any, *, section: str, dtype: str) -> bool:
    enabled = asked.deepspeed.get(section, {}).get("enabled", "auto")
    return enabled != "auto" and enabled != (asked.dtype == dtype)


def _schedule_contradicts(asked: Any) -> bool:
    scheduler = asked.deepspeed.get("scheduler")
    return scheduler is not None and SCHEDULES[scheduler["type"]] != asked.lr_scheduler_type


RULES = (
    Rule(
        "load_in_4bit",
        lambda _, asked: asked.load_in_4bit and asked.load_in_8bit,
        "load_in_4bit and load_in_8bit are two ways to hold the same weights; give one",
    ),
    Rule(
        "load_in_{bits}bit",
        lambda method, asked: _quantized(asked) and method not in QUANTIZED_METHODS,
        "quantized training is not available for {method}",
    ),
    Rule(
        "load_in_{bits}bit",
        lambda _, asked: _quantized(asked) and _full(asked),
        "quantized weights cannot be trained themselves, only an adapter on them: leave use_peft at true",
    ),
    Rule(
        "load_in_{bits}bit",
        lambda _, asked: _quantized(asked) and zero_stage(asked.deepspeed) == 3,
        "ZeRO-3 cannot partition quantized weights; use zero2, or ZeRO-3 without load_in_{bits}bit",
    ),
    Rule(
        "modules_to_save",
        lambda _, asked: _quantized(asked) and _trains_quantized(asked),
        "of a quantized model only embeddings and head can be trained whole: the rest is in {bits} bits",
    ),
    Rule(
        "use_peft",
        lambda method, asked: _full(asked) and method not in FULL_METHODS,
        "{method} needs the adapter: with it switched off the model is its own reference",
    ),
    *(
        Rule(
            name,
            lambda _, asked, name=name: _full(asked) and getattr(asked, name) != _default(asked, name),
            "it belongs to an adapter, and use_peft is false",
        )
        for name in (
            "lora_rank",
            "lora_alpha",
            "lora_dropout",
            "target_modules",
            "modules_to_save",
            "init_adapter",
        )
    ),
    Rule(
        "modules_to_save",
        lambda method, asked: bool(asked.modules_to_save) and method not in FULL_METHODS,
        "trained copies of modules are not available for {method}",
    ),
    Rule(
        "new_tokens",
        lambda _, asked: getattr(asked, "new_tokens", 0) > 0 and zero_stage(asked.deepspeed) == 3,
        "embeddings that ZeRO-3 has spread over the processes cannot grow; use zero2",
    ),
    Rule(
        "init_adapter",
        lambda method, asked: asked.init_adapter is not None and method == "ppo",
        "ppo starts from a merged model, which is its own reference with the adapter off; "
        "the value head of an earlier run is not in its adapter",
    ),
    Rule(
        "init_adapter",
        lambda _, asked: asked.init_adapter is not None and getattr(asked, "new_tokens", 0) > 0,
        "an adapter knows no tokens that are still to be learnt: train from its merged model",
    ),
    Rule(
        "init_adapter",
        lambda _, asked: asked.init_adapter is not None and zero_stage(asked.deepspeed) == 3,
        "an adapter cannot be read into weights that ZeRO-3 has spread over the processes; use zero2",
    ),
    *(
        Rule(
            name,
            lambda method, asked, name=name: (
                method == "reward" and getattr(asked, name) not in (_default(asked, name), [])
            ),
            "a reward model answers nothing: the scores of the first held-out pairs are kept instead",
        )
        for name in ("eval_prompts", "eval_max_tokens")
    ),
    Rule(
        "deepspeed",
        lambda method, asked: asked.deepspeed is not None and method not in SHARDED_METHODS,
        "DeepSpeed is not available for {method}",
    ),
    *(
        Rule(
            name,
            lambda method, asked, name=name: method == "kto" and getattr(asked, name) == 1,
            "kto measures its KL term on the answers of other rows of the same pass: give at least 2",
        )
        for name in ("micro_batch_size", "batch_size")
    ),
    Rule(
        "batch_size",
        lambda method, asked: (
            method == "grpo" and asked.batch_size != "auto" and asked.batch_size % asked.num_generations != 0
        ),
        "it counts answers, and those to one prompt are compared with each other: "
        "give a multiple of num_generations",
    ),
    Rule(
        "reward_model",
        lambda method, asked: method == "grpo" and bool(asked.grader) and asked.reward_model is not None,
        "the grader gives the rewards already; name one of the two",
    ),
    Rule(
        "beta",
        lambda method, asked: method == "grpo" and _full(asked) and asked.beta > 0,
        "with all weights trained no reference is left to stay near to: leave beta at 0, or use an adapter",
    ),
    *(
        Rule(
            "dtype",
            lambda method, asked, name=name: method == name and asked.dtype == "float16",
            f"{reason}: use bfloat16 or float32",
        )
        for name, reason in WITHOUT_FLOAT16.items()
    ),
    *(
        Rule(
            f"deepspeed.{section}.enabled",
            lambda _, asked, section=section, dtype=dtype: (
                isinstance(asked.deepspeed, dict) and _half_contradicts(asked, section=section, dtype=dtype)
            ),
            f'the job\'s dtype decides: leave this at "auto", or set dtype to {dtype}',
        )
        for section, dtype in (("fp16", "float16"), ("bf16", "bfloat16"))
    ),
    Rule(
        "deepspeed.scheduler.type",
        lambda _, asked: isinstance(asked.deepspeed, dict) and _schedule_contradicts(asked),
        "the job's lr_scheduler_type decides, and it is {schedule}: leave the scheduler out",
    ),
)


def check_combination(
    method: str, asked: Any, *, path: str, spell: Callable[[str], str] = lambda name: name
) -> None:
    """Raise SpecError for hyperparameters that exclude each other.

    `path` is where they are in the request, `spell` gives the name that the user wrote for one of ours.
    """
    words = {
        "method": method,
        "bits": "4" if asked.load_in_4bit else "8",
        "schedule": asked.lr_scheduler_type,
    }
    for rule in RULES:
        if rule.forbids(method, asked):
            parameter = spell(rule.parameter.format(**words))
            raise SpecError(f"{parameter}: {rule.reason.format(**words)}", param=f"{path}.{parameter}")
