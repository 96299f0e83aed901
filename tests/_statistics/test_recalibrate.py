"""Recalibrated statistics are those of one training step on all data at once, however it is cut."""

import contextlib
import weakref

import hypothesis
import hypothesis.strategies as st
import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import tfbn
from replica_recalibration import graphs

BOTH = {"stock": layers.BatchNormalization, "ours": tfbn.BatchNormalization}
IMAGES = np.random.default_rng(0).normal(5.0, 3.0, (134, 6, 6, 3)).astype("float32")


def network(norm, twins: bool = False) -> keras.Model:
    """Convolutions, residual additions, dropout, 20 normalizations, one of them called twice.

    With `twins`, there is a layer of its own for the second call, and no dropout.
    """
    names = iter(range(100))

    def block(a, width, kernel=3, activate=True):
        number = next(names)
        z = layers.Conv2D(width, kernel, padding="same", name=f"conv{number}")(a)
        z = norm(name=f"bn{number}")(z)
        return layers.ReLU()(z) if activate else z

    image = keras.Input((6, 6, 3))
    shared = norm(name="shared")
    a = layers.ReLU()(shared(layers.Conv2D(8, 3, padding="same", name="stem")(image)))
    for _ in range(3):
        branches = [block(a, 8, kernel, activate=False) for kernel in (1, 3)]
        branches.append(block(block(a, 4, 1), 8, activate=False))
        branches.append(block(layers.MaxPool2D(3, 1, "same")(a), 8, 1, activate=False))
        branches.append(block(a, 8, 3, activate=False))
        a = layers.ReLU()(layers.Add()([a, *branches]))
        a = layers.Dropout(0.0 if twins else 0.4)(a)
    again = norm(name="twin") if twins else shared
    a = again(layers.Conv2D(8, 1, name="last")(a))
    a = norm(name="top")(layers.GlobalMaxPool2D()(a))
    return keras.Model(image, layers.Dense(2, name="head")(a))


def randomize(model: keras.Model) -> None:
    """Trained-looking weights, by name; statistics that fit nothing."""
    for layer in model.layers:
        for weight in layer.weights:
            name = layer.name.replace("twin", "shared") + weight.name
            rng = np.random.default_rng(sum(map(ord, name)))
            spread = {"gamma": 0.2, "beta": 0.5, "kernel": 0.3}.get(weight.name, 0.0)
            centre = {"gamma": 1.0, "moving_variance": 7.0}.get(weight.name, 0.0)
            weight.assign(centre + spread * rng.normal(size=weight.shape))


def statistics(model: keras.Model) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    return {
        layer.name: tuple(
            np.asarray(w, np.float64) for w in (layer.moving_mean, layer.moving_variance)
        )
        for layer in model.layers
        if isinstance(layer, tuple(BOTH.values()))
    }


def one_training_step(images: np.ndarray) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The oracle: Keras's own layer in float64 forgets all but this batch (momentum 0)."""
    policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy("float64")
    try:
        model = network(lambda name: layers.BatchNormalization(momentum=0.0, name=name), twins=True)
    finally:
        keras.config.set_dtype_policy(policy)
    randomize(model)
    model(images.astype("float64"), training=True)
    found = statistics(model)
    # Two calls of one layer: the mean of the means, and the variance around it.
    (mean_a, variance_a), (mean_b, variance_b) = found["shared"], found.pop("twin")
    between = ((mean_a - mean_b) / 2) ** 2
    found["shared"] = (mean_a + mean_b) / 2, (variance_a + variance_b) / 2 + between
    return found


@pytest.fixture(scope="module")
def truth():
    return one_training_step(IMAGES)


def assert_statistics(model, truth, tolerance=1e-5):
    found = statistics(model)
    assert found.keys() == truth.keys()
    for name, (mean, variance) in truth.items():
        scale = np.max(np.abs(mean) + np.sqrt(variance))
        assert np.max(np.abs(found[name][0] - mean)) < tolerance * scale, name
        np.testing.assert_allclose(found[name][1], variance, rtol=tolerance, err_msg=name)


def batches(sizes: list[int], images: np.ndarray = IMAGES):
    """A function that makes a generator."""
    ends = np.cumsum(sizes)
    assert ends[-1] == len(images)
    return lambda: (images[end - size : end] for size, end in zip(sizes, ends, strict=True))


CUTS = {
    "one by one": [1] * 134,
    "64": [64, 64, 6],
    "unequal": [3, 50, 1, 64, 16],
}


