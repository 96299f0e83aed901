"""Training on several replicas matches training on one device: weights, statistics, history and metrics."""

import numpy as np
import pytest
import tensorflow as tf

from layer_runs import error
from replicas import run_devices
from scenarios import SCENARIOS
from tfbn._training.workers import Workers
from trained import PROGRAM, Observed, under

pytestmark = pytest.mark.timeout(300)
# Half precision rounds each replica's share of a sum.
TOLERANCE = {"overflowing": 1e-3}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Observed:
    """Each scenario on one device and on several virtual ones, and what the experiments observed."""
    output = tmp_path_factory.mktemp("trained") / "seen.npz"
    return run_devices(PROGRAM, output, "--devices", "4")


@pytest.mark.parametrize("scenario", [scenario.id for scenario in SCENARIOS])
def test_synchronized_replicas_match_one_device_training_on_whole_batches(trained, scenario):
    alone, together = under(trained, scenario, "alone"), under(trained, scenario, "together")
    assert alone.keys() == together.keys()
    assert len(under(alone, "weight")) > 3
    assert alone["updates"] > 1
    far = {
        name: off
        for name, value in together.items()
        if not (off := error(value, alone[name])) <= TOLERANCE.get(scenario, 1e-4)
    }
    assert not far


def test_fifty_updates_were_compared(trained):
    assert trained["uneven/together/updates"] == 50


def test_an_overflow_on_one_replica_skips_the_update_on_all(trained):
    """The last example of each batch is on the second replica."""
    updates, scale = trained["overflowing/together/updates"], trained["overflowing/together/scale"]
    skipped = 12 - np.log2(scale)  # each of them halves the scale, which was 2¹²
    assert (updates, skipped) == (2, 6)


@pytest.mark.parametrize("kind", ["one device", "mirrored"])
def test_a_strategy_of_one_replica_trains_the_same_bits_as_no_strategy(trained, kind):
    expected, seen = under(trained, "one replica/none"), under(trained, "one replica", kind)
    assert expected.keys() == seen.keys()
    for name, value in seen.items():
        np.testing.assert_array_equal(value, expected[name], err_msg=name)


def test_unsynchronized_layers_have_equal_statistics_on_all_replicas_after_every_step(trained):
    steps = under(trained, "unsynchronized/moving")
    assert len(steps) == 5 * 4  # steps, statistics
    for name, values in steps.items():
        assert len(values) == 2
        assert (values == values[0]).all(), name
        assert np.isfinite(values).all(), name


def test_a_step_takes_one_all_reduce_for_gradients_and_one_for_statistics(trained):
    assert trained["unsynchronized/collectives"] == 2


def test_replicas_raise_about_statistics_that_no_step_updates_and_about_no_others(trained):
    assert "1 of 2 layers" in str(trained["watched/error"])
    assert "Received: 'forgotten', after 1 step." in str(trained["watched/error"])
    np.testing.assert_array_equal(trained["watched/mean"], [2, 4])


def test_gradients_are_right_even_if_the_optimizer_sums_them_again(trained):
    for name, value in under(trained, "summed again/weight").items():
        assert error(value, trained[f"heads/alone/weight/{name}"]) <= 1e-4


def test_a_run_interrupted_by_ctrl_c_resumes_from_its_backup(trained):
    assert trained["interrupted/saved"] == 1
    seen = under(trained, "interrupted")
    for name, expected in under(trained, "accumulated/together").items():
        if name.startswith("weight"):
            np.testing.assert_array_equal(seen[name], expected, err_msg=name)
        else:
            np.testing.assert_allclose(seen[name], expected, rtol=1e-6, err_msg=name)


def test_the_loss_of_a_worker_is_explained_once(monkeypatch):
    workers = Workers(None)
    monkeypatch.setattr(workers, "_alone", False)
    with (
        pytest.raises(tf.errors.UnavailableError) as lost,
        workers.explain_lost_worker(),
        workers.explain_lost_worker(),
    ):
        raise tf.errors.UnavailableError(None, None, "connection reset")
    (note,) = lost.value.__notes__
    assert note.startswith("A worker of the strategy was lost")


REFUSALS = {
    "xla": "ValueError: XLA cannot compile a step that runs on several replicas. Pass jit_compile=False. "
    "Received: jit_compile=True and 2 replicas.",
    "accumulating": "ValueError: An optimizer's `gradient_accumulation_steps` does not work on several "
    "replicas. Set accumulation_steps of the loop instead. Received: gradient_accumulation_steps=2 and 2 "
    "replicas.",
    "overwriting": "ValueError: An optimizer's `ema_overwrite_frequency` does not work on several replicas. "
    "Leave it out: the averages replace the weights when training ends. Received: ema_overwrite_frequency=2 "
    "and 2 replicas.",
    "sum": "ValueError: A strategy of several replicas needs a loss that averages over the examples",
    "elsewhere": "ValueError: The model, the optimizer and the metrics must be created in the scope of the "
    "strategy: `with strategy.scope(): model = ...; loop = tfbn.TrainingLoop(model, ..., "
    "strategy=strategy)`. Received: created in another scope or in none: model.",
    "stock": "UserWarning: keras.layers.BatchNormalization keeps different moving statistics on each replica "
    "and saves only those of the first. Call `tfbn.convert(model)` in the scope of the strategy to keep them "
    "equal. Received: 2 replicas, and Keras's layers 'bn'.",
    "stock synchronized": "accepted",
    "automatic": "accepted",
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_replicas_cannot_train_raises_with_the_cure(trained, case):
    assert str(trained[f"refused/{case}"]).startswith(REFUSALS[case])
