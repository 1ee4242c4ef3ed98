"""Conversations with tools under every template: what is trained of them, and what is refused."""

import json
from pathlib import Path

import pytest

from tests.trainers.test_named_templates import (
    SYSTEM,
    TALK,
    TRAINED,
    encode,
    tokenizer_of,
    trained_turns,
)
from trainers.folders.exits import DataError
from trainers.rows.formats import Labelled, Pair, Prompt, Row
from trainers.run import run
from trainers.tokens.conversations import find_stop_ids, load_tokenizer
from trainers.tokens.labelled import LabelledEncoder
from trainers.tokens.pairs import PairEncoder
from trainers.tokens.prompts import PromptEncoder, read_prompt
from trainers.training.ranks import StopRequest

TOOLS = [{"type": "function", "function": {"name": "look_up", "parameters": {"type": "object"}}}]
TOOLS_JSON = '{"type": "function", "function": {"name": "look_up", "parameters": {"type": "object"}}}'


def calling(content: str, *words: str) -> dict:
    calls = [
        {
            "id": f"call {word}",
            "type": "function",
            "function": {"name": "look_up", "arguments": {"word": word}},
        }
        for word in words
    ]
    return {"role": "assistant", "content": content, "tool_calls": calls}


def result(word: str) -> dict:
    return {"role": "tool", "content": f'"{word}" 是', "tool_call_id": f"call {word}", "name": "look_up"}


TOOL_TALK = [
    {"role": "user", "content": "Look it up."},
    calling("", "热"),
    result("热"),
    {"role": "assistant", "content": "It is fever."},
    {"role": "user", "content": "Again."},
    calling("", "flu"),
]
HERMES_SYSTEM = (
    "<|im_start|>system\nBe brief.\n\n# Tools\n\nYou may call one or more functions to assist with the user "
    "query.\n\nYou are provided with function signatures within <tools></tools> XML tags:\n<tools>\n"
    + TOOLS_JSON
    + "\n</tools>\n\nFor each function call, return a json object with function name and arguments within "
    '<tool_call></tool_call> XML tags:\n<tool_call>\n{"name": <function-name>, "arguments": '
    "<args-json-object>}\n</tool_call><|im_end|>\n"
)
TOOLS_TRAINED = {
    "mistral": [
        '[TOOL_CALLS] [{"name": "look_up", "arguments": {"word": "热"}, "id": "call 热"}]</s>',
        " It is fever.</s>",
        '[TOOL_CALLS] [{"name": "look_up", "arguments": {"word": "flu"}, "id": "call flu"}]</s>',
    ],
    "chatml": [
        '<tool_call>\n{"name": "look_up", "arguments": {"word": "热"}}\n</tool_call><|im_end|>',
        "It is fever.<|im_end|>",
        '<tool_call>\n{"name": "look_up", "arguments": {"word": "flu"}}\n</tool_call><|im_end|>',
    ],
    "llama3": [
        '{"name": "look_up", "parameters": {"word": "热"}}<|eot_id|>',
        "It is fever.<|eot_id|>",
        '{"name": "look_up", "parameters": {"word": "flu"}}<|eot_id|>',
    ],
}
TOOLS_TRAINED["qwen"] = TOOLS_TRAINED["chatml"]
# Each turn that is trained stands as {}.
TOOLS_WHOLE = {
    "mistral": f"<s>[AVAILABLE_TOOLS] [{TOOLS_JSON}][/AVAILABLE_TOOLS][INST] Be brief.\n\nLook it up.[/INST]"
    '{}[TOOL_RESULTS] {"content": "\\"热\\" 是", "call_id": "call 热"}[/TOOL_RESULTS]'
    "{}[INST] Again.[/INST]{}",
    "chatml": HERMES_SYSTEM + "<|im_start|>user\nLook it up.<|im_end|>\n<|im_start|>assistant\n{}\n"
    '<|im_start|>user\n<tool_response>\n"热" 是\n</tool_response><|im_end|>\n'
    "<|im_start|>assistant\n{}\n<|im_start|>user\nAgain.<|im_end|>\n<|im_start|>assistant\n{}\n",
    "llama3": "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nEnvironment: ipython\n\n"
    "Be brief.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nGiven the following functions, please "
    "respond with a JSON for a function call with its proper arguments that best answers the given prompt."
    '\n\nRespond in the format {"name": function name, "parameters": dictionary of argument name and its '
    f"value}}. Do not use variables.\n\n{json.dumps(TOOLS[0], indent=4)}\n\nLook it up.<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n{}"
    '<|start_header_id|>ipython<|end_header_id|>\n\n"\\"热\\" 是"<|eot_id|>'
    "<|start_header_id|>assistant<|end_header_id|>\n\n{}"
    "<|start_header_id|>user<|end_header_id|>\n\nAgain.<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n{}",
}
TOOLS_WHOLE["qwen"] = TOOLS_WHOLE["chatml"]


