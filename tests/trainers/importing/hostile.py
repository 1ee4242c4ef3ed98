"""Hostile models: every way known to us of making an import run code, hang, eat memory or read elsewhere.

Each case changes a copy of a good model folder. Whatever could run leaves the folder `canary` beside it.
"""

import json
import os
import pickle
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HANG = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
TEMPLATES = {
    "nested range": HANG,
    "three ranges": "{% for a in range(999) %}{% for b in range(999) %}{% for c in range(999) %}"
    "{% endfor %}{% endfor %}{% endfor %}",
    "huge repeat": "{{ 'a' * 10**10 }}",
    "repeat of a repeat": "{% set a = 'a' * 10**6 %}{{ (a * 10**3) * 10**3 }}",
    "huge number": "{{ 9 ** 9 ** 9 }}",
    "huge output": "{{ messages[0]['content'] * 10**5 }}",
    "huge padding": "{{ messages[0]['content'].center(10**10) }}",
    "huge format": "{{ '%99999999999d' % 1 }}",
    "huge indentation": "{{ messages | tojson(indent=10**9) }}",
    "attribute escape": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "attribute filter": "{{ '' | attr('__class__') }}{{ messages[0]['content'].__class__.__mro__ }}",
    "globals of a function": "{{ raise_exception.__globals__['__builtins__'] }}",
    "format escape": "{{ '{0.__class__.__mro__}'.format(messages[0]['content']) }}",
    "globals of a cycler": "{{ cycler.__init__.__globals__.os.system('true') }}",
    "changes its arguments": "{{ messages.append(1) }}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "recursive loop": "{% for m in messages recursive %}{{ loop([m]) }}{% endfor %}",
    "include": "{% include '/etc/passwd' %}",
    "import": "{% import 'os' as os %}{{ os }}",
    "extends": "{% extends '/etc/passwd' %}",
    "always raises": "{{ raise_exception('no') }}",
    "raises a book": "{{ raise_exception('no ' * 10**6) }}",
    "no template": "{% bogus %}",
    "drops the message": "forgets the message",
    "nested too deep": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "second turn": "{{ messages[0]['content'] }}{% if messages|length > 1 %}" + HANG + "{% endif %}",
    "only with tools": "{{ messages[0]['content'] }}{% if tools %}" + HANG + "{% endif %}",
    "only at a call": "{% for m in messages %}{{ m['content'] }}{% if m['tool_calls'] %}"
    + HANG
    + "{% endif %}{% endfor %}",
}


