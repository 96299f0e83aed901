"""Training on several replicas is training on one device: weights, statistics, history and metrics."""

import numpy as np
import pytest
import tensorflow as tf

from layer_runs import error
from replicas import run_devices
from tfbn._training.workers import Workers
from trained import PROGRAM, SCENARIOS, Observed, under

pytestmark = pytest.mark.timeout(300)
RUNS = [(scenario.id, number) for scenario in SCENARIOS for number in scenario.replicas]
# Half precision rounds each replica's share of a sum.
TOLERANCE = {"overflowing": 1e-3}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Observed:
    """Each scenario on one device and on several virtual ones, and what the experiments saw."""
    output = tmp_path_factory.mktemp("trained") / "seen.npz"
    return run_devices(PROGRAM, output, "--devices", "4")


@pytest.mark.parametrize(
    ("scenario", "number"), [pytest.param(*r, id=f"{r[0]}-{r[1]}") for r in RUNS]
)
def test_synchronized_replicas_train_what_one_device_trains_on_whole_batches(
    trained, scenario, number
):
    alone, together = under(trained, scenario, 1), under(trained, scenario, number)
    assert alone.keys() == together.keys()
    assert len(under(alone, "weight")) > 3
    far = {
        name: off
        for name, value in together.items()
        if not (off := error(value, alone[name])) <= TOLERANCE.get(scenario, 1e-4)
    }
    assert not far


def test_fifty_updates_were_compared(trained):
    assert trained["uneven/4/updates"] == 50


def test_an_overflow_on_one_replica_leaves_out_the_update_on_all(trained):
    """The last example of each batch is on the second replica."""
    updates, scale = trained["overflowing/2/updates"], trained["overflowing/2/scale"]
    left_out = 12 - np.log2(scale)  # each of them halves the scale, which was 2¹²
    assert (updates, left_out) == (2, 6)


@pytest.mark.parametrize("kind", ["one device", "mirrored"])
def test_a_strategy_of_one_replica_trains_the_same_bits_as_none(trained, kind):
    expected, seen = under(trained, "one replica/none"), under(trained, "one replica", kind)
    assert expected.keys() == seen.keys()
    for name, value in seen.items():
        np.testing.assert_array_equal(value, expected[name], err_msg=name)


@pytest.mark.parametrize("number", [2, 4])
def test_layers_that_are_not_synchronized_hold_the_same_statistics_after_every_step(
    trained, number
):
    steps = under(trained, "apart/moving", number)
    assert len(steps) == 5 * 4  # steps, statistics
    for name, values in steps.items():
        assert len(values) == number
        assert (values == values[0]).all(), name
        assert np.isfinite(values).all(), name


def test_a_step_takes_one_collective_for_the_gradients_and_one_for_all_statistics(trained):
    assert trained["apart/collectives/2"] == 2


def test_should_keras_sum_the_gradients_again_they_are_those_of_one_device_all_the_same(trained):
    for name, value in under(trained, "summed again/weight").items():
        assert error(value, trained[f"heads/1/weight/{name}"]) <= 1e-4


def test_what_ctrl_c_ended_goes_on_from_its_backup(trained):
    expected, seen = (
        under(trained, "interrupted/undisturbed"),
        under(trained, "interrupted/restarted"),
    )
    assert not under(trained, "interrupted/interrupted")
    for name, value in seen.items():
        if name.startswith("weight"):
            np.testing.assert_array_equal(value, expected[name], err_msg=name)
        else:
            np.testing.assert_allclose(value, expected[name], rtol=1e-6, err_msg=name)


def test_the_loss_of_a_worker_is_explained_once(monkeypatch):
    workers = Workers(None)
    monkeypatch.setattr(workers, "_alone", False)
    with pytest.raises(tf.errors.UnavailableError) as lost, workers.together(), workers.together():
        raise tf.errors.UnavailableError(None, None, "connection reset")
    (note,) = lost.value.__notes__
    assert note.startswith("A worker of the strategy was lost")


REFUSALS = {
    "xla": "ValueError: XLA cannot compile a step that replicas take together: pass jit_compile=False. "
    "Received: jit_compile=True and 2 replicas.",
    "accumulating": "ValueError: TensorFlow cannot take an optimizer's `gradient_accumulation_steps` to "
    "several replicas; set accumulation_steps of the loop. Received: gradient_accumulation_steps=2 and 2 "
    "replicas.",
    "overwriting": "ValueError: TensorFlow cannot take an optimizer's `ema_overwrite_frequency` to several "
    "replicas; leave it out: the averages come in when training ends. Received: ema_overwrite_frequency=2 "
    "and 2 replicas.",
    "sum": "ValueError: A strategy of several replicas needs a loss that is a mean over the examples",
    "elsewhere": "ValueError: The model, the optimizer and the metrics must be made in the scope of the "
    "strategy: `with strategy.scope(): model = ...; loop = tfbn.TrainingLoop(model, ..., "
    "strategy=strategy)`. Received: of another scope, or none: model.",
    "stock": "UserWarning: Keras's batch normalization keeps moving statistics of its own on each replica, "
    "and only those of the first are saved: `tfbn.convert(model)` in the scope of the strategy makes them "
    "one. Received: 2 replicas, and Keras's layers 'bn'.",
    "stock synchronized": "accepted",
    "automatic": "accepted",
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_replicas_cannot_train_is_refused_with_the_cure(trained, case):
    assert str(trained[f"refused/{case}"]).startswith(REFUSALS[case])
