"""Rule graders at work: a row and an answer give a number. See trainers.specs.graders for what they are."""

from collections.abc import Sequence
from typing import Any

import regex
from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
from nltk.translate.gleu_score import sentence_gleu
from rapidfuzz import fuzz
from rouge_score.rouge_scorer import RougeScorer

from trainers.specs.graders import (
    ANSWER,
    REFERENCE,
    Grader,
    RegexMatch,
    StringCheck,
    TextSimilarity,
)

_REGEX_TIMEOUT_S = 1.0
# Words, and every character of a script that puts no spaces between them.
_WORD = regex.compile(
    r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}]|[\w--\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}]+", regex.V1
)


def grade(grader: Grader, answer: str, *, items: dict[str, str]) -> float:
    """The number that an answer gets, between 0 and 1; `items` as read_items gives them."""
    values = items | {ANSWER: answer}
    text = _fill(grader.input, values)
    match grader:
        case RegexMatch():
            return float(_is_found(grader.pattern, text))
        case StringCheck():
            return float(_agrees(text, _fill(grader.reference, values), grader.operation))
        case TextSimilarity():
            return measure_similarity(text, _fill(grader.reference, values), metric=grader.evaluation_metric)


def measure_similarity(text: str, reference: str, *, metric: str) -> float:
    """How alike two texts are, between 0 and 1. Case does not count for ROUGE."""
    if metric == "fuzzy_match":
        return fuzz.WRatio(text, reference) / 100
    if metric.startswith("rouge_"):
        name = "rougeL" if metric == "rouge_l" else f"rouge{metric.removeprefix('rouge_')}"
        scorer: Any = RougeScorer([name], tokenizer=_Words())
        return float(scorer.score(reference, text)[name].fmeasure)
    words, wanted = split_words(text), split_words(reference)
    if not words or not wanted:
        return float(words == wanted)
    if metric == "gleu":
        return float(sentence_gleu([wanted], words))
    smoothing: Any = SmoothingFunction().method1  # short texts have no common four words
    bleu: Any = sentence_bleu([wanted], words, smoothing_function=smoothing)
    return float(bleu)


def split_words(text: str) -> Sequence[str]:
    """Words of a text; in Chinese, Japanese and Thai its characters."""
    return _WORD.findall(text)


class _Words:
    """What ROUGE counts. Its own tokenizer drops every letter that is not ASCII, all of a Chinese text."""

    def tokenize(self, text: str) -> Sequence[str]:
        return split_words(text.lower())


def _fill(template: str, values: dict[str, str]) -> str:
    return REFERENCE.sub(lambda match: values[match[1]], template)


def _is_found(pattern: str, text: str) -> bool:
    """Whether a pattern is in a text. One that takes too long finds nothing, for training would wait."""
    try:
        return regex.search(pattern, text, timeout=_REGEX_TIMEOUT_S) is not None
    except TimeoutError:
        return False


def _agrees(text: str, reference: str, operation: str) -> bool:
    match operation:
        case "eq":
            return text == reference
        case "ne":
            return text != reference
        case "like":
            return reference in text
    return reference.casefold() in text.casefold()
