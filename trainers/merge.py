"""Merge a run's LoRA adapter into the exact base it was trained on, and prove that the result is that model.

`python -m trainers.merge RUN_DIR OUT_DIR --report R.json`: exit 0 with the facts in the report, or 3 with
{"error": {"code", "message"}}. One copy of the model is in memory at a time. What is compared:

1. base + adapter against the merged weights, as logits on fixed prompts. Both are computed in float32 from
   the stored weights (each layer is widened while it runs), so that the only difference left is
   the rounding of the merged weights to the base's dtype, without the larger one of bfloat16 activations.
2. the weights in memory against the saved files read back: equal bytes, tensor by tensor.
3. merged against base: they must differ, unless the adapter does nothing (warning `merge_is_identity`).
"""

import argparse
import gc
import hashlib
import json
import os
import resource
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from trainers.folders.artifacts import (
    Refused,
    count_bytes,
    describe_model,
    digest_folder,
    publish_folder,
    report_outcome,
    write_json,
)
from trainers.folders.evaluation import EVALUATION_FILE
from trainers.models.adapters import (
    TRAINED_HEAD_KEY,
    Head,
    attach_adapter,
    find_stop_ids,
    load_model,
    load_tokenizer,
)
from trainers.models.libraries import MODELS, QUANTIZATION, SHARDING, do_without, preload
from trainers.models.quantized import describe_quantization
from trainers.models.vocabulary import add_rows, count_rows
from trainers.specs import SpecError, load_run_spec

PROMPT_LIMIT_TOKENS = 48
PROMPTS = (
    "The patient complains of a headache and a stiff neck. The next step is",
    "患者咳嗽三天,体温38.5度,应该",
    "def binary_search(items, target):\n    low, high = 0,",
    "Once upon a time, in a small town by the sea, there lived",
)
# Allowed root mean square error of the logits, relative to their standard deviation. Rounding moves a weight
# by at most 2^-9 (bfloat16), 2^-12 (float16) or 2^-25 (float32) of itself, and the layers add such errors up:
# SmolLM2-135M in bfloat16 with a strong adapter measures 0.9e-2.
TOLERANCE = {torch.bfloat16: 3e-2, torch.float16: 4e-3, torch.float32: 1e-4}
# A score is one number, over which nothing averages out: SmolLM2-135M in bfloat16 measures 3.5e-2.
SCORE_FACTOR = 4


def merge_run(run_dir: Path, *, out_dir: Path) -> dict[str, Any]:
    """Merge `run_dir`/output into the run's base, write `out_dir`, return the report. Raises Refused."""
    try:
        spec = load_run_spec(run_dir)
    except SpecError as error:
        raise Refused("bad_run", str(error)) from error
    base_dir = Path(spec.model_dir)
    if spec.model_digest and digest_folder(base_dir) != spec.model_digest:
        raise Refused("wrong_base", f"{base_dir} is no longer the model that the run was trained on.")
    head: Head = "score" if spec.method == "reward" else "lm"
    settings, trained = spec.settings(), run_dir / "output"
    kept = trained / EVALUATION_FILE
    if not settings.use_peft:
        return publish_whole(base_dir, trained_dir=trained, out_dir=out_dir, head=head, evaluation=kept)
    report = merge_adapters(base_dir, adapter_dirs=[trained], out_dir=out_dir, head=head, evaluation=kept)
    report["warnings"] += describe_quantization(settings)
    return report


def merge_adapters(
    base_dir: Path,
    *,
    adapter_dirs: Sequence[Path],
    out_dir: Path,
    head: Head = "lm",
    evaluation: Path | None = None,
) -> dict[str, Any]:
    """Merge, save, reload and verify. `out_dir` appears only when everything agreed, with `evaluation` in it.

    Each adapter is merged into the result of the one before, and compared, before the next is read. Of
    several, the report has the facts of each in `adapters`, and at its top those of the least exact.
    """
    with _published(out_dir, evaluation=evaluation) as work_dir:
        return _merge_into(work_dir, base_dir=base_dir, adapter_dirs=adapter_dirs, head=head)


