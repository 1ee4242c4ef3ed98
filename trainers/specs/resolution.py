"""From what was asked to numbers: the same input always gives the same answer."""

from math import ceil, lcm
from typing import Any

from trainers.specs.faults import SpecError
from trainers.specs.methods import METHODS
from trainers.specs.parameters import Asked, Resolved
from trainers.specs.parse import Method

_MOST_ROWS = 256  # of a batch


def resolve(method: Method, *, n_examples: int, seed: int, nproc_per_node: int = 1) -> dict[str, Any]:
    """The hyperparameters with every "auto" that does not depend on the machine replaced by a number.

    Raises SpecError where the numbers cannot be combined.
    """
    if not 0 <= seed < 2**32:
        raise SpecError("seed must be between 0 and 4294967295", param="seed")
    if n_examples < 1:
        raise SpecError("the training file has no examples", param="training_file")
    asked, kind = method.hyperparameters, method.kind
    n_examples -= count_held_out(n_examples, asked)
    n_examples = min(n_examples, asked.max_train_samples or n_examples)
    n_epochs = _choose_epochs(n_examples) if asked.n_epochs == "auto" else asked.n_epochs
    batch_size, micro = _size_batch(method, n_examples=n_examples, nproc_per_node=nproc_per_node)
    # All weights at once take a tenth of what an adapter takes.
    base_rate = kind.base_learning_rate * (1.0 if asked.use_peft else 0.1)
    multiplier = 1.0 if asked.learning_rate_multiplier == "auto" else asked.learning_rate_multiplier
    learning_rate = asked.learning_rate or base_rate * multiplier
    total_steps = asked.max_steps or n_epochs * ceil(n_examples * count_answers(asked) / batch_size)
    interval = min(max(ceil(total_steps / 10), 10), 500)
    log_interval = 1 if total_steps <= 1000 else 10
    resolved = asked.model_dump(exclude={"gradient_accumulation_steps"}) | {
        "n_epochs": n_epochs,
        "batch_size": batch_size,
        "micro_batch_size": micro,
        "learning_rate": learning_rate,
        "learning_rate_multiplier": learning_rate / base_rate,
        "logging_steps": log_interval if asked.logging_steps == "auto" else asked.logging_steps,
        # Evaluating where we save gives every checkpoint its validation loss.
        "eval_steps": interval if asked.eval_steps == "auto" else asked.eval_steps,
        "save_steps": interval if asked.save_steps == "auto" else asked.save_steps,
    }
    return kind.resolved.model_validate(resolved).model_dump()


def count_answers(settings: Asked | Resolved) -> int:
    """How often a row counts in a batch: once with most methods, else as often as it is answered."""
    return getattr(settings, "num_generations", 1)


def _size_batch(method: Method, *, n_examples: int, nproc_per_node: int) -> tuple[int, int]:
    """(rows of an optimizer step, rows of a pass of one process)."""
    asked, kind = method.hyperparameters, method.kind
    path = f"method.{kind.name}.hyperparameters"
    answers, batch_size, micro = count_answers(asked), asked.batch_size, asked.micro_batch_size
    if asked.gradient_accumulation_steps is not None:
        batch_size = _multiply_batch(method, nproc_per_node)
    if batch_size == "auto":
        per_pass = kind.least_micro_batch if micro == "auto" else micro
        unit = lcm(nproc_per_node * per_pass, answers)
        batch_size = _choose_batch(n_examples, unit=unit, answers=answers)
    share = batch_size // nproc_per_node
    if micro == "auto":
        row_tokens = kind.row_length(asked) + getattr(asked, "output_max_length", 0)
        micro = _choose_micro_batch(share, row_tokens, least=kind.least_micro_batch)
    check_batch(batch_size, micro=micro, nproc_per_node=nproc_per_node, method=kind.name)
    if batch_size % answers:
        raise SpecError(
            f"batch_size {batch_size} is not a multiple of num_generations {answers}: it counts answers, "
            "and those to one prompt are compared with each other",
            param=f"{path}.batch_size",
        )
    mini = getattr(asked, "mini_batch_size", None)
    if mini and share % mini:
        raise SpecError(
            f"mini_batch_size {mini} does not divide the {share} rows of a process",
            param=f"{path}.mini_batch_size",
        )
    return batch_size, micro


