"""Rule graders: what they read, what they give, and what is refused before anything is trained."""

import time

import pytest

from trainers.rl.graders import grade, measure_similarity
from trainers.specs import SpecError, parse_method
from trainers.specs.graders import MissingItem, load_grader, read_grader, read_items

CHECK = {"type": "string_check", "input": "{{sample.output_text}}", "reference": "{{item.answer}}"}


def score(config: dict, text: str, **row: object) -> float:
    grader = load_grader(read_grader(config))
    return grade(grader, text, items=read_items(row, grader))


@pytest.mark.parametrize(
    ("operation", "answer", "reference", "wanted"),
    [
        ("eq", "42", "42", 1),
        ("eq", "42 ", "42", 0),
        ("ne", "42", "41", 1),
        ("ne", "42", "42", 0),
        ("like", "It is 42.", "42", 1),
        ("like", "ASPIRIN", "aspirin", 0),
        ("ilike", "ASPIRIN helps", "aspirin", 1),
        ("ilike", "rest", "aspirin", 0),
        ("eq", "42", 42, 1),
    ],
)
def test_string_check(operation: str, answer: str, reference: object, wanted: int) -> None:
    assert score(CHECK | {"operation": operation}, answer, answer=reference) == wanted


def test_a_regular_expression_sees_the_answer_or_what_it_is_told_to() -> None:
    assert score({"type": "regex", "pattern": r"(?s)<think>.*</think>"}, "<think>a\nb</think> 4") == 1
    assert score({"type": "regex", "pattern": r"^\d+$"}, "four") == 0
    both = {
        "type": "regex",
        "pattern": r"^yes/no$",
        "input": "{{ item.meta.truth }}/{{ sample.output_text }}",
    }
    assert score(both, "no", meta={"truth": "yes"}) == 1


@pytest.mark.parametrize(
    "pattern",
    [
        "(?:ab|cd){250000}",
        "(?:(?:ab|cd){500}){500}",
        "(?:(?:(?:a{300}){300}){300})",
        "(?R)",
        "(?La)a",
        "(?=a)",
    ],
)
def test_a_pattern_that_would_cost_too_much_is_refused(pattern: str) -> None:
    with pytest.raises(SpecError) as caught:
        parse_method({"type": "grpo", "grpo": {"grader": {"type": "regex", "pattern": pattern}}}, None)
    assert caught.value.param == "method.grpo.grader.pattern"


@pytest.mark.parametrize(
    ("pattern", "text"),
    [("^(?:a?){40}a{40}$", "a" * 39 + "b"), ("(a+)+$", "a" * 5000 + "b"), ("(" * 350 + ")" * 350, "")],
)
def test_no_pattern_takes_long(pattern: str, text: str) -> None:
    began = time.process_time()
    score({"type": "regex", "pattern": pattern}, text)
    assert time.process_time() - began < 1


@pytest.mark.parametrize("text", ["{{" + " " * 19_000, "{{" * 9000, "{{sample.output_text}}" * 900])
def test_no_template_takes_long(text: str) -> None:
    began = time.process_time()
    for changed in ({"reference": text, "operation": "is"}, {"input": text + "{{x}}", "operation": "eq"}):
        with pytest.raises(SpecError):
            parse_method({"type": "grpo", "grpo": {"grader": CHECK | changed}}, None)
    assert time.process_time() - began < 1


@pytest.mark.parametrize("metric", ["fuzzy_match", "bleu", "gleu", "rouge_1", "rouge_2", "rouge_l"])
def test_a_similarity_is_1_of_the_same_less_of_the_like_and_0_of_the_other(metric: str) -> None:
    for text, like, other in (
        ("take two tablets of aspirin a day", "take two tablets of ibuprofen a day", "lorem ipsum, quux!"),
        ("多喝水，多休息，按时服药", "多喝水，按时服药，别吸烟", "手术后观察三天"),  # noqa: RUF001
    ):
        same = measure_similarity(text, text, metric=metric)
        near = measure_similarity(like, text, metric=metric)
        far = measure_similarity(other, text, metric=metric)
        assert same == pytest.approx(1)
        assert 0.05 < near < 0.95
        assert far < near
        assert measure_similarity("", text, metric=metric) == 0
    for short in ("", "rest", "rest now", "👍"):
        assert measure_similarity(short, short, metric=metric) == 1
    assert measure_similarity("👍", "👎", metric=metric) == 0


def test_rouge_counts_what_it_says() -> None:
    # Three of four words, in order; two of three pairs.
    assert measure_similarity("a b c x", "a b c d", metric="rouge_1") == pytest.approx(0.75)
    assert measure_similarity("a b c x", "a b c d", metric="rouge_2") == pytest.approx(2 / 3)
    assert measure_similarity("c b a", "a b c", metric="rouge_l") == pytest.approx(1 / 3)
    assert measure_similarity("c b a", "a b c", metric="rouge_1") == pytest.approx(1)


@pytest.mark.parametrize(
    ("config", "field", "part"),
    [
        ({"type": "score_model"}, "type", "string_check"),
        ({"type": "regex"}, "pattern", "missing"),
        ({"type": "regex", "pattern": "("}, "pattern", "no regular expression of RE2"),
        ({"type": "regex", "pattern": "a", "flags": "i"}, "flags", "not a field"),
        (CHECK | {"operation": "is"}, "operation", "eq"),
        (CHECK | {"operation": "eq", "input": "{{item.a}}"}, "input", "never looks"),
        (CHECK | {"operation": "eq", "reference": "{{sample.text}}"}, "reference", "unknown"),
        (
            {"type": "text_similarity", "input": "a", "reference": "b", "evaluation_metric": "cosine"},
            "evaluation_metric",
            "rouge_l",
        ),
    ],
)
def test_a_grader_that_cannot_be_is_refused_with_the_place(config: object, field: str, part: str) -> None:
    with pytest.raises(SpecError) as caught:
        parse_method({"type": "grpo", "grpo": {"grader": config}}, None)
    assert caught.value.param == f"method.grpo.grader.{field}"
    assert part in caught.value.message


@pytest.mark.parametrize("config", ["string", [], 3, True])
def test_a_grader_is_an_object(config: object) -> None:
    with pytest.raises(SpecError, match="must be an object") as caught:
        parse_method({"type": "grpo", "grpo": {"grader": config}}, None)
    assert caught.value.param == "method.grpo.grader"


def test_a_grader_stands_beside_the_hyperparameters_and_comes_back_there() -> None:
    asked = {"grader": CHECK | {"operation": "eq"}, "hyperparameters": {"beta": 0.1}}
    method = parse_method({"type": "grpo", "grpo": asked}, None)
    written = method.to_request()
    assert written["grpo"]["grader"]["reference"] == "{{item.answer}}"
    assert "grader" not in written["grpo"]["hyperparameters"]
    assert parse_method(written, None) == method
    for wrong in ({"type": "ppo", "ppo": asked}, {"type": "grpo", "grpo": {"hyperparameters": asked}}):
        with pytest.raises(SpecError) as caught:
            parse_method(wrong, None)
        assert caught.value.code == "unknown_parameter"


def test_what_a_row_lacks_is_named() -> None:
    grader = load_grader(read_grader(CHECK | {"operation": "eq"}))
    with pytest.raises(MissingItem, match=r"item\.answer, which this row does not have"):
        read_items({"question": "Why?"}, grader)
    with pytest.raises(MissingItem, match=r"item\.answer must be a text or a number"):
        read_items({"answer": ["a"]}, grader)