def publish_whole(
    base_dir: Path, *, trained_dir: Path, out_dir: Path, head: Head = "lm", evaluation: Path | None = None
) -> dict[str, Any]:
    """A model of which all weights were trained: narrow it to the base's dtype, save, reload and verify."""
    with _published(out_dir, evaluation=evaluation) as work_dir:
        tokenizer = _load_own_tokenizer(trained_dir)
        prompts = encode_prompts(tokenizer)
        base = load_model(base_dir, head=head)
        dtype = base.dtype
        add_rows(base, tokenizer)
        base_logits = compute_logits(base, prompts)
        del base
        model = load_model(trained_dir, head=head)
        trained_logits = compute_logits(model, prompts)
        model = model.to(dtype)
        narrowed_logits = compute_logits(model, prompts)
        report = compare_logits(
            base_logits, trained_logits, narrowed_logits, tolerance=allowed_error(dtype, head=head)
        )
        weights = digest_weights(model)
        save_merged(model, work_dir, base_dir=base_dir, tokenizer=tokenizer)
        del model
        gc.collect()
        verify_saved(
            work_dir, head=head, weights=weights, dtype=dtype, prompts=prompts, expected=narrowed_logits
        )
        return report | _describe(work_dir, dtype=dtype, head=head) | {"trained": "all weights"}


@contextmanager
def _published(out_dir: Path, *, evaluation: Path | None) -> Iterator[Path]:
    """A folder to write in, which becomes `out_dir` when nothing was raised.

    evaluation: a file that goes with the model, if it is there.
    """
    if out_dir.exists():
        raise Refused("output_exists", f"{out_dir} already exists.")
    work_dir = out_dir.with_name(out_dir.name + ".tmp")
    shutil.rmtree(work_dir, ignore_errors=True)
    work_dir.mkdir(parents=True)
    if evaluation is not None and evaluation.is_file():
        shutil.copyfile(evaluation, work_dir / EVALUATION_FILE)
    try:
        yield work_dir
        publish_folder(work_dir, out_dir)
    except BaseException:
        shutil.rmtree(work_dir, ignore_errors=True)
        raise


def _merge_into(
    work_dir: Path, *, base_dir: Path, adapter_dirs: Sequence[Path], head: Head
) -> dict[str, Any]:
    model = load_model(base_dir, head=head)
    dtype = model.dtype
    tokenizer: Any = None
    steps: list[dict[str, Any]] = []
    for position, adapter_dir in enumerate(adapter_dirs, 1):
        try:
            before, tokenizer = tokenizer, _load_own_tokenizer(adapter_dir)
            if before is not None and count_rows(tokenizer) < count_rows(before):
                raise Refused("bad_adapter", "Its tokenizer lacks tokens of the adapter before it.")
            model, facts = _merge_one(model, adapter_dir=adapter_dir, tokenizer=tokenizer)
        except Refused as refused:
            if len(adapter_dirs) == 1:
                raise
            raise Refused(refused.code, f"Adapter {position} of {len(adapter_dirs)}: {refused}") from refused
        steps.append(facts)
    prompts = encode_prompts(tokenizer)
    merged_logits = compute_logits(model, prompts)
    weights = digest_weights(model)
    save_merged(model, work_dir, base_dir=base_dir, tokenizer=tokenizer)
    del model
    gc.collect()
    verify_saved(work_dir, head=head, weights=weights, dtype=dtype, prompts=prompts, expected=merged_logits)
    report = max(steps, key=lambda facts: facts["rms_rel_diff"])
    if len(steps) > 1:
        warnings = [warning for facts in steps for warning in facts["warnings"]]
        report = report | {"warnings": warnings, "adapters": steps}
    return report | _describe(work_dir, dtype=dtype, head=head)