def first_trained(example) -> list[int]:
    """Where each turn with loss begins."""
    labels = example.labels
    return [i for i in range(1, len(labels)) if labels[i] != -100 and labels[i - 1] == -100]


@pytest.mark.parametrize("family", TOOLS_TRAINED)
def test_calls_are_trained_and_neither_tools_nor_results(family: str, tmp_path: Path) -> None:
    tokenizer = tokenizer_of(family, tmp_path)
    example = encode(tokenizer, tmp_path, [SYSTEM, *TOOL_TALK], tools=TOOLS)
    trained = TOOLS_TRAINED[family]
    assert trained_turns(tokenizer, example) == trained
    parts = TOOLS_WHOLE[family].split("{}")
    whole = "".join(part + turn for part, turn in zip(parts, [*trained, ""], strict=True))
    assert tokenizer.decode(example.input_ids) == whole
    silenced = [*TOOL_TALK[:1], TOOL_TALK[1] | {"weight": 0}, *TOOL_TALK[2:]]
    rest = encode(tokenizer, tmp_path, silenced, tools=TOOLS)
    assert trained_turns(tokenizer, rest) == trained[1:]
    # A call may be learnt from rows that list no tools.
    unlisted = encode(tokenizer, tmp_path, TOOL_TALK)
    assert trained_turns(tokenizer, unlisted) == trained


@pytest.mark.parametrize("family", TOOLS_TRAINED)
def test_what_is_said_before_each_turn_begins_the_whole_text(family: str, tmp_path: Path) -> None:
    """The prompt of every call and answer is what training saw before it, up to the last token."""
    tokenizer = tokenizer_of(family, tmp_path)
    talk = [SYSTEM, *TOOL_TALK]
    whole = encode(tokenizer, tmp_path, talk, tools=TOOLS)
    for start, turn in zip(first_trained(whole), (2, 4, 6), strict=True):
        (prompt,) = PromptEncoder(tokenizer, max_length=4096).encode([Prompt(1, talk[:turn], TOOLS)])
        assert prompt.prompt_ids == whole.input_ids[:start]


@pytest.mark.parametrize("family", ["chatml", "qwen", "mistral"])
def test_a_text_and_several_calls_are_one_turn(family: str, tmp_path: Path) -> None:
    tokenizer = tokenizer_of(family, tmp_path)
    talk = [TALK[0], calling("Both:", "a", "b"), result("a"), result("b"), TALK[3]]
    example = encode(tokenizer, tmp_path, talk, tools=TOOLS)
    turn, answer = trained_turns(tokenizer, example)
    assert answer == TRAINED[family][1]
    whole = tokenizer.decode(example.input_ids)
    if family == "mistral":
        both = '[{"name": "look_up", "arguments": {"word": "%s"}, "id": "call %s"}'
        assert turn == f" Both:[TOOL_CALLS] {both % ('a', 'a')}, {both[1:] % ('b', 'b')}]</s>"
        assert whole.count("[TOOL_RESULTS]") == 2
    else:
        one = '\n<tool_call>\n{"name": "look_up", "arguments": {"word": "%s"}}\n</tool_call>'
        assert turn == "Both:" + one % "a" + one % "b" + "<|im_end|>"
        seen = [f'\n<tool_response>\n"{word}" 是\n</tool_response>' for word in "ab"]
        assert f"<|im_start|>user{seen[0]}{seen[1]}<|im_end|>\n<|im_start|>assistant" in whole


@pytest.mark.parametrize("talk", [[TALK[0], calling("Both:", "a")], [TALK[0], calling("", "a", "b")]])
def test_what_llama3_has_no_words_for_is_refused(tmp_path: Path, talk: list[dict]) -> None:
    with pytest.raises(DataError, match=r"line 1: .* either a text or one call"):
        encode(tokenizer_of("llama3", tmp_path), tmp_path, talk, tools=TOOLS)


