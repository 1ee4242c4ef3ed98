"""The methods: what each is called, what it may be asked, and what it learns from."""

from dataclasses import dataclass, field
from typing import Literal

from trainers.specs.parameters import (
    Asked,
    DpoSettings,
    GrpoSettings,
    KtoSettings,
    PpoSettings,
    PretrainingSettings,
    Resolved,
    RewardSettings,
    SupervisedSettings,
)


class AskedSupervised(Asked, SupervisedSettings):
    """`supervised` as a user writes it."""


class ResolvedSupervised(Resolved, SupervisedSettings):
    """`supervised` as a run gets it."""


class AskedPretraining(Asked, PretrainingSettings):
    """`pretraining` as a user writes it."""


class ResolvedPretraining(Resolved, PretrainingSettings):
    """`pretraining` as a run gets it."""


class AskedReward(Asked, RewardSettings):
    """`reward` as a user writes it."""


class ResolvedReward(Resolved, RewardSettings):
    """`reward` as a run gets it."""


class AskedDpo(Asked, DpoSettings):
    """`dpo` as a user writes it."""


class ResolvedDpo(Resolved, DpoSettings):
    """`dpo` as a run gets it."""


class AskedKto(Asked, KtoSettings):
    """`kto` as a user writes it."""


class ResolvedKto(Resolved, KtoSettings):
    """`kto` as a run gets it."""


class AskedPpo(Asked, PpoSettings):
    """`ppo` as a user writes it."""


class ResolvedPpo(Resolved, PpoSettings):
    """`ppo` as a run gets it."""


class AskedGrpo(Asked, GrpoSettings):
    """`grpo` as a user writes it."""


class ResolvedGrpo(Resolved, GrpoSettings):
    """`grpo` as a run gets it."""


@dataclass(frozen=True)
class MethodKind:
    """One `method.type`."""

    name: str
    summary: str
    asked: type[Asked]
    resolved: type[Resolved]
    learns_from: Literal["conversation", "preference", "labelled", "document", "prompt"]
    length_field: str  # the parameter that bounds the tokens of a row
    shaping: set[str]  # parameters that decide what the prepared data are
    # Usual for LoRA, ten times that of full fine-tuning.
    base_learning_rate: float
    least_micro_batch: int = 1  # rows that a pass must have
    # Parameters that are written beside `hyperparameters`, not among them.
    beside: frozenset[str] = field(default_factory=frozenset)

    def takes(self, kind: str | None) -> bool:
        """Whether rows of a kind will do.

        A conversation is a prompt once its last answer is taken away; a pair is one good and one bad answer.
        """
        turned = ("conversation", "prompt"), ("preference", "labelled")
        return kind == self.learns_from or (kind, self.learns_from) in turned

    def row_length(self, settings: Asked | Resolved) -> int:
        """Tokens of the longest row that `settings` allow."""
        return int(getattr(settings, self.length_field))


METHODS = {
    kind.name: kind
    for kind in (
        MethodKind(
            "pretraining",
            "Continued pretraining on plain text",
            AskedPretraining,
            ResolvedPretraining,
            "document",
            "block_size",
            {"block_size"},
            2e-4,
        ),
        MethodKind(
            "supervised",
            "Supervised fine-tuning on conversations: loss on the assistant's turns",
            AskedSupervised,
            ResolvedSupervised,
            "conversation",
            "max_length",
            {"max_length", "train_on_inputs"},
            2e-4,
        ),
        MethodKind(
            "reward",
            "A reward model from pairs of answers, of which one was preferred",
            AskedReward,
            ResolvedReward,
            "preference",
            "max_length",
            {"max_length"},
            1e-4,
        ),
        MethodKind(
            "dpo",
            "Direct preference optimization on pairs of answers",
            AskedDpo,
            ResolvedDpo,
            "preference",
            "max_length",
            {"max_length"},
            2e-5,
        ),
        MethodKind(
            "kto",
            "Kahneman-Tversky optimization on answers found good or bad",
            AskedKto,
            ResolvedKto,
            "labelled",
            "max_length",
            {"max_length"},
            2e-5,
            # Its KL term is measured on the answers of the other rows of a pass.
            least_micro_batch=2,
        ),
        MethodKind(
            "ppo",
            "Reinforcement learning: answers to prompts, scored by a reward model, under a KL penalty",
            AskedPpo,
            ResolvedPpo,
            "prompt",
            "max_length",
            {"max_length"},
            1.4e-5,
        ),
        MethodKind(
            "grpo",
            "Reinforcement learning: several answers to a prompt, compared by a grader or a reward model",
            AskedGrpo,
            ResolvedGrpo,
            "prompt",
            "max_length",
            {"max_length", "grader"},
            2e-5,
            beside=frozenset({"grader"}),
        ),
    )
}
