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
    Grader,
    RegexMatch,
    StringCheck,
    TextSimilarity,
    compile_pattern,
    fill_references,
)

# Words, and every character of a script that puts no spaces between them.
_WORD = regex.compile(
    r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}]|[\w--\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}]+", regex.V1
)


def grade(grader: Grader, answer: str, *, items: dict[str, str]) -> float:
    """The number that an answer gets, between 0 and 1; `items` as read_items gives them."""
    values = items | {ANSWER: answer}
    text = fill_references(grader.input, values)
    match grader:
        case RegexMatch():
            return float(compile_pattern(grader.pattern).search(text) is not None)
        case StringCheck():
            return float(_agrees(text, fill_references(grader.reference, values), grader.operation))
        case TextSimilarity():
            return measure_similarity(
                text, fill_references(grader.reference, values), metric=grader.evaluation_metric
            )


def measure_similarity(text: str, reference: str, *, metric: str) -> float:
    """How alike two texts are, between 0 and 1. Case does not count for ROUGE.

    Texts that are the same are always 1, however few words there are to compare.
    """
    if text == reference:
        return 1.0
    if metric == "fuzzy_match":
        return fuzz.WRatio(text, reference) / 100
    if metric.startswith("rouge_"):
        name = "rougeL" if metric == "rouge_l" else f"rouge{metric.removeprefix('rouge_')}"
        scorer: Any = RougeScorer([name], tokenizer=_Words())
        return float(scorer.score(reference, text)[name].fmeasure)
    words, wanted = split_words(text), split_words(reference)
    if not words or not wanted:
        return 0.0
    longest = min(4, len(words), len(wanted))  # words in a row that both can have
    if metric == "gleu":
        return float(sentence_gleu([wanted], words, max_len=longest))
    smoothing: Any = SmoothingFunction().method1  # else one order without a match would make it all 0
    weights: Any = [1 / longest] * longest
    bleu: Any = sentence_bleu([wanted], words, weights=weights, smoothing_function=smoothing)
    return float(bleu)


def split_words(text: str) -> Sequence[str]:
    """Words of a text; in Chinese, Japanese and Thai its characters."""
    return _WORD.findall(text)


class _Words:
    """What ROUGE counts. Its own tokenizer drops every letter that is not ASCII, all of a Chinese text."""

    def tokenize(self, text: str) -> Sequence[str]:
        return split_words(text.lower())


def _agrees(text: str, reference: str, operation: str) -> bool:
    match operation:
        case "eq":
            return text == reference
        case "ne":
            return text != reference
        case "like":
            return reference in text
    return reference.casefold() in text.casefold()
