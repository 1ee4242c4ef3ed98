"""What PPO is shown to learn with: a base that can say what is liked, and models that like something."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
)

from tests.tiny import SYMPTOMS
from trainers.merge import merge_run
from trainers.models.adapters import TRAINED_HEAD_KEY
from trainers.run import run
from trainers.specs import RunSpec, parse_method, resolve
from trainers.specs.methods import ResolvedPpo
from trainers.training import recipe
from trainers.training.ranks import StopRequest

PAD = 0
QUESTIONS = [{"question": f"Patient {i} has {SYMPTOMS[i % 8]}. What now?"} for i in range(16)]


def ppo_settings() -> ResolvedPpo:
    """What a job asks for that asks for little."""
    asked = parse_method({"type": "ppo", "ppo": {"hyperparameters": {"lora_dropout": 0.1}}}, None)
    return ResolvedPpo.model_validate(resolve(asked, n_examples=8, seed=0))


def make_reward_model(base_dir: Path, folder: Path, *, trained: bool = True, seed: int = 5) -> Path:
    """A reward model that likes some last tokens better than others, by a direction in their states.

    Beside it, the adapter it was merged from.
    """
    model: Any = AutoModelForSequenceClassification.from_pretrained(base_dir, num_labels=1)
    torch.manual_seed(seed)
    direction = torch.randn_like(model.score.weight)
    model.score.weight.data = direction / direction.norm()
    model.config.pad_token_id = PAD
    if trained:
        setattr(model.config, TRAINED_HEAD_KEY, True)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base_dir).save_pretrained(folder)
    lora = recipe.configure_lora(ppo_settings(), task_type="SEQ_CLS")
    adapter = folder.with_name(f"{folder.name}-adapter")
    get_peft_model(model, lora).save_pretrained(adapter)
    AutoTokenizer.from_pretrained(base_dir).save_pretrained(adapter)
    return folder


def train_reward_model(base_dir: Path, root: Path) -> Path:
    """ROOT/run, a run of our own reward method, and ROOT/merged, what it made."""
    run_dir = root / "run"
    run_dir.mkdir()
    rows = [
        {**row, "response_chosen": "Rest and drink water.", "response_rejected": f"No {i}"}
        for i, row in enumerate(QUESTIONS)
    ]
    (run_dir / "train").write_text("".join(json.dumps(row) + "\n" for row in rows))
    wanted = {"learning_rate": 5e-3, "max_steps": 6, "batch_size": 8, "dtype": "float32"}
    asked = parse_method({"type": "reward", "reward": {"hyperparameters": wanted}}, None)
    spec = RunSpec(
        job_id="ftjob-reward",
        attempt=1,
        method="reward",
        hyperparameters=resolve(asked, n_examples=len(rows), seed=3),
        seed=3,
        model_dir=base_dir,
        model_id="tiny",
        train_file=run_dir / "train",
        cache_dir=root / "cache",
    )
    (run_dir / "spec.json").write_text(spec.model_dump_json())
    assert run(run_dir, stop=StopRequest()) == 0
    merge_run(run_dir, out_dir=root / "merged")
    return root


def build_steerable_model(tiny: Path, folder: Path) -> Path:
    """The tiny model with a head of its own, so that it can say what a reward model may like.

    As it is, its answers are uniform whatever is learned: a hidden state of length 8 against
    embeddings of length 0.16. A longer tied head would repeat the last token; a rotated one does not.
    """
    tied = AutoModelForCausalLM.from_pretrained(tiny)
    config = LlamaConfig.from_pretrained(tiny, tie_word_embeddings=False)
    model = LlamaForCausalLM(config)
    model.model.load_state_dict(tied.model.state_dict())
    torch.manual_seed(0)
    rotation, _ = torch.linalg.qr(torch.randn(64, 64))
    model.lm_head.weight.data = 9.0 * tied.model.embed_tokens.weight.data @ rotation
    model.model.embed_tokens.weight.data *= 3.0
    model.generation_config = tied.generation_config
    shutil.copytree(tiny, folder)
    model.save_pretrained(folder)
    return folder
