"""Recalibration and diagnosis under a strategy of several workers pool over all of them."""

import itertools
import json

import numpy as np
import pytest

from replicas import Observed, run_workers
from worker_recalibration import TOGETHER, UPSTREAM, X

PROGRAM = "worker_recalibration.py"
EPSILON = 1e-3

pytestmark = pytest.mark.timeout(250)


@pytest.fixture(scope="module")
def workers(tmp_path_factory) -> Observed:
    return run_workers(tmp_path_factory.mktemp("workers"), 2, PROGRAM)


@pytest.mark.parametrize("upstream", UPSTREAM)
@pytest.mark.parametrize("together", TOGETHER)
def test_two_workers_give_the_statistics_of_all_data(workers, together, upstream):
    name = f"{together}/{upstream}"
    result, other = (json.loads(str(workers[f"{name}/{worker}"])) for worker in (0, 1))
    del result["cache"], other["cache"]  # Each worker keeps its own shards.
    assert result == other
    assert (result["batches"], result["examples"]) == (3, 23)
    assert [layer["values"] for layer in result["layers"]] == [23, 23]
    # What the first layer normalizes together: everything, each batch, or each replica's share of it.
    ends = {"apart": [0, 5, 11, 16, 22, 23], "synchronized": [0, 11, 22, 23]}[together]
    inside = hidden(parts([0, 23] if upstream == "population" else ends))
    expected = {
        "first/moving_mean": X.mean(0),
        "first/moving_variance": X.var(0),
        "second/moving_mean": inside.mean(0),
        "second/moving_variance": inside.var(0),
    }
    for weight, value in expected.items():
        one, other = (workers[f"{name}/{weight}/{replica}"] for replica in (0, 1))
        np.testing.assert_allclose(one, value, rtol=1e-4, err_msg=weight)
        np.testing.assert_array_equal(one, other, err_msg=weight)


@pytest.mark.parametrize("together", TOGETHER)
def test_two_workers_diagnose_what_all_data_shows(workers, together):
    for when in ("before", "after"):
        assert workers[f"{together}/{when}/0"] == workers[f"{together}/{when}/1"]
    before, after = (
        json.loads(str(workers[f"{together}/{when}/0"])) for when in ("before", "after")
    )
    (finding,) = before["findings"]
    assert (finding["kind"], len(finding["layers"])) == ("never_updated", 2)
    assert not after["findings"]
    replicas = [0, 4, 8, 12, 16, 19, 23]  # their shares
    shares = {"apart": replicas, "synchronized": [0, 8, 16, 23]}[together]
    seen = {"first": (X, parts(replicas)), "second": (hidden([X]), None)}
    for layer in before["layers"]:
        values, batches = seen[layer["layer"].rsplit("/", 1)[-1]]
        sigma = np.sqrt(values.var(0) + EPSILON)
        expected = {
            "values_per_batch": 23 / (len(shares) - 1),
            "mean_shift": np.sqrt(np.mean(np.square(values.mean(0) / sigma))),
            "log_variance_ratio": np.mean(np.log((1 + EPSILON) / sigma**2)),
        }
        if batches:
            spread = np.var([part.mean(0) for part in batches], 0)
            expected["batch_noise"] = np.sqrt(np.mean(spread / sigma**2))
        assert {key: layer[key] for key in expected} == pytest.approx(expected, rel=1e-4)


def parts(ends: list[int]) -> list[np.ndarray]:
    return [X[begin:end] for begin, end in itertools.pairwise(ends)]


def hidden(batches: list[np.ndarray]) -> np.ndarray:
    """What the second layer sees if the first one normalizes each batch by itself."""
    y = [(part - part.mean(0)) / np.sqrt(part.var(0) + EPSILON) for part in batches]
    return np.maximum(np.concatenate(y) @ np.ones((2, 3)), 0)
