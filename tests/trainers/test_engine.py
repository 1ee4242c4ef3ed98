"""The serving engine, asked over HTTP: one real process on the tiny model for most tests."""

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from examples.demo import GGUF, fetch_base_model
from trainers.folders.artifacts import digest_folder
from trainers.folders.checkpoints import seal, stage
from trainers.importer import import_model

START_LIMIT_S = 300
URL = "/v1/chat/completions"
QUESTION = [{"role": "user", "content": "Patient 3 has back pain. What now?"}]


def wait_until(condition: Callable[[], Any], *, limit_s: float) -> Any:
    """The first true value of `condition`; fails after limit_s."""
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.02)
    pytest.fail(f"nothing after {limit_s} s")


class RunningEngine:
    """An engine process and a client for it."""

    def __init__(self, command: list[Any], folder: Path) -> None:
        self.ready_file = folder / "ready.json"
        self.log = folder / "engine.log"
        arguments = ["--model-id", "tiny", "--ready-file", self.ready_file]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen([*command, *arguments], stdout=log, stderr=log)
        ready = wait_until(self._read_ready, limit_s=START_LIMIT_S)
        assert ready["pid"] == self.process.pid
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{ready['port']}", timeout=150)

    def _read_ready(self) -> dict | None:
        assert self.process.poll() is None, self.log.read_text()
        return json.loads(self.ready_file.read_text()) if self.ready_file.exists() else None

    def chat(self, **body: Any) -> dict:
        response = self.client.post(
            URL, json={"model": "tiny", "messages": QUESTION, "max_tokens": 24} | body
        )
        assert response.status_code == 200, response.text
        return response.json()

    def text(self, **body: Any) -> str:
        return self.chat(**body)["choices"][0]["message"]["content"]

    def complete(self, prompt: Any, **body: Any) -> dict:
        body = {"model": "tiny", "prompt": prompt, "temperature": 0} | body
        response = self.client.post("/v1/completions", json=body)
        assert response.status_code == 200, response.text
        return response.json()

    def stream(self, url: str = URL, **body: Any) -> list[Any]:
        """The frames of a stream, parsed; the last is "[DONE]"."""
        body = {"model": "tiny", "messages": QUESTION, "max_tokens": 24, "stream": True} | body
        with self.client.stream("POST", url, json=body) as response:
            assert response.status_code == 200
            assert response.headers["content-type"].startswith("text/event-stream")
            assert response.headers["x-accel-buffering"] == "no"
            events = response.read().decode().split("\n\n")
        assert events.pop() == ""
        data = [event.removeprefix("data: ") for event in events]
        return [item if item == "[DONE]" else json.loads(item) for item in data]

    def refuse(self, url: str = URL, **body: Any) -> dict:
        response = self.client.post(url, json={"model": "tiny", "messages": QUESTION} | body)
        assert response.status_code == 400, response.text
        error = response.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["type"] == "invalid_request_error"
        return error

    def count_active(self) -> int:
        return self.client.get("/health").json()["active_requests"]

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        self.client.close()


@pytest.fixture(scope="session")
def start_engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., RunningEngine]]:
    started = []

    def start(*arguments: Any, code: str | None = None) -> RunningEngine:
        program = ["-c", code] if code else ["-m", "trainers.engine"]
        engine = RunningEngine([sys.executable, *program, *arguments], tmp_path_factory.mktemp("engine"))
        started.append(engine)
        return engine

    yield start
    for engine in started:
        engine.end()


@pytest.fixture(scope="session")
def engine(start_engine, tiny_model: Path) -> RunningEngine:
    return start_engine(tiny_model)


# What is generated


