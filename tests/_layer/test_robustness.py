"""Nothing poisons the layer: empty, masked, non-finite, lone, constant, huge and tiny inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfbn
from cases import MODES
from layer_runs import compiled, weights

LAYOUTS = [((3,), -1), ((4, 3), -1), ((3, 4), 1), ((2, 4, 3), -1), ((3, 2, 4), 1)]
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "renorm": {"renorm": True},
    "cumulative": {"momentum": None},
}


def built(shape: tuple[int, ...], axis: int, **arguments) -> tfbn.BatchNormalization:
    """A layer with moving statistics that are not its first ones."""
    layer = tfbn.BatchNormalization(axis, **{"momentum": 0.5, **arguments})
    layer.build((None, *shape))
    dtype = layer.compute_dtype
    x = np.random.default_rng(5).normal(1.0, 2.0, (8, *shape))
    layer(tf.cast(x, dtype), training=True)
    return layer


def stepper(layer: keras.layers.Layer, mode: str, *specs: tf.TensorSpec) -> Callable[..., Any]:
    """Training forward and backward, compiled: returns y and the gradients of its sum of squares."""

    def step(x: tf.Tensor, mask: tf.Tensor | None = None) -> list[tf.Tensor]:
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x, training=True, mask=mask)
            loss = tf.reduce_sum(tf.square(y))
        sources = [x, *[v.value for v in layer.trainable_variables]]
        return [y, *tape.gradient(loss, sources)]

    return compiled(step, mode, specs or None)


def assert_unchanged(layer: keras.layers.Layer, before: dict[str, np.ndarray]) -> None:
    for name, value in weights(layer).items():
        np.testing.assert_array_equal(value, before[name], err_msg=name)


# Empty batches (keras#11858, tensorflow#34062, pytorch#36530)


@pytest.mark.parametrize("unknown_batch", [False, True])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("shape", "axis"), LAYOUTS, ids=str)
@pytest.mark.usefixtures("device")
def test_empty_batch_gives_an_empty_result_zero_gradients_and_moves_nothing(
    shape, axis, mode, unknown_batch
):
    if mode == "eager" and unknown_batch:
        pytest.skip("eager shapes are known")
    layer = built(shape, axis)
    before = weights(layer)
    spec = tf.TensorSpec((None if unknown_batch else 0, *shape))
    y, dx, *dweights = stepper(layer, mode, spec)(tf.zeros((0, *shape)))
    assert y.shape == dx.shape == (0, *shape)
    for gradient in dweights:
        np.testing.assert_array_equal(gradient, np.zeros(3))
    assert_unchanged(layer, before)
    assert layer(tf.zeros((0, *shape)), training=False).shape == (0, *shape)


@pytest.mark.parametrize("kind", [*KINDS, "virtual"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("mode", ["eager", "graph"])
@pytest.mark.usefixtures("device")
def test_empty_batch_of_every_kind_and_dtype(kind, dtype, mode):
    arguments = KINDS.get(kind, {"virtual_batch_size": 2})
    layer = built((4, 3), -1, dtype=dtype, **arguments)
    before = weights(layer)
    step = stepper(layer, mode, tf.TensorSpec((None, 4, 3), dtype))
    y, dx, *dweights = step(tf.zeros((0, 4, 3), dtype))
    assert y.shape == dx.shape == (0, 4, 3)
    for gradient in dweights:
        np.testing.assert_array_equal(gradient, np.zeros(3))
    assert_unchanged(layer, before)


@pytest.mark.parametrize("mode", ["eager", "graph"])
def test_no_positions_is_as_empty_as_no_examples(mode):
    layer = built((4, 3), -1)
    before = weights(layer)
    step = stepper(layer, mode, tf.TensorSpec((None, None, 3)))
    y, dx, *dweights = step(tf.zeros((5, 0, 3)))
    assert y.shape == dx.shape == (5, 0, 3)
    for gradient in dweights:
        np.testing.assert_array_equal(gradient, np.zeros(3))
    assert_unchanged(layer, before)


# Masks that leave nothing


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.usefixtures("device")
def test_fully_masked_batch_moves_nothing_and_stays_finite(kind, mode):
    layer = built((4, 3), -1, **KINDS[kind])
    before = weights(layer)
    specs = tf.TensorSpec((None, 4, 3)), tf.TensorSpec((None, 4), "bool")
    results = stepper(layer, mode, *specs)(tf.random.normal((5, 4, 3)), tf.zeros((5, 4), bool))
    for result in results:
        assert np.all(np.isfinite(result))
    assert_unchanged(layer, before)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.usefixtures("device")
def test_channel_without_an_unmasked_value_keeps_its_own_statistics(mode):
    layer = built((4, 3), -1, renorm=True)
    before = weights(layer)
    mask = np.ones((5, 4, 3), bool)
    mask[..., 1] = False
    specs = tf.TensorSpec((None, 4, 3)), tf.TensorSpec((None, 4, 3), "bool")
    x = tf.random.normal((5, 4, 3), 3.0, 2.0)
    results = stepper(layer, mode, *specs)(x, tf.constant(mask))
    for result in results:
        assert np.all(np.isfinite(result))
    for name, value in weights(layer).items():
        if name in ("gamma", "beta"):
            continue
        assert value[1] == before[name][1], name
        assert np.all(value[[0, 2]] != before[name][[0, 2]]), name


def test_what_is_masked_does_not_count_whatever_it_is():
    layer, other = built((4, 3), -1), built((4, 3), -1)
    x = np.random.default_rng(0).normal(size=(5, 4, 3)).astype("float32")
    mask = np.random.default_rng(1).uniform(size=(5, 4)) < 0.6
    wild = np.where(mask[..., None], x, np.float32(np.nan))
    y, expected = layer(wild, training=True, mask=mask), other(x, training=True, mask=mask)
    np.testing.assert_array_equal(y.numpy()[mask], expected.numpy()[mask])
    assert_unchanged(layer, weights(other))


# Values that are not finite


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", [*KINDS, "virtual"])
@pytest.mark.parametrize("mode", ["eager", "graph"])
@pytest.mark.usefixtures("device")
def test_non_finite_batch_shows_in_the_output_and_leaves_the_statistics(bad, kind, mode):
    layer = built((4, 3), -1, **KINDS.get(kind, {"virtual_batch_size": 2}))
    before = weights(layer)
    x = np.random.default_rng(0).normal(size=(6, 4, 3)).astype("float32")
    x[2, 1, 1] = bad
    y, *_ = stepper(layer, mode, tf.TensorSpec((None, 4, 3)))(tf.constant(x))
    assert np.isnan(y[2, 1, 1])  # a batch that went wrong is not hidden
    assert np.all(np.isfinite(y.numpy()[..., [0, 2]]))
    assert_unchanged(layer, before)


@pytest.mark.parametrize(("shape", "axis"), LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_non_finite_batch_in_every_layout(shape, axis, dtype):
    layer = built(shape, axis, dtype=dtype)
    before = weights(layer)
    x = np.random.default_rng(0).normal(size=(6, *shape)).astype(dtype)
    x[(2,) + (0,) * len(shape)] = np.nan
    for mode in ("eager", "xla"):
        y, *_ = stepper(layer, mode)(tf.constant(x))
        assert np.any(np.isnan(y))
        assert_unchanged(layer, before)


def test_training_goes_on_after_a_non_finite_batch():
    layer = built((3,), -1)
    x = tf.random.normal((8, 3))
    layer(x * np.nan, training=True)
    np.testing.assert_allclose(
        layer(x, training=True), built((3,), -1)(x, training=True), rtol=1e-6
    )
    assert np.all(np.isfinite(layer(x)))


# One value


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("shape", "axis"), LAYOUTS, ids=str)
@pytest.mark.usefixtures("device")
def test_one_example_alone_is_as_in_keras_and_never_nan(shape, axis, mode):
    ours = tfbn.BatchNormalization(axis, momentum=0.5)
    stock = keras.layers.BatchNormalization(axis, momentum=0.5)
    x = tf.constant(np.random.default_rng(0).normal(2.0, 3.0, (1, *shape)), "float32")
    results = []
    for layer, how in ((ours, mode), (stock, "eager")):
        layer.build((None, *shape))
        layer.beta.assign([1.0, 2.0, 3.0])
        results.append([*stepper(layer, how)(x), *[w.value for w in layer.weights]])
    for got, expected in zip(*results, strict=True):
        assert np.all(np.isfinite(got))
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("device")
def test_one_value_per_channel_gives_beta_and_variance_zero(dtype, kind):
    # TensorFlow's fused kernel divides by N - 1 here (tensorflow#48845).
    layer = tfbn.BatchNormalization(dtype=dtype, **{"momentum": 0.0, **KINDS[kind]})
    layer.build((None, 3))
    layer.beta.assign([1.0, 2.0, 3.0])
    y, dx, dgamma, _ = stepper(layer, "eager")(tf.constant([[5.0, -6.0, 7.0]], dtype))
    assert np.all(np.isfinite(y))
    np.testing.assert_array_equal(dx, np.zeros((1, 3)))
    if kind != "renorm":  # which brings the output back to that of the moving statistics
        np.testing.assert_array_equal(y, [[1.0, 2.0, 3.0]])
        np.testing.assert_array_equal(dgamma, np.zeros(3))
    np.testing.assert_allclose(weights(layer)["moving_mean"], [5.0, -6.0, 7.0])
    np.testing.assert_allclose(weights(layer)["moving_variance"], np.zeros(3), atol=1e-7)


def test_constant_channel_gives_beta_and_no_gradient_to_its_input():
    layer = tfbn.BatchNormalization(momentum=0.0)
    layer.build((None, 4, 2))
    layer.beta.assign([1.0, 2.0])
    x = np.random.default_rng(0).normal(size=(8, 4, 2)).astype("float32")
    x[..., 0] = 1234.5678
    y, dx, *_ = stepper(layer, "eager")(tf.constant(x))
    np.testing.assert_allclose(y.numpy()[..., 0], 1.0, rtol=1e-5)
    assert np.all(np.isfinite(dx))
    assert weights(layer)["moving_variance"][0] < 1e-6
    assert np.all(weights(layer)["moving_variance"] >= 0)


# The ends of the range


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("shape", "axis"), [LAYOUTS[1], LAYOUTS[2]], ids=str)
@pytest.mark.usefixtures("device")
def test_float16_near_its_maximum_does_not_overflow_in_the_statistics(shape, axis, mode):
    layer = tfbn.BatchNormalization(axis, momentum=0.0, dtype="float16")
    layer.build((None, *shape))
    rng = np.random.default_rng(0)
    x = (rng.choice([-1.0, 1.0], (64, *shape)) * rng.uniform(5e4, 6.5e4, (64, *shape))).astype(
        "float16"
    )
    y, *_ = stepper(layer, mode)(tf.constant(x))
    over = tuple(a for a in range(x.ndim) if a != axis % x.ndim)
    exact = x.astype("float64")
    np.testing.assert_allclose(weights(layer)["moving_mean"], exact.mean(over), rtol=1e-3, atol=5)
    np.testing.assert_allclose(weights(layer)["moving_variance"], exact.var(over), rtol=1e-5)
    centred = exact - exact.mean(over, keepdims=True)
    expected = centred / exact.std(over, keepdims=True)
    np.testing.assert_allclose(y, expected, rtol=2**-10)


@pytest.mark.parametrize("mode", ["eager", "graph"])
@pytest.mark.parametrize(("shape", "axis"), LAYOUTS[:3], ids=str)
def test_huge_values_whose_squares_still_fit(shape, axis, mode):
    layer = tfbn.BatchNormalization(axis, momentum=0.0)
    layer.build((None, *shape))
    x = np.random.default_rng(0).normal(size=(64, *shape)) * 1e17
    y, *gradients = stepper(layer, mode)(tf.constant(x, "float32"))
    over = tuple(a for a in range(x.ndim) if a != axis % x.ndim)
    expected = (x - x.mean(over, keepdims=True)) / x.std(over, keepdims=True)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(weights(layer)["moving_variance"], x.var(over), rtol=1e-5)
    assert all(np.all(np.isfinite(g)) for g in gradients)


@pytest.mark.parametrize("mode", MODES)
def test_values_whose_squares_overflow_do_not_poison_the_statistics(mode):
    layer = built((3,), -1)
    before = weights(layer)
    stepper(layer, mode)(tf.random.normal((8, 3)) * 1e30)
    assert_unchanged(layer, before)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_denormal_values_give_beta(dtype, mode):
    layer = tfbn.BatchNormalization(momentum=0.0, dtype=dtype)
    layer.build((None, 3))
    tiny = {"float16": 6e-8, "bfloat16": 1e-40, "float32": 1e-44, "float64": 5e-324}[dtype]
    x = tf.constant(np.random.default_rng(0).integers(-3, 4, (8, 3)) * tiny, dtype)
    results = stepper(layer, mode)(x)
    assert all(np.all(np.isfinite(r)) for r in results)
    np.testing.assert_allclose(tf.cast(results[0], "float64"), np.zeros((8, 3)), atol=1e-4)
    assert np.all(weights(layer)["moving_variance"] >= 0)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("shape", "axis"), LAYOUTS[1:3], ids=str)
@pytest.mark.usefixtures("device")
def test_variance_is_never_negative_and_right_far_from_zero(shape, axis, mode):
    # E[x²] − E[x]² gives anything here; a negative variance became NaN under XLA.
    layer = tfbn.BatchNormalization(axis, momentum=0.0)
    layer.build((None, *shape))
    x = (1e6 + np.random.default_rng(0).normal(size=(64, *shape))).astype("float32")
    stepper(layer, mode)(tf.constant(x))
    over = tuple(a for a in range(x.ndim) if a != axis % x.ndim)
    expected = x.astype("float64").var(over)
    np.testing.assert_allclose(weights(layer)["moving_variance"], expected, rtol=1e-4)


@pytest.mark.parametrize("mode", ["graph", "xla"])
@pytest.mark.parametrize("place", [0, 100_000, -1])
def test_one_outlier_costs_the_other_values_no_digits(mode, place):
    """Statistics are taken around a value of the channel: not around one that is far from all others."""
    x = np.random.default_rng(0).normal(size=(200_000, 2)).astype("float32")
    x[place] = 1e6
    wide = x.astype("float64")
    normalized = (wide - wide.mean(0)) / np.sqrt(wide.var(0) + 1e-3)
    for axis, values in ((-1, x), (1, x.T[np.newaxis].repeat(2, 0))):
        layer = tfbn.BatchNormalization(axis=axis)
        layer.build(values.shape)
        run = tf.function(lambda x, layer=layer: layer(x, training=True), jit_compile=mode == "xla")
        y = run(tf.constant(values)).numpy()
        y = y if axis == -1 else y[0].T
        others = np.delete(y, place, 0)
        spread = np.delete(normalized, place, 0).std()
        assert np.abs(others - np.delete(normalized, place, 0)).max() < 0.01 * spread


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("momentum", [0.0, None])
def test_statistics_that_are_not_finite_heal_where_the_batch_has_all_the_weight(momentum, mode):
    layer = tfbn.BatchNormalization(momentum=momentum)
    layer.build((None, 3))
    for weight in (layer.moving_mean, layer.moving_variance):
        weight.assign(np.full(3, np.nan))
    x = np.random.default_rng(0).normal(3, 2, (8, 3)).astype("float32")
    stepper(layer, mode)(tf.constant(x))
    np.testing.assert_allclose(weights(layer)["moving_mean"], x.mean(0), rtol=1e-5)
    np.testing.assert_allclose(weights(layer)["moving_variance"], x.var(0), rtol=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_the_cumulative_average_is_the_plain_mean_of_the_batches_that_had_values_of_a_channel(mode):
    layer = tfbn.BatchNormalization(momentum=None, virtual_batch_size=None)
    layer.build((None, 2))
    run = compiled(lambda x, mask: layer(x, training=True, mask=mask), mode)
    x = np.random.default_rng(0).normal(3, 2, (3, 8, 2)).astype("float32")
    mask = np.ones(x.shape, bool)
    mask[0, :, 1] = False  # The first batch has no values of the second channel.
    for batch in zip(x, mask, strict=True):
        run(*map(tf.constant, batch))
    means = x.mean(1)
    expected = [means[:, 0].mean(), means[1:, 1].mean()]
    np.testing.assert_allclose(weights(layer)["moving_mean"], expected, rtol=1e-5)
    np.testing.assert_array_equal(weights(layer)["update_count"], [3, 2])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("mode", ["graph", "xla"])
def test_virtual_batches_of_unknown_number_train_or_infer_by_a_tensor(mode, training):
    layer = tfbn.BatchNormalization(virtual_batch_size=2, momentum=0.5)
    layer.build((None, 3))
    x = np.random.default_rng(0).normal(3, 2, (4, 3)).astype("float32")

    def step(x, training):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x, training=training)
        return y, tape.gradient(y, [x, layer.gamma.value])

    signature = [tf.TensorSpec([None, 3]), tf.TensorSpec([], tf.bool)]
    y, (dx, _) = compiled(step, mode, signature)(tf.constant(x), tf.constant(training))
    groups = x.reshape(2, 2, 3)
    by_groups = (groups - groups.mean(1, keepdims=True)) / np.sqrt(
        groups.var(1, keepdims=True) + 1e-3
    )
    expected = by_groups.reshape(4, 3) if training else x / np.sqrt(1 + 1e-3)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(dx, np.full(x.shape, 0 if training else 1), atol=1e-3)
    moved = 0.5 * groups.mean((0, 1)) if training else np.zeros(3)
    np.testing.assert_allclose(weights(layer)["moving_mean"], moved, rtol=1e-5)