def _merge_one(model: Any, *, adapter_dir: Path, tokenizer: Any) -> tuple[Any, dict[str, Any]]:
    """The model with the adapter in it, and how exactly that went."""
    head: Head = "score" if hasattr(model, "score") else "lm"
    prompts, tolerance = encode_prompts(tokenizer), allowed_error(model.dtype, head=head)
    adapted = attach_adapter(model, adapter_dir=adapter_dir, tokenizer=tokenizer)
    with adapted.disable_adapter():
        base_logits = compute_logits(adapted, prompts)
    adapted_logits = compute_logits(adapted, prompts)
    try:
        merged = adapted.merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise Refused("nan_weights", str(error)) from error
    merged_logits = compute_logits(merged, prompts)
    return merged, compare_logits(base_logits, adapted_logits, merged_logits, tolerance=tolerance)


def _load_own_tokenizer(folder: Path) -> Any:
    try:
        return load_tokenizer(folder)
    except (ValueError, OSError) as error:
        raise Refused("no_tokenizer", f"The run's output has no tokenizer: {error}") from error


def _describe(folder: Path, *, dtype: torch.dtype, head: Head) -> dict[str, Any]:
    return {
        "digest": digest_folder(folder),
        "bytes": count_bytes(folder),
        **describe_model(folder),
        "dtype": str(dtype).removeprefix("torch."),
        "head": head,
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def encode_prompts(tokenizer: Any) -> list[torch.Tensor]:
    """Token ids of the fixed prompts, and of the first as a chat where the tokenizer knows how."""
    texts = list(PROMPTS)
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": PROMPTS[0]}]
        texts.append(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    return [torch.tensor(tokenizer(text)["input_ids"][-PROMPT_LIMIT_TOKENS:]) for text in texts]


@torch.inference_mode()
def compute_logits(model: Any, prompts: list[torch.Tensor]) -> torch.Tensor:
    """Centred logits, or scores, at every position of every prompt, [positions, vocabulary or 1], in float32.

    Each layer that holds weights is widened to float32 just before it runs and narrowed right after: that
    loses nothing, and only one layer at a time costs the extra memory. One pass over all prompts widens once.
    """
    handles = []
    for module in model.modules():
        own = [parameter for parameter in module.parameters(recurse=False)]
        if not own or all(parameter.dtype == torch.float32 for parameter in own):
            continue
        handles.append(module.register_forward_pre_hook(_widen))
        handles.append(module.register_forward_hook(_narrow_to(own[0].dtype)))
    # Padded on the right, where a causal model does not look.
    mask = pad_sequence([torch.ones_like(ids) for ids in prompts], batch_first=True)
    batch = {"input_ids": pad_sequence(prompts, batch_first=True), "attention_mask": mask, "use_cache": False}
    try:
        if not hasattr(model, "score"):
            logits = model(**batch).logits[mask.bool()]
            # What all tokens of a position have in common changes no probability.
            return logits - logits.mean(dim=-1, keepdim=True)
        # The model itself would score only the last position of each prompt.
        whole = model.get_base_model() if hasattr(model, "get_base_model") else model
        return whole.score(whole.base_model(**batch).last_hidden_state)[mask.bool()]
    finally:
        for handle in handles:
            handle.remove()


def _widen(module: torch.nn.Module, _inputs: Any) -> None:
    for parameter in module.parameters(recurse=False):
        parameter.data = parameter.data.float()


def _narrow_to(dtype: torch.dtype) -> Any:
    def narrow(module: torch.nn.Module, _inputs: Any, _output: Any) -> None:
        for parameter in module.parameters(recurse=False):
            parameter.data = parameter.data.to(dtype)

    return narrow


def allowed_error(dtype: torch.dtype, *, head: Head) -> float:
    """The relative error of logits, or scores, that rounding to `dtype` explains."""
    return TOLERANCE[dtype] * (SCORE_FACTOR if head == "score" else 1)


def compare_logits(
    base: torch.Tensor, adapted: torch.Tensor, merged: torch.Tensor, *, tolerance: float
) -> dict[str, Any]:
    """The report's differences. Raises Refused when merged is not base + adapter within `tolerance`."""
    spread = float(adapted.std())
    error = adapted - merged
    relative_error = float(error.square().mean().sqrt()) / spread
    facts: dict[str, Any] = {
        "max_abs_diff": float(error.abs().max()),
        "max_rel_diff": float(error.abs().max()) / float(adapted.abs().max()),
        "rms_rel_diff": relative_error,
        "warnings": [],
    }
    if not relative_error <= tolerance:  # also when it is NaN
        raise Refused(
            "merge_mismatch",
            f"The merged model is not base + adapter: relative error {relative_error:.1e} > {tolerance:.0e}.",
        )
    effect = float((adapted - base).square().mean().sqrt()) / spread
    facts["adapter_rel_effect"] = effect
    if effect == 0:
        facts["warnings"].append(
            {
                "code": "merge_is_identity",
                "message": "The adapter does nothing: the merged model equals its base.",
            }
        )
    elif torch.equal(merged, base):
        raise Refused("merge_lost", "The adapter changes the model, but the merged model equals its base.")
    elif relative_error > 0.5 * effect:
        facts["warnings"].append(
            {
                "code": "merge_loses_precision",
                "message": "Rounding to the base's dtype loses much of what the adapter learned: "
                f"relative error {relative_error:.2e}, relative effect {effect:.2e}.",
            }
        )
    return facts


def digest_weights(model: torch.nn.Module) -> dict[str, str]:
    """sha256 of each tensor's bytes, by name."""
    digests = {}
    for name, tensor in model.state_dict().items():
        flat = tensor.detach().contiguous().cpu().flatten()
        digests[name] = hashlib.sha256(flat.view(torch.uint8).numpy()).hexdigest()
    return digests


def save_merged(model: Any, folder: Path, *, base_dir: Path, tokenizer: Any) -> None:
    """Write weights, config, the run's tokenizer and the base's generation settings with every stop token."""
    from transformers import GenerationConfig

    if any("lora_" in name for name in model.state_dict()):
        raise Refused("merge_mismatch", "Adapter tensors are left in the merged model.")
    if hasattr(model, "score"):
        setattr(model.config, TRAINED_HEAD_KEY, True)
        # Of the texts of a batch, the score is read at the last token that is not this one.
        model.config.pad_token_id = tokenizer.pad_token_id
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return
    model.generation_config = GenerationConfig()  # replaced below: saving would judge the base's settings
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    settings_path = base_dir / "generation_config.json"
    settings = json.loads(settings_path.read_bytes()) if settings_path.is_file() else {}
    base_eos = settings.get("eos_token_id", model.config.get_text_config().eos_token_id)
    settings["eos_token_id"] = find_stop_ids(tokenizer, base_eos)
    write_json(folder / "generation_config.json", settings)


def verify_saved(
    folder: Path,
    *,
    head: Head,
    weights: dict[str, str],
    dtype: torch.dtype,
    prompts: list[torch.Tensor],
    expected: torch.Tensor,
) -> None:
    """Read the saved folder back. Raises Refused unless it is the model that was in memory."""
    model = load_model(folder, head=head)
    if model.dtype != dtype:
        raise Refused("reload_mismatch", f"Saved as {model.dtype}, merged as {dtype}.")
    reloaded = digest_weights(model)
    if changed := sorted(
        name for name in weights.keys() | reloaded if weights.get(name) != reloaded.get(name)
    ):
        raise Refused(
            "reload_mismatch", f"{len(changed)} saved tensors differ from the merged ones: {changed[0]} ..."
        )
    error = float((compute_logits(model, prompts) - expected).square().mean().sqrt()) / float(expected.std())
    if not error <= TOLERANCE[torch.float32]:
        raise Refused("reload_mismatch", f"The saved model answers differently: relative error {error:.2e}.")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m trainers.merge", description=__doc__)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--report", type=Path, required=True)
    arguments = parser.parse_args(argv)
    os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    if argv is None:  # a process of its own
        do_without(QUANTIZATION, SHARDING)
        preload(*MODELS, "peft")
    return report_outcome(
        lambda: merge_run(arguments.run_dir, out_dir=arguments.out_dir), to=arguments.report
    )


if __name__ == "__main__":
    sys.exit(main())
