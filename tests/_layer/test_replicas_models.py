"""Whole models on many replicas: training, saving, collectives, second derivatives, errors."""

import numpy as np
import pytest
import tensorflow as tf

import replica_models
import tfbn
from oracle import BatchNorm
from replica_models import X
from replicas import Observed, run_devices


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Observed:
    return run_devices("replica_models.py", tmp_path_factory.mktemp("models") / "seen.npz")


def test_fifty_steps_of_two_devices_are_those_of_one(seen):
    replica_models.assert_trained(seen, 2)


@pytest.mark.parametrize("kind", ["apart", "synchronized", "renorm"])
def test_what_fit_saves_depends_on_no_replica(seen, kind):
    number = sum(name.startswith(f"fitted/{kind}/file/") for name in seen)
    assert number >= 6
    for index in range(number):

        def part(what: str, index: int = index) -> np.ndarray:
            return seen[f"fitted/{kind}/{what}/{index}"]

        for other in ("replica-1", "file", "loaded-0", "loaded-1"):
            np.testing.assert_array_equal(part("replica-0"), part(other), err_msg=other)
        np.testing.assert_array_equal(part("set-0"), part("replica-0") + 1)
        np.testing.assert_array_equal(part("set-0"), part("set-1"))
    assert not np.array_equal(seen[f"fitted/{kind}/file/2"], np.zeros(4))  # the moving mean moved
    np.testing.assert_allclose(
        seen[f"fitted/{kind}/served"], seen[f"fitted/{kind}/predicted"], rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("kind", ["apart", "synchronized"])
def test_losses_that_layers_add_are_those_of_one_device(seen, kind):
    """Keras keeps them in one list for all replica threads, which take turns where statistics meet."""
    number = sum(name.startswith(f"added_losses/{kind}/one/") for name in seen)
    assert number > 10
    for index in range(number):
        one, two = (seen[f"added_losses/{kind}/{where}/{index}"] for where in ("one", "two"))
        np.testing.assert_allclose(two, one, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "collectives"),
    {
        "apart": 1,
        "synchronized": 2,  # one forward, one backward
        "renorm": 3,  # its corrections need the moments before the output
        "keras apart": 0,
        "keras synchronized": 5,
    }.items(),
)
def test_collectives_of_a_training_step_for_each_layer(seen, kind, collectives):
    assert seen[f"collectives/{kind}"] == 2 * collectives  # of two layers


@pytest.mark.parametrize("kind", ["inference", "frozen", "not trainable"])
def test_no_collective_where_nothing_is_learnt(seen, kind):
    assert seen[f"collectives/{kind}"] == 0


def test_second_derivatives_are_those_of_the_joined_batch(seen):
    layer = tfbn.BatchNormalization(dtype="float64")
    layer.build((None, 4))
    x = tf.constant(X[0, :8], tf.float64)
    with tf.GradientTape() as tape:
        tape.watch(x)
        penalty = replica_models.gradient_penalty(layer, x)
    expected = tape.gradient(penalty, [x, *[v.value for v in layer.trainable_variables]])
    for name, value in zip(("dx", "dgamma", "dbeta"), expected, strict=True):
        np.testing.assert_allclose(seen[f"second_order/{name}"], value, rtol=1e-9, err_msg=name)


def moved(*batches: list[np.ndarray]) -> BatchNorm:
    """The oracle after steps in which each replica had one of these batches."""
    oracle = BatchNorm((None, 4), momentum=0.9)
    for parts in batches:
        n = np.array([len(part) for part in parts])
        mean = sum(k * part.mean(0) for k, part in zip(n, parts, strict=True)) / n.sum()
        variance = sum(k * part.var(0) for k, part in zip(n, parts, strict=True)) / n.sum()
        oracle._move(np.full((1, 4), n.sum()), mean[None], variance[None])
    return oracle


def normalized(x: np.ndarray) -> np.ndarray:
    return (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-3)


SHARDS = [X[0, :3].astype("float64"), X[0, 3:8].astype("float64")]
JOINED = [np.concatenate(SHARDS)]


@pytest.mark.parametrize(
    ("name", "oracle"),
    {
        "apart-once": moved(SHARDS),
        "apart-twice": moved(SHARDS, [normalized(x) for x in SHARDS]),
        "apart-over-time": moved(SHARDS, [x + 1 for x in SHARDS]),
        "synchronized-once": moved(JOINED),
        "synchronized-twice": moved(JOINED, [normalized(x) for x in JOINED]),
        "synchronized-over-time": moved(JOINED, [x + 1 for x in JOINED]),
        "handed-on-together": moved(JOINED),
    }.items(),
)
def test_each_call_moves_the_statistics_of_all_replicas(seen, name, oracle):
    for replica in range(2):
        for weight in ("moving_mean", "moving_variance"):
            np.testing.assert_allclose(
                seen[f"called/{name}/{replica}/{weight}"], oracle.state[weight], rtol=1e-5
            )


def test_who_asks_for_moments_gets_those_of_each_replica(seen):
    for replica, shard in enumerate(SHARDS):
        actual = seen[f"called/handed-on/{replica}/moving_mean"]
        np.testing.assert_allclose(actual, moved([shard]).state["moving_mean"], rtol=1e-5)


@pytest.mark.parametrize("where", ["branch", "nested"])
def test_training_where_replicas_cannot_meet_is_refused_with_the_cure(seen, where):
    message = str(seen[f"refused/{where}"])
    assert "with the other replicas" in message
    assert "Received: a call in training mode in the graph" in message
    assert "decorate the function that calls strategy.run" in message
    np.testing.assert_array_equal(seen["refused/moving_mean"], np.zeros(4))


def test_a_converted_model_is_synchronized(seen):
    for replica in range(2):
        expected = 0.01 * JOINED[0].mean(0)
        np.testing.assert_allclose(seen[f"converted/{replica}/moving_mean"], expected, rtol=1e-5)


def test_a_fused_model_trains_on_two_devices_as_on_one(seen):
    number = sum(name.startswith("fused/one/") for name in seen)
    assert number == 12
    for index in range(number):
        one, first, second = (
            seen[f"fused/{key}"] for key in (f"one/{index}/0", f"two/{index}/0", f"two/{index}/1")
        )
        np.testing.assert_array_equal(first, second)
        np.testing.assert_allclose(first, one, rtol=1e-4, atol=1e-5)


def test_one_replica_is_the_unsynchronized_path_to_the_bit():
    strategy = tf.distribute.OneDeviceStrategy("CPU:0")
    with strategy.scope():
        layers = [tfbn.BatchNormalization(synchronized=flag) for flag in (False, True)]
        for layer in layers:
            layer.build((None, 4))
    seen = []
    for layer in layers:
        run = tf.function(lambda x, layer=layer: strategy.run(layer, (x,), {"training": True}))
        operations = run.get_concrete_function(tf.constant(X[0])).graph.get_operations()
        y = run(tf.constant(X[0]))
        seen.append(([op.type for op in operations], [y.numpy(), *layer.get_weights()]))
    (graph, values), (other_graph, other_values) = seen
    assert graph == other_graph
    for value, other in zip(values, other_values, strict=True):
        np.testing.assert_array_equal(value, other)
