"""Kahneman-Tversky optimization (Ethayarajh et al. 2024); the reference is the model with its adapter off."""

from typing import Any, ClassVar

from datasets import Dataset
from transformers import AutoModelForCausalLM
from trl.trainer.kto_config import KTOConfig
from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference, KTOTrainer

from trainers.folders.checkpoints import Checkpoint
from trainers.folders.exits import DataError
from trainers.specs.methods import ResolvedKto
from trainers.training import recipe
from trainers.training.attempt import Attempt
from trainers.training.loop import Guarded


def train(attempt: Attempt, *, prepared: dict[str, Any], resume: Checkpoint | None) -> None:
    """Trains an adapter into RUN_DIR/output or to a stop. Raises DataError for labels all alike."""
    settings = attempt.spec.settings()
    assert isinstance(settings, ResolvedKto)
    materials = recipe.gather_materials(attempt, prepared)
    check_labels(materials.train_rows)
    tokenizer, dtype = materials.tokenizer, materials.dtype
    pad_token_id = recipe.ensure_pad_token(tokenizer)
    arguments = KTOConfig(
        **recipe.common_arguments(attempt, materials, resume=resume),
        max_length=None,
        loss_type="kto",
        beta=settings.beta,
        desirable_weight=settings.desirable_weight,
        undesirable_weight=settings.undesirable_weight,
    )
    model = recipe.load_base(AutoModelForCausalLM, attempt, dtype=dtype)
    trainer = LabelTrainer(
        model=model,
        args=arguments,
        data_collator=Mismatching(pad_token_id=pad_token_id, rows=materials.train_rows),
        train_dataset=materials.train_rows,
        eval_dataset=materials.valid_rows,
        processing_class=tokenizer,
        peft_config=recipe.configure_lora(settings, task_type="CAUSAL_LM", model=model),
        attempt=attempt,
        keep_checkpoints=settings.save_total_limit,
    )
    # TRL wants the order of the file, because it pairs rows beforehand. Ours are paired as they come, and a
    # file sorted by label would otherwise train on good answers first and on bad ones last.
    arguments.train_sampling_strategy = "random"
    recipe.carry_out(trainer, resume=resume, dtype=dtype)


def check_labels(rows: Dataset) -> None:
    """Raises DataError unless there are good and bad answers."""
    labels = {label for (label,) in rows["label"]}
    if len(labels) == 1:
        raise DataError(
            f"every answer in the training file is labelled {'true' if labels == {1} else 'false'}: "
            "kto learns from the difference between good and bad ones"
        )


class Mismatching(DataCollatorForUnpairedPreference):
    """Adds to each row of a pass the answer of the row before it, on which the KL term is measured.

    A row alone in its pass, as the last of an epoch may be, gets an answer to another prompt of the training
    file. On its own answer the term would be its reward, and the two would cancel out.
    """

    def __init__(self, *, pad_token_id: int, rows: Any) -> None:
        super().__init__(pad_token_id=pad_token_id)
        self._rows = rows

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """The padded tensors that TRL's trainer reads."""
        others = [examples[-1], *examples[:-1]] if len(examples) > 1 else [self._find_other(examples[0])]
        return super().torch_call(
            [
                row | {"label": bool(row["label"][0]), "KL_completion_ids": other["completion_ids"]}
                for row, other in zip(examples, others, strict=True)
            ]
        )

    def _find_other(self, example: dict[str, Any]) -> dict[str, Any]:
        """The first row with another prompt; in a file of one prompt, the first with another answer."""
        for key in ("prompt_ids", "completion_ids"):
            for row in self._rows:
                if row[key] != example[key]:
                    return row
        return example


class LabelTrainer(Guarded, KTOTrainer):
    """TRL's trainer on rows that are tokenized already."""

    reported: ClassVar = {
        "rewards/chosen": "reward_chosen",
        "rewards/rejected": "reward_rejected",
        "rewards/margins": "margin",
        "kl": "kl",
    }

    def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
        return dataset
