"""The example of five ways to fine-tune."""

import re

import pytest

from examples import fine_tune


def test_it_prints_and_draws_each_way(tmp_path, monkeypatch, capsys):
    ways = ("everything", "freeze", "fuse")  # The others take long to trace, and are made of these.
    monkeypatch.setattr(fine_tune, "WAYS", {name: fine_tune.WAYS[name] for name in ways})
    monkeypatch.setattr(fine_tune, "STEP_SHAPE", (2, 8, 8, 1))
    monkeypatch.setattr(
        fine_tune, "step_peaks", lambda: {"everything": 30.0, "freeze": 20.0, "fuse": 15.0}
    )
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    picture = tmp_path / "new" / "fine_tune.png"
    options = ["--seeds", "1", "--epochs", "1", "--steps", "1", "--output", str(picture)]
    fine_tune.main(options)
    assert picture.read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    rows = re.findall(
        r"^(\w[\w, ]+?) +([\d.]+)% +([\d.]+)% +([\d.]+)% +[\d.]+ +\d+$", printed, re.M
    )
    accuracy = {name: float(mean) for name, mean, _, _ in rows}
    assert tuple(accuracy) == ways
    assert accuracy["fuse"] == pytest.approx(accuracy["freeze"], abs=0.5)
    assert re.search(r"With frozen statistics, [01] of 1 seeds end better", printed)
    assert "0.75 times the memory" in printed


@pytest.mark.slow
def test_the_peak_is_that_of_the_steps(monkeypatch):
    monkeypatch.setattr(fine_tune, "WAYS", {"everything": fine_tune.everything})
    monkeypatch.setattr(fine_tune, "MEMORY_SHAPE", (128, 32, 32, 1))
    activation = 128 * 32 * 32 * 32 * 4 / 2**20
    assert 4 * activation < fine_tune.step_peaks()["everything"] < 40 * activation
