"""4 and 8 bits with the kernels of a GPU, and ZeRO over NCCL."""

from typing import Any

import pytest
import torch

from tests.trainers.conftest import (  # noqa: F401 - fixtures
    cache_dir,
    events_of,
    make_run,
)
from tests.trainers.test_run import LIMIT_S, exit_of, launch
from trainers import merge

pytestmark = pytest.mark.gpu

FLAGS: dict[int, dict[str, Any]] = {0: {}, 4: {"load_in_4bit": True}, 8: {"load_in_8bit": True}}


def finish(run_dir, *, nproc: int) -> dict[str, Any]:
    """Trains through torchrun and merges; the merge's report, with the run's metrics."""
    status = launch(run_dir, nproc=nproc).wait(LIMIT_S)
    assert status == 0, (run_dir / "stderr.log").read_text()[-3000:]
    metrics = exit_of(run_dir)["metrics"]
    assert metrics["valid_loss"] < 0.98 * metrics["valid_loss_before"]
    report = merge.merge_run(run_dir, out_dir=run_dir / "merged")
    assert report["adapter_rel_effect"] > 1000 * report["rms_rel_diff"]
    return report | {"metrics": metrics}


@pytest.mark.parametrize("dtype", ["auto", "float32", "float16"])
@pytest.mark.parametrize("bits", [0, 4, 8])
def test_an_adapter_on_a_quantized_base_learns_and_is_merged(
    make_run,  # noqa: F811
    events_of,  # noqa: F811
    bits: int,
    dtype: str,
) -> None:
    run_dir = make_run(dtype=dtype, max_steps=20, learning_rate=5e-3, **FLAGS[bits])
    report = finish(run_dir, nproc=1)
    warned = [warning["code"] for warning in report["warnings"]]
    assert warned == (["trained_on_quantized_base"] if bits else [])
    (told,) = [e["data"] for e in events_of(run_dir, "message") if e["data"].get("code") == "configured"]
    assert told["device"] == "cuda"
    assert told["dtype"] == ("bfloat16" if dtype == "auto" else dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("zero", ["zero2", "zero3"])
def test_zero_on_one_gpu_learns_and_is_merged(make_run, zero: str, dtype: str) -> None:  # noqa: F811
    finish(make_run(deepspeed=zero, dtype=dtype, max_steps=20, learning_rate=5e-3), nproc=1)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantized_base_under_zero2(make_run, bits: int) -> None:  # noqa: F811
    finish(make_run(deepspeed="zero2", max_steps=20, learning_rate=5e-3, **FLAGS[bits]), nproc=1)


@pytest.mark.parametrize("zero", ["zero2", "zero3"])
def test_two_gpus_learn_what_one_learns(make_run, zero: str) -> None:  # noqa: F811
    assert torch.cuda.device_count() >= 2, "this test needs two GPUs"
    settings = {"dtype": "float32", "max_steps": 10, "micro_batch_size": 2, "learning_rate": 5e-3}
    one = finish(make_run("1", **settings), nproc=1)
    two = finish(make_run("2", nproc=2, deepspeed=zero, **settings), nproc=2)
    assert two["metrics"]["valid_loss"] == pytest.approx(one["metrics"]["valid_loss"], rel=1e-3)
