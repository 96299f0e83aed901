"""`examples/train_workers.py --slurm` as the tasks of Slurm jobs. Runs where Slurm answers."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest


def slurm(*command: object, **options: object) -> str:
    """Runs a command of Slurm and returns its output."""
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, timeout=240, check=False, **options
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def slurm_answers() -> bool:
    if shutil.which("srun") is None:
        return False
    return subprocess.run(["sinfo"], capture_output=True, timeout=60, check=False).returncode == 0


if not slurm_answers():
    pytest.skip("needs a Slurm that answers", allow_module_level=True)

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]
ROOT = Path(__file__).parents[2]
EPOCHS = 3
TRAIN = [sys.executable, ROOT / "examples" / "train_workers.py", "--slurm", "--epochs", EPOCHS]


def digests(output: str) -> list[tuple[str, ...]]:
    """Returns the digests of the weights and statistics of each worker, in their order."""
    found = re.findall(r"Worker (\d)  weights (\w{16})  statistics (\w{16})", output)
    assert [int(worker) for worker, *_ in found] == list(range(len(found)))
    return [tuple(values) for _, *values in found]


@pytest.fixture(scope="module")
def data_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


def train(tasks: int, data_directory: Path) -> list[tuple[str, ...]]:
    environment = {**os.environ, "TFDS_DATA_DIR": str(data_directory)}
    output = slurm("srun", "--overcommit", f"--ntasks={tasks}", *TRAIN, env=environment)
    assert "All equal" in output
    return digests(output)


@pytest.fixture(scope="module")
def undisturbed(data_directory: Path) -> list[tuple[str, ...]]:
    return train(2, data_directory)


def test_two_tasks_end_with_the_same_network(undisturbed):
    assert len(undisturbed) == 2
    assert len(set(undisturbed)) == 1


def test_three_tasks_end_with_the_same_network(data_directory):
    found = train(3, data_directory)
    assert len(found) == 3
    assert len(set(found)) == 1


def kill_one_task(step: str) -> None:
    """Sends SIGKILL to the second task of the step, as the kernel does when memory runs out."""
    lines = [line.split() for line in slurm("scontrol", "listpids", step).splitlines()[1:]]
    (process,) = (int(pid) for pid, _, _, local, *_ in lines if local == "1")
    os.kill(process, signal.SIGKILL)


def submit(folder: Path, data_directory: Path, on_failure: str) -> tuple[str, Path]:
    """Submits a job that backs up after every 5 batches. Returns its id and the file that it prints to."""
    output, script = folder / "output", folder / "job.sh"
    train = " ".join(map(str, [*TRAIN, "--backup", folder / "backup", "--save-every", 5]))
    script.write_text(
        "#!/bin/bash\n"
        f"export TFDS_DATA_DIR={data_directory}\n"
        'echo "Restarts: ${SLURM_RESTART_COUNT:-0}"\n'
        f"srun --kill-on-bad-exit=1 {train} || {on_failure}\n"
    )
    options = ["--requeue", "--overcommit", "--ntasks=2", "--open-mode=append"]
    return slurm("sbatch", "--parsable", *options, f"--output={output}", script).strip(), output


def wait_for_state(job: str, state: str) -> None:
    wait_until(lambda: f"JobState={state}" in slurm("scontrol", "show", "job", job))


def wait_until_mid_epoch(folder: Path) -> None:
    wait_until(lambda: 5 <= saved_batches(folder / "backup" / "training.npz", epoch=1) <= 15)


def test_a_job_that_loses_a_task_in_mid_epoch_is_requeued_and_ends_with_the_same_bits(
    undisturbed, data_directory, tmp_path
):
    job, output = submit(tmp_path, data_directory, "scontrol requeue $SLURM_JOB_ID")
    try:
        wait_until_mid_epoch(tmp_path)
        kill_one_task(f"{job}.0")
        wait_for_state(job, "PENDING")
        wait_for_state(job, "COMPLETED")  # Slurm starts a requeued job after two minutes.
    finally:
        subprocess.run(["scancel", job], check=False)
        print(output.read_text())
    assert "A worker of the strategy was lost or has stopped." in output.read_text()
    assert "Restarts: 1" in output.read_text()
    assert digests(output.read_text()) == undisturbed
    assert not (tmp_path / "backup").exists()


def test_a_job_cancelled_in_mid_epoch_and_submitted_again_ends_with_the_same_bits(
    undisturbed, data_directory, tmp_path
):
    first, output = submit(tmp_path, data_directory, "exit 1")
    second = None
    try:
        wait_until_mid_epoch(tmp_path)
        slurm("scancel", f"{first}.0")
        wait_for_state(first, "FAILED")
        assert "All equal" not in output.read_text()
        second, output = submit(tmp_path, data_directory, "exit 1")
        wait_for_state(second, "COMPLETED")
    finally:
        subprocess.run(["scancel", *filter(None, [first, second])], check=False)
        print(output.read_text())
    assert digests(output.read_text()) == undisturbed


def saved_batches(backup: Path, epoch: int) -> int:
    """Returns how many batches of this epoch the last backup has seen."""
    if not backup.exists():
        return 0
    with np.load(backup) as stored:
        progress = json.loads(str(stored["state"]))["progress"]
    return progress["batches"] if progress["epoch"] == epoch else 0


def wait_until(done: Callable[[], bool], seconds: float = 240) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end
        time.sleep(0.02)
