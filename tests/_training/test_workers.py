"""Training on worker processes matches training on one device, and survives the death of a worker."""

import signal

import numpy as np
import pytest

from layer_runs import error
from replicas import finish, processes
from trained import PROGRAM, Observed, run_workers, under, worker_commands

pytestmark = pytest.mark.timeout(300)


def assert_matches_one_device(seen: list[Observed], scenario: str) -> None:
    """Checks every worker against one device, and all workers against the first to the bit."""
    alone, first = under(seen[0], scenario, "alone"), under(seen[0], scenario, "together")
    assert alone.keys() == first.keys()
    assert len(under(alone, "weight")) > 3
    far = {n: off for n in first if not (off := error(first[n], alone[n])) <= 1e-4}
    assert not far
    for other in seen[1:]:
        for name, value in under(other, scenario, "together").items():
            np.testing.assert_array_equal(value, first[name], err_msg=name)


@pytest.mark.slow
@pytest.mark.no_cover
def test_three_workers_match_one_device(tmp_path):
    seen = run_workers(tmp_path / "w", 3, "--scenario", "accumulated")
    assert_matches_one_device(seen, "accumulated")
    # Then each started a run with different data.
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


def test_two_workers_match_one_device(undisturbed):
    assert_matches_one_device(undisturbed, "uneven")


@pytest.mark.slow
@pytest.mark.no_cover
def test_workers_killed_one_after_the_other_end_like_undisturbed_ones(undisturbed, tmp_path):
    arguments = ["--scenario", "uneven", "--backup", tmp_path / "backup"]
    for killed in (0, 1):  # the chief, then the other, which has resumed from the chief's backup
        commands = worker_commands(tmp_path, 2, *arguments, "--killed", killed)
        with processes(PROGRAM, commands) as started:
            finish(started[killed], code=-signal.SIGKILL)
            # It takes seconds, most of which TensorFlow spends on exiting.
            output = finish(started[1 - killed], code=1, limit=60)
        assert "UnavailableError" in output
        assert (
            "A worker of the strategy was lost or has stopped. The others cannot continue without it"
            in output
        )
        assert [path.name for path in (tmp_path / "backup").iterdir()] == ["training.npz"]
    again = run_workers(tmp_path / "again", 2, *arguments)
    for expected, seen in zip(undisturbed, again, strict=True):
        for name, value in under(seen, "uneven/together").items():
            if name.startswith("weight"):
                np.testing.assert_array_equal(
                    value, expected[f"uneven/together/{name}"], err_msg=name
                )
            else:
                np.testing.assert_allclose(value, expected[f"uneven/together/{name}"], rtol=1e-6)
