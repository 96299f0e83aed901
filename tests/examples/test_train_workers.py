"""`examples/train_workers.py` starts workers, which end with the same network."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from examples import clusters

ROOT = Path(__file__).parents[2]


def command(*options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs the command as a user would, from another folder."""
    return subprocess.run(
        [sys.executable, str(ROOT / "examples" / "train_workers.py"), *options],
        env={
            **os.environ,
            "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ['PYTHONPATH']}",
            **environment,
        },
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


def test_a_worker_that_fails_ends_the_others(tmp_path, monkeypatch):
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    monkeypatch.setattr(sys, "argv", [str(script)])
    begun = time.monotonic()
    assert clusters.start_workers(2) == 1
    assert time.monotonic() - begun < 60
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


# The first worker would wait for a minute; the other one fails as soon as it does.
WORKER = """
import json, os, pathlib, sys, time

pid = pathlib.Path(__file__).with_name("pid")
if json.loads(os.environ["TF_CONFIG"])["task"]["index"]:
    while not pid.exists() or not pid.read_text():
        time.sleep(0.01)
    sys.exit(3)
pid.write_text(str(os.getpid()))
time.sleep(60)
"""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "error: which worker is this? Pass --workers or --slurm, or set TF_CONFIG."),
        (["--slurm"], "error: --slurm runs as a task of a Slurm job: srun python ... --slurm"),
        (["--workers", "0"], "--workers must be at least 1. Received: --workers 0."),
        (["--save-every", "0"], "--save-every must be at least 1. Received: --save-every 0."),
    ],
    ids=["no cluster", "no job", "no workers", "no batches"],
)
def test_bad_options_raise_without_a_traceback(options, message):
    done = command(*options)
    assert done.returncode != 0
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def slurm_task(monkeypatch: pytest.MonkeyPatch, rank: int, **variables: str) -> dict[str, str]:
    """Returns the settings of one of three tasks on two nodes."""
    monkeypatch.setattr(clusters, "_hosts", lambda nodelist: ["n9", "n10"])
    node, local = [(0, 0), (0, 1), (1, 0)][rank]
    environment = {
        "SLURM_STEP_NODELIST": "n[9-10]",
        "SLURM_STEP_TASKS_PER_NODE": "2,1",
        "SLURM_JOB_ID": "1207",
        "SLURM_STEP_ID": "1",
        "SLURM_PROCID": str(rank),
        "SLURM_NODEID": str(node),
        "SLURM_LOCALID": str(local),
    }
    return clusters.slurm_settings(environment | variables)


def test_the_tasks_of_a_slurm_job_are_workers_in_the_order_of_slurm(monkeypatch):
    for rank in range(3):
        settings = slurm_task(monkeypatch, rank)
        config = json.loads(settings.pop("TF_CONFIG"))
        assert config["cluster"] == {"worker": ["n9:12800", "n9:12801", "n10:12800"]}
        assert config["task"] == {"type": "worker", "index": rank}
        assert settings == {}  # no GPUs


@pytest.mark.parametrize(
    ("visible", "bound", "expected"),
    [
        ("NoDevFiles", {}, [None, None, None]),
        ("0,1", {}, ["0", "1", None]),  # The third task is alone on its node.
        ("0,1,2,3", {}, ["0,1", "2,3", None]),
        ("0,1", {"SLURM_GPUS_PER_TASK": "2"}, [None, None, None]),
    ],
    ids=["none", "one per task", "two per task", "bound by Slurm"],
)
def test_the_tasks_of_a_node_divide_its_gpus_unless_slurm_has(
    monkeypatch, visible, bound, expected
):
    for rank, own in enumerate(expected):
        settings = slurm_task(monkeypatch, rank, CUDA_VISIBLE_DEVICES=visible, **bound)
        assert settings.get("CUDA_VISIBLE_DEVICES") == own


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (
            {"CUDA_VISIBLE_DEVICES": "0"},
            r"--gpus-per-task=1\. Received: 1 GPUs for 2 tasks",
        ),
        (
            {"SLURM_DISTRIBUTION": "cyclic"},
            r"srun --distribution=block\. Received: --distribution=cyclic",
        ),
    ],
    ids=["too few GPUs", "cyclic"],
)
def test_slurm_jobs_that_cannot_train_exit_with_the_cure(monkeypatch, variables, message):
    with pytest.raises(SystemExit, match=message):
        slurm_task(monkeypatch, 0, **variables)


@pytest.mark.parametrize(
    ("expression", "counts"), [("2", [2]), ("2(x3),1", [2, 2, 2, 1]), ("1,3", [1, 3])]
)
def test_tasks_per_node_are_expanded(expression, counts):
    assert clusters._tasks_per_node(expression) == counts
