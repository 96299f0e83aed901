"""A forward pass that is recomputed for the gradient updates the moving statistics once, like one that is not."""

import contextlib

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfbn
from layer_runs import weights

X = np.random.default_rng(0).normal(3.0, 2.0, (16, 4)).astype("float32")
OPTIONS = {
    "plain": {},
    "cumulative": {"momentum": None},
    "renorm": {"renorm": True},
    "virtual": {"virtual_batch_size": 4},
}


def network(**options):
    keras.utils.set_random_seed(0)
    dense, norm = keras.layers.Dense(4), tfbn.BatchNormalization(momentum=0.5, **options)
    dense.build((None, 4))
    norm.build((None, 4))
    return dense, norm


def train(mode, recompute, options, calls=1):
    """The statistics and the gradients of a step whose block runs `calls` times."""
    dense, norm = network(**({"momentum": 0.5} | options)) if options else network()

    def block(x):
        for _ in range(calls):
            x = norm(dense(x), training=True)
        return x

    run = tf.recompute_grad(block) if recompute else block

    def step(x):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(run(x) ** 3)
        return tape.gradient(loss, [w.value for w in (dense.kernel, norm.gamma, norm.beta)])

    compiled = step if mode == "eager" else tf.function(step, jit_compile=mode == "xla")
    return weights(norm), [compiled(tf.constant(X)) for _ in range(2)], weights(norm)


@pytest.mark.parametrize("calls", [1, 2])
@pytest.mark.parametrize("mode", ["eager", "graph", "xla"])
def test_recompute_grad_updates_once_for_each_call_of_the_forward_pass(mode, calls):
    _, gradients, after = train(mode, True, {}, calls)
    _, expected_gradients, expected = train(mode, False, {}, calls)
    for name, value in after.items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-5, err_msg=name)
    for seen, wanted in zip(gradients, expected_gradients, strict=True):
        for one, other in zip(seen, wanted, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("scope", ["remat", "RematScope"])
def test_keras_s_own_ways_update_once(scope):
    def trained(remat):
        keras.utils.set_random_seed(0)
        inputs = keras.Input((4,))
        with keras.RematScope(mode="full") if remat else contextlib.nullcontext():
            outputs = tfbn.BatchNormalization(momentum=0.5)(keras.layers.Dense(4)(inputs))
        model = keras.Model(inputs, outputs)
        call = keras.remat(model.__call__) if remat and scope == "remat" else model
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(call(tf.constant(X), training=True) ** 2)
        tape.gradient(loss, model.trainable_weights)
        return weights(model.layers[-1])

    seen, expected = trained(True), trained(False)
    for name, value in expected.items():
        np.testing.assert_allclose(seen[name], value, rtol=1e-5, err_msg=name)
