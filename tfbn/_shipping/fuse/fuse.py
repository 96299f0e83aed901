"""Fusing batch normalization with the linear layers before it, and undoing it."""

from collections import defaultdict
from typing import Any

import keras

from tfbn._models import compare
from tfbn._models.compilation import without_compilation
from tfbn._models.fused_part import fused_parts, require_unfused
from tfbn._models.rebuild import rebuild
from tfbn._models.recorded import record_batch_norms
from tfbn._models.replace_layers import replace_inside
from tfbn._models.signature import signature_of
from tfbn._models.walk import batch_norm_layers, name_of, require_model
from tfbn._shipping.fold.check import difference_of
from tfbn._shipping.fold.report import FoldedCall
from tfbn._shipping.fold.trace import require_built, trace
from tfbn._shipping.fuse.frozen_norm import FrozenNorm
from tfbn._shipping.fuse.fused_linear import FusedLinear, FusedNorm
from tfbn._shipping.fuse.report import FuseReport, Outcome
from tfbn._shipping.fuse.search import Found, search
from tfbn._support.progress import Progress, prints_result


def fuse(
    model: keras.Model,
    inputs: Any = None,
    *,
    tolerance: float | None = None,
    verbose: int | str = "auto",
) -> keras.Model:
    r"""Returns a copy of a model to fine-tune, with batch normalization fused with the linear layers before it.

    With frozen statistics, a linear layer :math:`W x + b` and the batch normalization after it compute
    :math:`(s W) x + (s b + t)`, with the scale :math:`s = \gamma / \sqrt{\sigma^2 + \epsilon}` and the shift
    :math:`t = \beta - \mu s`. In a fused model one layer computes that, and makes the kernel and the bias anew in
    each call. So a training step takes about the time and the memory of the network without batch
    normalization: the output of the convolution is neither stored for the backward pass nor read again.

    :math:`W`, :math:`b`, :math:`\gamma` and :math:`\beta` have the gradients that they have in the model with
    frozen statistics, and stay trainable or not as they are. The moving statistics are frozen, whatever ``training``
    is. To train with the statistics of batches, do not fuse; to set the statistics to those of your data, call
    `tfbn.recalibrate` before.

    Linear layers are those of `tfbn.fold`, without `EinsumDense` and `TimeDistributed`. A layer is fused if it
    directly follows a linear layer without activation, whose output nothing else uses. Any other layer normalizes by
    its frozen statistics, and the report says why it was not fused.

    The names of layers and weights stay. `tfbn.unfuse` gives the ordinary layers back, with the trained weights.
    A fused model can be saved, loaded and cloned, which needs `import tfbn`.

    Args:
        model: A built Keras model. It is not modified. A subclassed model can be fused if its `call` works on
            symbolic tensors, and calls the same layers in training and in inference.
        inputs: Inputs to compare outputs on, as you would call the model with them. Defaults to random inputs.
        tolerance: The largest allowed difference between outputs, relative to the largest output.
            Defaults to 1e-4, and more for models that compute in half precision.
        verbose: 0: silent. 1: a progress bar, then the report. 2: a line at the end, then the report. "auto": a
            progress bar in a terminal if it takes longer than a second, and no report.

    Returns:
        The fused model, with its own weights. It is not compiled. The attribute `report`, a `tfbn.FuseReport`, tells
        what became of each batch normalization layer.

    Raises:
        TypeError: If `model` is not a Keras model.
        ValueError: If the model is not built, is fused already, or has nothing to fuse; if its `call` does not work
            on symbolic tensors; if a layer cannot be copied from its config; or as in `tfbn.fold` if outputs
            cannot be compared.
        FoldError: If the outputs differ by more than the tolerance. It is a `ValueError`.

    Example:
        >>> fused = tfbn.fuse(model)
        >>> fused.compile(keras.optimizers.SGD(1e-3), "sparse_categorical_crossentropy")
        >>> history = fused.fit(images, labels, verbose=0)
        >>> tuned = tfbn.unfuse(fused)
    """
    progress = Progress(verbose, "stage", 4)
    require_model(model)
    require_unfused(model, "fuse")
    require_built(model)
    tolerance = compare.tolerance_for(model, tolerance)
    new = _copy(model)
    progress.tick()
    found = search(trace(new))
    progress.tick()
    _require_fusible(found, model)
    swaps: dict[int, keras.layers.Layer] = {}
    for norm, _, outcome, linear, _ in found:
        names = {"name": norm.name, "trainable": norm.trainable}
        if linear is not None:
            pair = name_of(norm)
            swaps[id(norm)] = FusedNorm(pair, dtype=norm.dtype_policy, **names)
            trainable = linear.trainable or norm.trainable
            swaps[id(linear)] = FusedLinear(
                linear, norm, pair, name=linear.name, trainable=trainable
            )
        elif outcome is Outcome.FROZEN:
            swaps[id(norm)] = FrozenNorm(norm, **names)
    replace_inside(new, swaps)
    record_batch_norms(new)
    progress.tick()
    if inputs is None:
        inputs = compare.random_inputs(signature_of(model).structure, batch_size=2)
    difference = difference_of(model, new, inputs, tolerance, "fused")
    progress.tick()
    new.report = FuseReport(tuple(map(_row, found)), difference, tolerance)
    if prints_result(verbose):
        print(new.report)
    return new


