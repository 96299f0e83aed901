"""What layers do on many replicas: on 2, 3 and 4 virtual devices, 2 virtual GPUs, 2 and 3 worker processes."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

import replicas
from oracle import BatchNorm, Pass
from replica_models import assert_trained
from replicas import CASES, STEPS, Case, Observed, Shard, shards

DEVICES = {"devices": ["--devices", "4"], "gpus": ["--devices", "2", "--kind", "GPU"]}
TOLERANCE = {"float64": 1e-10, "float16": 2.0**-10, "bfloat16": 2.0**-7}


@pytest.fixture(scope="module")
def observed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], Observed]:
    """What was seen in each setting. Each is run once, when it is first asked for."""
    folder: Path = tmp_path_factory.mktemp("replicas")
    known: dict[tuple[str, int], Observed] = {}

    def find(setting: str, number: int) -> Observed:
        key = (setting, number if setting == "workers" else 0)
        if key not in known:
            if setting == "workers":
                known[key] = replicas.run_workers(folder, number)
            else:
                known[key] = replicas.run_devices(
                    "replicas.py", folder / f"{setting}.npz", *DEVICES[setting]
                )
        return known[key]

    return find


def settings(wanted: Callable[[Case], bool]) -> list:
    """Every case, on virtual devices; those of two replicas on GPUs, some of them on workers too."""
    runs = {
        "devices": lambda case: True,
        "workers": lambda case: case.workers,
        "gpus": lambda case: case.replicas == 2,
    }
    return [
        pytest.param(
            case,
            setting,
            id=f"{setting}-{case.id}",
            marks=[pytest.mark.gpu] if setting == "gpus" else [],
        )
        for setting, takes_part in runs.items()
        for case in CASES
        if wanted(case) and takes_part(case)
    ]


def ours(case: Case) -> bool:
    return not case.stock


def synchronized(case: Case) -> bool:
    return ours(case) and "synchronized" in case.layer


def apart(case: Case) -> bool:
    return ours(case) and "synchronized" not in case.layer


def seen_by(seen: Observed, case: Case, step: int, name: str) -> list[np.ndarray]:
    return [seen[f"{case.id}/{step}/{replica}/{name}"] for replica in range(case.replicas)]


def names(seen: Observed, case: Case) -> list[str]:
    """Of the layer's weights."""
    start = f"{case.id}/0/0/"
    every = [key.removeprefix(start) for key in seen if key.startswith(start)]
    return [name for name in every if name not in ("y", "dx", "dgamma", "dbeta")]


def oracle_for(case: Case) -> BatchNorm:
    numerics = {
        name: value
        for name, value in case.layer.items()
        if name not in ("synchronized", "center", "scale")
    }
    return BatchNorm((None, *case.shape), **numerics)


def joined(fed: Sequence[Shard]) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    mask = None if fed[0].mask is None else np.concatenate([shard.mask for shard in fed])
    return np.concatenate([s.x for s in fed]), np.concatenate([s.dy for s in fed]), mask


def assert_close(actual: np.ndarray, expected: np.ndarray, case: Case, name: str) -> None:
    """To 1e-5 of the largest value, or as well as the dtype holds it."""
    stored = case.dtype if name in ("y", "dx") or case.dtype == "float64" else "float32"
    scale = np.max(np.abs(expected), initial=1e-3)
    tolerance = TOLERANCE.get(stored, 1e-5)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * scale, err_msg=name)


@pytest.mark.parametrize(("case", "setting"), settings(ours))
def test_every_replica_holds_the_same_bits_after_every_step(case, setting, observed):
    seen = observed(setting, case.replicas)
    for step in range(STEPS):
        for name in names(seen, case):
            first, *others = seen_by(seen, case, step, name)
            for other in others:
                np.testing.assert_array_equal(other, first, err_msg=f"{name} after step {step}")