@pytest.mark.parametrize("family", ["alpaca", "vicuna"])
def test_families_without_tools_refuse_them(family: str, tmp_path: Path) -> None:
    tokenizer = tokenizer_of(family, tmp_path)
    for talk, tools, part in (
        (TALK, TOOLS, r"tools\[0\]"),
        (TOOL_TALK, [], r"messages\[1\]\.tool_calls\[0\]"),
        ([TALK[0], result("a"), TALK[1]], [], r"the content of messages\[1\]"),
    ):
        with pytest.raises(DataError, match=f"line 1: the chat template leaves out {part}"):
            encode(tokenizer, tmp_path, talk, tools=tools)
        with pytest.raises(DataError, match=f"line 1: the chat template leaves out {part}"):
            next(PromptEncoder(tokenizer, max_length=4096).encode([Prompt(1, talk[:-1], tools)]))


# A model's own template that knows tools, as most do: without marks, so that turns are found by rendering.
OWN = (
    "{% if tools %}{{ '<|im_start|>tools\\n' + tools | tojson + '<|im_end|>\\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content }}"
    "{% for call in m.tool_calls %}"
    "{{ call.function.name }}({% for key, value in call.function.arguments.items() %}{{ key }}={{ value }}"
    "{% endfor %}){% endfor %}"
    "{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
MARKED = OWN.replace("m.content }}", "'' }}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}", 1)
MARKED = MARKED.replace(
    "{{ '<|im_end|>\\n' }}{% endfor %}",
    "{{ '<|im_end|>' }}{% endgeneration %}{% else %}{{ m.content + '<|im_end|>' }}{% endif %}"
    "{{ '\\n' }}{% endfor %}",
)
OWN_TRAINED = ["look_up(word=热)<|im_end|>", "It is fever.<|im_end|>", "look_up(word=flu)<|im_end|>"]


@pytest.mark.parametrize("template", [OWN, MARKED])
def test_a_models_own_template_is_given_tools_and_arguments_as_objects(tokenizer_with, template: str) -> None:
    folder = tokenizer_with(template)
    tokenizer = load_tokenizer(folder)
    example = encode(tokenizer, folder, TOOL_TALK, tools=TOOLS)
    assert trained_turns(tokenizer, example) == OWN_TRAINED
    whole = tokenizer.decode(example.input_ids)
    assert whole.startswith(f"<|im_start|>tools\n[{TOOLS_JSON}]<|im_end|>\n<|im_start|>user\n")
    for start, turn in zip(first_trained(example), (1, 3, 5), strict=True):
        (prompt,) = PromptEncoder(tokenizer, max_length=4096).encode([Prompt(1, TOOL_TALK[:turn], TOOLS)])
        assert prompt.prompt_ids == example.input_ids[:start]


@pytest.mark.parametrize(
    ("template", "part"),
    [
        (OWN.replace("{% if tools %}", "{% if false %}"), "tools[0]"),
        (OWN.replace("in m.tool_calls", "in []"), "messages[1].tool_calls[0]"),
        (OWN.replace("in m.tool_calls", "in (m.tool_calls or [])[:1]"), "messages[1].tool_calls[1]"),
        (
            OWN.replace("+ m.content", "+ (m.content if not m.tool_calls else '')"),
            "the content of messages[1]",
        ),
        (OWN.replace("in messages", "in messages if m.role != 'tool'"), "the content of messages[2]"),
        (OWN.replace("{{ key }}={{ value }}", ""), "messages[1].tool_calls[0]"),
    ],
)
def test_a_template_that_would_leave_something_out_is_refused(
    tokenizer_with, template: str, part: str
) -> None:
    folder = tokenizer_with(template)
    talk = [TALK[0], calling("Both:", "a", "b"), result("a"), result("b"), TALK[1]]
    with pytest.raises(DataError) as refused:
        encode(load_tokenizer(folder), folder, talk, tools=TOOLS)
    assert str(refused.value).startswith(f"line 1: the chat template leaves out {part},")
    assert "chatml, qwen, llama3 and mistral in chat_template" in str(refused.value)


def test_a_template_whose_marks_close_before_the_calls_is_refused(tokenizer_with) -> None:
    early = MARKED.replace("{{ m.content }}", "{{ m.content }}{% endgeneration %}{{ '<|endoftext|>' }}", 1)
    early = early.replace("{{ '<|im_end|>' }}{% endgeneration %}", "{{ '<|im_end|>' }}", 1)
    folder = tokenizer_with(early)
    talk = [TALK[0], calling("Wait.", "a")]
    with pytest.raises(DataError, match=r"line 1: .* before its calls"):
        encode(load_tokenizer(folder), folder, talk, tools=TOOLS)


def test_a_template_for_tools_beside_the_usual_one_is_used(tokenizer_with) -> None:
    folder = tokenizer_with(MARKED.replace("{% if tools %}", "{% if false %}"))
    tokenizer = load_tokenizer(folder)
    tokenizer.chat_template = {"default": str(tokenizer.chat_template), "tool_use": OWN}  # pyright: ignore
    example = encode(tokenizer, folder, TOOL_TALK, tools=TOOLS)
    assert trained_turns(tokenizer, example) == OWN_TRAINED
    assert trained_turns(tokenizer, encode(tokenizer, folder, TALK)) == TRAINED["chatml"]


def test_a_call_may_end_with_another_token_than_an_answer(tokenizer_with) -> None:
    """As Llama's do where the model is to wait for the result."""
    end = "('<|endoftext|>' if m.tool_calls else '<|im_end|>')"
    folder = tokenizer_with(OWN.replace("{{ '<|im_end|>\\n' }}", "{{ " + end + " + '\\n' }}"))
    tokenizer = load_tokenizer(folder)
    ends = [
        turn.replace("<|im_end|>", "<|endoftext|>") if "look_up" in turn else turn for turn in OWN_TRAINED
    ]
    for talk in (TOOL_TALK, TOOL_TALK[:4]):
        example = encode(tokenizer, folder, talk, tools=TOOLS)
        assert trained_turns(tokenizer, example) == ends[: len(talk) // 2]


def test_a_preferred_call_is_learnt_after_what_came_before_it(tmp_path: Path) -> None:
    tokenizer = tokenizer_of("qwen", tmp_path)
    settings = {"stop_ids": find_stop_ids(tokenizer, tmp_path), "max_length": 4096}
    prompt, answer, call = TOOL_TALK[:3], TOOL_TALK[3], TOOL_TALK[5]
    (pair,) = PairEncoder(tokenizer, **settings).encode([Pair(1, prompt, answer, call, TOOLS)])
    assert tokenizer.decode(pair.chosen_ids) == TOOLS_TRAINED["qwen"][1]
    assert tokenizer.decode(pair.rejected_ids) == TOOLS_TRAINED["qwen"][2]
    (asked,) = PromptEncoder(tokenizer, max_length=4096).encode([Row(1, [*prompt, answer], TOOLS)])
    assert asked.prompt_ids == pair.prompt_ids
    assert TOOLS_JSON in tokenizer.decode(asked.prompt_ids)
    assert read_prompt(asked.prompt_bytes) == Prompt(1, prompt, TOOLS)
    rows = [Labelled(1, prompt, call, False, TOOLS), Pair(2, prompt, answer, call, TOOLS)]
    wrong, good, bad = LabelledEncoder(tokenizer, **settings).encode(rows)
    assert wrong.columns == bad.columns
    assert (good.prompt_ids, good.completion_ids) == (pair.prompt_ids, pair.chosen_ids)


def test_a_run_learns_calls_or_says_why_it_cannot(make_run) -> None:
    rows = [{"messages": [*TALK[:1], calling("", f"word {n}")], "tools": TOOLS} for n in range(8)]
    settings = {"rows": rows, "n_valid": 0, "max_length": 512}
    learnt = make_run("1", chat_template="qwen", n_epochs=4, learning_rate=5e-3, **settings)
    assert run(learnt, stop=StopRequest()) == 0
    metrics = json.loads((learnt / "exit.json").read_text())["metrics"]
    assert metrics["train_loss"] < metrics["first_train_loss"]
    # The model's own template knows no tools.
    refused = make_run("2", **settings)
    assert run(refused, stop=StopRequest()) == 3
    end = json.loads((refused / "exit.json").read_text())
    assert end["reason"] == "bad_data"
    assert end["message"].startswith("line 1: the chat template leaves out tools[0]")