def test_greedy_is_what_transformers_generates(engine, tiny_model):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_model)
    prompt = tokenizer.apply_chat_template(
        QUESTION, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    ids = model.generate(**prompt, max_new_tokens=24, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert torch.numel(ids)
    assert engine.text(temperature=0) == tokenizer.decode(ids, skip_special_tokens=True)


def test_greedy_repeats_itself(engine):
    assert len({engine.text(temperature=0) for _ in range(3)}) == 1


def test_settings_of_one_request_never_serve_another(engine):
    greedy = engine.text(temperature=0)
    hot = [engine.text(temperature=1.5) for _ in range(2)]
    assert hot[0] != hot[1]
    assert greedy not in hot
    assert engine.text(temperature=0) == greedy
    assert engine.text(temperature=1.5) not in [greedy, *hot]
    # One token to choose from is greedy too, whatever the temperature.
    assert engine.text(temperature=1.5, top_k=1) == greedy
    assert engine.text(temperature=1.5, top_p=0) == greedy


def test_concurrent_requests_each_get_their_settings(engine):
    settings = [{"temperature": 0}, {"temperature": 1.5, "seed": 1}, {"seed": 2}, {"seed": 3, "top_k": 3}] * 4
    alone = [engine.text(**each) for each in settings[:4]]
    assert len(set(alone)) == 4
    with ThreadPoolExecutor(16) as pool:
        together = list(pool.map(lambda each: engine.text(**each), settings))
    assert together == alone * 4


def test_seed_repeats_and_differs(engine):
    first = engine.text(seed=7)
    assert engine.text(seed=7) == first
    assert engine.text(seed=8) != first
    assert engine.text(seed=7, n=1, temperature=1.0, top_p=1) == first
    assert engine.text() != engine.text()  # no seed: not the same again


def test_choices_differ_and_prompt_counts_once(engine):
    one, three = engine.chat(seed=5), engine.chat(seed=5, n=3)
    assert [choice["index"] for choice in three["choices"]] == [0, 1, 2]
    texts = [choice["message"]["content"] for choice in three["choices"]]
    assert len(set(texts)) == 3
    assert texts[0] == one["choices"][0]["message"]["content"]
    assert three["usage"]["prompt_tokens"] == one["usage"]["prompt_tokens"]


def test_penalties_discourage_repetition(engine):
    prompt, limit = "aaaa", {"max_tokens": 40}
    plain = engine.complete(prompt, **limit)["choices"][0]["text"]
    for penalty in ("frequency_penalty", "presence_penalty"):
        penalized = engine.complete(prompt, **limit, **{penalty: 2.0})["choices"][0]["text"]
        assert len(set(penalized)) > len(set(plain))
    assert engine.complete(prompt, **limit, frequency_penalty=0.0)["choices"][0]["text"] == plain


def test_length_and_usage(engine):
    for limit in ({"max_tokens": 5}, {"max_completion_tokens": 5, "max_tokens": 9}):
        answer = engine.chat(temperature=0, **limit)
        assert answer["choices"][0]["finish_reason"] == "length"
        usage = answer["usage"]
        assert usage["completion_tokens"] == 5
        assert usage["total_tokens"] == usage["prompt_tokens"] + 5


def test_end_of_turn_stops(engine):
    """The tiny model draws <|im_end|> at random soon enough; it is not part of the text."""
    choices = engine.chat(seed=1, n=32, max_tokens=100)["choices"]
    assert "stop" in {choice["finish_reason"] for choice in choices}
    assert not any("<|im_end|>" in choice["message"]["content"] for choice in choices)


def test_stop_strings_cut_and_are_left_out(engine):
    text = engine.text(seed=11, max_tokens=60)
    stop = next(text[i : i + 3] for i in range(8, len(text)) if text[i : i + 3].isascii() and text[i])
    cut = text[: text.index(stop)]
    for stops in (stop, [stop], ["never there", stop]):
        answer = engine.chat(seed=11, max_tokens=60, stop=stops)
        assert answer["choices"][0]["message"]["content"] == cut
        assert answer["choices"][0]["finish_reason"] == "stop"
    frames = engine.stream(seed=11, max_tokens=60, stop=stop)
    assert "".join(frame["choices"][0]["delta"].get("content", "") for frame in frames[:-1]) == cut
    wait_until(lambda: engine.count_active() == 0, limit_s=5)


def test_cache_pressure_does_not_change_answers(start_engine, engine, tiny_model):
    """More requests than the cache can hold: transformers evicts and recomputes."""
    small = start_engine(tiny_model, "--kv-cache-gib", str(4 * 256 * 512 / 2**30))  # 4 blocks of 256 tokens
    body = {"seed": 3, "n": 6, "max_tokens": 300}
    with ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(lambda each: each.chat(**body)["choices"], (small, engine)))
    assert answers[0] == answers[1]
    small.end()


# The shape of the answers


def test_whole_answer_has_openai_shape(engine):
    answer = engine.chat(temperature=0)
    assert answer["id"].startswith("chatcmpl-")
    assert answer["system_fingerprint"].startswith("fp_")
    assert answer["created"] == pytest.approx(time.time(), abs=60)
    text = answer["choices"][0]["message"]["content"]
    assert answer == answer | {
        "object": "chat.completion",
        "model": "tiny",
        "service_tier": "default",
        "choices": [
            {
                "index": 0,
                "finish_reason": "length",
                "logprobs": None,
                "message": {"role": "assistant", "content": text, "refusal": None, "annotations": []},
            }
        ],
    }


@pytest.mark.parametrize("include_usage", [False, True])
def test_stream_has_openai_frames(engine, include_usage):
    options = {"stream_options": {"include_usage": True}} if include_usage else {}
    whole = engine.chat(seed=4)
    frames = engine.stream(seed=4, **options)
    assert frames.pop() == "[DONE]"
    assert (
        len(
            {(frame["id"], frame["created"], frame["model"], frame["system_fingerprint"]) for frame in frames}
        )
        == 1
    )
    assert {frame["object"] for frame in frames} == {"chat.completion.chunk"}
    if include_usage:
        last = frames.pop()
        assert last["choices"] == []
        assert last["usage"] == whole["usage"]
        assert all(frame["usage"] is None for frame in frames)
    else:
        assert not any("usage" in frame for frame in frames)
    choices = [frame["choices"][0] for frame in frames]
    assert choices[0]["delta"] == {"role": "assistant", "content": ""}
    assert choices[-1]["delta"] == {}
    assert choices[-1]["finish_reason"] == whole["choices"][0]["finish_reason"]
    assert all(choice["finish_reason"] is None for choice in choices[:-1])
    assert all(set(choice) == {"index", "delta", "logprobs", "finish_reason"} for choice in choices)
    text = "".join(choice["delta"].get("content", "") for choice in choices)
    assert text == whole["choices"][0]["message"]["content"]


def test_stream_of_choices_is_interleaved(engine):
    frames = engine.stream(seed=5, n=3)
    whole = engine.chat(seed=5, n=3)
    texts, ends = ["", "", ""], [0, 0, 0]
    for frame in frames[:-1]:
        choice = frame["choices"][0]
        texts[choice["index"]] += choice["delta"].get("content", "")
        ends[choice["index"]] += choice["finish_reason"] is not None
    assert texts == [choice["message"]["content"] for choice in whole["choices"]]
    assert ends == [1, 1, 1]
    order = [frame["choices"][0]["index"] for frame in frames[3:-1]]
    assert order != sorted(order)


def test_plain_completions(engine):
    answer = engine.complete(["Patient 1", "Patient 2"], n=2, max_tokens=3)
    assert answer["object"] == "text_completion"
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert answer["choices"][0]["text"] == answer["choices"][1]["text"]
    assert answer["usage"]["completion_tokens"] == 12
    ids = engine.client.post("/tokenize", json={"prompt": "Patient 1"}).json()["tokens"]
    for prompt in (ids, [ids]):
        assert engine.complete(prompt, max_tokens=3)["choices"][0]["text"] == answer["choices"][0]["text"]
    frames = engine.stream("/v1/completions", prompt="Patient 1", max_tokens=3, temperature=0)
    assert "".join(frame["choices"][0]["text"] for frame in frames[:-1]) == answer["choices"][0]["text"]


def test_parts_and_developer_role_are_what_training_reads(engine):
    def count(messages: list[dict]) -> list[int]:
        return engine.client.post("/tokenize", json={"messages": messages}).json()["tokens"]

    parts = [{"type": "text", "text": "Patient 3 has back "}, {"type": "text", "text": "pain. What now?"}]
    assert count([{"role": "user", "content": parts}]) == count(QUESTION)
    system, developer = (
        [{"role": role, "content": "Be brief."}, *QUESTION] for role in ("system", "developer")
    )
    assert count(system) == count(developer) != count(QUESTION)
    assert engine.text(messages=[{"role": "user", "content": parts}], temperature=0) == engine.text(
        temperature=0
    )


def test_models_and_health(engine):
    model = engine.client.get("/v1/models").json()["data"][0]
    assert model == model | {"id": "tiny", "object": "model", "max_model_len": 512}
    assert engine.client.get("/health").json()["status"] == "ok"


def test_openai_sdk(engine):
    from openai import BadRequestError, OpenAI

    client = OpenAI(base_url=f"{engine.client.base_url}/v1", api_key="none", max_retries=0)
    body: dict[str, Any] = {"model": "tiny", "messages": QUESTION, "max_tokens": 8, "seed": 1}
    whole = client.chat.completions.create(**body)
    stream = client.chat.completions.create(**body, stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage
    with pytest.raises(BadRequestError) as caught:
        client.chat.completions.create(**body, logprobs=True)
    assert caught.value.code == "unsupported_parameter"
    client.close()


# What is refused


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tools", [{"type": "function", "function": {"name": "f"}}]),
        ("tool_choice", "required"),
        ("logprobs", True),
        ("top_logprobs", 2),
        ("response_format", {"type": "json_object"}),
        ("logit_bias", {"5": 10}),
        ("repetition_penalty", 1.3),
        ("chat_template", "{{ messages }}"),
        ("chat_template_kwargs", {"enable_thinking": False}),
    ],
)
def test_unsupported_parameters_are_refused(engine, name, value):
    error = engine.refuse(**{name: value})
    assert (error["code"], error["param"]) == ("unsupported_parameter", name)


