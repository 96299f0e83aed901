"""Selecting the batch normalization layers of a model to measure, and how to run the model on a batch."""

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfbn._data.multi_pass import MultiPassReader
from tfbn._data.sources import describe
from tfbn._layer.batch_normalization import BatchNormalization
from tfbn._models.fused_part import require_unfused
from tfbn._models.walk import BatchNormLayer, batch_norm_layers, name_of, statistics_are_frozen
from tfbn._statistics.measure import StatisticsPasses
from tfbn._statistics.tensor_cache import TensorCache
from tfbn._statistics.traced_model import Forward, Summary
from tfbn._support.checks import check_count, first_line
from tfbn._support.reports import count

UPSTREAM = ("population", "batch")


def plan_passes(
    model: keras.layers.Layer,
    reader: MultiPassReader,
    upstream: str,
    forward: Forward | None,
    *,
    include_frozen: bool,
    summaries: Sequence[Summary] = (),
    cache: TensorCache | None = None,
    prior: int = 0,
) -> tuple[list[BatchNormLayer], StatisticsPasses]:
    """Returns all batch normalization layers of a model, and the passes that measure those not frozen.

    Args:
        model: A Keras model or layer. It is built if necessary.
        reader: The data.
        upstream: "population" or "batch".
        forward: Runs the model on a batch; by default `run_model`.
        include_frozen: Whether to measure frozen layers, too.
        summaries: What else to measure of each call.
        cache: Keeps the tensors between levels.
        prior: How many examples the moving statistics count for.

    Raises:
        TypeError: If `model` is not a Keras model or layer.
        ValueError: If there is nothing to measure, or an argument is out of range.
    """
    if upstream not in UPSTREAM:
        raise ValueError(f"`upstream` must be one of {UPSTREAM}. Received: upstream={upstream!r}.")
    check_count("prior", prior, least=0)
    if prior and upstream == "batch":
        raise ValueError(
            '`prior` requires upstream="population", in which layers normalize by the statistics that they '
            f"will have. Received: prior={prior!r}, upstream={upstream!r}."
        )
    require_unfused(model, "measure the statistics of")
    if forward is None:
        _check_preprocessing(model)
    forward = _explained(run_model if forward is None else forward)
    if not model.built:
        tf.function(lambda batch: forward(model, batch), autograph=False).get_concrete_function(
            reader.spec
        )
    layers = batch_norm_layers(model)
    if not layers:
        raise ValueError(
            "The model has no batch normalization layers. "
            f"Received: model {model.name!r} of type {type(model).__name__}."
        )
    measured = [layer for layer in layers if include_frozen or not statistics_are_frozen(layer)]
    if not measured:
        raise ValueError(
            "All batch normalization layers of the model are frozen. Pass include_frozen=True, or call "
            f"`tfbn.unfreeze(model)`. Received: model {model.name!r}, {count(len(layers), 'frozen layer')}."
        )
    for layer in measured:
        _check_call(layer)
        if prior and layer.built:
            _check_finite(layer, prior)
    passes = StatisticsPasses(
        model,
        [layer for layer in measured if layer.built],
        forward=forward,
        spec=reader.spec,
        upstream=upstream,
        summaries=summaries,
        cache=cache,
        prior=prior,
    )
    if not passes.calls:
        raise ValueError(
            "Running the model on a batch called none of its batch normalization layers. Pass a `forward` "
            f"that does. Received: model {model.name!r}, layers {[name_of(layer) for layer in measured]}."
        )
    return layers, passes


