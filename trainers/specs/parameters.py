"""Every hyperparameter with its bounds and default. Lengths in tokens, intervals in optimizer steps."""

from typing import Annotated, Literal

from pydantic import Field

from trainers.specs.fields import Auto, Count, DType, Number, OptionalModules, Split, Strict, TargetModules
from trainers.specs.graders import GraderConfig
from trainers.specs.zero import ZeroConfig

# What two adapters must share for the weights of one to be those of the other.
ADAPTER_SHAPE = ("lora_rank", "lora_alpha", "target_modules", "modules_to_save")
EvalPrompt = Annotated[str, Field(min_length=1, max_length=2000)]
ChatTemplate = Literal["alpaca", "chatml", "llama3", "mistral", "qwen", "vicuna"]


class Training(Strict):
    """What every method has and what has a plain default."""

    max_steps: Annotated[Count, Field(ge=1, le=10_000_000)] | None = None
    # Rows that are read of the training file and of the validation file; all by default.
    max_train_samples: Annotated[Count, Field(ge=1, le=1_000_000_000)] | None = None
    max_eval_samples: Annotated[Count, Field(ge=1, le=1_000_000_000)] | None = None
    # Rows of each training file that are held out and evaluated in place of a validation file: a fraction up
    # to 0.5, or how many. The seed decides which.
    validation_split: Split = None
    # The same as percent, at least one row.
    validation_split_percentage: Annotated[Number, Field(ge=0, le=50)] = 0.0
    # The share of the validation rows that may stand in the training data too; above it the job is refused.
    max_validation_overlap: Annotated[Number, Field(ge=0, le=1)] = 0.5
    # Answered before training, at each checkpoint and at the end. Each is a user's message, or plain text to
    # go on from; by default they are of the first validation rows, and an empty list asks for none.
    eval_prompts: Annotated[list[EvalPrompt], Field(max_length=16)] | None = None
    eval_max_tokens: Annotated[Count, Field(ge=1, le=512)] = 64  # of such an answer
    warmup_ratio: Annotated[Number, Field(ge=0, le=0.5)] = 0.03
    weight_decay: Annotated[Number, Field(ge=0, le=1)] = 0.0
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "cosine"
    max_grad_norm: Annotated[Number, Field(gt=0, le=1000)] = 1.0
    save_total_limit: Annotated[Count, Field(ge=1, le=100)] = 3
    lora_rank: Annotated[Count, Field(ge=1, le=512)] = 8
    lora_alpha: Annotated[Number, Field(gt=0, le=2048)] = 16
    lora_dropout: Annotated[Number, Field(ge=0, lt=1)] = 0.0
    target_modules: TargetModules = "all-linear"
    # Trained whole beside the adapter, and kept with it.
    modules_to_save: OptionalModules = None
    # False: no adapter, all weights are trained.
    use_peft: bool = True
    # A job, its model or a checkpoint: training starts from the weights of that adapter, and from those only.
    init_adapter: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    # These two may stay "auto": the answer depends on the machine, so the run gives it and reports it.
    gradient_checkpointing: Auto | bool = "auto"
    dtype: DType = "auto"
    # The frozen base in 8 bits, or in 4 (nf4); the adapter and its gradients are not.
    load_in_8bit: bool = False
    load_in_4bit: bool = False
    deepspeed: ZeroConfig = None


class Asked(Training):
    """As a user writes them: what depends on the data may be left to us."""

    n_epochs: Auto | Annotated[Count, Field(ge=1, le=50)] = "auto"
    # Examples an optimizer step sees: micro_batch_size * gradient accumulation * number of processes.
    batch_size: Auto | Annotated[Count, Field(ge=1, le=256)] = "auto"
    micro_batch_size: Auto | Annotated[Count, Field(ge=1, le=256)] = "auto"
    # Another way to say how large a batch is; then batch_size must be left to it.
    gradient_accumulation_steps: Annotated[Count, Field(ge=1, le=256)] | None = None
    learning_rate_multiplier: Auto | Annotated[Number, Field(gt=0, le=1000)] = "auto"
    learning_rate: Annotated[Number, Field(gt=0, le=1)] | None = None  # wins over the multiplier
    logging_steps: Auto | Annotated[Count, Field(ge=1, le=100_000)] = "auto"
    eval_steps: Auto | Annotated[Count, Field(ge=1, le=10_000_000)] = "auto"
    save_steps: Auto | Annotated[Count, Field(ge=1, le=10_000_000)] = "auto"


class Resolved(Training):
    """As a run gets them."""

    n_epochs: Annotated[Count, Field(ge=1, le=50)]
    batch_size: Annotated[Count, Field(ge=1, le=256)]
    micro_batch_size: Annotated[Count, Field(ge=1, le=256)]
    learning_rate_multiplier: Annotated[Number, Field(gt=0)]
    learning_rate: Annotated[Number, Field(gt=0, le=1)]
    logging_steps: Annotated[Count, Field(ge=1)]
    eval_steps: Annotated[Count, Field(ge=1)]
    save_steps: Annotated[Count, Field(ge=1)]


