"""transformers' continuous batching behind asyncio: requests in, tokens out, a clear end when it fails."""

import asyncio
import itertools
import logging
import math
import threading
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import psutil
from transformers import GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from trainers.serving.sampling import Sampling, build_processors
from trainers.tokens.text_stream import Detokenizer, StopFilter

PAGE_TOKENS = 256
CPU_KV_CACHE_BYTES = 1 << 30
_POLL_S = 1.0  # how soon a dead generation thread is noticed when nothing is asked of it

log = logging.getLogger(__name__)


class GenerationFailed(RuntimeError):
    """The engine could not go on with a request."""


@dataclass(frozen=True)
class Piece:
    """The next part of an answer. `finish_reason` ("stop" or "length") comes with the last one."""

    text: str
    n_tokens: int  # generated so far
    finish_reason: str | None = None


class Generator:
    """Feeds one ContinuousBatchingManager. No scheduling and no cache of its own."""

    def __init__(
        self, model: Any, *, tokenizer: Any, stop_ids: list[int], kv_cache_bytes: int | None
    ) -> None:
        """kv_cache_bytes None: on GPU most of the free memory, on CPU 1 GiB or one whole context."""
        self.tokenizer = tokenizer
        self.stop_ids = frozenset(stop_ids)
        self.failure: str | None = None
        text_config = model.config.get_text_config()
        self.dtype = str(model.dtype).removeprefix("torch.")
        self.vocab_size: int = text_config.vocab_size
        on_cpu = model.device.type == "cpu"
        self._manager: Any = model.init_continuous_batching(
            # What is not set here could come from the model's folder, and would then hold for every request.
            GenerationConfig(
                do_sample=False, eos_token_id=stop_ids or -1, pad_token_id=text_config.pad_token_id
            ),
            ContinuousBatchingConfig(
                per_request_processors=True,
                num_blocks=_count_blocks(text_config, model=model, kv_cache_bytes=kv_cache_bytes),
                max_batch_tokens=1024 if on_cpu else 2048,
                max_requests_per_batch=64 if on_cpu else 256,
                use_cuda_graph=False,  # see trainers.serving.sampling
                use_async_batching=False,
                **_options_known_here(auto_switch_to_flash=False),  # never fetches a kernel
            ),
        )
        self._manager.logit_processor = build_processors()
        self._context_limit: int = getattr(text_config, "max_position_embeddings", None) or 2**31
        self._queues: dict[str, asyncio.Queue[Any]] = {}
        self._counter = itertools.count()
        self._stopping = False

    def start(self, *, on_failure: Callable[[], None]) -> None:
        """Start the generation thread and the one that hands its results to the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._on_failure = on_failure
        self._manager.start()
        threading.Thread(target=self._dispatch, name="dispatch", daemon=True).start()

    @property
    def context_length(self) -> int:
        """Most tokens that prompt and answer can have together."""
        blocks = self._manager.continuous_batching_config.num_blocks
        return min(self._context_limit, (blocks - 1) * PAGE_TOKENS) if blocks else self._context_limit

    def count_active_requests(self) -> int:
        """Requests that the generation thread holds, running or waiting."""
        processor = self._manager.batch_processor
        if processor is None:
            return 0
        return len(processor.scheduler.active_requests) + len(processor.scheduler.waiting_requests)

    def fail(self, reason: str) -> None:
        """Give up: every request in flight ends with an error, and so does every later one."""
        if self.failure is not None or self._stopping:
            return
        self.failure = reason
        log.error("the engine failed: %s", reason)
        for queue in self._queues.values():
            queue.put_nowait(None)
        self._on_failure()

    def stop(self, *, timeout_s: float) -> None:
        self._stopping = True
        self._manager.stop(block=True, timeout=timeout_s, hard_stop=True)

    async def generate(
        self, prompt_ids: list[int], *, sampling: Sampling, max_tokens: int
    ) -> AsyncGenerator[tuple[list[int], bool]]:
        """Yields (new tokens, finished). Closing it early cancels the request."""
        if self.failure is not None:
            raise GenerationFailed(self.failure)
        request_id = f"request-{next(self._counter)}"
        queue = self._queues[request_id] = asyncio.Queue()
        finished, n_seen = False, 0
        try:
            self._manager.add_request(
                prompt_ids,
                request_id=request_id,
                max_new_tokens=max_tokens,
                streaming=True,
                eos_token_id=list(self.stop_ids) or -1,
                **sampling.to_kwargs(),
            )
            while not finished:
                output = await queue.get()
                if output is None or output.error is not None:
                    finished = True
                    raise GenerationFailed(
                        output.error if output else self.failure or "the engine is stopping"
                    )
                finished = output.is_finished()
                new = output.generated_tokens[n_seen:]
                n_seen += len(new)
                yield new, finished
        finally:
            del self._queues[request_id]
            if not finished:
                self._manager.cancel_request(request_id)

    async def generate_text(
        self, prompt_ids: list[int], *, sampling: Sampling, max_tokens: int, stops: list[str]
    ) -> AsyncGenerator[Piece]:
        """Yields the answer's text as it becomes certain; the last piece says why it ended."""
        detokenizer, stop_filter = Detokenizer(self.tokenizer), StopFilter(stops)
        n_tokens = 0
        async with aclosing(self.generate(prompt_ids, sampling=sampling, max_tokens=max_tokens)) as batches:
            async for new, finished in batches:
                n_tokens += len(new)
                reason = None
                if finished:
                    reason = "stop" if new and new[-1] in self.stop_ids else "length"
                shown = new[:-1] if reason == "stop" else new
                text = stop_filter.push(detokenizer.push(shown, last=finished), last=finished)
                if stop_filter.stopped:
                    reason = "stop"
                if text or reason:
                    yield Piece(text, n_tokens, reason)
                if reason:
                    return

    def _dispatch(self) -> None:
        while True:
            output = self._manager.get_result(timeout=_POLL_S)
            if output is not None:
                self._loop.call_soon_threadsafe(self._deliver, output)
            elif not self._manager.is_running():
                break
        if not self._stopping:
            error = self._manager.background_thread_status.fatal_error
            self._loop.call_soon_threadsafe(self.fail, f"the generation thread ended: {error}")

    def _deliver(self, output: Any) -> None:
        # A cancelled request may still have had a token on its way.
        if queue := self._queues.get(output.request_id):
            queue.put_nowait(output)