def test_neutral_and_unknown_parameters_are_accepted(engine):
    neutral = {"tools": [], "tool_choice": "auto", "logprobs": False, "top_logprobs": 0, "logit_bias": {}}
    neutral |= {"response_format": {"type": "text"}, "presence_penalty": 0, "frequency_penalty": 0.0, "n": 1}
    unknown = {"user": "u", "store": True, "service_tier": "auto", "metadata": {"a": "b"}, "banana": 1}
    nothing = dict.fromkeys(
        ("stop", "seed", "top_p", "stream", "stream_options", "max_completion_tokens", "n")
    )
    assert engine.text(temperature=0, **neutral | unknown | nothing) == engine.text(temperature=0)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"temperature": 2.5}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 1.1}, "top_p"),
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"presence_penalty": -3}, "presence_penalty"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
        ({"stop": ""}, "stop"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content.0"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"seed": 2**64}, "seed"),
    ],
)
def test_invalid_values_are_named(engine, body, param):
    assert engine.refuse(**body)["param"] == param


def test_missing_and_broken_bodies(engine):
    assert engine.client.post(URL, content=b"{").status_code == 400
    response = engine.client.post(URL, json={"model": "tiny"})
    assert response.status_code == 400
    assert response.json()["error"] == response.json()["error"] | {
        "param": "messages",
        "code": "missing_required_parameter",
    }


