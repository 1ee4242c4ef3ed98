"""Direct preference optimization (Rafailov et al. 2023); the reference is the model with its adapter off."""

from typing import Any, ClassVar

from transformers import AutoModelForCausalLM
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer

from trainers.folders.checkpoints import Checkpoint
from trainers.specs.methods import ResolvedDpo
from trainers.training import recipe
from trainers.training.attempt import Attempt
from trainers.training.loop import Guarded


def train(attempt: Attempt, *, prepared: dict[str, Any], resume: Checkpoint | None) -> None:
    """Trains an adapter into RUN_DIR/output, or until asked to stop."""
    settings = attempt.spec.settings()
    assert isinstance(settings, ResolvedDpo)
    materials = recipe.gather_materials(attempt, prepared)
    tokenizer, dtype = materials.tokenizer, materials.dtype
    recipe.ensure_pad_token(tokenizer)
    arguments = DPOConfig(
        **recipe.common_arguments(attempt, materials, resume=resume),
        max_length=None,
        beta=settings.beta,
        loss_type=[settings.loss_type],
        label_smoothing=settings.label_smoothing,
    )
    model = recipe.load_base(AutoModelForCausalLM, attempt, dtype=dtype)
    trainer = PreferenceTrainer(
        model=model,
        # Without an adapter to switch off, the reference is a copy.
        ref_model=None if settings.use_peft else recipe.load_base(AutoModelForCausalLM, attempt, dtype=dtype),
        args=arguments,
        train_dataset=materials.train_rows,
        eval_dataset=materials.valid_rows,
        processing_class=tokenizer,
        peft_config=recipe.configure_lora(settings, task_type="CAUSAL_LM", model=model),
        attempt=attempt,
        keep_checkpoints=settings.save_total_limit,
    )
    recipe.carry_out(trainer, resume=resume, dtype=dtype)


class PreferenceTrainer(Guarded, DPOTrainer):
    """TRL's trainer on rows that are tokenized already."""

    reported: ClassVar = {
        "rewards/accuracies": "accuracy",
        "rewards/margins": "margin",
        "rewards/chosen": "reward_chosen",
        "rewards/rejected": "reward_rejected",
    }

    def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
        return dataset
