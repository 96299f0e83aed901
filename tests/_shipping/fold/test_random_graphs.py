"""Folding never changes an output, whatever the graph and whatever it decides."""

import hypothesis
import hypothesis.strategies as st
import keras
import numpy as np
import tensorflow as tf

import tfbn
from graphs import random_model
from tfbn._models.walk import batch_norm_layers


@hypothesis.given(data=st.data())
def test_folding_a_random_graph_keeps_its_outputs_and_leaves_no_batch_normalization(data):
    model = random_model(data.draw)
    x = tf.random.stateless_normal((3, 8, 8, 4), seed=(1, 2))
    before = [weight.numpy() for weight in model.weights]
    expected = keras.tree.flatten(model(x, training=False))
    folded = tfbn.fold(model)
    assert batch_norm_layers(folded) == []
    assert len(folded.report.rows) >= len(batch_norm_layers(model))
    for old, new in zip(expected, keras.tree.flatten(folded(x, training=False)), strict=True):
        scale = max(1e-6, float(tf.reduce_max(tf.abs(old))))
        np.testing.assert_allclose(new, old, rtol=0, atol=1e-4 * scale)
    for value, weight in zip(before, model.weights, strict=True):
        np.testing.assert_array_equal(value, weight.numpy())
