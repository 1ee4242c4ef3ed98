"""New tokens: learnt from the text, added to tokenizer and model, trained, merged, kept by later stages."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from tests.tiny import chat_rows
from trainers.folders.exits import DataError
from trainers.merge import merge_run
from trainers.models.vocabulary import PIECES_FILE, add_rows, learn_tokens, place_tokens, save_extended
from trainers.run import run
from trainers.training.ranks import StopRequest

WORDS = ["dyspnoea", "tachycardia", "naïve", "患者咳嗽", "haematuria", "ischaemic stroke", "otitis media"]
TEXTS = [f"Case {n}: {WORDS[n % 7]}, then {WORDS[n % 3]}; {n % 7} x aspirin, aspirin." for n in range(40)]
N_NEW = 60  # more than the tiny model has spare rows
EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture
def tokenizer(tiny_model: Path):
    return AutoTokenizer.from_pretrained(tiny_model)


def untied(folder: Path, tiny_model: Path, *, rows: int) -> Path:
    """The tiny model with a head of its own and a number of rows, as some families pad them."""
    config = LlamaConfig.from_pretrained(tiny_model, tie_word_embeddings=False, vocab_size=rows)
    torch.manual_seed(1)
    LlamaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    return folder


def train(run_dir: Path) -> dict:
    assert run(run_dir, stop=StopRequest()) == 0
    return json.loads((run_dir / "exit.json").read_text())


def pretrain(make_run, name: str = "1", **settings):
    return make_run(
        name,
        method="pretraining",
        rows=[{"text": text} for text in TEXTS],
        valid_rows=[{"text": text} for text in TEXTS[:8]],
        **{"block_size": 32, "new_tokens": N_NEW, "max_steps": 6, "learning_rate": 5e-3, **settings},
    )


def test_tokens_are_added_and_nothing_else_changes(tokenizer, tmp_path: Path) -> None:
    tokens = learn_tokens(tokenizer, TEXTS, count=30)
    extended = save_extended(tokenizer, tokens, tmp_path)
    assert [token.id for token in tokens] == list(range(len(tokenizer), len(tokenizer) + 30))
    assert tokenizer.get_vocab().items() < extended.get_vocab().items()
    assert "Ġaspirin" in {token.text for token in tokens}
    for text in [*TEXTS, "  spaces \n\t and <|im_end|> tags 👩‍⚕️ é"]:
        ids = extended(text, add_special_tokens=False)["input_ids"]
        assert extended.decode(ids, skip_special_tokens=False) == text
        old = [piece for i in ids for piece in (dict((t.id, t.pieces) for t in tokens).get(i, (i,)))]
        assert old == tokenizer(text, add_special_tokens=False)["input_ids"]
    unrelated = "Hello world, what now?"
    assert extended(unrelated)["input_ids"] == tokenizer(unrelated)["input_ids"]
    assert len(extended(TEXTS[0])["input_ids"]) < 0.7 * len(tokenizer(TEXTS[0])["input_ids"])
    assert learn_tokens(tokenizer, TEXTS, count=30) == tokens


def test_no_more_tokens_than_the_text_has(tokenizer) -> None:
    assert learn_tokens(tokenizer, ["abc xyz"], count=5) == []
    assert 0 < len(learn_tokens(tokenizer, ["qqqq qqqq"], count=500)) < 10


def test_a_tokenizer_of_another_kind_is_refused() -> None:
    raw = Tokenizer(models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>"))
    with pytest.raises(DataError, match="byte-pair"):
        learn_tokens(PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>"), ["a a"], count=3)


def test_a_tokenizer_that_marks_words_as_sentencepiece_does(tmp_path: Path) -> None:
    raw = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    raw.pre_tokenizer = pre_tokenizers.Metaspace()
    raw.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    byte_tokens = [f"<0x{n:02X}>" for n in range(256)]
    raw.train_from_iterator(
        ["the case of the day"], trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>", *byte_tokens])
    )
    raw.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>", eos_token="<unk>")
    texts = ["the eschar of 患者 heals", "the eschar of 患者 stays"]
    extended = save_extended(tokenizer, tokens := learn_tokens(tokenizer, texts, count=8), tmp_path)
    assert len(tokens) > 2
    assert not [token for token in tokens if "<0x" in token.text or "▁" in token.text[1:]]
    for text in texts:
        assert extended.decode(extended(text, add_special_tokens=False)["input_ids"]) == text


@pytest.mark.parametrize("rows", [460, 640])
def test_a_new_row_is_the_mean_of_its_pieces_and_rows_are_only_added(
    tokenizer, tiny_model: Path, tmp_path: Path, rows: int
) -> None:
    model = AutoModelForCausalLM.from_pretrained(untied(tmp_path / "model", tiny_model, rows=rows))
    before = {name: weights.clone() for name, weights in model.state_dict().items()}
    tokens = learn_tokens(tokenizer, TEXTS, count=30)
    extended = save_extended(tokenizer, tokens, tmp_path / "tokens")
    assert place_tokens(model, extended) == ["embed_tokens", "lm_head"]
    for name in (EMBEDDING, "lm_head.weight"):
        after = model.state_dict()[name]
        assert len(after) == max(rows, len(extended))
        kept = min(rows, len(tokenizer))
        assert torch.equal(after[:kept], before[name][:kept])
        for token in tokens:
            mean = before[name][list(token.pieces)].mean(dim=0)
            assert torch.allclose(after[token.id], mean, atol=1e-6)
    add_rows(model, tokenizer)
    assert len(model.state_dict()[EMBEDDING]) == max(rows, len(extended))


@pytest.mark.parametrize("tied", [True, False])
def test_a_run_trains_merges_and_hands_its_tokens_on(
    make_run, tiny_model: Path, tmp_path: Path, events_of, tied: bool
) -> None:
    base = tiny_model if tied else untied(tmp_path / "untied", tiny_model, rows=640)
    run_dir = pretrain(make_run, model_dir=base)
    metrics = train(run_dir)["metrics"]
    assert metrics["valid_loss"] < metrics["valid_loss_before"] - 0.1
    told = [
        e["data"] for e in events_of(run_dir, "message") if e["data"].get("code") == "vocabulary_extended"
    ]
    assert [(data["new_tokens"], data["asked"]) for data in told] == [(N_NEW, N_NEW)]

    report = merge_run(run_dir, out_dir=tmp_path / "merged")
    assert report["warnings"] == []
    merged, old = AutoTokenizer.from_pretrained(tmp_path / "merged"), AutoTokenizer.from_pretrained(base)
    assert len(merged) == len(old) + N_NEW
    weights, before = (load_file(folder / "model.safetensors") for folder in (tmp_path / "merged", base))
    assert len(weights[EMBEDDING]) == max(len(before[EMBEDDING]), len(merged))
    assert not torch.equal(weights[EMBEDDING][: len(old)], before[EMBEDDING][: len(old)])
    assert ("lm_head.weight" in weights) == (not tied)

    later = make_run("2", model_dir=tmp_path / "merged", max_steps=2, rows=chat_rows(8))
    train(later)
    assert merge_run(later, out_dir=tmp_path / "later")["warnings"] == []
    assert AutoTokenizer.from_pretrained(tmp_path / "later").get_vocab() == merged.get_vocab()


def test_a_stopped_run_goes_on_exactly(make_run, curve_of) -> None:
    whole = pretrain(make_run, "1", save_steps=2)
    train(whole)
    part = pretrain(make_run, "2", save_steps=2)

    class StopLater(StopRequest):
        """Asks once two steps were logged."""

        @property
        def requested(self) -> bool:
            return len(curve_of(part)) >= 2 if (part / "events.jsonl").exists() else False

        @requested.setter
        def requested(self, value: bool) -> None:
            pass

    assert run(part, stop=StopLater()) == 0
    assert json.loads((part / "exit.json").read_text())["reason"] == "stopped"
    rest = pretrain(make_run, "3", save_steps=2, resume_roots=(part / "checkpoints",))
    assert train(rest)["resumed_from"] < 6
    assert curve_of(part) | curve_of(rest) == curve_of(whole)
    ends = [load_file(folder / "output" / "adapter_model.safetensors") for folder in (whole, rest)]
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_the_saving_in_tokens_is_told(make_run, tokenizer, events_of) -> None:
    run_dir = pretrain(make_run)
    train(run_dir)
    told = [e["data"] for e in events_of(run_dir, "message")]
    (compression,) = [data for data in told if data.get("code") == "vocabulary_compression"]
    prepared = json.loads((run_dir / "prepared.json").read_text())
    assert compression["tokens_after"] == prepared["counts"]["tokens"]
    # One token more a document, which ends it.
    alone = sum(len(tokenizer(text, add_special_tokens=False)["input_ids"]) + 1 for text in TEXTS)
    assert compression["tokens_before"] == alone > 1.5 * compression["tokens_after"]


def test_the_vocabulary_is_learnt_once(make_run) -> None:
    first, second = (pretrain(make_run, name, max_steps=1, new_tokens=9) for name in ("1", "2"))
    for run_dir in (first, second):
        train(run_dir)
    prepared = [json.loads((folder / "prepared.json").read_text()) for folder in (first, second)]
    assert prepared[0]["tokenizer"] == prepared[1]["tokenizer"]
    assert (Path(prepared[0]["tokenizer"]) / PIECES_FILE).is_file()
    assert prepared[0]["train"] == prepared[1]["train"]
    assert prepared[1]["cache_hit"]["train"]
