"""Laws of batch normalization and of its moments, on inputs that hypothesis draws."""

from __future__ import annotations

import json
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from hypothesis import assume, given
from hypothesis import strategies as st

import tfbn
from tfbn._moments.moments import Moments, merge

# Numbers that the exponents of float64 hold with room, and arrays of any shape of rank 2 to 5.
seeds = st.integers(0, 2**32 - 1)
ranks = st.integers(2, 5)


@st.composite
def inputs(draw) -> tuple[np.ndarray, int]:
    """A float64 input of several examples and a channel axis of it."""
    rank = draw(ranks)
    shape = (draw(st.integers(2, 6)), *(draw(st.integers(1, 4)) for _ in range(rank - 1)))
    axis = draw(st.integers(1, rank - 1))
    x = np.random.default_rng(draw(seeds)).normal(size=shape)
    return x, draw(st.sampled_from([axis, axis - rank]))


def train(x: np.ndarray, axis: int, epsilon: float = 1e-3, mask: Any = None) -> np.ndarray:
    layer = tfbn.BatchNormalization(axis, epsilon=epsilon, dtype="float64")
    return layer(tf.constant(x), training=True, mask=mask).numpy()


@given(inputs(), st.floats(-1e3, 1e3), st.floats(1e-3, 1e3))
def test_shifting_and_scaling_the_input_changes_nothing(drawn, shift, scale):
    x, axis = drawn
    over = tuple(a for a in range(x.ndim) if a != axis % x.ndim)
    assume(x.std(over).min() > 1e-2)
    y = train(x, axis, epsilon=1e-30)
    np.testing.assert_allclose(train(x * scale + shift, axis, 1e-30), y, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(train(x * -scale, axis, 1e-30), -y, rtol=1e-6, atol=1e-6)


@given(inputs(), seeds)
def test_permuting_the_examples_permutes_the_output(drawn, seed):
    x, axis = drawn
    order = np.random.default_rng(seed).permutation(len(x))
    np.testing.assert_allclose(train(x[order], axis), train(x, axis)[order], atol=1e-12)


@given(inputs(), seeds)
def test_channels_know_nothing_of_each_other(drawn, seed):
    x, axis = drawn
    y = train(x, axis)
    rng = np.random.default_rng(seed)
    changed = np.moveaxis(x.copy(), axis, 0)
    one = rng.integers(len(changed))
    changed[one] = rng.normal(5.0, 10.0, changed[one].shape)
    after = np.moveaxis(train(np.moveaxis(changed, 0, axis), axis), axis, 0)
    others = [c for c in range(len(changed)) if c != one]
    np.testing.assert_allclose(after[others], np.moveaxis(y, axis, 0)[others], atol=1e-12)


@given(inputs())
def test_the_arrangement_of_the_other_axes_does_not_matter(drawn):
    x, axis = drawn
    flat = np.moveaxis(x, axis, -1).reshape(-1, x.shape[axis])
    y = np.moveaxis(train(x, axis), axis, -1).reshape(flat.shape)
    np.testing.assert_allclose(train(flat, -1), y, atol=1e-12)


@given(inputs())
def test_all_axes_but_the_batch_as_channels_are_one_channel_axis_unrolled(drawn):
    x, _ = drawn
    y = train(x, list(range(1, x.ndim)))
    np.testing.assert_allclose(y, train(x.reshape(len(x), -1), -1).reshape(x.shape), atol=1e-12)


@given(inputs(), seeds)
def test_masked_examples_might_as_well_be_absent(drawn, seed):
    x, axis = drawn
    mask = np.random.default_rng(seed).uniform(size=len(x)) < 0.5
    mask[0] = True
    np.testing.assert_allclose(
        train(x, axis, mask=tf.constant(mask))[mask], train(x[mask], axis), atol=1e-9
    )


@given(inputs())
def test_output_has_mean_beta_and_spread_gamma(drawn):
    x, axis = drawn
    over = tuple(a for a in range(x.ndim) if a != axis % x.ndim)
    assume(x.std(over).min() > 1e-2)
    y = train(x, axis, epsilon=1e-30)
    np.testing.assert_allclose(y.mean(over), 0, atol=1e-9)
    np.testing.assert_allclose(y.std(over), 1, rtol=1e-9)


# Moments


def moments(values: np.ndarray) -> Moments:
    """Count, mean and variance of each column; of no rows, what a division by zero leaves."""
    n = np.float64(len(values))
    with np.errstate(all="ignore"):
        mean = values.sum(0) / n if n else np.full(values.shape[1], np.nan)
        variance = ((values - mean) ** 2).sum(0) / n if n else mean
    return Moments(*map(tf.constant, (n, mean, variance)))


def assert_same(a: Moments, b: Moments) -> None:
    np.testing.assert_allclose(a.count, b.count, rtol=1e-12)
    np.testing.assert_allclose(a.mean, b.mean, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(a.variance, b.variance, rtol=1e-9, atol=1e-9)


@st.composite
def parts(draw) -> list[np.ndarray]:
    """The rows of one array cut into three parts, some perhaps empty but not all."""
    sizes = draw(st.tuples(*[st.integers(0, 20)] * 3).filter(any))
    rng = np.random.default_rng(draw(seeds))
    return [rng.normal(rng.normal(0.0, 10.0), rng.uniform(0.1, 5.0), (size, 3)) for size in sizes]


@given(parts())
def test_merged_moments_are_those_of_the_whole(drawn):
    a, b, c = map(moments, drawn)
    assert_same(merge(merge(a, b), c), moments(np.concatenate(drawn)))


@given(parts())
def test_merging_is_associative_and_commutative(drawn):
    a, b, c = map(moments, drawn)
    assert_same(merge(merge(a, b), c), merge(a, merge(b, c)))
    assume(float(a.count + b.count) > 0)
    assert_same(merge(a, b), merge(b, a))


@given(parts())
def test_an_empty_side_changes_nothing_to_the_bit(drawn):
    assume(len(drawn[0]))
    whole, empty = moments(drawn[0]), moments(drawn[0][:0])
    for merged in (merge(whole, empty), merge(empty, whole)):
        for got, expected in zip(merged, whole, strict=True):
            np.testing.assert_array_equal(got, expected)


@given(seeds, st.floats(1e3, 1e6))
def test_merging_far_from_zero_keeps_the_variance(seed, offset):
    # In float32, where E[x²] − E[x]² of these would be noise.
    rng = np.random.default_rng(seed)
    whole = (offset + rng.normal(size=(256, 3))).astype("float32")
    merged = moments(whole[:0].astype("float64"))
    merged = Moments(*(tf.cast(m, "float32") for m in merged))
    for part in np.split(whole, 8):
        exact = moments(part.astype("float64"))
        merged = merge(merged, Moments(*(tf.cast(m, "float32") for m in exact)))
    spread = np.spacing(np.float32(offset))  # what a mean in float32 cannot know
    np.testing.assert_allclose(
        merged.variance, whole.astype("float64").var(0), rtol=1e-5, atol=2 * spread
    )


@given(parts(), st.floats(0.0, 1.0))
def test_one_update_with_pooled_moments_is_one_update_with_the_whole_batch(drawn, momentum):
    layers = []
    for pooled in (True, False):
        layer = tfbn.BatchNormalization(momentum=momentum, dtype="float64")
        layer.build((None, 3))
        if pooled:
            a, b, c = map(moments, drawn)
            layer.update_statistics(merge(merge(a, b), c))
        else:
            layer(np.concatenate(drawn), training=True)
        layers.append(layer)
    for a, b in zip(layers[0].weights, layers[1].weights, strict=True):
        np.testing.assert_allclose(a.numpy(), b.numpy(), rtol=1e-9, atol=1e-9, err_msg=a.path)


# Configurations

probabilities = st.floats(0.0, 1.0)
initializers = st.sampled_from(
    ["zeros", "ones", keras.initializers.Constant(0.5), keras.initializers.RandomNormal(seed=1)]
)
regularizers = st.sampled_from([None, "l1", keras.regularizers.L1L2(0.1, 0.2)])
constraints = st.sampled_from([None, "non_neg", keras.constraints.MaxNorm(3.0)])


@st.composite
def arguments(draw) -> dict[str, Any]:
    renorm = draw(st.booleans())
    synchronized = draw(st.booleans())
    drawn: dict[str, Any] = {
        "axis": draw(
            st.integers(1, 4)
            | st.integers(-4, -1)
            | st.lists(st.integers(1, 4), min_size=1, max_size=3, unique=True)
        ),
        "momentum": draw(probabilities | st.none()),
        "epsilon": draw(st.floats(1e-12, 1.0)),
        "center": draw(st.booleans()),
        "scale": draw(st.booleans()),
        "renorm": renorm,
        "renorm_momentum": draw(probabilities),
        "synchronized": synchronized,
        "trainable": draw(st.booleans()),
        "dtype": draw(st.sampled_from(["float16", "float32", "float64", "mixed_bfloat16"])),
    }
    for name in ("beta", "gamma", "moving_mean", "moving_variance"):
        drawn[f"{name}_initializer"] = draw(initializers)
    for name in ("beta", "gamma"):
        drawn[f"{name}_regularizer"] = draw(regularizers)
        drawn[f"{name}_constraint"] = draw(constraints)
    if renorm:
        limits = {"rmin": st.floats(0.0, 1.0), "rmax": st.floats(1.0, 9.0), "dmax": st.floats(0, 9)}
        drawn["renorm_clipping"] = draw(st.none() | st.fixed_dictionaries({}, optional=limits))
    elif not synchronized:
        drawn["virtual_batch_size"] = draw(st.none() | st.integers(1, 64))
    return drawn


@given(arguments())
def test_config_survives_json(drawn):
    layer = tfbn.BatchNormalization(**drawn)
    again = tfbn.BatchNormalization.from_config(json.loads(json.dumps(layer.get_config())))
    assert again.get_config() == layer.get_config()
    config = layer.get_config()
    for name in ("momentum", "epsilon", "center", "scale", "renorm_momentum", "trainable"):
        assert config[name] == drawn[name]
