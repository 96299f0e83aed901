"""Gradients of gradients, forward mode and gradients in inference mode are those of the formula."""

from __future__ import annotations

from collections.abc import Callable

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfbn
from cases import LAYOUTS, MODES, VARIANTS, Case
from layer_runs import array, assign, compiled, error
from oracle import align

# Each: what a gradient of a gradient has to pass through.
CASES = [
    Case(LAYOUTS[0]),
    Case(LAYOUTS[5]),
    Case(LAYOUTS[6]),
    Case(LAYOUTS[8]),
    Case(LAYOUTS[3], mask="elements"),
    Case(LAYOUTS[5], variant="virtual"),
    Case(LAYOUTS[5], variant="renorm"),
    Case(LAYOUTS[5], affine=(False, False)),
    Case(LAYOUTS[5], "float64"),
    Case(LAYOUTS[9], "float64", mask="steps"),
]
# Sums of products of some hundred float32 values; the reference is float64.
TOLERANCE = {"float32": 2e-5, "float64": 1e-10}


def formula(case: Case, x: tf.Tensor, gamma: tf.Tensor, beta: tf.Tensor) -> tf.Tensor:
    """Batch normalization by TensorFlow's own operations, differentiated by TensorFlow alone."""
    batch = case.batches()[0]
    start = {name: tf.constant(value) for name, value in case.weights().items()}
    axes = case.numerics["axis"]
    axes = [a % x.shape.rank for a in ([axes] if isinstance(axes, int) else axes)]
    channels = [x.shape[a] if a in axes else 1 for a in range(x.shape.rank)]
    over = [a for a in range(x.shape.rank) if a not in axes]
    size = case.numerics.get("virtual_batch_size", x.shape[0])
    mask = np.ones(x.shape) if batch.mask is None else align(batch.mask, batch.x).astype(float)
    outputs = []
    for group, m in zip(
        tf.split(x, x.shape[0] // size), tf.split(mask, x.shape[0] // size), strict=True
    ):
        n = tf.reduce_sum(m, over, keepdims=True)
        mean = tf.reduce_sum(group * m, over, keepdims=True) / n
        variance = tf.reduce_sum((group - mean) ** 2 * m, over, keepdims=True) / n
        stddev = tf.sqrt(variance + case.numerics["epsilon"])
        y = (group - mean) / stddev
        if case.variant == "renorm":
            running = tf.reshape(start["renorm_stddev"], channels)
            d = (mean - tf.reshape(start["renorm_mean"], channels)) / running
            y = y * tf.stop_gradient(stddev / running) + tf.stop_gradient(d)
        outputs.append(y * tf.reshape(gamma, channels) + tf.reshape(beta, channels))
    return tf.concat(outputs, 0)


def second_order(
    normalize: Callable[..., tf.Tensor], x: tf.Tensor, dy: tf.Tensor, sources: list[tf.Tensor]
) -> list[tf.Tensor]:
    """A gradient penalty, and its gradients: by x, the output's gradient, gamma and beta."""
    with tf.GradientTape() as outer:
        outer.watch([x, dy, *sources])
        with tf.GradientTape() as inner:
            inner.watch(x)
            y = normalize(x)
            score = tf.reduce_sum(tf.sin(y) * dy)
        slope = inner.gradient(score, x)
        penalty = tf.reduce_sum(slope**2 * tf.cos(x))
    gradients = outer.gradient(penalty, [x, dy, *sources], unconnected_gradients="zero")
    return [penalty, *gradients]


def without_mode(case: Case) -> str:
    return str(case).removesuffix("-eager")


def layer_for(case: Case) -> keras.layers.Layer:
    layer = tfbn.BatchNormalization(**case.arguments, dtype=case.dtype)
    layer.build(case.input_shape)
    assign(layer, case.weights())
    return layer


def reference(case: Case) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor, tf.Tensor]:
    """x, dy, gamma and beta as float64 tensors."""
    batch, start = case.batches()[0], case.weights()
    return tuple(map(tf.constant, (batch.x, batch.dy, start["gamma"], start["beta"])))


@pytest.mark.no_cover
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", CASES, ids=without_mode)
@pytest.mark.usefixtures("device")
def test_gradients_of_a_gradient_penalty_are_the_formulas(case, mode):
    x, dy, gamma, beta = reference(case)
    expected = second_order(lambda x: formula(case, x, gamma, beta), x, dy, [gamma, beta])
    layer = layer_for(case)
    mask = case.batches()[0].mask
    mask = None if mask is None else tf.constant(mask)

    def run(x, dy):
        sources = [v.value for v in layer.trainable_variables]
        return second_order(lambda x: layer(x, training=True, mask=mask), x, dy, sources)

    got = compiled(run, mode)(tf.cast(x, case.dtype), tf.cast(dy, case.dtype))
    names = ["penalty", "x", "dy", *[v.name for v in layer.trainable_variables]]
    by_name = dict(zip(["penalty", "x", "dy", "gamma", "beta"], expected, strict=True))
    errors = {
        name: error(array(value), array(by_name[name]))
        for name, value in zip(names, got, strict=True)
    }
    assert max(errors.values()) <= TOLERANCE[case.dtype], errors


