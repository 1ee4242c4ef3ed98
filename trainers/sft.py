"""Supervised fine-tuning: a LoRA adapter, with TRL's trainer and our data, events and checkpoints."""

from typing import Any, ClassVar

import torch
from datasets import Dataset, concatenate_datasets
from transformers import AutoModelForCausalLM
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from trainers.folders.checkpoints import Checkpoint
from trainers.models.vocabulary import place_tokens
from trainers.tokens.conversations import IGNORED
from trainers.training import recipe
from trainers.training.attempt import Attempt
from trainers.training.loop import Guarded
from trainers.training.ranks import world_size


def train(attempt: Attempt, *, prepared: dict[str, Any], resume: Checkpoint | None) -> None:
    """Trains an adapter into RUN_DIR/output, or until asked to stop; fills in the outcome as it goes."""
    settings = attempt.spec.settings()
    materials = recipe.gather_materials(attempt, prepared)
    valid_rows = materials.valid_rows
    if valid_rows is not None:
        valid_rows = pad_rows(valid_rows, multiple=world_size() * settings.micro_batch_size)
    tokenizer, dtype = materials.tokenizer, materials.dtype
    arguments = SFTConfig(
        **recipe.common_arguments(attempt, materials, resume=resume),
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},  # the rows are tokenized, labelled and cut
    )
    model = recipe.load_base(AutoModelForCausalLM, attempt, dtype=dtype)
    new_rows = place_tokens(model, tokenizer)
    trainer = PerTokenTrainer(
        model=model,
        args=arguments,
        train_dataset=materials.train_rows,
        eval_dataset=valid_rows,
        processing_class=tokenizer,
        peft_config=recipe.configure_lora(
            settings, task_type="CAUSAL_LM", model=model, token_modules=new_rows
        ),
        attempt=attempt,
        keep_checkpoints=settings.save_total_limit,
    )
    recipe.carry_out(trainer, resume=resume, dtype=dtype)


class PerTokenTrainer(Guarded, SFTTrainer):
    """Evaluates per token, so that the result depends on neither the batches nor the number of ranks."""

    reported: ClassVar = Guarded.reported | {"perplexity": "perplexity"}

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        self._eval_losses: list[torch.Tensor] = []
        self._eval_tokens: list[torch.Tensor] = []
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        counts: Any = self.accelerator.reduce(torch.stack(self._eval_tokens), "sum")
        loss: Any = self.accelerator.reduce(torch.stack(self._eval_losses).sum(), "sum")
        accuracies = torch.tensor(self._metrics["eval"]["mean_token_accuracy"], device=counts.device)
        assert output.metrics is not None
        mean_loss = loss / counts.sum()
        output.metrics[f"{metric_key_prefix}_loss"] = mean_loss.item()
        output.metrics[f"{metric_key_prefix}_perplexity"] = mean_loss.double().exp().item()
        self._metrics["eval"]["mean_token_accuracy"] = [((accuracies * counts).sum() / counts.sum()).item()]
        return output

    def prediction_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        result = super().prediction_step(model, inputs, *args, **kwargs)
        n_tokens = (inputs["labels"][..., 1:] != IGNORED).sum()
        self._eval_tokens.append(n_tokens)
        self._eval_losses.append(result[0].detach().float() * n_tokens)
        return result


def pad_rows(rows: Dataset, *, multiple: int) -> Dataset:
    """The rows and as many rows without loss as make whole batches on every rank.

    Otherwise the last batch is filled up with rows from the start, which would count twice.
    """
    missing = -len(rows) % multiple
    if not missing:
        return rows
    token = rows[0]["input_ids"][:1]
    blank = {"input_ids": [token * 2] * missing, "labels": [[IGNORED] * 2] * missing}
    return concatenate_datasets([rows, Dataset.from_dict(blank, features=rows.features)])
