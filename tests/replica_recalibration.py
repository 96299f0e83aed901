"""Recalibrates models made under a tf.distribute strategy, and compares with what one device would give.

Two virtual devices have to be there before TensorFlow starts: a process of its own.
"""

import itertools

import numpy as np

from replicas import started


def main() -> None:
    strategy = started(2)[2]
    import keras

    import tfbn

    kinds = keras.layers.BatchNormalization, tfbn.BatchNormalization
    for norm, synchronized in itertools.product(kinds, (True, False)):
        with strategy.scope():
            model = keras.Sequential(
                [
                    keras.Input((2,)),
                    norm(synchronized=synchronized),
                    keras.layers.Dense(3, activation="relu", kernel_initializer="ones"),
                    norm(),
                ]
            )
        for upstream in ("population", "batch"):
            check(model, synchronized, upstream)


def check(model, synchronized: bool, upstream: str) -> None:
    import tfbn

    x = np.random.default_rng(0).normal(4.0, 2.0, (23, 2)).astype("float32")
    # The last batch has one example: none for one of the replicas.
    result = tfbn.recalibrate(model, x, batch_size=11, upstream=upstream)
    assert (result.batches, result.examples) == (3, 23), result
    assert [layer.values for layer in result.layers] == [23, 23], result
    first, second = model.layers[0], model.layers[2]
    for variable in getattr(first.moving_mean.value, "values", [first.moving_mean.value]):
        np.testing.assert_allclose(variable.numpy(), x.mean(0), rtol=1e-5)
    np.testing.assert_allclose(first.moving_variance, x.var(0), rtol=1e-5)
    # What the first layer normalizes together: everything, each batch, or its share of it.
    together = [[0, 23], [0, 11, 22, 23], [0, 5, 11, 16, 22, 23]]
    ends = together[0 if upstream == "population" else 1 if synchronized else 2]
    parts = [x[a:b] for a, b in itertools.pairwise(ends)]
    inside = [(p - p.mean(0)) / np.sqrt(p.var(0) + 1e-3) @ np.ones((2, 3)) for p in parts]
    seen = np.maximum(np.concatenate(inside), 0)
    np.testing.assert_allclose(second.moving_mean, seen.mean(0), rtol=1e-4)
    np.testing.assert_allclose(second.moving_variance, seen.var(0), rtol=1e-4)


if __name__ == "__main__":
    main()
