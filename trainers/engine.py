"""Serve one model folder over HTTP: `python -m trainers.engine MODEL_DIR --model-id ID --ready-file F`.

The ready file appears, with the port and the pid, once a generation has worked. The process dies with its
parent, exits 0 on SIGTERM after giving answers in flight a few seconds, and 1 when generation breaks down.
"""

import argparse
import asyncio
import hashlib
import logging
import os
import signal
import socket
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import uvicorn

from trainers.folders.artifacts import Refused, digest_folder, write_json
from trainers.folders.checkpoints import find_damage
from trainers.models.libraries import MODELS, QUANTIZATION, SHARDING, do_without, preload
from trainers.training.ranks import die_with_parent

if TYPE_CHECKING:
    from trainers.serving.generator import Generator

DRAIN_LIMIT_S = 5
PROBE_LIMIT_S = 300

log = logging.getLogger(__name__)


class Server(uvicorn.Server):
    """Writes the ready file as soon as connections are accepted."""

    def __init__(self, config: uvicorn.Config, *, ready_file: Path | None, port: int) -> None:
        super().__init__(config)
        self._ready_file = ready_file
        self._port = port

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self._ready_file and self.started:
            write_json(self._ready_file, {"port": self._port, "pid": os.getpid()})
        log.info("listening on port %d", self._port)


def load_generator(
    model_dir: Path, *, adapter_dir: Path | None, dtype: str, kv_cache_gib: float | None
) -> "Generator":
    """The model, on the GPU where there is one, with the adapter merged in memory."""
    preload("trainers.serving.generator", *MODELS, *(["peft"] if adapter_dir else []))
    import torch

    from trainers.models.adapters import attach_adapter, find_stop_ids, load_model, load_tokenizer
    from trainers.serving.generator import Generator

    on_gpu = torch.cuda.is_available()
    if dtype == "auto" and on_gpu:
        dtype = "bfloat16"
    if adapter_dir is not None and not (adapter_dir / "adapter_config.json").is_file():
        model_dir, adapter_dir = adapter_dir, None  # all weights were trained; there is nothing to merge
    model = load_model(model_dir, dtype=dtype)
    if dtype == "auto" and model.dtype == torch.float16:
        model = model.float()  # half precision is slow, and partly missing, on CPUs
    has_tokenizer = adapter_dir is not None and (adapter_dir / "tokenizer_config.json").is_file()
    tokenizer = load_tokenizer(adapter_dir if adapter_dir and has_tokenizer else model_dir)
    if adapter_dir is not None:
        model = attach_adapter(model, adapter_dir=adapter_dir, tokenizer=tokenizer).merge_and_unload(
            safe_merge=True
        )
    model = model.to("cuda" if on_gpu else "cpu").eval()
    log.info("loaded %s as %s on %s", model_dir, model.dtype, model.device)
    return Generator(
        model,
        tokenizer=tokenizer,
        stop_ids=find_stop_ids(tokenizer, model.generation_config.eos_token_id),
        kv_cache_bytes=int(kv_cache_gib * 2**30) if kv_cache_gib else None,
    )


def verify_checkpoint(folder: Path, manifest_sha256: str | None) -> None:
    """Raise Refused unless every byte of the checkpoint is as it was sealed; see `find_damage`."""
    if problem := find_damage(folder, manifest_sha256=manifest_sha256):
        raise Refused("corrupt_checkpoint", f"the checkpoint is damaged: {problem}")


def verify_model(model_dir: Path, digest: str | None) -> str:
    """The digest of the model's files. Raise Refused when it is not the one that is told."""
    found = digest_folder(model_dir)
    if digest is not None and digest != found:
        raise Refused("corrupt_model", f"the model is damaged: the files in {model_dir} have changed")
    return found


def compute_fingerprint(digests: list[str], *, dtype: str) -> str:
    """Equal for equal weights, libraries and precision: with an equal seed, answers should then repeat."""
    import torch
    import transformers

    parts = [*digests, dtype, torch.__version__, transformers.__version__]
    return "fp_" + hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]


