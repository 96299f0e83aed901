"""No example and no command prints a warning of TensorFlow's or Keras's that the user can do nothing about."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import quiet
from command_line import small_model

ROOT = Path(__file__).parents[1]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def lines_of(*command: object, folder: Path) -> list[str]:
    """Runs a program in a process of its own. Returns what it should not have printed."""
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        env=quiet.environment() | {"TFDS_DATA_DIR": str(folder)},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode in (0, 1), done.stderr  # 1: diagnose found something.
    return quiet.noise(done.stderr)


EXAMPLES = {
    "train_digits": "examples/train_digits.py --quick --output",
    "domain_shift": "-m examples.domain_shift --epochs 1 --few 4 --draws 1 --output",
    "fine_tune": "-m examples.fine_tune --seeds 1 --epochs 1 --steps 1 --output",
    "lectures": "-m examples.lectures one_line test_time --quick --seeds 1 --out",
    "train_workers": "examples/train_workers.py --workers 2 --epochs 1 --backup",
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_is_quiet(name, tmp_path):
    output = tmp_path / ("out.png" if name in ("domain_shift", "fine_tune") else "out")
    assert lines_of(*EXAMPLES[name].split(), output, folder=tmp_path) == []


COMMANDS = {
    "diagnose": "diagnose model.keras data.npz --html report.html",
    "recalibrate": "recalibrate model.keras data.npz --output recalibrated.keras",
    "convert": "convert model.keras ours.keras",
    "fuse": "fuse model.keras fused.keras",
    "fold": "fold model.keras folded.keras",
    "export": "export model.keras served",
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_is_quiet(name, tmp_path):
    model = small_model()
    model.compile("adam", "mse")
    model.save(tmp_path / "model.keras")
    x = np.random.default_rng(0).normal(5, 3, (64, 4)).astype("float32")
    np.savez(tmp_path / "data.npz", x=x, y=np.zeros((64, 5), "float32"))
    words = COMMANDS[name].split()
    words = [str(tmp_path / w) if "." in w or w == "served" else w for w in words]
    assert lines_of("-m", "tfbn", *words, folder=tmp_path) == []