def test_unknown_model_and_route(engine):
    response = engine.client.post(URL, json={"model": "other", "messages": QUESTION})
    assert (response.status_code, response.json()["error"]["code"]) == (404, "model_not_found")
    assert engine.client.get("/nothing").json()["error"]["code"] == "not_found"
    assert engine.client.get(URL).json()["error"]["code"] == "method_not_allowed"


def test_what_does_not_fit_the_context_is_refused(engine):
    long = [{"role": "user", "content": "Patient 3 has back pain. " * 200}]
    for body in ({"messages": long}, {"max_tokens": 600}, {"messages": long, "stream": True}):
        assert engine.refuse(**body)["code"] == "context_length_exceeded"
    full = [5] * 500
    assert engine.complete(full, max_tokens=12)["usage"]["completion_tokens"] <= 12
    assert engine.refuse("/v1/completions", prompt=full, max_tokens=13)["code"] == "context_length_exceeded"
    assert engine.refuse("/v1/completions", prompt=[512])["code"] == "invalid_value"


# Cancelling, ending, failing


def test_disconnecting_aborts_a_stream(engine):
    body = {"model": "tiny", "messages": QUESTION, "n": 64, "max_tokens": 450, "stream": True}
    with engine.client.stream("POST", URL, json=body) as response:
        lines = response.iter_lines()
        assert "delta" in next(lines)
        wait_until(lambda: engine.count_active() > 30, limit_s=10)
    wait_until(lambda: engine.count_active() == 0, limit_s=3)


def test_disconnecting_aborts_a_whole_answer(engine):
    body = {"model": "tiny", "messages": QUESTION, "n": 64, "max_tokens": 450}
    with ThreadPoolExecutor(1) as pool:
        request = pool.submit(httpx.post, f"{engine.client.base_url}{URL}", json=body, timeout=1)
        wait_until(lambda: engine.count_active() > 30, limit_s=10)
        assert isinstance(request.exception(), httpx.ReadTimeout)
    wait_until(lambda: engine.count_active() == 0, limit_s=3)
    assert engine.text(temperature=0)


