"""Each case takes the kernel that it should: by the operations in the traced graph, never by time.

A fallback to the formula gives the same numbers, so that only this shows it.
"""

import collections

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfbn
from tfbn._normalize.dispatch import SMALL, normalize
from tfbn._normalize.kernel import Normalization

FUSED = {"FusedBatchNormV3": 1}
# The others run only where rounding shows: for the moments of pieces, of a rest, and to normalize.
FUSED_WITH_RETRY = {"FusedBatchNormV3": 4}
FUSED_BACK = {"FusedBatchNormGradV3": 1}
FORMULA: dict[str, int] = {}


def fused_operations(graph: tf.Graph) -> dict[str, int]:
    """How often each fused kernel stands in a graph and in the functions that it calls."""
    definition = graph.as_graph_def()
    nodes = list(definition.node)
    for function in definition.library.function:
        nodes.extend(function.node_def)
    return dict(collections.Counter(n.op for n in nodes if n.op.startswith("FusedBatchNorm")))


def trace(shape, training, mask=None, jit_compile=False, backward=False, dtype=None, **arguments):
    layer = tfbn.BatchNormalization(dtype=dtype, **arguments)
    layer.build(shape)

    def step(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x, training=training, mask=mask)
        return tape.gradient(y, x) if backward else y

    spec = tf.TensorSpec(shape, layer.compute_dtype)
    function = tf.function(step, jit_compile=jit_compile)
    return fused_operations(function.get_concrete_function(spec).graph)


@pytest.fixture(autouse=True)
def _on_the_cpu():
    with tf.device("CPU:0"):
        yield


IMAGES = (4, 5, 5, 3)


def fused_in_training(shape, dtype="float32"):
    """In half precision the mean is not checked: only a batch of unknown size may be too large."""
    return FUSED if "16" in dtype and None not in shape else FUSED_WITH_RETRY


@pytest.mark.parametrize("dtype", ["float32", "mixed_float16", "mixed_bfloat16"])
@pytest.mark.parametrize("shape", [(8, 3), (4, 6, 3), IMAGES, (2, 3, 3, 3, 3), (None, 5, 5, 3)])
def test_channels_last_is_fused(shape, dtype):
    assert trace(shape, True, dtype=dtype) == fused_in_training(shape, dtype)
    assert trace(shape, False, dtype=dtype) == FUSED


def test_the_gradient_is_fused():
    assert trace(IMAGES, True, backward=True) == FUSED_WITH_RETRY | FUSED_BACK
    assert trace(IMAGES, False, backward=True) == FUSED | FUSED_BACK


def test_layers_share_the_functions_that_run_the_kernel_again():
    layers = [tfbn.BatchNormalization() for _ in range(3)]

    @tf.function
    def step(x):
        for layer in layers:
            x = layer(x, training=True)
        return x

    library = step.get_concrete_function(tf.TensorSpec(IMAGES)).graph.as_graph_def().library
    assert len(library.function) == 2


@pytest.mark.parametrize("small", [True, False])
def test_tensorflow_joins_inference_to_the_convolution_before_it(small, monkeypatch):
    monkeypatch.setattr("tfbn._normalize.dispatch.SMALL", 10**9 if small else 0)
    rng = np.random.default_rng(0)
    image, kernel = rng.normal(size=IMAGES), rng.normal(size=(3, 3, 3, 3))
    mean, variance, gamma, beta = rng.uniform(0.5, 2, (4, 3))
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        x = tf.compat.v1.placeholder("float32", IMAGES)
        convolved = tf.nn.conv2d(x, tf.constant(kernel, tf.float32), 1, "SAME")
        weights = [tf.constant(value, tf.float32) for value in (mean, variance, gamma, beta)]
        y = tf.nn.relu(normalize(convolved, *weights, Normalization((3,), 1e-3)))
        # What TensorFlow makes of a graph is shown by its sessions alone.
        run = tf.compat.v1.RunMetadata()
        options = tf.compat.v1.RunOptions(output_partition_graphs=True)
        got = session.run(y, {x: image}, options, run)
    operations = [node.op for graph in run.partition_graphs for node in graph.node]
    assert any("FusedConv2D" in operation for operation in operations), operations
    assert not [operation for operation in operations if "BatchNorm" in operation]
    convolved = tf.nn.conv2d(image, kernel, 1, "SAME").numpy()  # in float64
    expected = np.maximum((convolved - mean) / np.sqrt(variance + 1e-3) * gamma + beta, 0)
    np.testing.assert_allclose(got, expected, atol=1e-5 * expected.max())


