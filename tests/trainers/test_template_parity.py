"""The engine writes a conversation, under each named template, as the training of its model read it."""

import json
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from datasets import Dataset
from fastapi.testclient import TestClient
from transformers import LlamaConfig, LlamaForCausalLM

from tests.trainers.test_engine import RunningEngine
from tests.trainers.test_named_templates import FAMILIES, SYSTEM, TALK, tokenizer_of
from tests.trainers.test_sft import train
from trainers.engine import load_generator
from trainers.merge import merge_run
from trainers.serving.http import Engine, create_app
from trainers.tokens.conversations import IGNORED

SPACED = [{**message, "content": f" \n {message['content']}  \n\n "} for message in TALK]
TALKS: dict[str, list[dict[str, Any]]] = {
    "one turn": TALK[:2],
    "two turns": TALK,
    "a system prompt": [SYSTEM, *TALK],
    "spaces at the edges": SPACED,
    "spaces at every edge": [{"role": "system", "content": "\n\n Be brief. \n"}, *SPACED],
    "line ends first": [TALK[0], {"role": "assistant", "content": "\n\n\nA raised temperature."}],
}


def build_base(family: str, folder: Path) -> Path:
    """A tiny llama that has the tokens of a family, and no template."""
    tokenizer = tokenizer_of(family, folder)
    tokenizer.chat_template = None
    (folder / "chat_template.jinja").unlink()
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **size)).save_pretrained(folder)
    return folder


@pytest.fixture
def run_dir(family: str, make_run, tmp_path: Path) -> Path:
    """A run on all the conversations, which leaves an adapter with its tokenizer."""
    rows = [{"messages": messages} for messages in TALKS.values()]
    settings = {"chat_template": family, "max_steps": 1, "n_valid": 0}
    run_dir = make_run(model_dir=build_base(family, tmp_path / "base"), rows=rows, **settings)
    train(run_dir)
    return run_dir


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def app(run_dir: Path, tmp_path: Path) -> Iterator[httpx.Client]:
    """The engine's application, in this process, on the adapter."""
    generator = load_generator(
        tmp_path / "base", adapter_dir=run_dir / "output", dtype="float32", kv_cache_gib=0.01
    )
    with (
        ThreadPoolExecutor(1) as thread,
        TestClient(create_app(Engine(generator, "m", "fp", 0, thread))) as it,
    ):
        yield it


@pytest.fixture
def process(run_dir: Path, tmp_path: Path) -> Iterator[httpx.Client]:
    """The engine as it is deployed, on the merged model."""
    merge_run(run_dir, out_dir=run_dir / "merged")
    engine = RunningEngine([sys.executable, "-m", "trainers.engine", run_dir / "merged"], tmp_path)
    yield engine.client
    engine.end()


def check_parity(run_dir: Path, client: httpx.Client) -> None:
    prepared = json.loads((run_dir / "prepared.json").read_text())
    rows = Dataset.from_file(prepared["train"] + "/rows.arrow")
    for (name, messages), row in zip(TALKS.items(), rows, strict=True):
        trained = [False, *(label != IGNORED for label in row["labels"])]
        starts = [i for i, (before, here) in enumerate(pairwise(trained)) if here and not before]
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        for start, turn in zip(starts, turns, strict=True):
            answer = client.post("/tokenize", json={"messages": messages[:turn]})
            assert answer.json()["tokens"] == row["input_ids"][:start], (name, turn)


def test_a_prompt_is_what_training_saw_before_the_answer(run_dir: Path, app: httpx.Client) -> None:
    check_parity(run_dir, app)


@pytest.mark.long
def test_the_engine_of_a_deployment_does_so_too(run_dir: Path, process: httpx.Client) -> None:
    check_parity(run_dir, process)
