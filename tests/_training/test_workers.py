"""Training on worker processes is training on one device, and survives the death of a worker."""

import signal

import numpy as np
import pytest

from layer_runs import error
from replicas import finish, processes
from trained import PROGRAM, Observed, run_workers, under, worker_commands

pytestmark = pytest.mark.timeout(300)


def assert_trained_as_alone(seen: list[Observed], scenario: str) -> None:
    """Every worker ends as one device does, and all with the same bits."""
    alone, first = under(seen[0], scenario, 1), under(seen[0], scenario, len(seen))
    assert alone.keys() == first.keys()
    assert len(under(alone, "weight")) > 3
    far = {name: error for name in first if not (off := error(first[name], alone[name])) <= 1e-4}
    assert not far
    for other in seen[1:]:
        for name, value in under(other, scenario, len(seen)).items():
            np.testing.assert_array_equal(value, first[name], err_msg=name)


@pytest.mark.slow
@pytest.mark.no_cover
def test_three_workers_train_what_one_device_trains(tmp_path):
    seen = run_workers(tmp_path / "w", 3, "--scenario", "accumulated")
    assert_trained_as_alone(seen, "accumulated")
    # Then each has begun a training with data of its own.
    for each in seen:
        assert str(each["error"]).startswith(
            "All workers must train on the same batches in the same order"
        )
        assert str(each["error"]).endswith(
            "Received: workers that differ in data and validation_data."
        )


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[Observed]:
    return run_workers(tmp_path_factory.mktemp("undisturbed") / "w", 2, "--scenario", "uneven")


def test_two_workers_train_what_one_device_trains(undisturbed):
    assert_trained_as_alone(undisturbed, "uneven")


@pytest.mark.slow
@pytest.mark.no_cover
def test_workers_that_are_killed_one_after_the_other_end_as_if_nothing_had_happened(
    undisturbed, tmp_path
):
    arguments = ["--scenario", "uneven", "--backup", tmp_path / "backup"]
    for killed in (0, 1):  # the chief, then the other, which has gone on from the chief's backup
        commands = worker_commands(tmp_path, 2, *arguments, "--killed", killed)
        with processes(PROGRAM, commands) as started:
            finish(started[killed], code=-signal.SIGKILL)
            # Seconds, most of which TensorFlow takes to leave, on a machine that may have much else to do.
            output = finish(started[1 - killed], code=1, limit=60)
        assert "UnavailableError" in output
        assert "A worker of the strategy was lost, or stopped: without it the others" in output
        assert [path.name for path in (tmp_path / "backup").iterdir()] == ["training.npz"]
    again = run_workers(tmp_path / "again", 2, *arguments)
    for expected, seen in zip(undisturbed, again, strict=True):
        for name, value in under(seen, "uneven/2").items():
            if name.startswith("weight"):
                np.testing.assert_array_equal(value, expected[f"uneven/2/{name}"], err_msg=name)
            else:
                np.testing.assert_allclose(value, expected[f"uneven/2/{name}"], rtol=1e-6)