class ChatSettings(Strict):
    """What all methods have that write conversations the way the model reads them."""

    # By name, in place of the model's own; it stays with the result.
    chat_template: ChatTemplate | None = None


class SupervisedSettings(ChatSettings):
    """What only supervised fine-tuning has."""

    max_length: Annotated[Count, Field(ge=16, le=131_072)] = 2048
    train_on_inputs: bool = False


class PretrainingSettings(Strict):
    """What only continued pretraining has."""

    block_size: Annotated[Count, Field(ge=16, le=131_072)] = 1024
    # Learnt from the training file and added to the tokenizer; embeddings and head are then trained whole.
    new_tokens: Annotated[Count, Field(ge=0, le=50_000)] = 0


class RewardSettings(ChatSettings):
    """What only reward modeling has."""

    max_length: Annotated[Count, Field(ge=16, le=131_072)] = 2048


class DpoSettings(ChatSettings):
    """What only direct preference optimization has."""

    max_length: Annotated[Count, Field(ge=16, le=131_072)] = 2048
    beta: Annotated[Number, Field(gt=0, le=2)] = 0.1
    loss_type: Literal["sigmoid", "hinge", "ipo"] = "sigmoid"
    label_smoothing: Annotated[Number, Field(ge=0, lt=0.5)] = 0.0


class KtoSettings(ChatSettings):
    """What only Kahneman-Tversky optimization has."""

    max_length: Annotated[Count, Field(ge=16, le=131_072)] = 2048
    beta: Annotated[Number, Field(gt=0, le=2)] = 0.1
    # What a good answer counts, and a bad one: to make up for a file that has more of one sort.
    desirable_weight: Annotated[Number, Field(gt=0, le=100)] = 1.0
    undesirable_weight: Annotated[Number, Field(gt=0, le=100)] = 1.0


class PpoSettings(ChatSettings):
    """What only proximal policy optimization has. A step is one round: answers, scores, passes over them."""

    reward_model: Annotated[str, Field(min_length=1, max_length=200)] | None = None
    max_length: Annotated[Count, Field(ge=16, le=131_072)] = 512  # of a prompt
    output_max_length: Annotated[Count, Field(ge=1, le=32_768)] = 128  # of an answer
    # Answers an optimizer step sees on each process; by default all of the round.
    mini_batch_size: Annotated[Count, Field(ge=1, le=256)] | None = None
    ppo_epochs: Annotated[Count, Field(ge=1, le=50)] = 4
    init_kl_coef: Annotated[Number, Field(ge=0, le=100)] = 0.2
    target_kl: Annotated[Number, Field(gt=0, le=100)] = 0.1  # nats a token away from the model as it was
    # Answers in which the coefficient moves by at most a fifth.
    horizon: Annotated[Count, Field(ge=1, le=10_000_000)] = 1_000
    # Leave a round once its own passes have moved the policy by 1.5 times target_kl.
    early_stopping: bool = False
    reward_baseline: Annotated[Number, Field(ge=-1e6, le=1e6)] = 0.0
    missing_eos_penalty: Annotated[Number, Field(ge=0, le=1e6)] = 1.0
    gamma: Annotated[Number, Field(gt=0, le=1)] = 1.0
    lam: Annotated[Number, Field(ge=0, le=1)] = 0.95
    cliprange: Annotated[Number, Field(gt=0, lt=1)] = 0.2
    # Wide, and with a fast learner: the value head is linear and starts at zero.
    cliprange_value: Annotated[Number, Field(gt=0, le=1e6)] = 5.0
    vf_coef: Annotated[Number, Field(gt=0, le=100)] = 0.1
    value_learning_rate: Annotated[Number, Field(gt=0, le=1)] = 1e-3


class GrpoSettings(ChatSettings):
    """What only group relative policy optimization has. Rows of a batch and of a pass are answers."""

    # What gives an answer its number: one of the two.
    grader: GraderConfig = None
    reward_model: Annotated[str, Field(min_length=1, max_length=200)] | None = None
    max_length: Annotated[Count, Field(ge=16, le=131_072)] = 512  # of a prompt
    output_max_length: Annotated[Count, Field(ge=1, le=32_768)] = 128  # of an answer
    # Answers to one prompt, which are compared with each other.
    num_generations: Annotated[Count, Field(ge=2, le=64)] = 8
    temperature: Annotated[Number, Field(gt=0, le=2)] = 1.0
    # Weight of the KL to the base with the adapter off, also to one started from; 0: there is no reference.
    beta: Annotated[Number, Field(ge=0, le=2)] = 0.0
    loss_type: Literal["dapo", "grpo", "dr_grpo", "bnpo"] = "dapo"
    scale_rewards: Literal["group", "batch", "none"] = "group"
    mask_truncated_completions: bool = False