def test_trailing_axes_are_fused():
    assert trace(IMAGES, True, axis=[2, 3]) == FUSED_WITH_RETRY


@pytest.mark.parametrize("dtype", ["float32", "mixed_float16", "mixed_bfloat16"])
@pytest.mark.parametrize(
    "case", [{"axis": 1}, {"axis": [1, 3]}, {"virtual_batch_size": 2}], ids=str
)
def test_channels_elsewhere_are_fused_between_transpositions(case, dtype):
    expected = fused_in_training(IMAGES, dtype) | FUSED_BACK
    assert trace(IMAGES, True, backward=True, dtype=dtype, **case) == expected


def test_virtual_batches_of_unknown_number_take_the_formula():
    assert trace((None, *IMAGES[1:]), True, virtual_batch_size=2) == FORMULA


def test_virtual_batches_of_unknown_number_take_the_formula_between_transpositions_too():
    assert trace((None, 2, 3, 2, 3), True, axis=[1, 3], virtual_batch_size=2) == FORMULA


@pytest.mark.parametrize("dtype", ["float32", "mixed_float16", "mixed_bfloat16"])
def test_inference_transposes_what_it_would_have_to_copy(dtype):
    expected = FORMULA if dtype == "float32" else FUSED
    assert trace(IMAGES, False, dtype=dtype, axis=1) == expected


@pytest.mark.parametrize("case", [{"dtype": "float64"}, {"mask": [[True] * 5] * 4}], ids=str)
@pytest.mark.parametrize("axis", [1, -1])
def test_what_the_fused_kernel_cannot_take_is_not_fused(case, axis):
    assert trace(IMAGES, True, axis=axis, **case) == FORMULA


@pytest.mark.parametrize("training", [True, False])
def test_xla_gets_the_formula(training):
    assert trace(IMAGES, training, jit_compile=True, backward=True) == FORMULA


def test_xla_gets_the_formula_in_a_function_inside():
    """`jit_compile` on an outer function compiles those that it calls."""
    layer = tfbn.BatchNormalization()
    layer.build(IMAGES)
    inner = tf.function(lambda x: layer(x, training=True))
    outer = tf.function(lambda x: inner(x), jit_compile=True)
    graph = outer.get_concrete_function(tf.TensorSpec(IMAGES)).graph
    assert fused_operations(graph) == FORMULA


@pytest.fixture
def _the_true_line(monkeypatch):
    monkeypatch.setattr("tfbn._normalize.dispatch.SMALL", SMALL)


@pytest.mark.usefixtures("_the_true_line")
@pytest.mark.parametrize(
    ("shape", "dtype", "small"),
    [
        ((64, 32), "float32", True),
        ((128, 512), "float32", True),
        ((129, 512), "float32", False),
        ((None, 512), "float32", True),
        ((None, 513), "float32", False),
        ((None, None, 3), "float32", False),
        ((64, 32), "mixed_bfloat16", True),
        ((129, 512), "mixed_bfloat16", False),
    ],
)
def test_small_tensors_in_a_graph_take_the_formula(shape, dtype, small):
    expected = FORMULA if small else FUSED
    assert trace(shape, False, dtype=dtype) == expected
    assert trace(shape, True, dtype=dtype) == (
        FORMULA if small else fused_in_training(shape, dtype)
    )


@pytest.mark.usefixtures("_the_true_line")
def test_small_tensors_come_out_as_in_keras():
    x, dy = tf.random.normal((16, 5, 3), seed=1), tf.random.normal((16, 5, 3), seed=2)

    def run(layer):
        layer.build(x.shape)

        @tf.function
        def step():
            with tf.GradientTape() as tape:
                tape.watch(x)
                y = layer(x, training=True)
            sources = [x, layer.gamma.value, layer.beta.value]
            return y, *tape.gradient(y, sources, output_gradients=dy), layer(x, training=False)

        return [*step(), layer.moving_mean, layer.moving_variance]

    ours, keras_s = run(tfbn.BatchNormalization()), run(keras.layers.BatchNormalization())
    for a, b in zip(ours, keras_s, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
