"""Models for inference, with batch normalization folded into the layers around it."""

from typing import Any

import keras

from tfbn._models import compare
from tfbn._shipping.fold.assemble import assemble
from tfbn._shipping.fold.report import FoldReport
from tfbn._shipping.fold.search import fold_graph
from tfbn._shipping.fold.trace import traced


class FoldError(ValueError):
    """The folded model would give other outputs than the model."""


def fold(model: keras.Model, inputs: Any = None, *, tolerance: float | None = None) -> keras.Model:
    r"""A model for inference that gives the same outputs without batch normalization layers.

    In inference batch normalization is :math:`s x + t` with one :math:`s = \gamma / \sqrt{\sigma^2 + \epsilon}`
    and one :math:`t = \beta - \mu s` for each channel. The layer that it follows takes both up,
    :math:`s (W x + b) + t = (s W) x + (s b + t)`; or, where nothing pads with zeros, the layers that
    it precedes, :math:`W (s x + t) + b = (W s) x + (W t + b)`. These are `Dense`, `EinsumDense`,
    `Conv1D` to `Conv3D`, `Conv1DTranspose` to `Conv3DTranspose`, `DepthwiseConv1D` and `2D`,
    `SeparableConv1D` and `2D`, by themselves or in `TimeDistributed`, directly or with layers in between that
    it can be moved through: pooling, dropout, padding and cropping, reshaping, `Add`, `Concatenate`.
    Batch normalization after batch normalization is one. What nothing takes up becomes one
    multiply-add for each channel, a `keras.layers.Rescaling`.

    A layer that is called in several places keeps one set of weights where the same is folded into
    all of its calls, and gets copies where it is not. Nested models are laid out flat. The algebra is done in
    float64, and cast once to the dtype of the weights.

    Args:
        model: A Keras model, built. Layers of your own with batch normalization inside, and subclassed
            models, are folded if their `call` works on symbolic tensors. It stays as it is.
        inputs: Inputs to compare the outputs on, as you would call the model with; by default random
            ones.
        tolerance: The largest difference between outputs that is allowed, relative to the largest
            output. By default 1e-4; more for models that compute in half precision.

    Returns:
        A Functional model of Keras's own layers: nothing that uses it needs tfbn. Its inputs and
        outputs are nested as the model's, with the same keys; an output that was batch normalization's has
        the name of the layer that took it up (`tfbn.export` keeps the old one). Its attribute
        `report`, a `FoldReport`, says what became of each batch normalization layer and how large the
        difference is. It is not compiled.

    Raises:
        TypeError: if `model` is no Keras model.
        ValueError: if the model is not built; if its graph cannot be seen; if a layer cannot be made
            again from its config; if outputs of the model are not finite, or there are none to
            compare; if `tolerance` is no number of at least 0.
        FoldError: (a `ValueError`) if the outputs differ by more than the tolerance.

    Example:
        >>> folded = tfbn.fold(model)
        >>> print(folded.report)
        >>> folded.save("folded.keras")
    """
    if not isinstance(model, keras.Model):
        raise TypeError(
            f"Only a Keras model can be folded. Received: model={model!r} of type {type(model).__name__}."
        )
    tolerance = compare.tolerance_for(model, tolerance)
    graph = traced(model)
    rows = fold_graph(graph)
    folded = assemble(graph, model)
    if inputs is None:
        inputs = compare.random_inputs(folded.input, batch_size=2)
    expected = model(inputs, training=False)
    difference = compare.difference(expected, folded(inputs, training=False))
    folded.report = FoldReport(tuple(rows), difference, tolerance)
    if not difference <= tolerance:
        raise FoldError(
            "The folded model gives other outputs than the model, so it is not returned. "
            f"Received: a difference of {difference:.2g} of the largest output, tolerance={tolerance:.2g}. "
            + compare.advice(model, inputs, tolerance)
        )
    return folded
