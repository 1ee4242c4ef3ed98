"""The named chat templates: what is trained of a conversation, and what comes before an answer."""

import json
from pathlib import Path

import pytest
from datasets import Dataset
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tests.tiny import chat_rows
from trainers.folders.exits import DataError
from trainers.merge import merge_run
from trainers.rows.formats import Prompt, Row, read_row
from trainers.run import run
from trainers.tokens.conversations import ConversationEncoder, find_stop_ids
from trainers.tokens.prompts import PromptEncoder
from trainers.tokens.run_tokenizer import read_template
from trainers.training.ranks import StopRequest

# Of each family the tokens that its template writes, and its beginning and end of text.
FAMILIES = {
    "alpaca": ([], "<s>", "</s>"),
    "vicuna": ([], "<s>", "</s>"),
    "mistral": (
        [
            *("[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"),
            *("[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
        ],
        "<s>",
        "</s>",
    ),
    "chatml": (["<|im_start|>", "<|im_end|>"], None, "<|endoftext|>"),
    "qwen": (["<|im_start|>", "<|im_end|>"], None, "<|endoftext|>"),
    "llama3": (
        ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
        "<|begin_of_text|>",
        "<|end_of_text|>",
    ),
}
# How the later families take a text apart: line ends in a row are one piece, whatever follows them.
BY_LINES = Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
SYSTEM = {"role": "system", "content": "Be brief."}
TALK = [
    {"role": "user", "content": "Hi, what is fever?"},
    {"role": "assistant", "content": "A raised temperature."},
    {"role": "user", "content": "And 患者咳嗽?"},
    {"role": "assistant", "content": "It is a cough.\nRest."},
]
# All of the text that has loss, turn by turn.
TRAINED = {
    "alpaca": ["A raised temperature.</s>", "It is a cough.\nRest.</s>"],
    "vicuna": [" A raised temperature.</s>", " It is a cough.\nRest.</s>"],
    "mistral": [" A raised temperature.</s>", " It is a cough.\nRest.</s>"],
    "chatml": ["A raised temperature.<|im_end|>", "It is a cough.\nRest.<|im_end|>"],
    "qwen": ["A raised temperature.<|im_end|>", "It is a cough.\nRest.<|im_end|>"],
    "llama3": ["A raised temperature.<|eot_id|>", "It is a cough.\nRest.<|eot_id|>"],
}
WHOLE = {
    "alpaca": "Be brief.\n\n### Instruction:\nHi, what is fever?\n\n"
    "### Response:\nA raised temperature.</s>\n\n"
    "### Instruction:\nAnd 患者咳嗽?\n\n### Response:\nIt is a cough.\nRest.</s>\n\n",
    "vicuna": "<s>Be brief. USER: Hi, what is fever? ASSISTANT: A raised temperature.</s>"
    "USER: And 患者咳嗽? ASSISTANT: It is a cough.\nRest.</s>",
    "mistral": "<s>[INST] Be brief.\n\nHi, what is fever?[/INST] A raised temperature.</s>"
    "[INST] And 患者咳嗽?[/INST] It is a cough.\nRest.</s>",
    "chatml": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi, what is fever?<|im_end|>\n"
    "<|im_start|>assistant\nA raised temperature.<|im_end|>\n<|im_start|>user\nAnd 患者咳嗽?<|im_end|>\n"
    "<|im_start|>assistant\nIt is a cough.\nRest.<|im_end|>\n",
    "llama3": "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nHi, what is fever?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nA raised temperature.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nAnd 患者咳嗽?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nIt is a cough.\nRest.<|eot_id|>",
}
WHOLE["qwen"] = WHOLE["chatml"]


def tokenizer_of(family: str, folder: Path) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with the tokens of a family, and its template by name."""
    tokens, bos, eos = FAMILIES[family]
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if family in ("chatml", "qwen", "llama3"):
        pieces = pre_tokenizers.Split(BY_LINES, "isolated")
        bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        raw.pre_tokenizer = pre_tokenizers.Sequence([pieces, bytes_])  # pyright: ignore[reportAttributeAccessIssue]
    raw.decoder = decoders.ByteLevel()
    special = [token for token in (bos, eos, *tokens) if token]
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    # Like those of real models, it has tokens of several spaces and line ends.
    spaces = ["\n\n\n.    ." * 50]
    raw.train_from_iterator([*spaces, *(json.dumps(row) for row in chat_rows(64))], trainer)
    if bos:  # which is written before any text, unless one asks for it not to be
        raw.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, raw.token_to_id(bos))]
        )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token=bos, eos_token=eos)
    tokenizer.chat_template = read_template(family, tokenizer)
    tokenizer.save_pretrained(folder)
    return tokenizer


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


def encode(tokenizer, folder: Path, messages: list[dict], *, max_length: int = 4096, tools: tuple = ()):
    encoder = ConversationEncoder(tokenizer, stop_ids=find_stop_ids(tokenizer, folder), max_length=max_length)
    return next(encoder.encode([Row(1, messages, list(tools))]))


def trained_turns(tokenizer, example) -> list[str]:
    """The text of each run of tokens that have loss."""
    turns, ids = [], []
    for token, label in [*zip(example.input_ids, example.labels, strict=True), (0, -100)]:
        if label != -100:
            assert label == token
            ids.append(token)
        elif ids:
            turns.append(tokenizer.decode(ids))
            ids = []
    return turns


def test_the_loss_is_on_what_the_assistant_said_and_on_its_end(family: str, tmp_path: Path) -> None:
    tokenizer = tokenizer_of(family, tmp_path)
    example = encode(tokenizer, tmp_path, [SYSTEM, *TALK])
    assert tokenizer.decode(example.input_ids) == WHOLE[family]
    assert trained_turns(tokenizer, example) == TRAINED[family]
    assert trained_turns(tokenizer, encode(tokenizer, tmp_path, TALK[:2])) == TRAINED[family][:1]
    silenced = [TALK[0], TALK[1] | {"weight": 0}, *TALK[2:]]
    assert trained_turns(tokenizer, encode(tokenizer, tmp_path, silenced)) == TRAINED[family][1:]


def test_alpaca_rows_train_their_output(family: str, tmp_path: Path) -> None:
    tokenizer = tokenizer_of(family, tmp_path)
    row = read_row({"instruction": "Name it.", "input": "37.9", "output": "Fever."}, "alpaca", line=1)
    (turn,) = trained_turns(tokenizer, encode(tokenizer, tmp_path, row.messages))
    assert turn.strip().startswith("Fever.")
    assert turn.strip() == "Fever." + TRAINED[family][0].rpartition(".")[2]


def test_a_cut_conversation_keeps_whole_tokens_of_its_beginning(family: str, tmp_path: Path) -> None:
    tokenizer = tokenizer_of(family, tmp_path)
    whole = encode(tokenizer, tmp_path, TALK)
    cut = encode(tokenizer, tmp_path, TALK, max_length=len(whole.input_ids) - 3)
    assert cut.was_cut
    assert (cut.input_ids, cut.labels) == (whole.input_ids[:-3], whole.labels[:-3])


def test_the_template_writes_for_an_answer_what_training_saw_before_it(family: str, tmp_path: Path) -> None:
    tokenizer = tokenizer_of(family, tmp_path)
    seen = encode(tokenizer, tmp_path, [SYSTEM, *TALK])
    last = max(i for i, label in enumerate(seen.labels[:-1]) if label == -100 and seen.labels[i + 1] != -100)
    served = AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(
        [SYSTEM, *TALK[:3]], add_generation_prompt=True, tokenize=False
    )
    asked = tokenizer(served, add_special_tokens=False)["input_ids"]
    assert asked == seen.input_ids[: last + 1]
    (prompt,) = PromptEncoder(tokenizer, max_length=4096).encode([Prompt(1, [SYSTEM, *TALK[:3]])])
    assert prompt.prompt_ids == asked


def test_a_family_whose_end_of_turn_is_missing_ends_with_the_end_of_text(tmp_path: Path) -> None:
    tokenizer = tokenizer_of("vicuna", tmp_path)
    tokenizer.chat_template = read_template("chatml", tokenizer)
    turns = trained_turns(tokenizer, encode(tokenizer, tmp_path, TALK))
    assert turns == ["A raised temperature.</s>", "It is a cough.\nRest.</s>"]
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="end a turn"):
        read_template("chatml", tokenizer)


def test_a_base_model_without_a_template_learns_one_and_keeps_it(
    make_run, tokenizer_with, tmp_path: Path
) -> None:
    base = tokenizer_with(None)
    refused = make_run("1", model_dir=base)
    assert run(refused, stop=StopRequest()) == 3
    assert "chat_template" in json.loads((refused / "exit.json").read_text())["message"]

    run_dir = make_run("2", model_dir=base, chat_template="alpaca", max_steps=2)
    assert run(run_dir, stop=StopRequest()) == 0
    rows = Dataset.from_file(json.loads((run_dir / "prepared.json").read_text())["train"] + "/rows.arrow")
    merge_run(run_dir, out_dir=tmp_path / "merged")
    served = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert served.decode(rows[0]["input_ids"]).startswith("Below is an instruction")
    question = served.apply_chat_template(
        chat_rows(1)[0]["messages"][:1], add_generation_prompt=True, tokenize=False
    )
    assert served.decode(rows[0]["input_ids"]).startswith(question)
    later = make_run("3", model_dir=tmp_path / "merged", max_steps=1)
    assert run(later, stop=StopRequest()) == 0