class Payload:
    """Makes the canary when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self._canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self._canary),)


@dataclass(frozen=True)
class Case:
    """A name, what it does to a good model folder, and the code it must be refused with."""

    name: str
    damage: Callable[[Path], None]
    code: str
    alone: bool = False  # in a process of its own: it might hang or take all memory


def canary_of(folder: Path) -> Path:
    return folder.parent / "canary"


def edit_json(path: Path, **changes: object) -> None:
    known = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(known | changes))


def pickle_as(name: str, *, instead: bool = False) -> Callable[[Path], None]:
    """A pickle under `name`; `instead` of the file that had it."""

    def damage(folder: Path) -> None:
        path = folder / name
        assert path.exists() == instead
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(pickle.dumps(Payload(canary_of(folder))))

    return damage


def set_json(name: str, **changes: object) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        code = f"import os\nos.mkdir({str(canary_of(folder))!r})\nclass Evil: ...\n"
        (folder / "evil.py").write_text(code)
        edit_json(folder / name, **changes)

    return damage


def write(name: str, content: bytes | str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())

    return damage


def sparse(name: str, n_bytes: int) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        with (folder / name).open("ab") as file:
            file.truncate(n_bytes)

    return damage


def pipe(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return damage


def link(name: str, target: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target)

    return damage


def nested(depth: int) -> bytes:
    return b'{"a":' * depth + b"1" + b"}" * depth


def safetensors(header: bytes, body: bytes = b"") -> Callable[[Path], None]:
    return write("model.safetensors", len(header).to_bytes(8, "little") + header + body)


def _tensors(**offsets: tuple[int, int]) -> bytes:
    entries = {
        name: {"dtype": "F32", "shape": [(end - start) // 4], "data_offsets": [start, end]}
        for name, (start, end) in offsets.items()
    }
    return json.dumps(entries).encode()


def truncate(name: str, lost_bytes: int) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        os.truncate(folder / name, (folder / name).stat().st_size - lost_bytes)

    return damage


def _in_string(template: object) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / "chat_template.jinja").unlink()
        edit_json(folder / "tokenizer_config.json", chat_template=template)

    return damage


def _in_list(template: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / "chat_template.jinja").unlink()
        good = "{{ messages[0]['content'] }}"
        named = [{"name": "default", "template": good}, {"name": "tool_use", "template": template}]
        edit_json(folder / "tokenizer_config.json", chat_template=named)

    return damage


def _shadowed(template: str) -> Callable[[Path], None]:
    """Beside a good template that takes precedence today."""
    return lambda folder: edit_json(folder / "tokenizer_config.json", chat_template=template)


PLACES: dict[str, Callable[[str], Callable[[Path], None]]] = {
    "chat_template.jinja": lambda template: write("chat_template.jinja", template),
    "a string": _in_string,
    "a list": _in_list,
    "shadowed": _shadowed,
    "additional": lambda template: write("additional_chat_templates/tool_use.jinja", template),
}


def gguf(*, version: int = 3, n_tensors: int = 0, n_pairs: int = 0, rest: bytes = b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, n_tensors, n_pairs) + rest


def gguf_pair(key: str, kind: int, value: bytes) -> bytes:
    return struct.pack("<Q", len(key)) + key.encode() + struct.pack("<I", kind) + value


def gguf_text(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


def _pickles() -> list[Case]:
    suffixes = ("bin", "pt", "pth", "pkl", "pickle", "ckpt", "npy", "npz", "h5", "msgpack", "joblib")
    names = [f"weights.{suffix}" for suffix in suffixes]
    names += [name.upper() for name in names] + [f"original/{name}" for name in names]
    cases = [Case(f"pickle {name}", pickle_as(name), "unsafe_weights") for name in names]
    return [
        *cases,
        Case("pickle as weights", pickle_as("model.safetensors", instead=True), "bad_safetensors"),
        Case("pickle as more weights", pickle_as("model-2.safetensors"), "bad_safetensors"),
        Case("pickle as tokenizer", pickle_as("tokenizer.json", instead=True), "not_a_model"),
        Case("pickle as vocabulary", pickle_as("vocab.json"), "not_a_model"),
        Case("pickle as config", pickle_as("config.json", instead=True), "not_a_model"),
        Case("pickle as template", pickle_as("chat_template.jinja", instead=True), "bad_chat_template"),
    ]


def _code() -> list[Case]:
    ref = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}
    tokenizer_ref = {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}
    config, generation, tokenizer = "config.json", "generation_config.json", "tokenizer_config.json"
    deep = {"deep": [[{"auto_map": ref}]]}
    changes = [
        (config, {"auto_map": ref}),
        (config, {"text_config": deep}),
        (config, {"custom_pipelines": {"text-generation": {"impl": "evil.Evil"}}}),
        (config, {"attn_implementation": "someone/kernel"}),
        (config, {"_attn_implementation_internal": "someone/kernel:evil"}),
        (config, {"attn_implementation": {"": "sdpa", "text_config": "someone/kernel"}}),
        (config, {"text_config": {"_attn_implementation": "someone/kernel@main"}}),
        (config, {"experts_implementation": "someone/kernel"}),
        (config, {"kernel_config": {"RMSNorm": "someone/kernel:evil"}}),
        (config, {"use_kernels": True}),
        (generation, {"auto_map": ref}),
        (generation, {"custom_generate": "someone/evil"}),
        (generation, {"nested": {"custom_generate": "someone/evil"}}),
        (tokenizer, {"auto_map": tokenizer_ref}),
        (tokenizer, {"auto_map": ["evil.Evil", None]}),
        (tokenizer, {"nested": deep}),
    ]
    cases = [
        Case(f"code {name} {list(change)} {number}", set_json(name, **change), "remote_code")
        for number, (name, change) in enumerate(changes)
    ]
    arguments: list[dict[str, object]] = [
        {"tokenizer_file": "/etc/passwd"},
        {"vocab_file": "/etc/passwd"},
        {"merges_file": "../elsewhere/merges.txt"},
        {"init_inputs": ["/etc/passwd"]},
    ]
    cases += [
        Case(f"argument {change}", set_json(tokenizer, **change), "unsafe_tokenizer") for change in arguments
    ]
    return [
        *cases,
        Case("unknown type", set_json(config, model_type="evil"), "unknown_model_type"),
        Case("type that is no text", set_json(config, model_type=["llama"]), "unknown_model_type"),
        Case("quantized", set_json(config, quantization_config={"quant_method": "gptq"}), "quantized_model"),
        Case("adapter", write("adapter_config.json", "{}"), "adapter_needs_base"),
    ]


def _places() -> list[Case]:
    index = {"weight_map": {"lm_head.weight": "../../elsewhere.safetensors"}}
    lists = {"weight_map": {"lm_head.weight": ["model.safetensors"]}}
    return [
        Case("linked weights", link("model.safetensors", "/etc/passwd"), "symlink"),
        Case("linked config", link("config.json", "/etc/passwd"), "symlink"),
        Case("linked note", link("README.md", "/etc/passwd"), "symlink"),
        Case("linked folder", link("original", "/etc"), "symlink"),
        Case("dangling link", link("weights", "/nowhere"), "symlink"),
        Case("index outside", write("model.safetensors.index.json", json.dumps(index)), "not_a_model"),
        Case("index of lists", write("model.safetensors.index.json", json.dumps(lists)), "not_a_model"),
        *(Case(f"pipe {name}", pipe(name), "not_a_model", alone=True) for name in ("config.json", "a.model")),
        Case("pipe as weights", pipe("model.safetensors"), "not_a_model", alone=True),
        Case("folder as weights", lambda f: (f / "b.safetensors").mkdir(), "not_a_model"),
    ]


def _damaged() -> list[Case]:
    overlapping = _tensors(a=(0, 64), b=(32, 96))
    outside, hole = _tensors(a=(0, 1 << 40)), _tensors(a=(0, 32), b=(64, 96))
    bad = "bad_safetensors"
    cases = [
        Case("header of 1 TiB", write("model.safetensors", (1 << 40).to_bytes(8, "little") + b"{}"), bad),
        Case("header past the end", write("model.safetensors", (99).to_bytes(8, "little") + b"{}"), bad),
        Case("empty weights", write("model.safetensors", b""), bad),
        Case("half weights", truncate("model.safetensors", 100), bad),
        Case("header no JSON", safetensors(b"\0" * 64), bad),
        Case("header a list", safetensors(b"[]"), bad),
        Case("header a number", safetensors(b"1"), bad),
        Case("header too deep", safetensors(nested(100_000)), bad),
        Case("header half deep", safetensors(nested(900)), bad),
        Case("overlapping tensors", safetensors(overlapping, bytes(96)), bad),
        Case("tensor outside", safetensors(outside, bytes(96)), bad),
        Case("hole between tensors", safetensors(hole, bytes(96)), bad),
        Case("negative offsets", safetensors(_tensors(a=(-64, 0)), bytes(96)), bad),
        Case("config too deep", write("config.json", nested(100_000)), "not_a_model"),
        Case("config deep", write("config.json", nested(500)), "unknown_model_type"),
        Case("config of 1 GB", sparse("config.json", 1 << 30), "not_a_model", alone=True),
        Case("tokenizer of 1 GB", sparse("tokenizer.json", 1 << 30), "not_a_model", alone=True),
        Case("template of 1 GB", sparse("chat_template.jinja", 1 << 30), "not_a_model", alone=True),
        Case("config a list", write("config.json", "[]"), "not_a_model"),
        Case("config of numbers", write("config.json", "1" * 10_000), "not_a_model"),
        Case("tokenizer an object", write("tokenizer.json", "{}"), "no_tokenizer"),
        Case("tokenizer too deep", write("tokenizer.json", nested(100_000)), "not_a_model"),
        Case(
            "tokenizer of another kind", write("tokenizer.json", '{"model": {"type": "x"}}'), "no_tokenizer"
        ),
    ]
    numbers: list[tuple[str, object, str]] = [
        ("num_hidden_layers", 10**9, "bad_config"),
        ("num_hidden_layers", 10**30, "bad_config"),
        ("num_local_experts", 10**9, "bad_config"),
        ("hidden_size", 10**30, "load_failed"),
        ("hidden_size", -64, "load_failed"),
        ("hidden_size", "many", "load_failed"),
        ("hidden_size", None, "load_failed"),
        ("hidden_size", {}, "load_failed"),
        ("num_attention_heads", 0, "load_failed"),
        ("vocab_size", 10**15, "load_failed"),
        ("vocab_size", 0, "load_failed"),
        ("rope_scaling", [1], "load_failed"),
        ("dtype", "evil", "load_failed"),
    ]
    return cases + [
        Case(f"config {key}={value}", set_json("config.json", **{key: value}), code, alone=value == 10**9)
        for key, value, code in numbers
    ]


def _templates() -> list[Case]:
    code = "bad_chat_template"
    everywhere = [
        Case(f"template {name} in {place}", put(TEMPLATES[name]), code)
        for place, put in PLACES.items()
        for name in ("attribute escape", "huge repeat", "raises a book")
    ]
    hanging = [
        Case(f"template that hangs in {place}", PLACES[place](HANG), code)
        for place in ("chat_template.jinja", "additional")
    ]
    odd: list[tuple[str, object]] = [
        ("a number", 7),
        ("a list of texts", ["{{ messages }}"]),
        ("a list without names", [{"template": "{{ messages[0]['content'] }}"}]),
        ("a name that is no text", [{"name": ["default"], "template": "{{ messages[0]['content'] }}"}]),
        ("a number in a list", [{"name": "default", "template": 7}]),
        ("hundreds", [{"name": f"t{i}", "template": "{{ messages[0]['content'] }}"} for i in range(300)]),
        ("no default", [{"name": "tool_use", "template": "{{ messages[0]['content'] }}"}]),
    ]
    return [
        *everywhere,
        *hanging,
        *(Case(f"template is {name}", _in_string(value), code) for name, value in odd),
    ]


FOLDERS = [*_pickles(), *_code(), *_places(), *_damaged(), *_templates()]

_COUNT = struct.pack("<Q", 2**62)
_ARCHITECTURE = gguf_pair("general.architecture", 8, gguf_text("llama"))
GGUFS = {
    "bad magic": (b"PK\x03\x04" + bytes(64), "not_a_model"),
    "empty": (b"", "bad_gguf"),
    "magic alone": (b"GGUF", "bad_gguf"),
    "unknown version": (gguf(version=77), "bad_gguf"),
    "other byte order": (b"GGUF" + struct.pack(">IQQ", 3, 1, 1) + bytes(64), "bad_gguf"),
    "2**62 tensors": (gguf(n_tensors=2**62), "bad_gguf"),
    "2**62 values": (gguf(n_pairs=2**62), "bad_gguf"),
    "a million tensors in no bytes": (gguf(n_tensors=10**6), "bad_gguf"),
    "key of 2**62 bytes": (gguf(n_pairs=1, rest=_COUNT), "bad_gguf"),
    "text of 2**62 bytes": (gguf(n_pairs=1, rest=gguf_pair("a", 8, _COUNT)), "bad_gguf"),
    "array of 2**62 bytes": (
        gguf(n_pairs=1, rest=gguf_pair("a", 9, struct.pack("<I", 0) + _COUNT)),
        "bad_gguf",
    ),
    "array of 2**62 texts": (
        gguf(n_pairs=1, rest=gguf_pair("a", 9, struct.pack("<I", 8) + _COUNT)),
        "bad_gguf",
    ),
    "array of arrays": (
        gguf(n_pairs=1, rest=gguf_pair("a", 9, struct.pack("<IQ", 9, 1) + struct.pack("<IQ", 9, 1) * 50)),
        "bad_gguf",
    ),
    "unknown type": (gguf(n_pairs=1, rest=gguf_pair("a", 77, bytes(8))), "bad_gguf"),
    "tensor of 2**32 - 1 dimensions": (
        gguf(n_tensors=1, rest=gguf_text("t") + b"\xff" * 4 + bytes(64)),
        "bad_gguf",
    ),
    "tensor larger than the file": (
        gguf(n_tensors=1, rest=gguf_text("t") + struct.pack("<IQQIQ", 2, 2**31, 2**31, 0, 0)),
        "bad_gguf",
    ),
    "a billion layers": (
        gguf(n_pairs=2, rest=_ARCHITECTURE + gguf_pair("llama.block_count", 4, struct.pack("<I", 10**9))),
        "bad_config",
    ),
    "hanging template": (
        gguf(n_pairs=2, rest=_ARCHITECTURE + gguf_pair("tokenizer.chat_template", 8, gguf_text(HANG))),
        "bad_chat_template",
    ),
}