def _count_blocks(text_config: Any, *, model: Any, kv_cache_bytes: int | None) -> int | None:
    """Cache blocks of PAGE_TOKENS tokens; None leaves it to transformers."""
    on_cpu = model.device.type == "cpu"
    if kv_cache_bytes is None and not on_cpu:
        return None
    n_heads = getattr(text_config, "num_key_value_heads", None) or text_config.num_attention_heads
    head_dim = getattr(text_config, "head_dim", None)
    head_dim = head_dim or text_config.hidden_size // text_config.num_attention_heads
    token_bytes = 2 * text_config.num_hidden_layers * n_heads * head_dim * model.dtype.itemsize
    block_bytes = token_bytes * PAGE_TOKENS
    # One more than the context fills: the last block is never quite free.
    context_blocks = math.ceil(getattr(text_config, "max_position_embeddings", 4096) / PAGE_TOKENS) + 1
    if kv_cache_bytes is None:
        # transformers would take 60 % of the machine, which runs other things too.
        limit = psutil.virtual_memory().available // 4
        kv_cache_bytes = min(max(CPU_KV_CACHE_BYTES, context_blocks * block_bytes), limit)
    return max(2, min(64 * context_blocks, kv_cache_bytes // block_bytes))


def _options_known_here(**options: Any) -> dict[str, Any]:
    """Those options that the installed transformers has."""
    return {name: value for name, value in options.items() if hasattr(ContinuousBatchingConfig, name)}