def unfuse(model: keras.Model) -> keras.Model:
    """Returns a copy of a fused model with the ordinary layers that it was fused from, and the trained weights.

    Names, configs, trainable flags and the order of weights are those of the original model, so that its checkpoints,
    `tfbn.fold`, `tfbn.export` and `tfbn.convert` work as before. Batch normalization layers that `fuse` froze train
    their statistics again.

    Args:
        model: A model that `tfbn.fuse` returned, or one that contains such a model; trained, saved and loaded
            since, or not. It is not modified.

    Returns:
        A new model with its own weights. It is not compiled.

    Raises:
        TypeError: If `model` is not a Keras model.
        ValueError: If the model is not fused, or contains a part of a fused model only.

    Example:
        >>> tfbn.fuse(model).save("fused.keras")
        >>> model = tfbn.unfuse(keras.models.load_model("fused.keras"))
        >>> path = tfbn.export(model, "served/1")
    """
    require_model(model)
    if not fused_parts(model):
        raise ValueError(
            "The model is not fused: it has no layer that `tfbn.fuse` made. Pass what `tfbn.fuse(model)` returned. "
            f"Received: model {model.name!r}."
        )
    new = _copy(model)
    parts = fused_parts(new)
    norms: dict[str, list[keras.layers.Layer]] = defaultdict(list)
    for part in parts:
        if isinstance(part, FusedLinear):
            norms[part.pair].append(part.norm)
    swaps = {}
    for part in parts:
        if not isinstance(part, FusedNorm):
            swaps[id(part)] = part.original()
        elif norms[part.pair]:
            swaps[id(part)] = norms[part.pair].pop(0)
        else:
            raise ValueError(
                f"The model contains '{part.name}', but not the linear layer that it was fused with. Unfuse the "
                f"model that has both. Received: model {model.name!r}."
            )
    replace_inside(new, swaps)
    for layer in batch_norm_layers(new):
        if hasattr(layer, "has_fused_statistics"):
            del layer.has_fused_statistics
    record_batch_norms(new)
    return new


def _copy(model: keras.Model) -> keras.Model:
    """A copy of a model, not compiled: its optimizer's state may depend on the order of the weights."""
    with without_compilation(model):
        return rebuild(model, {})


def _require_fusible(found: list[Found], model: keras.Model) -> None:
    if any(row.outcome is Outcome.FUSED for row in found):
        return
    reasons = [f"'{row.norm.name}': {row.reason}" for row in found]
    if not reasons:
        raise ValueError(
            "There is nothing to fuse: the model has no batch normalization layers. Fine-tune it as it is. "
            f"Received: model {model.name!r}."
        )
    raise ValueError(
        "There is nothing to fuse: no batch normalization layer directly follows a linear layer that it can be fused "
        "with. To freeze the statistics, call `tfbn.freeze(tfbn.convert(model), affine=False)` instead. "
        f"Received: model {model.name!r}, {'; '.join(reasons[:3])}{'; …' * (len(reasons) > 3)}."
    )


def _row(found: Found) -> FoldedCall:
    into = None if found.linear is None else found.linear.name
    return FoldedCall(found.norm.name, found.within, found.outcome, into, found.reason)