@pytest.mark.no_cover
@pytest.mark.parametrize(
    ("kind", "cut", "cache"),
    [
        ("stock", "one by one", "auto"),
        ("stock", "64", "disk"),
        ("ours", "unequal", "memory"),
        ("ours", "64", "none"),
    ],
)
def test_population_statistics_are_those_of_one_training_step_on_everything(
    kind, cut, cache, truth
):
    model = network(BOTH[kind])
    randomize(model)
    assert len(truth) == 20
    weights = {w.path: w.numpy() for w in model.weights if "moving" not in w.name}
    result = tfbn.recalibrate(model, batches(CUTS[cut]), cache=cache)
    assert_statistics(model, truth, tolerance=5e-6)
    assert (result.batches, result.examples) == (len(CUTS[cut]), 134)
    # The stem, the three blocks with two layers one after the other in each, the last two.
    assert result.levels == 1 + 3 * 2 + 2
    assert result.passes == (result.levels if cache == "none" else 1)
    for weight in model.weights:
        if "moving" not in weight.name:
            np.testing.assert_array_equal(weight.numpy(), weights[weight.path])


def chain(norm=tfbn.BatchNormalization) -> keras.Model:
    """Two normalizations, one after the other."""
    return keras.Sequential(
        [
            keras.Input((2,)),
            norm(name="first"),
            layers.Dense(3, activation="relu", kernel_initializer="ones", name="between"),
            norm(name="second"),
        ]
    )


@pytest.mark.no_cover
@hypothesis.settings(max_examples=12)
@hypothesis.given(
    sizes=st.lists(st.integers(1, 20), min_size=2, max_size=8).filter(lambda s: sum(s) > 4),
    offset=st.floats(-1e6, 1e6),
    spread=st.floats(0.1, 100.0),
)
@hypothesis.example(sizes=[1, 30, 2], offset=1e6, spread=1.0)
def test_how_the_data_is_cut_never_matters(sizes, offset, spread):
    rng = np.random.default_rng(sum(sizes))
    x = (offset + spread * rng.normal(size=(sum(sizes), 2))).astype("float32")
    model = chain()
    tfbn.recalibrate(model, batches(sizes, x))
    cut = statistics(model)
    tfbn.recalibrate(model, batches([len(x)], x))
    whole = statistics(model)
    for name in ("first", "second"):
        np.testing.assert_allclose(cut[name][0], whole[name][0], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(cut[name][1], whole[name][1], rtol=1e-4, atol=1e-6)
    exact = x.astype("float64")
    np.testing.assert_allclose(cut["first"][0], exact.mean(0), rtol=1e-6, atol=1e-5 * spread)
    np.testing.assert_allclose(cut["first"][1], exact.var(0), rtol=1e-4)


# One pass over batches


def by_batch(parts: list[np.ndarray], kernel: np.ndarray) -> dict[str, tuple[np.ndarray, ...]]:
    """What the layers of `chain` see when each batch is normalized by itself, pooled over all."""
    parts = [part.astype("float64") for part in parts]
    inside = [(p - p.mean(0)) / np.sqrt(p.var(0) + 1e-3) @ kernel for p in parts]
    seen = {"first": np.concatenate(parts), "second": np.maximum(np.concatenate(inside), 0)}
    return {name: (x.mean(0), x.var(0)) for name, x in seen.items()}


@pytest.mark.parametrize("kind", BOTH)
def test_batch_statistics_pool_unequal_batches_exactly_and_update_bn_does_not(kind):
    rng = np.random.default_rng(1)
    parts = [
        rng.normal(m, s, (n, 2)).astype("float32")
        for m, s, n in [(0, 1, 50), (4, 3, 9), (-9, 1, 3)]
    ]
    model = chain(BOTH[kind])
    kernel = np.array([[1.0, -2.0, 0.5], [0.3, 1.0, -1.0]])
    model.get_layer("between").kernel.assign(kernel)
    result = tfbn.recalibrate(model, lambda: iter(parts), upstream="batch")
    assert result.passes == 1
    expected = by_batch(parts, kernel)
    for name, (mean, variance) in statistics(model).items():
        np.testing.assert_allclose(mean, expected[name][0], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(variance, expected[name][1], rtol=1e-5)

    torch = pytest.importorskip("torch")
    norm = torch.nn.BatchNorm1d(2, eps=1e-3)
    torch.optim.swa_utils.update_bn([torch.tensor(part) for part in parts], norm)
    mean, variance = expected["first"]
    # It averages the batches with equal weights, and their (unbiased) variances without their means.
    np.testing.assert_allclose(norm.running_mean, np.mean([p.mean(0) for p in parts], 0), rtol=1e-4)
    assert np.all(np.abs(norm.running_mean.numpy() - mean) > 0.5)
    assert np.all(norm.running_var.numpy() < 0.8 * variance)


# Few examples: the present statistics as a prior


def test_a_prior_averages_the_present_statistics_with_those_of_the_data():
    few, prior = X[:8].astype("float64"), 24
    model = chain()
    old = {
        "first": (np.array([1.0, 2.0]), np.array([3.0, 0.5])),
        "second": (np.ones(3), 2 * np.ones(3)),
    }
    for name, (mean, variance) in old.items():
        model.get_layer(name).moving_mean.assign(mean)
        model.get_layer(name).moving_variance.assign(variance)
    tfbn.recalibrate(model, X[:8], batch_size=3, prior=prior)

    def mixed(name, seen):
        return tuple(
            (prior * before + len(few) * now) / (prior + len(few))
            for before, now in zip(old[name], (seen.mean(0), seen.var(0)), strict=True)
        )

    mean, variance = mixed("first", few)
    # The second layer sees what the first one gives with the statistics that it has from now on.
    inside = np.maximum((few - mean) / np.sqrt(variance + 1e-3) @ np.ones((2, 3)), 0)
    assert_statistics(model, {"first": (mean, variance), "second": mixed("second", inside)})


def test_without_a_prior_statistics_that_are_not_finite_do_not_matter():
    model = chain()
    model.get_layer("first").moving_mean.assign([np.nan, np.inf])
    with pytest.raises(ValueError, match=r"NaN or infinite.*`prior`.*prior=3, layer '[^']*first'"):
        tfbn.recalibrate(model, X, prior=3)
    tfbn.recalibrate(model, X)
    np.testing.assert_allclose(statistics(model)["first"][0], X.mean(0), rtol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"prior": -1}, "`prior` must be an integer of at least 0. Received: prior=-1"),
        ({"prior": 3, "upstream": "batch"}, '`prior` requires upstream="population".*prior=3'),
    ],
    ids=str,
)
def test_a_prior_out_of_range(arguments, text):
    with pytest.raises(ValueError, match=text):
        tfbn.recalibrate(chain(), X, **arguments)