@pytest.mark.parametrize("case", [c for c in CASES if c.dtype == "float64"], ids=without_mode)
def test_gradients_of_a_gradient_penalty_are_its_slopes(case):
    x, dy, *_ = reference(case)
    layer = layer_for(case)
    mask = case.batches()[0].mask

    def run(x):
        sources = [v.value for v in layer.trainable_variables]
        return second_order(lambda x: layer(x, training=True, mask=mask), x, dy, sources)

    along = np.random.default_rng(0).normal(size=x.shape)
    h = 1e-5
    slope = (run(x + h * along)[0] - run(x - h * along)[0]) / (2 * h)
    np.testing.assert_allclose(slope, tf.reduce_sum(run(x)[1] * along), rtol=1e-6)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("small", [True, False])
def test_gradient_of_a_gradient_through_nested_functions(training, small, monkeypatch):
    """As in one graph; around a nested function the inputs of the layer are in another."""
    monkeypatch.setattr("tfbn._normalize.dispatch.SMALL", 10**9 if small else 0)
    layer = tfbn.BatchNormalization()
    x = tf.random.normal((6, 3), seed=1)
    layer.build(x.shape)

    def slopes_of_slopes(nest):
        @nest
        def cubes(x):
            return tf.reduce_sum(layer(x * x, training=training) ** 3)

        @nest
        def slopes(x):
            with tf.GradientTape() as tape:
                tape.watch(x)
                y = cubes(x)
            return tape.gradient(y, x)

        with tf.GradientTape() as tape:
            tape.watch(x)
            y = tf.reduce_sum(slopes(x) ** 2)
        return tape.gradient(y, x)

    flat, nested = slopes_of_slopes(lambda f: f), slopes_of_slopes(tf.function)
    np.testing.assert_allclose(nested, flat, rtol=1e-4, atol=1e-4 * np.abs(flat).max())


@pytest.mark.parametrize("case", [CASES[0], CASES[1], CASES[4]], ids=without_mode)
def test_third_order(case):
    x, dy, gamma, beta = reference(case)

    def third(normalize, x):
        with tf.GradientTape() as outermost:
            outermost.watch(x)
            with tf.GradientTape() as outer:
                outer.watch(x)
                with tf.GradientTape() as inner:
                    inner.watch(x)
                    score = tf.reduce_sum(tf.sin(normalize(x)) * tf.cast(dy, x.dtype))
                first = tf.reduce_sum(inner.gradient(score, x) ** 2)
            second = tf.reduce_sum(outer.gradient(first, x) ** 2)
        return outermost.gradient(second, x)

    layer, mask = layer_for(case), case.batches()[0].mask
    got = third(lambda x: layer(x, training=True, mask=mask), tf.cast(x, case.dtype))
    expected = third(lambda x: formula(case, x, gamma, beta), x)
    assert error(array(got), array(expected)) <= 1e-4  # float32, through three derivatives


@pytest.mark.no_cover
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_gradient_penalty_trains(dtype, mode):
    # A critic whose slope is held at 1 (WGAN-GP), which needs the second order to go down.
    keras.utils.set_random_seed(1)
    model = keras.Sequential(
        [
            keras.Input((3,), dtype=dtype),
            keras.layers.Dense(8, dtype=dtype),
            tfbn.BatchNormalization(dtype=dtype),
            keras.layers.Activation("tanh", dtype=dtype),
            keras.layers.Dense(1, dtype=dtype),
        ]
    )
    optimizer = keras.optimizers.Adam(0.02)
    optimizer.build(model.trainable_variables)
    x = tf.constant(np.random.default_rng(0).normal(size=(16, 3)), dtype)

    def step(x):
        with tf.GradientTape() as outer:
            with tf.GradientTape() as inner:
                inner.watch(x)
                score = model(x, training=True)
            slopes = tf.norm(inner.gradient(score, x), axis=-1)
            penalty = tf.reduce_mean((slopes - 1.0) ** 2)
        weights = [v.value for v in model.trainable_variables]
        gradients = outer.gradient(penalty, weights, unconnected_gradients="zero")
        optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
        return penalty, gradients[0]

    run = compiled(step, mode)
    penalties = []
    for _ in range(30):
        penalty, kernel_gradient = run(x)
        assert np.all(np.isfinite(kernel_gradient))
        penalties.append(float(penalty))
    assert penalties[-1] < 0.3 * penalties[0], penalties