def halve_micro_batch(method: str, micro: int) -> int | None:
    """Half of the rows of a pass, or less where a half would not divide the batch; None at the least."""
    least = METHODS[method].least_micro_batch
    return max((size for size in range(least, micro // 2 + 1) if micro % size == 0), default=None)


def count_held_out(n_rows: int, settings: Asked | Resolved) -> int:
    """How many rows of a file are held out of the training: at least one, but never all."""
    split = settings.validation_split or settings.validation_split_percentage / 100
    if not split:
        return 0
    return min(n_rows - 1, max(1, round(n_rows * split) if split < 1 else int(split)))


def check_split(settings: Asked | Resolved, *, has_validation_file: bool, method: str) -> None:
    """Raise SpecError where there are two answers to what is evaluated."""
    named = ("validation_split", "validation_split_percentage")
    given = [name for name in named if getattr(settings, name)]
    if len(given) == 2:
        message = "validation_split and validation_split_percentage say the same; give one"
    elif given and has_validation_file:
        message = (
            f"{given[0]} holds rows of the training file out for want of a validation file, "
            "and there is one: give one of the two"
        )
    else:
        return
    raise SpecError(message, param=f"method.{method}.hyperparameters.{given[0]}")


def _choose_epochs(n_examples: int) -> int:
    """Three, more for very small files (at least 100 examples seen), fewer for very large ones."""
    if n_examples * 3 < 100:
        return min(25, ceil(100 / n_examples))
    if n_examples * 3 > 25_000:
        return max(1, 25_000 // n_examples)
    return 3


def _choose_batch(n_examples: int, *, unit: int, answers: int) -> int:
    """About 0.2 % of the examples, between 4 and 64, with all their answers: a multiple of `unit`."""
    size = 4
    while size < 64 and size < n_examples * 0.002 and 2 * size * answers <= _MOST_ROWS:
        size *= 2
    size = ceil(size * answers / unit) * unit
    return size if size <= _MOST_ROWS else max(_MOST_ROWS // unit, 1) * unit


def _multiply_batch(method: Method, nproc_per_node: int) -> int:
    """The batch that trainers without a batch size of their own make: passes times rows times processes."""
    asked, path = method.hyperparameters, f"method.{method.type}.hyperparameters"
    if asked.batch_size != "auto":
        raise SpecError(
            "gradient_accumulation_steps and batch_size say the same; give one",
            param=f"{path}.gradient_accumulation_steps",
        )
    micro = 4 if asked.micro_batch_size == "auto" else asked.micro_batch_size
    return micro * (asked.gradient_accumulation_steps or 1) * nproc_per_node


def _choose_micro_batch(per_process: int, row_tokens: int, *, least: int) -> int:
    """The largest divisor that keeps a forward pass under about 8,192 tokens; the rest is accumulated."""
    limit = min(8, max(least, 8192 // row_tokens))
    fitting = [size for size in range(least, limit + 1) if per_process % size == 0]
    # A batch without such a divisor, as 11 rows of which two must go together, is one pass.
    return max(fitting, default=max(least, per_process))


def check_batch(batch_size: int, *, micro: int, nproc_per_node: int, method: str) -> None:
    """Raise SpecError unless a batch is made of whole passes of all processes."""
    path = f"method.{method}.hyperparameters"
    if batch_size > _MOST_ROWS:
        raise SpecError(
            f"micro_batch_size {micro} on {nproc_per_node} processes makes a batch of more than {_MOST_ROWS}",
            param=f"{path}.micro_batch_size",
        )
    if batch_size % (micro * nproc_per_node):
        raise SpecError(
            f"batch_size {batch_size} is not a multiple of "
            f"micro_batch_size {micro} times {nproc_per_node} processes",
            param=f"{path}.batch_size",
        )
