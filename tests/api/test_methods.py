"""GET /v1/methods: what can be asked for, generated from what is accepted."""

import json
from typing import Any

import pytest

from api.methods import EXAMPLES, WITH_TOOLS
from tests.api.cli_peer import run, serve
from trainers.rows.formats import FORMATS, detect_format, kind_of, read_row
from trainers.specs import METHODS, parse_method
from trainers.specs.descriptions import DESCRIPTIONS
from trainers.specs.layouts import PLAIN_TEXT
from trainers.specs.names import ALIASES, IGNORED


@pytest.fixture
def listed(client) -> dict:
    answer = client.get("/v1/methods")
    assert answer.status_code == 200, answer.text
    return answer.json()


@pytest.fixture
def methods(listed) -> dict:
    return {method["name"]: method for method in listed["data"]}


def parameter(method: dict, name: str) -> dict:
    return next(found for found in method["parameters"] if found["name"] == name)


def test_every_method_is_described(listed, methods):
    assert listed["object"] == "list"
    assert listed["ignored"] == IGNORED
    assert list(methods) == list(METHODS)
    for name, kind in METHODS.items():
        assert methods[name]["object"] == "method"
        assert methods[name]["summary"] == kind.summary
        assert methods[name]["learns_from"] == kind.learns_from
        assert {found["name"] for found in methods[name]["parameters"]} == set(
            kind.asked.model_fields
        ) - kind.beside
    told = {found["name"] for method in methods.values() for found in method["parameters"]}
    assert told == DESCRIPTIONS.keys()
    kinds = methods["grpo"]["grader"]["discriminator"]["mapping"]
    assert set(kinds) == {"string_check", "text_similarity", "regex"}
    assert methods["ppo"]["grader"] is None


def test_a_parameter_tells_its_type_bounds_default_and_other_names(methods):
    assert parameter(methods["supervised"], "n_epochs") == {
        "name": "n_epochs",
        "description": "Passes over the training rows",
        "types": ["string", "integer"],
        "choices": ["auto"],
        "minimum": 1,
        "maximum": 50,
        "exclusive_minimum": None,
        "exclusive_maximum": None,
        "required": False,
        "default": "auto",
        "aliases": ["num_train_epochs", "num_epochs", "epochs"],
    }
    beta = parameter(methods["dpo"], "beta")
    assert (beta["types"], beta["exclusive_minimum"], beta["maximum"]) == (["number"], 0, 2)
    assert parameter(methods["dpo"], "loss_type")["choices"] == ["sigmoid", "hinge", "ipo"]
    assert parameter(methods["supervised"], "train_on_inputs")["types"] == ["boolean"]
    modules = parameter(methods["supervised"], "target_modules")
    assert (modules["types"], modules["choices"]) == (["string", "array"], ["all-linear"])
    assert parameter(methods["supervised"], "max_steps")["types"] == ["integer"]


def test_what_is_said_is_what_is_accepted(methods):
    for name, method in methods.items():
        for found in method["parameters"]:
            flags = ["fp16", "bf16"] if found["name"] == "dtype" else []
            named = [alias for alias, ours in ALIASES.items() if ours == found["name"]]
            assert found["aliases"] == named + flags
            if found["required"]:
                continue
            given = {found["name"]: found["default"]}
            parse_method({"type": name, name: {"hyperparameters": given}}, None)


def test_the_example_rows_are_read_as_what_they_are_said_to_be(methods):
    assert {kind for kind in EXAMPLES} >= {kind.learns_from for kind in METHODS.values()}
    shown = {name for examples in EXAMPLES.values() for name in examples}
    assert shown == {*FORMATS, PLAIN_TEXT}
    for kind, examples in EXAMPLES.items():
        for name, row in examples.items():
            assert kind_of(name) == kind
            if name != PLAIN_TEXT:
                assert detect_format(row) == name
                read_row(row, name, line=1)
    assert WITH_TOOLS.keys() == {"openai_preference"} | {
        name for name, known in FORMATS.items() if "tools" in known.optional
    }
    for name, row in WITH_TOOLS.items():
        assert detect_format(row) == name
        read: Any = read_row(row, name, line=1)
        assert [tool["function"]["name"] for tool in read.tools] == ["find_slot"]
    for method in methods.values():
        for shown in method["row_formats"]:
            assert shown["example_with_tools"] == WITH_TOOLS.get(shown["name"])
        kinds = [kind_of(shown["name"]) for shown in method["row_formats"]]
        assert kinds[0] == method["learns_from"]
        assert set(kinds) == {kind for kind in EXAMPLES if METHODS[method["name"]].takes(kind)}


def test_the_command_line_shows_them(listed, monkeypatch):
    with serve() as peer:
        monkeypatch.setenv("RESIDENCY_URL", peer.url)
        peer.answers("GET /v1/methods", listed)
        table = run("methods").stdout
        one = run("methods", "dpo").stdout
        as_json = run("methods", "dpo", "--json").stdout
        unknown = run("methods", "dreaming")
    for name, kind in METHODS.items():
        assert name in table
        assert kind.learns_from in table
    assert "loss_type" in one
    assert "sigmoid, hinge, ipo" in one
    assert "lora_r" in one
    assert "Passes over the training rows" in " ".join(one.split())
    assert json.loads(as_json)["name"] == "dpo"
    assert unknown.exit_code == 1
    assert "dreaming" in unknown.stderr
    assert "supervised" in unknown.stderr