@pytest.mark.no_cover
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("mode", ["eager", "graph"])
@pytest.mark.parametrize(
    "case", [CASES[0], CASES[1], CASES[2], CASES[4], CASES[5]], ids=without_mode
)
def test_forward_mode_is_the_formulas(case, mode, training):
    x, direction, gamma, beta = reference(case)
    layer, start, mask = layer_for(case), case.weights(), case.batches()[0].mask

    def push(x, direction, normalize):
        with tf.autodiff.ForwardAccumulator(x, direction) as accumulator:
            y = normalize(x)
        return y, accumulator.jvp(y)

    def inference(x):
        channels = [-1 if a == case.layout[1] % x.shape.rank else 1 for a in range(x.shape.rank)]
        mean, variance, scale, shift = (
            tf.reshape(start[name], channels)
            for name in ("moving_mean", "moving_variance", "gamma", "beta")
        )
        return (x - mean) / tf.sqrt(variance + case.numerics["epsilon"]) * scale + shift

    expected = push(
        x, direction, (lambda x: formula(case, x, gamma, beta)) if training else inference
    )
    run = compiled(lambda x, d: push(x, d, lambda x: layer(x, training=training, mask=mask)), mode)
    got = run(tf.cast(x, case.dtype), tf.cast(direction, case.dtype))
    for ours, theirs in zip(got, expected, strict=True):
        assert error(array(ours), array(theirs)) <= 1e-5


@pytest.mark.parametrize("mode", ["eager", "graph"])
@pytest.mark.parametrize("training", [True, False])
def test_forward_over_reverse_is_reverse_over_reverse(mode, training):
    # The product of the Hessian with a vector, both ways.
    case = CASES[8]
    x, direction, *_ = reference(case)
    layer = layer_for(case)

    def score(x):
        return tf.reduce_sum(tf.sin(layer(x, training=training)))

    def forward_over_reverse(x):
        with tf.autodiff.ForwardAccumulator(x, direction) as accumulator:
            with tf.GradientTape() as tape:
                tape.watch(x)
                y = score(x)
            slope = tape.gradient(y, x)
        return accumulator.jvp(slope)

    def reverse_over_reverse(x):
        with tf.GradientTape() as outer:
            outer.watch(x)
            with tf.GradientTape() as inner:
                inner.watch(x)
                y = score(x)
            along = tf.reduce_sum(inner.gradient(y, x) * direction)
        return outer.gradient(along, x)

    got = compiled(forward_over_reverse, mode)(x)
    assert error(array(got), array(reverse_over_reverse(x))) <= 1e-10


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", [CASES[0], CASES[1], CASES[2], CASES[8]], ids=without_mode)
def test_gradients_in_inference_mode_are_the_formulas_to_the_second_order(case, mode):
    x, dy, gamma, beta = reference(case)
    layer, start = layer_for(case), case.weights()
    mean, variance = tf.constant(start["moving_mean"]), tf.constant(start["moving_variance"])
    channels = [-1 if a == case.layout[1] % x.shape.rank else 1 for a in range(x.shape.rank)]

    def fixed(x):
        m, v, scale, shift = (tf.reshape(t, channels) for t in (mean, variance, gamma, beta))
        return (x - m) / tf.sqrt(v + case.numerics["epsilon"]) * scale + shift

    def all_gradients(normalize, x, dy, sources):
        with tf.GradientTape() as tape:
            tape.watch([x, *sources])
            y = normalize(x)
        first = tape.gradient(y, [x, *sources], output_gradients=dy)
        # Of the gradients by the weights too, not of that by x alone.
        with tf.GradientTape() as outer:
            outer.watch([x, dy, *sources])
            with tf.GradientTape() as inner:
                inner.watch([x, *sources])
                y = normalize(x)
            gradients = inner.gradient(y, [x, *sources], output_gradients=dy)
            total = tf.add_n([tf.reduce_sum(tf.sin(g)) for g in gradients])
        return [*first, *outer.gradient(total, [x, dy, *sources], unconnected_gradients="zero")]

    def run(x, dy):
        sources = [layer.moving_mean, layer.moving_variance, layer.gamma, layer.beta]
        return all_gradients(lambda x: layer(x, training=False), x, dy, [v.value for v in sources])

    expected = all_gradients(fixed, x, dy, [mean, variance, gamma, beta])
    got = compiled(run, mode)(tf.cast(x, case.dtype), tf.cast(dy, case.dtype))
    for ours, theirs in zip(got, expected, strict=True):
        assert error(array(ours), array(theirs)) <= TOLERANCE[case.dtype]


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "virtual"])
def test_moving_statistics_take_no_gradient(variant):
    layer = layer_for(Case(LAYOUTS[0], variant=variant))
    x = tf.constant(Case(LAYOUTS[0]).batches()[0].x, "float32")
    with tf.GradientTape() as tape:
        tape.watch([w.value for w in layer.non_trainable_variables])
        y = layer(x, training=True)
    assert all(
        g is None for g in tape.gradient(y, [w.value for w in layer.non_trainable_variables])
    )
