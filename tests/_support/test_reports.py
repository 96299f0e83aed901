"""Reports show themselves in notebooks, and become JSON that every parser reads."""

import json

import pytest

from tfbn._support.reports import Report, count, percent, plain


def test_json_holds_no_nan_and_no_infinity():
    value = {"a": float("nan"), "b": [1.5, float("inf")], "c": (-float("inf"), {"d": True}), 4: "x"}
    assert plain(value) == {"a": None, "b": [1.5, None], "c": [None, {"d": True}], "4": "x"}
    json.dumps(plain(value), allow_nan=False)


def test_a_notebook_shows_the_markdown():
    class Example(Report):
        def to_markdown(self):
            return "**bold**"

    assert Example()._repr_markdown_() == "**bold**"


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0 batches"), (1, "1 batch"), (2, "2 batches"), (1234, "1,234 batches")],
)
def test_a_count_agrees_with_its_noun(number, text):
    assert count(number, "batch", "batches") == text


@pytest.mark.parametrize(
    ("fraction", "text"),
    [(1, "100%"), (0.698, "70%"), (0.0951, "10%"), (0.0112, "1.1%"), (0.002, "0.2%")],
)
def test_a_small_percentage_has_a_second_digit(fraction, text):
    assert percent(fraction) == text
