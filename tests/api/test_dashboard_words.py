"""How the dashboard words numbers, moments and jobs, and which curves it draws together."""

import pytest

from api.dashboard import formats, job_words
from api.dashboard.curves import group, lines_of, names_of


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(4.2, "4 s"), (61, "1 min"), (4800, "1 h 20 min"), (36_000, "10 h"), (200_000, "2 d"), (None, "–")],  # noqa: RUF001
)
def test_spans(seconds, words):
    assert formats.duration(seconds) == words


@pytest.mark.parametrize(
    ("moment", "words"),
    [(1000.0, "now"), (880.0, "2 min ago"), (4600.0, "in 1 h"), (None, "–")],  # noqa: RUF001
)
def test_moments(moment, words):
    assert formats.ago(moment, now_s=1000.0) == words


@pytest.mark.parametrize(
    ("size", "words"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (80 * 2**30, "80.0 GiB")]
)
def test_sizes(size, words):
    assert formats.size(size) == words


@pytest.mark.parametrize(
    ("value", "words"), [(1234567, "1,234,567"), (0.00002, "2.00e-05"), (3.14159, "3.142"), (2.0, "2")]
)
def test_numbers(value, words):
    assert formats.number(value) == words


def test_what_a_browser_cannot_show_is_replaced():
    assert formats.readable("Two\0 a day \N{GRINNING FACE}") == "Two\ufffd a day \N{GRINNING FACE}"


def test_why_a_job_waits():
    blocked = [
        {"reason": "earlier_jobs", "count": 2},
        {"reason": "devices", "needed": 1, "held": 1},
        {"reason": "too_few_devices", "needed": 8, "most": 4},
        {"reason": "something new"},
    ]
    assert job_words.why_waiting({"blocked_by": blocked}) == (
        "2 jobs before it; needs 1 device, others hold them; needs 8 devices, no machine has more than 4; "
        "something new"
    )


def test_training_and_validation_of_one_measure_share_a_chart_and_loss_is_first():
    series = {
        name: {"steps": [1, 2], "values": [0.5, 0.25]}
        for name in (
            "grad_norm", "kl", "epoch", "train_accuracy", "full_valid_loss", "train_loss", "valid_loss",
        )
    }  # fmt: skip
    charts = group(lines_of({"series": series}))
    assert {title: sorted(lines) for title, lines in charts.items()} == {
        "Loss": ["train", "valid"],
        "Accuracy": ["train"],
        "KL": ["kl"],
        "Gradient norm": ["grad norm"],
    }
    assert [*charts] == ["Loss", "Accuracy", "KL", "Gradient norm"]
    assert charts["Loss"]["train"] == [(1, 0.5), (2, 0.25)]


def test_a_job_that_measured_nothing_has_no_curves():
    assert names_of({}) == []
    assert group(lines_of({"series": {}})) == {}