# Layers of every kind


def test_a_mask_leaves_values_out():
    inputs = keras.Input((4, 2))
    masked = layers.Masking()(inputs)
    model = keras.Model(inputs, tfbn.BatchNormalization(name="bn")(masked))
    x = np.random.default_rng(0).normal(3, 1, (9, 4, 2)).astype("float32")
    x[2:5, 1:] = 0.0
    kept = x[(x != 0).any(-1)].astype("float64")
    assert tfbn.recalibrate(model, x, batch_size=2).layers[0].values == len(kept) == 27
    assert_statistics(model, {"bn": (kept.mean(0), kept.var(0))})


def test_a_channel_that_a_mask_hides_everywhere_keeps_its_statistics():
    layer = tfbn.BatchNormalization()
    x = np.ones((4, 2), "float32") * [[3.0, 5.0]]
    layer.build(x.shape)
    layer.moving_mean.assign([7.0, 7.0])
    mask = np.array([[True, False]] * 4)
    tfbn.recalibrate(layer, (x, mask), forward=lambda layer, batch: layer(batch[0], mask=batch[1]))
    np.testing.assert_array_equal(layer.moving_mean, [3.0, 7.0])
    np.testing.assert_array_equal(layer.moving_variance, [0.0, 1.0])
    hidden = tfbn.recalibrate(
        layer, (x, ~mask & mask), forward=lambda layer, batch: layer(batch[0], mask=batch[1])
    )
    assert hidden.layers[0].outcome == "masked"
    np.testing.assert_array_equal(layer.moving_mean, [3.0, 7.0])


X = np.random.default_rng(3).normal(4.0, 2.0, (24, 2)).astype("float32")


def alone(**arguments) -> keras.Model:
    return keras.Sequential([keras.Input((2,)), tfbn.BatchNormalization(name="bn", **arguments)])


@pytest.mark.parametrize("upstream", ["population", "batch"])
@pytest.mark.parametrize(
    "arguments", [{}, {"virtual_batch_size": 4}, {"synchronized": True}, {"momentum": 1.0}], ids=str
)
def test_neither_momentum_nor_virtual_batches_nor_synchronization_change_the_statistics(
    arguments, upstream
):
    model = alone(**arguments)
    tfbn.recalibrate(model, X, batch_size=5, upstream=upstream)
    assert_statistics(model, {"bn": (X.mean(0), X.var(0))})


