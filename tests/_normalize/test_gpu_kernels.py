"""On a GPU each case takes the kernel that it should, and what is made of the kernel's results is right.

By the operations in a graph that is traced as on a GPU and never run, and by formulas in the place of
cuDNN: neither needs a GPU. The numbers of cuDNN itself are for the tests that take the `device` fixture.
"""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

import cudnn
import tfbn
from cases import LAYOUTS, Case
from layer_runs import assert_agree, assign, expect, observe
from tfbn._normalize import dispatch
from tfbn._normalize.dispatch import normalize_batch
from tfbn._normalize.kernel import Normalization

ON_GPU = dispatch._on_gpu
FUSED, FUSED_BACK = tf.raw_ops.FusedBatchNormV3, tf.raw_ops.FusedBatchNormGradV3
NHWC, NCHW = ("FusedBatchNormV3", b"NHWC"), ("FusedBatchNormV3", b"NCHW")
NHWC_BACK, NCHW_BACK = ("FusedBatchNormGradV3", b"NHWC"), ("FusedBatchNormGradV3", b"NCHW")


def trace(shape, training, dtype="float32", backward=False, **arguments):
    """The fused kernels of a layer on a GPU: the shape of x by operation and data format."""
    layer = tfbn.BatchNormalization(dtype=dtype, **arguments)
    layer.build(shape)

    def step(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x, training=training)
        return tape.gradient(y, x) if backward else y

    graph = tf.function(step).get_concrete_function(tf.TensorSpec(shape, dtype)).graph
    found = {}
    for operation in graph.get_operations():
        if operation.type.startswith("FusedBatchNorm"):
            x = operation.inputs[operation.type.endswith("GradV3")]
            found[operation.type, operation.get_attr("data_format")] = tuple(x.shape)
    return found


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch):
    monkeypatch.setattr("tfbn._normalize.dispatch._on_gpu", lambda: True)
    monkeypatch.setattr(tf.raw_ops, "FusedBatchNormV3", cudnn.forward)
    monkeypatch.setattr(tf.raw_ops, "FusedBatchNormGradV3", cudnn.backward)


@pytest.fixture
def _not_run(monkeypatch):
    monkeypatch.setattr(tf.raw_ops, "FusedBatchNormV3", FUSED)
    monkeypatch.setattr(tf.raw_ops, "FusedBatchNormGradV3", FUSED_BACK)


@pytest.mark.parametrize(
    ("devices", "on_gpu"),
    [
        (["/device:GPU:0"], True),
        (["/device:CPU:0"], False),
        (["", "/device:GPU:0"], True),  # In a function: where it is traced.
        (["", "/device:CPU:0"], False),
    ],
)
def test_where_operations_run_decides(devices, on_gpu, monkeypatch):
    monkeypatch.setattr(dispatch, "_on_gpu", ON_GPU)
    monkeypatch.setattr(tf.config, "list_logical_devices", lambda kind: ["one"])
    monkeypatch.setattr(dispatch, "_device", iter(devices).__next__)
    assert dispatch._on_gpu() == on_gpu


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(
    ("shape", "axis", "seen"),
    [
        ((8, 3), -1, (1, 8, 1, 3)),
        ((4, 5, 6, 3), -1, (4, 5, 6, 3)),
        ((70_000, 2, 3), -1, (1, 140_000, 1, 3)),  # As examples too many (pytorch#19911).
        ((70_000, 2, 2, 3), -1, (1, 280_000, 1, 3)),
        ((None, 5, 6, 3), -1, (None, 5, 6, 3)),
        ((None, 6, 3), -1, (1, None, 1, 3)),
        ((4, 5, 6, 3), [2, 3], (1, 20, 1, 18)),
        ((4, 3, 6), 1, (4, 3, 6, 1)),
        ((4, 3, 6, 5), 1, (4, 3, 30, 1)),
        ((None, 3, 6, None), 1, (None, 3, None, 1)),
        ((4, 2, 3, 6, 5), [1, 2], (4, 6, 30, 1)),
        ((4, 5, 3, 6), 2, (20, 3, 6, 1)),
    ],
    ids=str,
)
@pytest.mark.usefixtures("_not_run")
def test_channels_in_a_row_are_trained_by_the_kernel_as_they_stand(shape, axis, seen, dtype):
    kernel = NHWC if seen[-1] > 1 else NCHW
    assert trace(shape, True, dtype, axis=axis) == {kernel: seen}


