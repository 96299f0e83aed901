"""Folding batch normalization into the adjacent layers of a model."""

from typing import Any

import keras

from tfbn._models import compare
from tfbn._models.fused_part import fused_parts
from tfbn._models.walk import require_model
from tfbn._shipping.fold.assemble import assemble
from tfbn._shipping.fold.check import difference_of
from tfbn._shipping.fold.report import FoldReport
from tfbn._shipping.fold.search import fold_graph
from tfbn._shipping.fold.trace import trace
from tfbn._shipping.fuse.fuse import unfuse
from tfbn._support.progress import Progress, prints_result

STAGES = 4
"""How often `fold_in_stages` counts."""


def fold(
    model: keras.Model,
    inputs: Any = None,
    *,
    tolerance: float | None = None,
    verbose: int | str = "auto",
) -> keras.Model:
    r"""Returns a model for inference with batch normalization folded into the adjacent layers.

    In inference mode, batch normalization computes :math:`s x + t` per channel, with the scale
    :math:`s = \gamma / \sqrt{\sigma^2 + \epsilon}` and the shift :math:`t = \beta - \mu s`. Both can be folded
    into the preceding linear layer, :math:`s (W x + b) + t = (s W) x + (s b + t)`, or into the following
    ones if they do not pad with zeros, :math:`W (s x + t) + b = (W s) x + (W t + b)`.

    Linear layers are `Dense`, `EinsumDense`, `Conv1D` to `Conv3D`, `Conv1DTranspose` to `Conv3DTranspose`,
    `DepthwiseConv1D` and `2D`, and `SeparableConv1D` and `2D`, alone or in `TimeDistributed`. Other layers may
    stand in between: pooling, dropout, padding, cropping, reshaping, `Add`, `Concatenate`. Successive
    batch normalization layers are merged. Where no linear layer can absorb the scale and the shift, a
    `keras.layers.Rescaling` applies them.

    A layer that is called several times keeps one set of weights if the same is folded into every call,
    and is copied otherwise. Nested models are flattened. The folded weights are computed in
    float64 and rounded once, to the dtype of the layer's weights.

    Args:
        model: A built Keras model. It is not modified. Subclassed models, and custom layers that contain batch
            normalization, can be folded if their `call` works on symbolic tensors. A fused model is unfused first.
        inputs: Inputs to compare outputs on, as you would call the model with them. Defaults to random
            inputs.
        tolerance: The largest allowed difference between outputs, relative to the largest output.
            Defaults to 1e-4, and more for models that compute in half precision.
        verbose: 0: silent. 1: a progress bar, then the report. 2: a line at the end, then the report. "auto": a
            progress bar in a terminal if it takes longer than a second, and no report.

    Returns:
        A Functional model of Keras's own layers, which needs no tfbn to load. It is not compiled. Its
        inputs and outputs have the same structure and keys as the model's. An output of
        a batch normalization layer is named after the layer that absorbed it (`tfbn.export` keeps the
        original name). The attribute `report`, a `tfbn.FoldReport`, tells what became of each batch normalization
        layer.

    Raises:
        TypeError: If `model` is not a Keras model.
        ValueError: If the model is not built; if its `call` does not work on symbolic tensors; if a layer
            cannot be copied from its config; if outputs to compare are empty or not finite; or if `tolerance` or
            `verbose` is out of range.
        FoldError: If the outputs differ by more than the tolerance. It is a `ValueError`.

    Example:
        >>> folded = tfbn.fold(model)
        >>> print(folded.report)
        >>> folded.save("folded.keras")
    """
    folded = fold_in_stages(model, inputs, tolerance, Progress(verbose, "stage", STAGES))
    if prints_result(verbose):
        print(folded.report)
    return folded


def fold_in_stages(
    model: keras.Model, inputs: Any, tolerance: float | None, progress: Progress
) -> keras.Model:
    """Does what `fold` does, and counts its stages."""
    require_model(model)
    tolerance = compare.tolerance_for(model, tolerance)
    if fused_parts(model):
        model = unfuse(model)
    graph = trace(model)
    progress.tick()
    rows = fold_graph(graph)
    progress.tick()
    folded, shared = assemble(graph, model)
    progress.tick()
    if inputs is None:
        inputs = compare.random_inputs(folded.input, batch_size=2)
    difference = difference_of(model, folded, inputs, tolerance, "folded")
    progress.tick()
    folded.report = FoldReport(tuple(rows), difference, tolerance, shared)
    return folded