@pytest.mark.parametrize("kind", BOTH)
def test_after_it_both_corrections_of_renorm_are_the_identity(kind):
    layer = BOTH[kind](renorm=True)
    tfbn.recalibrate(layer, X, batch_size=5)
    expected = (X - X.mean(0)) / np.sqrt(X.var(0) + layer.epsilon)
    np.testing.assert_allclose(layer(X, training=False), expected, rtol=1e-4, atol=1e-5)
    before = [w.numpy() for w in layer.weights]
    np.testing.assert_allclose(layer(X, training=True), expected, rtol=1e-4, atol=1e-5)
    # All five statistics are those of X: a step towards those of X does not move them.
    for weight, value in zip(layer.weights, before, strict=True):
        np.testing.assert_allclose(weight.numpy(), value, rtol=1e-4, err_msg=weight.name)


def test_a_cumulative_average_goes_on_from_the_batches_of_the_pass():
    model = alone(momentum=None)
    model(X + 100, training=True)
    tfbn.recalibrate(model, X, batch_size=8)
    layer = model.layers[0]
    np.testing.assert_array_equal(layer.update_count, [3, 3])
    model(X + 4, training=True)
    np.testing.assert_allclose(layer.moving_mean, X.mean(0) + 1, rtol=1e-5)


@pytest.mark.parametrize("kind", BOTH)
def test_frozen_layers_are_left_alone_unless_asked_for(kind):
    model = chain(BOTH[kind])
    tfbn.freeze(model, within=model.get_layer("first"))
    frozen = statistics(model)["first"]
    result = tfbn.recalibrate(model, X)
    assert [layer.outcome for layer in result.layers] == ["frozen", "recalibrated"]
    assert result.levels == 1
    np.testing.assert_array_equal(statistics(model)["first"], frozen)
    # What feeds on it sees what it gives: with mean 0 and variance 1, its input.
    seen = np.maximum(X.astype("float64") / np.sqrt(1.001) @ np.ones((2, 3)), 0)
    assert_statistics(model, {"first": frozen, "second": (seen.mean(0), seen.var(0))})
    result = tfbn.recalibrate(model, X, include_frozen=True)
    assert [layer.outcome for layer in result.layers] == ["recalibrated"] * 2
    np.testing.assert_allclose(statistics(model)["first"][0], X.mean(0), rtol=1e-5)


@pytest.mark.parametrize("dtype", ["float64", "mixed_float16", "mixed_bfloat16"])
@pytest.mark.parametrize("kind", BOTH)
def test_every_precision(kind, dtype):
    policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy(dtype)
    try:
        model = chain(BOTH[kind])
    finally:
        keras.config.set_dtype_policy(policy)
    tfbn.recalibrate(model, X, batch_size=7)
    rounded = tf.cast(X, model.compute_dtype).numpy().astype("float64")
    mean, variance = statistics(model)["first"]
    np.testing.assert_allclose(mean, rounded.mean(0), rtol=1e-5)
    np.testing.assert_allclose(variance, rounded.var(0), rtol=1e-5)
    inside = (rounded - mean) / np.sqrt(variance + 1e-3) @ np.ones((2, 3))
    tolerance = {"float64": 1e-5, "mixed_float16": 5e-3, "mixed_bfloat16": 3e-2}[dtype]
    mean, variance = statistics(model)["second"]
    np.testing.assert_allclose(mean, np.maximum(inside, 0).mean(0), rtol=tolerance)
    np.testing.assert_allclose(variance, np.maximum(inside, 0).var(0), rtol=tolerance)


