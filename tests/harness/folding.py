"""What the tests of folding share: a model folded with random weights, and compared with the original."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import tensorflow as tf

import tfbn
from graphs import randomize


def image(channels: int = 4) -> Any:
    return keras.Input((8, 8, channels), name="image")


def folded(model: keras.Model, **arguments: Any) -> keras.Model:
    """Gives a model random weights, folds it, and compares on inputs that `fold` did not see."""
    randomize(model)
    new = tfbn.fold(model, **arguments)
    x = [tf.random.stateless_normal((3, *t.shape[1:]), (7, i)) for i, t in enumerate(new.inputs)]
    x = keras.tree.pack_sequence_as(new.input, x)
    for a, b in zip(*(keras.tree.flatten(m(x, training=False)) for m in (model, new)), strict=True):
        np.testing.assert_allclose(b, a, rtol=0, atol=1e-5 * np.abs(a).max())
    return new


def reasons(model: keras.Model) -> list[str | None]:
    """Why each call of batch normalization was not folded."""
    return [row.reason for row in model.report.rows]


def into(model: keras.Model) -> list[str | None]:
    """The layers that each call of batch normalization was folded into."""
    return [row.into for row in model.report.rows]


def count(model: keras.Model, kind: type) -> int:
    """How many layers of a class a model has."""
    return sum(type(layer) is kind for layer in model.layers)