def test_adapter_is_merged_and_sigterm_drains(start_engine, tiny_model, engine, tmp_path):
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    adapted.save_pretrained(tmp_path / "adapter")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    ids = tokenizer("Patient 3", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = tokenizer.decode(
            adapted.generate(input_ids=ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
        )

    served = start_engine(tiny_model, "--adapter", tmp_path / "adapter")
    assert served.complete("Patient 3", max_tokens=12)["choices"][0]["text"] == expected
    assert served.chat()["system_fingerprint"] != engine.chat()["system_fingerprint"]
    with ThreadPoolExecutor(1) as pool:
        stream = pool.submit(served.stream, n=8, max_tokens=200)
        wait_until(lambda: served.count_active() > 4, limit_s=10)
        served.process.send_signal(signal.SIGTERM)
        assert stream.result()[-1] == "[DONE]"
    assert served.process.wait(timeout=20) == 0


def flip_a_byte(folder):
    (folder / "adapter_model.safetensors").write_bytes(b"x" * 50 + b"y" + b"x" * 49)


def lose_the_manifest(folder):
    (folder / "MANIFEST.json").unlink()


def seal_others(folder):
    shutil.rmtree(folder)
    seal_checkpoint(folder.parent, b"z" * 100)


def seal_checkpoint(root, weights):
    staged = stage(root, step=3)
    (staged / "adapter_config.json").write_text("{}")
    (staged / "adapter_model.safetensors").write_bytes(weights)
    return seal(staged, step=3, attempt=1, world_size=1)


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (flip_a_byte, r"adapter_model\.safetensors does not match its sha256"),
        (lose_the_manifest, r"MANIFEST\.json is missing"),
        (seal_others, r"MANIFEST\.json is of another checkpoint"),
    ],
)
def test_a_damaged_checkpoint_is_not_served(start_engine, tiny_model, tmp_path, damage, problem):
    sealed = seal_checkpoint(tmp_path, b"x" * 100)
    damage(sealed.path)
    with pytest.raises(AssertionError, match=problem):
        start_engine(tiny_model, "--adapter", sealed.path, "--manifest-sha256", sealed.manifest_sha256)


def test_a_damaged_checkpoint_is_not_served_by_hand_either(start_engine, tiny_model, tmp_path):
    """Without the sum of its manifest, its own manifest counts."""
    sealed = seal_checkpoint(tmp_path, b"x" * 100)
    flip_a_byte(sealed.path)
    with pytest.raises(AssertionError, match=r"adapter_model\.safetensors does not match its sha256"):
        start_engine(tiny_model, "--adapter", sealed.path)


def test_broken_generation_is_reported_and_ends_the_process(start_engine, tiny_model):
    """The fault is real: the model raises in transformers' generation thread after the 40th step."""
    code = """
import itertools
from transformers import LlamaForCausalLM
from trainers import engine
right, steps = LlamaForCausalLM.forward, itertools.count()
def forward(self, *args, **kwargs):
    if next(steps) > 40:
        raise RuntimeError("the device is lost")
    return right(self, *args, **kwargs)
LlamaForCausalLM.forward = forward
engine.run()
"""
    broken = start_engine(tiny_model, code=code)
    frames = broken.stream(n=16, max_tokens=200)  # some end by themselves before the fault, not all
    assert "the device is lost" in frames[-1]["error"]["message"]
    assert frames[-1]["error"]["code"] == "engine_failed"
    assert broken.process.wait(timeout=20) == 1


@pytest.mark.long
def test_template_that_hangs_ends_only_its_engine(start_engine, tiny_model, tmp_path):
    """It passed the check at import, because it waits for a conversation longer than those tried there."""
    folder = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    template = (folder / "chat_template.jinja").read_text()
    hang = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    (folder / "chat_template.jinja").write_text(
        "{% if messages|length > 8 %}" + hang + "{% endif %}" + template
    )
    hostile = start_engine(folder)
    with ThreadPoolExecutor(1) as pool:
        body = {"model": "tiny", "messages": QUESTION * 9}
        hanging = pool.submit(httpx.post, f"{hostile.client.base_url}{URL}", json=body, timeout=150)
        assert hostile.complete([5, 6], max_tokens=4)["choices"]  # needs no tokenizer
        assert hanging.result().status_code == 503
    assert hostile.process.wait(timeout=20) == 1


