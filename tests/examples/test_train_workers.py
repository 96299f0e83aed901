"""`examples/train_workers.py` starts workers, which end with the same network."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def command(*options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs the command as a user would, from another folder."""
    return subprocess.run(
        [sys.executable, str(ROOT / "examples" / "train_workers.py"), *options],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        cwd=ROOT.parent,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


@pytest.mark.timeout(250)
def test_two_workers_end_with_equal_digests_and_read_digits(tmp_path):
    done = command("--workers", "2", "--epochs", "3", TFDS_DATA_DIR=str(tmp_path))
    assert done.returncode == 0, done.stderr
    found = re.findall(r"Worker (\d)  weights (\w{16})  statistics (\w{16})", done.stdout)
    (first, second) = found
    assert (first[0], second[0]) == ("0", "1")
    assert first[1:] == second[1:]
    assert first[1] != first[2]
    assert "All equal" in done.stdout
    (accuracy,) = re.findall(r"Test accuracy  (\S+)", done.stdout)
    assert float(accuracy) >= 0.95


def test_a_worker_that_fails_ends_the_others():
    done = command("--workers", "2", "--epochs", "0")
    assert done.returncode != 0
    assert "`epochs` must be an integer of at least 1. Received: epochs=0" in done.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "error: which worker is this? Give --workers or --slurm, or set TF_CONFIG."),
        (["--workers", "0"], "--workers must be at least 1. Received: --workers 0."),
    ],
    ids=["no cluster", "no workers"],
)
def test_a_command_that_names_no_workers_is_refused(options, message):
    done = command(*options)
    assert done.returncode != 0
    assert message in done.stderr
    assert "Traceback" not in done.stderr
