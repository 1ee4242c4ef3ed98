"""Where things come from, as text that can be stored and replayed."""

import pytest

from db.sources import HubSource, is_hub, parse_hub


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ("hf://org/name", HubSource("org/name")),
        ("hf://org/name@v1.0", HubSource("org/name", "v1.0")),
        ("hf://org/name@refs/pr/1", HubSource("org/name", "refs/pr/1")),
        (
            "hf://o-r.g/n_a.me@main?config=a+b%26c&split=train",
            HubSource("o-r.g/n_a.me", config="a b&c", split="train"),
        ),
    ],
)
def test_texts_and_sources(text: str, source: HubSource) -> None:
    assert parse_hub(text) == source
    assert parse_hub(str(source)) == source


@pytest.mark.parametrize(
    "text",
    [
        "hf://",
        "hf://name",
        "hf:///etc/passwd",
        "hf://org/name/more",
        "hf://../name",
        "hf://org/..",
        "hf://org/name@",
        "hf://org/name@../../x",
        "hf://org/name@-x",
        "hf://-org/name",
        "hf://org/name?evil=1",
        "hf://org/name?config",
        "hf://org/na me",
        "hf://org/name\n",
        "https://hub/org/name",
        "/models/org/name",
    ],
)
def test_what_is_none(text: str) -> None:
    with pytest.raises(ValueError, match=r"hub|part|bad query"):
        parse_hub(text)


def test_paths_are_no_hub() -> None:
    assert is_hub("hf://org/name")
    assert not is_hub("/models/hf://org/name")