def test_engine_dies_with_its_parent(tiny_model, tmp_path):
    """The engine's parent is killed, so nobody is left to stop it."""
    code = "import subprocess, sys; subprocess.run([sys.executable, '-m', 'trainers.engine', *sys.argv[1:]])"
    arguments = [tiny_model, "--model-id", "tiny", "--ready-file", tmp_path / "ready.json"]
    parent = subprocess.Popen([sys.executable, "-c", code, *arguments], stderr=subprocess.DEVNULL)
    wait_until((tmp_path / "ready.json").exists, limit_s=START_LIMIT_S)
    pid = json.loads((tmp_path / "ready.json").read_text())["pid"]
    parent.kill()
    parent.wait()
    wait_until(lambda: not _is_alive(pid), limit_s=5)


def _is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def run_to_end(tmp_path: Path, model_dir: Path, *more: str) -> subprocess.CompletedProcess[str]:
    """An engine that is not to start."""
    options = ["--model-id", "x", "--ready-file", tmp_path / "r", *more]
    command = [sys.executable, "-m", "trainers.engine", model_dir, *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert not (tmp_path / "r").exists()
    return done


def test_model_that_does_not_load_exits_nonzero(tmp_path):
    done = run_to_end(tmp_path, tmp_path)
    assert done.returncode == 1
    assert "does not load" in done.stderr


def test_a_model_that_has_changed_on_the_disk_is_not_served(tmp_path, tiny_model):
    changed = tmp_path / "model"
    shutil.copytree(tiny_model, changed)
    weights = bytearray((changed / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (changed / "model.safetensors").write_bytes(weights)
    done = run_to_end(tmp_path, changed, "--digest", digest_folder(tiny_model))
    assert done.returncode == 1
    assert "the model is damaged" in done.stderr


# The parts that HTTP cannot show well


def test_text_stream_never_splits_characters_or_stop_strings(tiny_model):
    from transformers import AutoTokenizer

    from trainers.tokens.text_stream import Detokenizer, StopFilter

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    text = "Fever 患者咳嗽三天 👩‍⚕️🩺 naïve — Ωμέγα. " * 4
    pieces, detokenizer = [], Detokenizer(tokenizer)
    for token_id in tokenizer(text)["input_ids"]:
        pieces.append(detokenizer.push([token_id]))
    pieces.append(detokenizer.push([], last=True))
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert sum(bool(piece) for piece in pieces) > 50

    stop_filter = StopFilter(["STOP", "TOPS"])
    shown = [stop_filter.push(piece) for piece in ("a ST", "ST", "O", "x STO", "PS y")]
    assert shown == ["a ", "ST", "", "STOx ", ""]
    assert stop_filter.stopped


def test_noise_draws_from_the_softmax():
    import torch
    from transformers.generation.continuous_batching.requests import FutureRequestState, RequestState

    from trainers.serving.sampling import Sampling, build_processors

    processors = build_processors()
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -9.0])
    storage = torch.zeros(processors.tensors_required, 2, dtype=torch.int32)
    counts = torch.zeros(5)
    states = [
        RequestState("hot", [0], logit_processor_kwargs=Sampling("a", temperature=2.0, top_k=4).to_kwargs()),
        RequestState("greedy", [0], logit_processor_kwargs=Sampling("a", temperature=0.0).to_kwargs()),
    ]
    for state in states:
        processors.check_kwargs(state.logit_processor_kwargs)
    processors.fill_defaults(storage)
    for position in range(4000):
        states[0].position_offset = position
        batch = [FutureRequestState(state, True, {}, 1) for state in states]
        arguments = processors.prepare_tensor_args(batch, storage)
        hot, greedy = processors(torch.LongTensor([0, 0]), logits.repeat(2, 1), arguments)
        counts[hot.argmax()] += 1
        assert greedy.argmax() == 0
    expected = torch.softmax(logits[:4] / 2, dim=0)
    assert counts[4] == 0
    assert torch.allclose(counts[:4] / 4000, expected, atol=0.03)


@pytest.mark.long
def test_real_model_answers(start_engine, tmp_path):
    fetch_base_model()
    import_model(GGUF, out_dir=tmp_path / "smollm2")
    real = start_engine(tmp_path / "smollm2")
    question = [{"role": "user", "content": "What is the capital of France?"}]
    answer = real.chat(messages=question, temperature=0, max_tokens=40)
    assert "Paris" in answer["choices"][0]["message"]["content"]
    assert answer["choices"][0]["finish_reason"] == "stop"
