"""The command line explains itself, names its own options in errors, and returns the right exit status."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import quiet
import tfbn
from command_line import run, small_model
from tfbn._command_line import commands
from tfbn._command_line.main import main

COMMANDS = ["inspect", "diagnose", "recalibrate", "convert", "fold", "export"]


@pytest.mark.parametrize(
    "arguments", [[], ["dinner"], ["fold"], ["convert", "a", "b", "--to", "c"]]
)
def test_wrong_arguments_exit_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert "usage: tfbn" in capsys.readouterr().err


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)], ids=str)
def test_help(command, capsys):
    with pytest.raises(SystemExit) as ended:
        main([*command, "--help"])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert "usage: tfbn" in out
    assert command or all(f"  tfbn {name} " in out for name in COMMANDS)


def test_help_names_the_program_as_it_was_called(capsys):
    with pytest.raises(SystemExit):
        main(["--help"], prog="python -m tfbn")
    out = capsys.readouterr().out
    assert "usage: python -m tfbn" in out
    assert "  python -m tfbn inspect model.keras" in out


def test_version(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"tfbn {tfbn.__version__}\n"


def test_the_package_runs_as_a_module(tmp_path):
    small_model().save(tmp_path / "model.keras")
    done = subprocess.run(
        [sys.executable, "-m", "tfbn", "inspect", str(tmp_path / "model.keras"), "--json"],
        cwd=Path(__file__).parents[2],
        env=quiet.environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["layers"]) == 2
    assert quiet.noise(done.stderr) == []


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("Pass overwrite=True to replace it.", "Pass --overwrite to replace it."),
        ("Received: path='a', overwrite=False. Or", "Received: path='a', no --overwrite. Or"),
        ("or pass tolerance=float('inf') to", "or pass --tolerance inf to"),
        ("pass a larger `tolerance`. If", "pass a larger --tolerance. If"),
        ("Received: steps=0.", "Received: --steps 0."),
        ("apart, tolerance=1.5e-12. Pass", "apart, --tolerance 1.5e-12. Pass"),
        ("(include_frozen=True), or", "(--include-frozen), or"),
        ("Received: upstream='all'.", "Received: --upstream all."),
        ("Received: virtual_batch_size=2.", "Received: virtual_batch_size=2."),
    ],
)
def test_errors_name_options_and_not_arguments(tmp_path, capsys, monkeypatch, text, shown):
    def fail(options):
        raise ValueError(text)

    monkeypatch.setattr(commands, "inspect", fail)
    assert run(capsys, "inspect", "model.keras") == (2, "", f"error: {shown}\n")


def test_an_error_without_a_message_gives_its_type(capsys, monkeypatch):
    def fail(options):
        raise NotImplementedError

    monkeypatch.setattr(commands, "inspect", fail)
    assert run(capsys, "inspect", "model.keras") == (2, "", "error: NotImplementedError\n")


def test_an_unexpected_error_shows_its_traceback_and_exits_with_2(capsys, monkeypatch):
    def fail(options):
        raise KeyError("gone")

    monkeypatch.setattr(commands, "inspect", fail)
    status, _, err = run(capsys, "inspect", "model.keras")
    assert status == 2
    assert "Traceback" in err


def test_lines_fit_the_terminal(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.chdir(tmp_path)
    small_model().save("model.keras")
    np.save("x.npy", np.random.default_rng(0).normal(5, 3, (64, 4)).astype("float32"))
    for arguments in (
        ["inspect", "model.keras"],
        ["fold", "model.keras", "f.keras"],
        ["fold", "model.keras", "f.keras"],  # An error: the file exists.
        ["export", "model.keras", "served"],
        ["recalibrate", "model.keras", "x.npy", "--output", "r.keras"],
    ):
        _, out, err = run(capsys, *arguments)
        lines = (out + err).splitlines()
        assert max(map(len, lines)) <= 60, "\n".join(lines)