async def probe(generator: "Generator") -> None:
    """Generate a few tokens, so that `ready` means that generation works."""
    from trainers.serving.sampling import Sampling

    ids = generator.tokenizer("Hello", add_special_tokens=True)["input_ids"] or [0]
    sampling = Sampling(seed="probe", temperature=1.0, top_p=0.9, top_k=50)
    n_tokens = 0
    async for new, _finished in generator.generate(ids, sampling=sampling, max_tokens=4):
        n_tokens += len(new)
    log.info("the probe generated %d tokens", n_tokens)


async def serve(arguments: argparse.Namespace, listener: socket.socket, generator: "Generator") -> int:
    """Serve until SIGTERM (0) or until generation breaks down (1)."""
    from trainers.serving.generator import GenerationFailed
    from trainers.serving.http import Engine, create_app

    digests = [arguments.digest]
    if arguments.adapter:
        digests.append(digest_folder(arguments.adapter))
    engine = Engine(
        generator=generator,
        model_id=arguments.model_id,
        fingerprint=compute_fingerprint(digests, dtype=generator.dtype),
        created=int(time.time()),
        text_thread=ThreadPoolExecutor(1, thread_name_prefix="text"),
    )
    config = uvicorn.Config(
        create_app(engine), log_config=None, access_log=False, timeout_graceful_shutdown=DRAIN_LIMIT_S
    )
    server = Server(config, ready_file=arguments.ready_file, port=listener.getsockname()[1])

    def shut_down() -> None:
        server.should_exit = True

    generator.start(on_failure=shut_down)
    try:
        await asyncio.wait_for(probe(generator), PROBE_LIMIT_S)
        await server.serve(sockets=[listener])
    except (GenerationFailed, TimeoutError) as error:
        log.error("the probe failed: %s", error)
        return 1
    finally:
        failed = generator.failure is not None
        generator.stop(timeout_s=DRAIN_LIMIT_S)
    return 1 if failed else 0


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m trainers.engine", description=__doc__)
    parser.add_argument("model_dir", type=Path)
    parser.add_argument("--model-id", required=True, help="the `model` that requests name")
    parser.add_argument("--adapter", type=Path, help="a PEFT adapter to merge in memory, or a checkpoint")
    parser.add_argument("--manifest-sha256", help="of the checkpoint's manifest; no other is served")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0, help="0: any free port, named in the ready file")
    parser.add_argument("--ready-file", type=Path)
    parser.add_argument("--digest", help="what MODEL_DIR must have; anything else is not served")
    parser.add_argument("--dtype", choices=["auto", "float32", "bfloat16", "float16"], default="auto")
    parser.add_argument(
        "--kv-cache-gib", type=float, help="default: 2 on CPU, most of the free memory on GPU"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    die_with_parent()  # before any thread exists
    os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s", stream=sys.stderr)
    arguments = parse_arguments(argv)
    # While loading, leave at once. While serving, uvicorn drains first and then raises the signal again.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: os._exit(0))
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((arguments.host, arguments.port))
    try:
        if arguments.adapter:
            verify_checkpoint(arguments.adapter, arguments.manifest_sha256)
        arguments.digest = verify_model(arguments.model_dir, arguments.digest)
        generator = load_generator(
            arguments.model_dir,
            adapter_dir=arguments.adapter,
            dtype=arguments.dtype,
            kv_cache_gib=arguments.kv_cache_gib,
        )
    except (Refused, OSError, ValueError, MemoryError) as error:
        log.error("the model does not load: %s", error)
        return 1
    return asyncio.run(serve(arguments, listener, generator))


def run(argv: list[Any] | None = None) -> None:
    """Run and leave, whatever threads a failure has left behind."""
    do_without(QUANTIZATION, SHARDING)
    code = main(argv)
    logging.shutdown()
    os._exit(code)


if __name__ == "__main__":
    run()
