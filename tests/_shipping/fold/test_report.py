"""The report of a fold, for programs and for people."""

from __future__ import annotations

import json

import keras

import tfbn
from folding import image
from graphs import randomize

layers = keras.layers
Norm = keras.layers.BatchNormalization


def mixed() -> keras.Model:
    x = image()
    h = Norm(name="first")(layers.Conv2D(4, 3, name="conv")(x))
    h = Norm(name="second")(layers.ReLU(name="relu")(h))
    return randomize(keras.Model(x, layers.Dense(2)(layers.ReLU(name="again")(h))))


def test_the_report_serves_programs_and_people():
    report = tfbn.fold(mixed()).report
    data = json.loads(json.dumps(report.to_dict()))
    assert data["layers"] == [
        {
            "layer": "first",
            "within": [],
            "outcome": "folded into the preceding layer",
            "into": "conv",
            "reason": None,
        },
        {
            "layer": "second",
            "within": [],
            "outcome": "multiply-add",
            "into": None,
            "reason": "'relu' (ReLU) is not linear; 'again' (ReLU) is not linear",
        },
    ]
    assert data["difference"] <= data["tolerance"] == 1e-4
    assert [row.layer for row in report.left] == ["second"]
    assert (
        "1 folded into the preceding layer, 1 multiply-add; outputs differ by at most"
        in report.summary()
    )
    for shown in (str(report), report.to_markdown()):
        for word in ("first", "conv", "second", "multiply-add", "relu"):
            assert word in shown
    assert "| first | folded into the preceding layer | conv |" in report.to_markdown()


def test_a_notebook_shows_the_report_as_markdown():
    report = tfbn.fold(mixed()).report
    assert report._repr_markdown_() == report.to_markdown()


def test_the_report_is_json_where_nothing_was_to_be_compared():
    report = tfbn.fold(mixed(), tolerance=float("inf")).report
    assert report.to_dict()["tolerance"] is None
    json.dumps(report.to_dict(), allow_nan=False)


def test_a_page_shows_what_became_of_each_layer(tmp_path):
    report = tfbn.fold(mixed()).report
    report.to_html(tmp_path / "fold.html")
    text = (tmp_path / "fold.html").read_text(encoding="utf-8")
    assert "folded into the preceding layer: 1" in text
    assert "multiply-add: 1" in text
    assert "&#x27;relu&#x27; (ReLU) is not linear" in text