def fit_data(model: keras.layers.Layer, data: Any, y: Any = None) -> Any:
    """Returns data as `MultiPassReader` takes it, from what `fit` takes as ``x`` and ``y``.

    A list is read as Keras reads it: as the inputs of a model.

    Raises:
        TypeError: If ``model`` is not a Keras model or layer; the data has not been touched then.
        ValueError: If ``y`` is passed with data that is not arrays, or if a list has another length than
            the model has inputs.
    """
    batch_norm_layers(model)  # Raises if it is not a layer.
    if y is not None and not (isinstance(data, dict | list | tuple) or hasattr(data, "shape")):
        raise ValueError(
            "`y` can be passed with arrays only. Other data contains its labels. "
            f"Received: data of type {type(data).__name__} and y={describe(y)}."
        )
    if isinstance(data, list):
        if len(data) != _num_inputs(model):
            raise ValueError(
                "A list is read as the inputs of the model, and this one has another length. Pass x and y as "
                "two arguments or as a tuple; batches as a tf.data.Dataset, or as a function that returns "
                "an iterator (`lambda: iter(batches)`); and several inputs of a subclassed model as "
                f"((x1, x2),). Received: a list of {count(len(data), 'item')} for a model with "
                f"{count(_num_inputs(model), 'input')}."
            )
        data = data[0] if len(data) == 1 else (tuple(data),) if y is None else tuple(data)
    return data if y is None else (data, y)


def run_model(model: keras.layers.Layer, batch: Any, training: bool = False) -> Any:
    """Runs the model on the inputs in a batch."""
    return model(unpacked(model, batch)[0], training=training)


def unpacked(model: keras.layers.Layer, batch: Any) -> tuple[Any, Any, Any]:
    """Returns the inputs, labels and sample weights in a batch, or in its spec."""
    several = isinstance(batch, tuple) and len(batch) == _num_inputs(model) > 1
    # Without labels, the batch may be the tuple of the model's inputs.
    if several and not isinstance(batch[0], dict | list | tuple):
        return batch, None, None
    return keras.utils.unpack_x_y_sample_weight(batch)


def _num_inputs(model: keras.layers.Layer) -> int:
    """The number of inputs; 1 if it is not known."""
    return len(getattr(model, "inputs", None) or [None])


def _explained(forward: Forward) -> Forward:
    """Adds to an error of the model what it was given, and what else could be."""

    def run(model: keras.layers.Layer, batch: Any) -> Any:
        try:
            return forward(model, batch)
        except Exception as error:
            raise ValueError(
                "Running the model on a batch failed. If a tf.data.Dataset holds single examples, batch it with "
                "`.batch(32)`. If a batch is a tuple of the inputs, pass each as ((x1, x2),), because (x1, x2) is "
                "read as x and y. If the model takes other arguments, or preprocesses its inputs elsewhere, pass "
                "a `forward` that runs it. "
                f"Received: batches {describe(batch)}, which raised {first_line(error)}"
            ) from error

    return run


def _check_preprocessing(model: keras.layers.Layer) -> None:
    """Raises if the model preprocesses its inputs in `predict`, but not when it is called."""
    predict = getattr(type(model), "predict", None)
    overridden = predict not in (None, keras.Model.predict)
    if overridden and getattr(model, "preprocessor", None) is not None:
        raise ValueError(
            "The model preprocesses its inputs in `fit` and `predict`, but not when it is called. Preprocess "
            "the data with `data.map(model.preprocessor)`, and pass a `forward` such as "
            "`lambda model, batch: model(batch[0], training=False)`. "
            f"Received: model {model.name!r} of type {type(model).__name__}."
        )


def _check_finite(layer: BatchNormLayer, prior: int) -> None:
    """Raises if the moving statistics cannot be averaged with others."""
    for weight in (layer.moving_mean, layer.moving_variance):
        if not np.isfinite(keras.ops.convert_to_numpy(weight)).all():
            raise ValueError(
                "The moving statistics are NaN or infinite, so they cannot count as a `prior`. Leave it out. "
                f"Received: prior={prior!r}, layer {name_of(layer)!r}."
            )


def _check_call(layer: BatchNormLayer) -> None:
    """Raises if a subclass overrides `call`."""
    known = (keras.layers.BatchNormalization.call, BatchNormalization.call)
    if type(layer).call not in known:
        raise ValueError(
            "This layer overrides `call`, so it is unknown how it uses its statistics. Only "
            "keras.layers.BatchNormalization, tfbn.BatchNormalization and subclasses that inherit `call` are "
            f"supported. Received: layer {name_of(layer)!r} of type {type(layer).__name__}."
        )