def test_channels_on_any_axes():
    x = np.random.default_rng(0).normal(size=(10, 3, 4, 2)).astype("float32")
    for norm, axis in [(layers.BatchNormalization, 1), (tfbn.BatchNormalization, [-1, 1])]:
        layer = norm(axis=axis)
        tfbn.recalibrate(layer, x, batch_size=3)
        reduced = (0, 2, 3) if axis == 1 else (0, 2)
        np.testing.assert_allclose(layer.moving_mean, x.mean(reduced), rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(layer.moving_variance, x.var(reduced), rtol=1e-5)


# Models of every kind


class Subclassed(keras.Model):
    """Two layers, of which each call order is chosen in Python; one is never called."""

    def __init__(self):
        super().__init__()
        self.blocks = [chain(), tfbn.BatchNormalization(name="idle"), layers.Dropout(0.9)]
        self.last = {"bn": layers.BatchNormalization(name="last")}
        self.seen = []

    def call(self, x, training=None):
        self.seen.append(training)
        return self.last["bn"](self.blocks[2](self.blocks[0](x)))


# Keras's own warning about the layer that is never called.
@pytest.mark.filterwarnings("ignore:`build\\(\\)` was called:UserWarning")
def test_a_subclassed_model_is_built_and_served():
    model = Subclassed()
    result = tfbn.recalibrate(model, X, batch_size=5)
    assert result.levels == 3
    outcomes = {layer.layer.split("/")[-1]: layer.outcome for layer in result.layers}
    assert outcomes.pop("idle") == "not called"
    assert outcomes == dict.fromkeys(("first", "second", "last"), "recalibrated")
    assert set(model.seen) == {False}
    y = model(X, training=False).numpy()
    np.testing.assert_allclose(y.mean(0), 0.0, atol=1e-5)


def test_each_step_of_time_distributed_is_a_call_of_its_own():
    model = keras.Sequential(
        [keras.Input((3, 2)), layers.TimeDistributed(tfbn.BatchNormalization(name="bn"))]
    )
    x = np.random.default_rng(0).normal([[0], [5], [9]], 1.0, (10, 3, 2)).astype("float32")
    result = tfbn.recalibrate(model, x, batch_size=4)
    assert (result.passes, result.layers[0].calls, result.layers[0].values) == (1, 3, 30)
    layer = model.layers[0].layer
    np.testing.assert_allclose(layer.moving_mean, x.mean((0, 1)), rtol=1e-5)
    np.testing.assert_allclose(layer.moving_variance, x.var((0, 1)), rtol=1e-5)


def test_a_tf_function_inside_the_model_is_seen_through_and_not_touched():
    class Inside(keras.Model):
        def __init__(self):
            super().__init__()
            self.bn = tfbn.BatchNormalization()
            self.bn.build((None, 2))  # Keras keeps the initial values of what is built in a trace
            self.traced = 0

        @tf.function
        def call(self, x, training=False):
            self.traced += 1
            return self.bn(x, training=training)

    model = Inside()
    model(X)  # traced before: what it was traced with knows nothing of a recalibration
    before = model.traced
    tfbn.recalibrate(model, X, batch_size=7)
    np.testing.assert_allclose(model.bn.moving_mean, X.mean(0), rtol=1e-5)
    y = model(X)
    np.testing.assert_allclose(np.mean(y, 0), 0.0, atol=1e-5)
    model.bn.moving_mean.assign([0.0, 0.0])
    np.testing.assert_allclose(
        model(X), np.asarray(y) + X.mean(0) / np.sqrt(X.var(0) + 1e-3), rtol=1e-4
    )
    assert model.traced == before + 1  # by recalibrate


class Branching(layers.Layer):
    """Runs one of two chains, by the sign of the batch's sum."""

    def __init__(self):
        super().__init__()
        self.low, self.high = chain(), chain()

    def call(self, x):
        return tf.cond(tf.reduce_sum(x) > 0, lambda: self.high(x), lambda: self.low(x))


class Looping(layers.Layer):
    """Normalizes twice, in a loop of the graph."""

    def __init__(self):
        super().__init__()
        self.bn = tfbn.BatchNormalization(name="looped")

    def build(self, shape):
        self.bn.build(shape)

    def call(self, x):
        return tf.while_loop(lambda i, x: i < 2, lambda i, x: (i + 1, self.bn(3 * x)), [0, x])[1]


@pytest.mark.parametrize("upstream", ["population", "batch"])
@pytest.mark.parametrize(("layer", "name"), [(Looping, "looped"), (Branching, "first")])
def test_a_layer_in_a_loop_or_a_branch_of_the_graph_is_refused_by_name(layer, name, upstream):
    model = keras.Sequential([keras.Input((2,)), layer()])
    weights = [w.numpy() for w in model.weights]
    with pytest.raises(ValueError, match=rf"loop or a branch.*Unroll the loop.*Received: .*{name}"):
        tfbn.recalibrate(model, X, batch_size=16, upstream=upstream)
    for weight, before in zip(model.weights, weights, strict=True):
        np.testing.assert_array_equal(weight.numpy(), before)


def test_control_flow_between_the_layers_is_no_obstacle():
    """A GRU runs in a loop of the graph, and a branch in a function of its own."""

    class Branch(layers.Layer):
        def call(self, x):
            return tf.cond(tf.reduce_sum(x) > 0, lambda: x + 1, lambda: 2 * x)

    model = keras.Sequential(
        [
            keras.Input((3, 2)),
            tfbn.BatchNormalization(name="first"),
            layers.GRU(4, name="gru"),
            Branch(),
            tfbn.BatchNormalization(name="second"),
        ]
    )
    x = np.random.default_rng(0).normal(4.0, 2.0, (10, 3, 2)).astype("float32")
    tfbn.recalibrate(model, x, batch_size=10)
    first = (x - x.mean((0, 1))) / np.sqrt(x.var((0, 1)) + 1e-3)
    seen = np.asarray(model.get_layer("gru")(first))
    seen = seen + 1 if seen.sum() > 0 else 2 * seen
    np.testing.assert_allclose(model.layers[-1].moving_mean, seen.mean(0), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(model.layers[-1].moving_variance, seen.var(0), rtol=1e-4)


# What it costs


@contextlib.contextmanager
def counted():
    """A layer that counts how often it runs; TensorFlow may drop it where its result is not needed."""
    runs = {}

    @keras.saving.register_keras_serializable("tests")
    class Counted(layers.Layer):
        def call(self, x):
            def count(values):
                runs[self.name] = runs.get(self.name, 0) + 1
                return values

            y = tf.numpy_function(count, [x], x.dtype, stateful=False)
            return tf.ensure_shape(y, x.shape)

    yield Counted, runs


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, {"before": 3, "between": 3}),
        ({"cache": "disk"}, {"before": 3, "between": 3}),
        ({"cache": "none"}, {"before": 6, "between": 3}),
        ({"upstream": "batch"}, {"before": 3, "between": 3}),
    ],
    ids=str,
)
def test_each_part_of_the_model_runs_once_on_each_batch(arguments, expected):
    with counted() as (counted_layer, runs):
        model = keras.Sequential(
            [
                keras.Input((2,)),
                counted_layer(name="before"),
                tfbn.BatchNormalization(),
                counted_layer(name="between"),
                tfbn.BatchNormalization(),
                counted_layer(name="behind"),
            ]
        )
        result = tfbn.recalibrate(model, X, batch_size=8, **arguments)
    assert result.passes == (2 if arguments == {"cache": "none"} else 1)
    assert runs == expected


