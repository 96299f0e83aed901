"""No batch poisons a model: whatever path it takes, statistics stay, and the loss shows the NaN.

One table: every kind of layer, every bad batch, every way of running it. The details of each are in
test_layer_robust.py.
"""

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfbn
from layer_runs import weights

KINDS = {
    "plain": {},
    "renorm": {"renorm": True},
    "cumulative": {"momentum": None},
    "virtual": {"virtual_batch_size": 2},
}
GOOD = np.random.default_rng(0).normal(3.0, 2.0, (4, 5, 3)).astype("float32")
SEEN = np.ones((4, 5), bool)


def with_value(value: float) -> np.ndarray:
    batch = GOOD.copy()
    batch[1, 2, 0] = value  # in one channel: the others stand still too
    return batch


BAD = {
    "empty": (GOOD[:0], SEEN[:0]),
    "masked": (GOOD, ~SEEN),
    "nan": (with_value(np.nan), SEEN),
    "infinite": (with_value(-np.inf), SEEN),
}


def changed(before: dict[str, np.ndarray], after: dict[str, np.ndarray]) -> set[str]:
    return {name for name in before if not np.array_equal(before[name], after[name])}


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["eager", "graph", "xla"])
def test_a_bad_batch_leaves_the_statistics_and_shows_its_nan(mode, kind, bad):
    layer = tfbn.BatchNormalization(**KINDS[kind])

    def step(x, mask):
        return layer(x, training=True, mask=mask)

    run = step if mode == "eager" else tf.function(step, jit_compile=mode == "xla")
    run(GOOD, SEEN)
    before = weights(layer)
    batch, mask = BAD[bad]
    y = run(batch, mask).numpy()
    assert changed(before, weights(layer)) == set()
    assert np.isnan(y).any() == (bad in ("nan", "infinite"))
    run(2 * GOOD, SEEN)
    assert {"moving_mean", "moving_variance"} <= changed(before, weights(layer))


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("kind", ["plain", "renorm", "cumulative"])
def test_a_bad_batch_among_accumulated_ones(kind, bad):
    def loop():
        inputs, mask = keras.Input((5, 3)), keras.Input((5,), dtype="bool")
        layer = tfbn.BatchNormalization(name="bn", **KINDS[kind])
        model = keras.Model([inputs, mask], layer(inputs, mask=mask))
        return tfbn.TrainingLoop(model, keras.optimizers.SGD(0.0), "mse", accumulation_steps=2)

    def statistics(batches):
        trainer = loop()
        data = [((x, mask), x) for x, mask in batches]
        trainer.fit((batch for batch in data), verbose=0)
        return weights(trainer.model.get_layer("bn"))

    good = (GOOD, SEEN), (GOOD[::2] + 1, SEEN[::2])
    if bad in ("empty", "masked"):  # adds nothing to its group
        together, expected = [good[0], BAD[bad]], [good[0]]
    else:  # costs its group
        together, expected = [*good, good[0], BAD[bad]], good
    found, wanted = statistics(together), statistics(expected)
    for name, value in wanted.items():
        if name in ("gamma", "beta"):
            continue  # the optimizer's to keep from the gradient's NaN
        np.testing.assert_allclose(found[name], value, rtol=1e-6, err_msg=name)
    assert np.any(found["moving_mean"] != 0)


@pytest.mark.parametrize("bad", ["nan", "infinite"])
def test_a_fit_over_a_bad_batch(bad):
    """Keras's layer is spoiled for ever; ours goes on, and the history shows the NaN."""
    spoiled = {}
    for norm in (keras.layers.BatchNormalization, tfbn.BatchNormalization):
        layer = norm(trainable=True)
        model = keras.Sequential(
            [keras.Input((5, 3)), layer, keras.layers.Lambda(lambda y: y[:, 0])]
        )
        model.compile(keras.optimizers.SGD(0.0), "mse")
        data = np.concatenate([GOOD, BAD[bad][0], GOOD])
        history = model.fit(data, np.zeros((12, 3)), batch_size=4, shuffle=False, verbose=0)
        assert np.isnan(history.history["loss"][0])
        spoiled[norm] = not np.isfinite(layer.moving_mean.numpy()).all()
    assert spoiled == {keras.layers.BatchNormalization: True, tfbn.BatchNormalization: False}