@pytest.mark.parametrize(
    ("case", "setting"), settings(lambda c: synchronized(c) and c.spoiled is None)
)
def test_synchronized_is_one_device_with_the_joined_batch(case, setting, observed):
    seen = observed(setting, case.replicas)
    oracle = oracle_for(case)
    for step in range(STEPS):
        expected = oracle.train(*joined(shards(case, step)))
        for name in ("y", "dx"):
            whole = np.concatenate(seen_by(seen, case, step, name))
            assert_close(whole, getattr(expected, name), case, name)
        for name in ("dgamma", "dbeta"):  # Each replica has its share of the sum.
            if name.removeprefix("d") in names(seen, case):
                total = np.sum(seen_by(seen, case, step, name), axis=0)
                assert_close(total, getattr(expected, name), case, name)
        assert_state(seen, case, step, oracle)


@pytest.mark.parametrize(("case", "setting"), settings(lambda c: apart(c) and c.spoiled is None))
def test_apart_each_normalizes_its_own_and_the_averages_are_weighted_by_count(
    case, setting, observed
):
    seen = observed(setting, case.replicas)
    oracle = oracle_for(case)
    for step in range(STEPS):
        fed = shards(case, step)
        expected = apart_step(oracle, fed)
        for replica, each in enumerate(expected):
            for name in ("y", "dx", "dgamma", "dbeta"):
                actual = seen[f"{case.id}/{step}/{replica}/{name}"]
                assert_close(actual, getattr(each, name), case, name)
        assert_state(seen, case, step, oracle)


def apart_step(oracle: BatchNorm, fed: Sequence[Shard]) -> list[Pass]:
    """One step on all replicas: the oracle moves by the moments of each, weighted by their counts."""
    state, updates = dict(oracle.state), oracle.updates
    passes, moved = [], []

    def collect(values: np.ndarray, mean: np.ndarray, variance: np.ndarray) -> None:
        moved.append((values, mean, variance))

    move, oracle._move = oracle._move, collect  # type: ignore[method-assign]
    try:
        for shard in fed:
            oracle.state, oracle.updates = dict(state), updates
            passes.append(oracle.train(shard.x, shard.dy, shard.mask))
    finally:
        oracle._move = move  # type: ignore[method-assign]
    # To the oracle, groups of one batch and batches of many replicas are averaged alike.
    move(*(np.concatenate(parts) for parts in zip(*moved, strict=True)))
    return passes


def assert_state(seen: Observed, case: Case, step: int, oracle: BatchNorm) -> None:
    for name, value in oracle.state.items():
        if name in names(seen, case):
            assert_close(seen[f"{case.id}/{step}/0/{name}"], value, case, name)
    if oracle.momentum is None:
        np.testing.assert_array_equal(seen[f"{case.id}/{step}/0/update_count"], oracle.updates)


@pytest.mark.parametrize(("case", "setting"), settings(lambda c: ours(c) and c.spoiled is not None))
def test_a_shard_that_is_not_finite_moves_nothing_on_any_replica(case, setting, observed):
    seen = observed(setting, case.replicas)
    for name, value in oracle_for(case).state.items():
        for each in seen_by(seen, case, STEPS - 1, name):
            np.testing.assert_array_equal(each, value, err_msg=name)


@pytest.mark.no_cover
def test_fifty_steps_of_workers_are_those_of_one_device(observed):
    assert_trained(observed("workers", 2), 2)


# Keras's layer, for the table in the README: when one of these fails, that table needs a look.


@pytest.mark.parametrize(("case", "setting"), settings(lambda c: c.id == "stock-apart"))
def test_keras_keeps_other_statistics_on_each_replica(case, setting, observed):
    one, other = seen_by(observed(setting, case.replicas), case, 0, "moving_mean")
    assert np.max(np.abs(one - other)) > 1e-3


def stock(name: str) -> Case:
    return next(case for case in CASES if case.id == name)


def test_keras_synchronized_cancels_where_the_mean_is_large(observed):
    case = stock("stock-far")
    seen = observed("devices", case.replicas)
    y = np.concatenate(seen_by(seen, case, 0, "y"))
    expected = oracle_for(case).train(*joined(shards(case, 0))).y
    assert np.max(np.abs(y - expected)) > 0.5


def test_keras_does_not_synchronize_under_a_mask(observed):
    case = stock("stock-mask")
    fed = shards(case, 0)
    apart = [oracle_for(case).train(shard.x, shard.dy, shard.mask).y for shard in fed]
    for y, expected in zip(seen_by(observed("devices", 2), case, 0, "y"), apart, strict=True):
        np.testing.assert_allclose(y, expected, atol=1e-4)