@pytest.mark.parametrize("upstream", ["population", "batch"])
def test_the_model_is_traced_once(upstream):
    traces = []

    class Traced(layers.Layer):
        def call(self, x):
            traces.append(x.shape)
            return x

    blocks = [tfbn.BatchNormalization() for _ in range(5)]
    model = keras.Sequential([keras.Input((2,)), *blocks, Traced()])
    traces.clear()
    assert tfbn.recalibrate(model, X, batch_size=7, upstream=upstream).batches == 4
    assert traces == [(None, 2)]


def test_no_batch_outlives_its_turn():
    alive: list[weakref.ref] = []
    most = 0

    def data():
        nonlocal most
        for number in range(20):
            batch = tf.random.stateless_normal([4, 2], [number, 0])
            alive.append(weakref.ref(batch))
            yield batch
            del batch
            most = max(most, sum(ref() is not None for ref in alive))

    tfbn.recalibrate(chain(), data, cache="none")
    assert len(alive) == 40  # in two passes
    assert most <= 3


@pytest.mark.parametrize("tool", [tfbn.recalibrate, tfbn.diagnose])
def test_no_graph_outlives_it(tool):
    model = chain()
    tfbn.freeze(model, within=model.layers[2])
    model.compile("sgd", "mse")
    before = graphs()
    tool(model, (X, np.zeros((24, 3))), batch_size=8)
    assert graphs() == before


def test_compiled_functions_of_the_model_are_not_touched():
    traces = []

    class Traced(layers.Layer):
        def call(self, x):
            traces.append(tf.executing_eagerly())
            return x

    model = keras.Sequential([keras.Input((2,)), tfbn.BatchNormalization(), Traced()])
    model.predict(X, verbose=0)
    function, before = model.predict_function, len(traces)
    tfbn.recalibrate(model, X)
    during = len(traces)
    y = model.predict(X, verbose=0)
    assert model.predict_function is function
    assert (during > before, len(traces)) == (True, during)
    np.testing.assert_allclose(y.mean(0), 0, atol=1e-5)
