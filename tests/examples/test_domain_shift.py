"""The example of the black and the coloured cats."""

import re

import pytest

from examples import domain_shift


def test_recalibration_brings_back_what_colours_took(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    picture = tmp_path / "new" / "shift.png"
    options = ["--few", "1", "--draws", "2"]
    domain_shift.main([*options, "--output", str(picture)])
    assert picture.read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert str(picture) in printed
    rows = re.findall(r"^(\w[\w ]+?) +([\d.]+)% +([\d.]+)% +([\d.]+) σ", printed, re.MULTILINE)
    accuracy = {name: (float(before), float(after)) for name, before, after, _ in rows}
    assert list(accuracy) == list(domain_shift.DOMAINS)
    at_home = accuracy["white on black"]
    assert min(at_home) > 95
    for name in ("faded", "coloured"):
        before, after = accuracy[name]
        assert before < 70
        assert after > before + 20
    few = re.findall(r"^(\d+) +([\d.]+)% +([\d.]+)%$", printed, re.MULTILINE)
    assert [int(number) for number, _, _ in few] == [1]
    replaced, averaged = map(float, few[0][1:])
    assert min(replaced, averaged) > accuracy[domain_shift.FEW][0]
    # Where ink and paper change places, it cannot help.
    assert max(accuracy["black on white"]) < 40


def test_without_matplotlib_it_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    monkeypatch.setattr(domain_shift, "run", lambda *arguments: ([], {}, []))
    with pytest.raises(SystemExit, match=r"error: .*pip install tfbn\[plots\]"):
        domain_shift.main(["--output", str(tmp_path / "shift.png")])
