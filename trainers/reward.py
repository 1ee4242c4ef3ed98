"""Reward modeling: a scalar head on the job's model, trained so that preferred answers score higher.

loss = -log sigmoid(score(chosen) - score(rejected)), both answers in one forward pass (Ouyang et al. 2022).
"""

from typing import Any, ClassVar

import torch
from transformers import AutoModelForSequenceClassification, EvalPrediction, set_seed
from trl.trainer.reward_config import RewardConfig
from trl.trainer.reward_trainer import DataCollatorForPreference, RewardTrainer

from trainers.folders.checkpoints import Checkpoint
from trainers.folders.events import drop_nonfinite
from trainers.training import recipe
from trainers.training.attempt import Attempt
from trainers.training.loop import Guarded

_SHOWN_PAIRS = 3  # whose scores are kept, with their texts
_SHOWN_CHARS = 2000  # of each text


def train(attempt: Attempt, *, prepared: dict[str, Any], resume: Checkpoint | None) -> None:
    """Trains an adapter and a head into RUN_DIR/output, or until asked to stop."""
    spec, settings = attempt.spec, attempt.spec.settings()
    materials = recipe.gather_materials(attempt, prepared)
    tokenizer, dtype = materials.tokenizer, materials.dtype
    pad_token_id = recipe.ensure_pad_token(tokenizer)
    arguments = RewardConfig(
        **recipe.common_arguments(attempt, materials, resume=resume),
        max_length=None,
        remove_unused_columns=False,
        disable_dropout=False,
    )
    set_seed(spec.seed)  # the head starts out random, and alike on every rank
    model = recipe.load_base(AutoModelForSequenceClassification, attempt, dtype=dtype, num_labels=1)
    trainer = PairwiseTrainer(
        model=model,
        args=arguments,
        train_dataset=materials.train_rows,
        eval_dataset=materials.valid_rows,
        processing_class=tokenizer,
        data_collator=JoiningCollator(pad_token_id=pad_token_id),
        compute_metrics=describe_scores,
        peft_config=recipe.configure_lora(settings, task_type="SEQ_CLS", model=model),
        attempt=attempt,
        keep_checkpoints=settings.save_total_limit,
    )
    recipe.carry_out(trainer, resume=resume, dtype=dtype)


class JoiningCollator(DataCollatorForPreference):
    """Puts the prompt in front of both answers."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """{"prompt_ids", "chosen_ids", "rejected_ids"} a row to `input_ids` of [2 x rows, tokens]."""
        joined = [
            {name: row["prompt_ids"] + row[name] for name in ("chosen_ids", "rejected_ids")}
            for row in examples
        ]
        return super().torch_call(joined)


class PairwiseTrainer(Guarded, RewardTrainer):
    """Evaluates over all pairs at once, so that the result depends on neither batches nor ranks."""

    reported: ClassVar = {
        "accuracy": "accuracy",
        "margin": "margin",
        "mean_reward": "score_mean",
        "std_reward": "score_std",
    }

    def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
        return dataset  # tokenized already

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        output = super().evaluation_loop(*args, **kwargs)
        scores: Any = output.predictions
        rows: Any = self.eval_dataset
        shown = range(min(_SHOWN_PAIRS, len(rows)))
        pairs = [self._describe_pair(rows[i], scores[i].tolist()) for i in shown]
        self.attempt.evaluation.note(self.state.global_step, pairs=pairs)
        return output

    def _describe_pair(self, row: dict[str, list[int]], scores: list[float]) -> dict[str, Any]:
        """A held-out pair as the model reads it, and what it thinks of both answers."""
        tokenizer: Any = self.processing_class
        texts = {
            name: tokenizer.decode(row[f"{name}_ids"], skip_special_tokens=True).strip()[:_SHOWN_CHARS]
            for name in ("prompt", "chosen", "rejected")
        }
        return drop_nonfinite(texts | {"chosen_score": scores[0], "rejected_score": scores[1]})

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(loss, scores of [rows, 2], labels that nobody reads)."""
        self.check_stop()
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            result: Any = self.compute_loss(model, inputs, return_outputs=True)
        loss, outputs = result
        scores = torch.stack(torch.chunk(outputs.logits.squeeze(-1).float(), 2), dim=1)
        return loss.detach(), scores, torch.zeros(len(scores), device=scores.device)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """TRL averages its evaluation metrics by batch; ours are in `logs` already."""
        if "eval_accuracy" in logs:
            self._metrics["eval"].clear()
        super().log(logs, start_time)


def describe_scores(prediction: EvalPrediction) -> dict[str, float]:
    """Pairwise accuracy, mean margin, and mean and standard deviation of the scores of all pairs."""
    scores = torch.as_tensor(prediction.predictions)
    chosen, rejected = scores[:, 0], scores[:, 1]
    return {
        "loss": float(-torch.nn.functional.logsigmoid(chosen - rejected).mean()),
        "accuracy": float((chosen > rejected).float().mean()),
        "margin": float((chosen - rejected).mean()),
        "mean_reward": float(scores.mean()),
        "std_reward": float(scores.std()),
    }