@pytest.mark.usefixtures("_not_run")
def test_the_gradient_is_fused():
    assert set(trace((4, 6, 3), True, backward=True)) == {NHWC, NHWC_BACK}
    assert set(trace((4, 6, 3), False, backward=True)) == {NHWC, NHWC_BACK}
    assert set(trace((4, 3, 6), True, axis=1, backward=True)) == {NCHW, NCHW_BACK}


@pytest.mark.usefixtures("_not_run")
def test_inference_is_by_the_kernel_where_it_also_runs_on_a_cpu():
    assert trace((70_000, 2, 3), False) == {NHWC: (1, 140_000, 1, 3)}
    assert trace((70_000, 2, 2, 3), False) == {NHWC: (1, 280_000, 1, 3)}
    assert trace((4, 3, 6), False, axis=1) == {}


@pytest.mark.parametrize(("examples", "fused"), [(880_801, True), (880_802, False), (None, True)])
@pytest.mark.usefixtures("_not_run")
def test_more_examples_than_cudnn_trains_on_take_the_formula(examples, fused):
    assert (NCHW in trace((examples, 3, 2), True, axis=1)) == fused


@pytest.mark.parametrize(
    "case", [{"axis": [1, 3]}, {"virtual_batch_size": 2}, {"axis": 1, "dtype": "float64"}], ids=str
)
@pytest.mark.usefixtures("_not_run")
def test_what_the_kernel_cannot_take_as_it_stands_takes_the_formula(case):
    assert trace((4, 3, 6, 5), True, **case) == {}


@pytest.mark.parametrize("mode", ["eager", "graph"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_numbers_are_the_oracles(layout, dtype, mode):
    case = Case(layout, dtype, mode=mode, unknown_batch=mode == "graph")
    batches = case.batches()
    layer = tfbn.BatchNormalization(**case.arguments, dtype=dtype)
    layer.build(case.input_shape)
    assign(layer, case.weights())
    seen = observe(layer, batches, dtype, mode, case.unknown_batch)
    assert_agree(seen, expect(case, batches), dtype)


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize(("shape", "axis"), [((3,), -1), ((4, 3), -1), ((3, 4), 1)])
def test_neither_an_empty_batch_nor_one_value_is_nan(shape, axis, known):
    layer = tfbn.BatchNormalization(axis, momentum=0.5)
    layer.build((None, *shape))

    def step(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x, training=True)
        return [y, *tape.gradient(y, [x, layer.gamma.value, layer.beta.value])]

    def run(size):
        spec = tf.TensorSpec((size if known else None, *shape))
        return tf.function(step, input_signature=[spec])(5 * tf.ones((size, *shape)))

    y, dx, *rest = run(0)
    assert y.shape == dx.shape == (0, *shape)
    for gradient in rest:
        np.testing.assert_array_equal(gradient, np.zeros(3))
    np.testing.assert_array_equal(layer.moving_mean, np.zeros(3))
    np.testing.assert_array_equal(layer.moving_variance, np.ones(3))
    for result in run(1):
        assert np.all(np.isfinite(result))
    np.testing.assert_array_equal(layer.moving_mean, 2.5 * np.ones(3))
    np.testing.assert_array_equal(layer.moving_variance, 0.5 * np.ones(3))


@pytest.mark.parametrize(("shape", "axis"), [((0, 4, 3), 2), ((0, 3, 4), 1), ((4, 3, 0), 1)])
def test_the_moments_of_nothing_are_zero(shape, axis):
    _, batch = normalize_batch(
        tf.zeros(shape), tf.ones(3), tf.zeros(3), Normalization([axis], 1e-3)
    )
    for value in batch:
        np.testing.assert_array_equal(value, tf.zeros_like(value))
