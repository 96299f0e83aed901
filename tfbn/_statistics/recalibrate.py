"""Moving statistics computed from a whole data set, in place of an average over past batches."""

import inspect
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfbn._data.multi_pass import MultiPassReader
from tfbn._models.walk import BatchNormLayer, name_of, statistics_are_frozen
from tfbn._statistics.layer_call import LayerCall, average, merge_calls
from tfbn._statistics.plan import fit_data, plan_passes
from tfbn._statistics.recalibration import LayerChange, Recalibration
from tfbn._statistics.tensor_cache import TensorCache
from tfbn._statistics.traced_model import Forward
from tfbn._support.progress import prints_result

Assignment = tuple[Any, Any]
"""A variable and its new value."""


def recalibrate(
    model: keras.layers.Layer,
    data: Any,
    y: Any = None,
    *,
    upstream: str = "population",
    forward: Forward | None = None,
    steps: int | None = None,
    batch_size: int | None = None,
    include_frozen: bool = False,
    prior: int = 0,
    cache: str = "auto",
    cache_limit: int | None = None,
    verbose: int | str = "auto",
) -> Recalibration:
    r"""Sets the moving statistics of all batch normalization layers to those of a whole data set.

    The original paper defines inference this way: with the mean and variance of the whole training set.
    Recalibrate wherever the moving averages are not what the model needs: after too few updates or with a
    momentum that lags, after averaging or loading weights, on data of another domain (labels are not
    needed), or after a bad batch. It works for Keras's layers and for tfbn's. For each channel, over all
    :math:`N` values in the data,

    .. math:: \mu = \frac1N \sum_i x_i, \quad \sigma^2 = \frac1N \sum_i (x_i - \mu)^2

    - ``upstream="population"`` is exact: it computes what one training-mode forward pass on all data as a
      single batch would compute, however the data is batched. A layer's inputs depend on the statistics of
      the layers before it, so the model runs layer by layer: each part of it runs on all batches before
      the next part does. See ``cache`` for what is kept in between.
    - ``upstream="batch"`` takes one pass. Each layer normalizes by the statistics of the current batch, as
      in training, so use the batch size of training. Batches of unequal size are weighted correctly.

    All other layers, such as dropout, run in inference mode. What they change there, such as the seed of a
    random layer or the state of a recurrent layer, goes on from batch to batch and is restored afterwards.

    A layer that is called several times gets the statistics of all its calls together; during the passes,
    each call normalizes by its own statistics, as in training. With ``renorm``, the statistics that the
    corrections refer to are set too, so both corrections become the identity. ``virtual_batch_size`` has
    no effect, because the result does not depend on batches. With ``momentum=None``, training continues
    the average as if it had seen the batches of one pass.

    Under a `tf.distribute` strategy, each replica processes a shard of every batch. With
    ``upstream="batch"``, a replica normalizes its shard alone or, if the layer is synchronized, together
    with the others. Call it on each worker with the same data; all workers get identical statistics.

    Args:
        model: A Keras model or layer. It is built if necessary. Otherwise, only the moving statistics
            change.
        data: A `tf.data.Dataset`; arrays; a `keras.utils.PyDataset`; an iterable of batches; or a function
            that returns one, such as a generator function. Arrays and batches are ``x``, ``(x, y)`` or
            ``(x, y, sample_weight)``, of which only ``x`` is used. For several inputs, ``x`` is a tuple or
            dict of tensors. A list, or a tuple of tensors, with as many items as the model has inputs is
            read as ``x``.
        y: Labels, if ``data`` is the array or arrays ``x``, as in `keras.Model.fit`. They are not used.
        upstream: "population" or "batch".
        forward: A function ``forward(model, batch)`` that runs the model on a batch in inference mode; by
            default ``model(x, training=False)``. For models with keyword arguments or methods of their own.
        steps: How many batches to use; by default all. Required if the data is endless.
        batch_size: The batch size for arrays; by default 32.
        include_frozen: Whether to recalibrate layers with frozen statistics (``trainable=False``, or
            `tfbn.freeze`). By default they keep their statistics and normalize by them.
        prior: How many examples the present moving statistics count for; by default 0. To adapt a model to
            few examples of a new domain, keep some weight on the statistics of the training: with
            :math:`N` as the prior and :math:`n` examples in the data, the mean becomes
            :math:`\frac{N}{N+n} \mu_{old} + \frac{n}{N+n} \mu`, and the variance likewise (Schneider et al.).
            Requires ``upstream="population"``.
        cache: Where to keep the inputs of the next layers for the whole data set while
            ``upstream="population"`` runs layer by layer: "memory"; "disk", for temporary files; or "auto",
            for memory and then files. If they fit, the data is read once, and the model runs once. If they
            do not, or with "none", the model runs again from an earlier layer or from the data.
        cache_limit: The number of bytes that may be kept in memory or, with ``cache="disk"``, in files; by
            default half of what is free. The files are in the folder for temporary files (``TMPDIR``).
        verbose: 0: silent. 1: a progress bar, then the result. 2: a line at the end, then the result. "auto": a
            progress bar in a terminal if it takes longer than a second, and no result.

    Returns:
        A `Recalibration`, which says what changed in each layer.

    Raises:
        TypeError: If `model` is not a Keras model or layer, or the data is of an unsupported kind.
        ValueError: If an argument is out of range; if the model has no batch normalization layers, only
            frozen ones, or calls none; if one is called inside of a graph loop or branch; if the model cannot
            run on a batch; if the data has no examples, a single value for each channel of a layer, is
            endless, or ends before ``steps`` batches; if it must be read again, but can be read only once or
            has changed.
        NotFiniteError: (a `ValueError`) If an input of a layer is not finite.

    If it raises, or is interrupted, the model does not change.

    Example:
        >>> model.load_weights("averaged.weights.h5")
        >>> print(tfbn.recalibrate(model, train_images))

    Reference:
        - Schneider et al., `Improving robustness against common corruptions by covariate shift adaptation
          <https://arxiv.org/abs/2006.16971>`_, 2020: the prior.
        - Ioffe and Szegedy, `Batch Normalization <https://arxiv.org/abs/1502.03167>`_, 2015, algorithm 2:
          population statistics in inference.
        - Wu and Johnson, `Rethinking "Batch" in BatchNorm <https://arxiv.org/abs/2105.07576>`_, 2021,
          section 3: statistics pooled in a single pass.
        - Chan, Golub and LeVeque, Algorithms for computing the sample variance. The American Statistician
          37(3), 1983: merging variances.
    """
    tensors = TensorCache(cache, cache_limit)
    reader = MultiPassReader(fit_data(model, data, y), steps, batch_size, verbose)
    layers, passes = plan_passes(
        model, reader, upstream, forward, include_frozen=include_frozen, cache=tensors, prior=prior
    )
    reader.expect(1 if cache != "none" else passes.levels, passes.levels)
    passes.measure(reader)
    changes, assignments = [], []
    for layer in layers:
        calls = [call for call in passes.calls if call.layer is layer]
        change, values = _change(layer, calls, reader.batches, passes.weight, include_frozen)
        changes.append(change)
        assignments += values
    with passes.strategy.scope():
        _assign(assignments)
    result = Recalibration(
        upstream=upstream,
        levels=passes.levels,
        passes=passes.passes,
        batches=reader.batches,
        examples=reader.examples,
        cache=passes.cache_use,
        layers=tuple(changes),
    )
    if prints_result(verbose):
        print(result)
    return result


def _change(
    layer: BatchNormLayer,
    calls: Sequence[LayerCall],
    batches: int,
    weight: float,
    include_frozen: bool,
) -> tuple[LayerChange, list[Assignment]]:
    """Returns what to report about a layer, and the new values of its weights."""
    name = name_of(layer)
    if statistics_are_frozen(layer) and not include_frozen:
        return LayerChange(name, "frozen"), []
    if not calls:
        return LayerChange(name, "not called"), []
    count, mean, variance = merge_calls(calls)
    seen = count > 0
    if not seen.any():
        return LayerChange(name, "masked", len(calls)), []
    if weight == 1 and np.max(count) <= 1:
        raise ValueError(
            "The data has a single value for each channel of a layer, and a single value has no variance. Pass "
            f"more examples, or a `prior`. Received: layer {name!r}."
        )
    old_mean, old_variance = (
        np.asarray(keras.ops.convert_to_numpy(weight), np.float64)
        for weight in (layer.moving_mean, layer.moving_variance)
    )
    mean = average(old_mean, mean, np.where(seen, weight, 0))
    variance = average(old_variance, variance, np.where(seen, weight, 0))
    stddev = np.sqrt(variance + layer.epsilon)
    values: list[Assignment] = [(layer.moving_mean, mean), (layer.moving_variance, variance)]
    if layer.renorm:
        values += [
            (layer.moving_stddev, stddev),
            (layer.renorm_mean, mean),
            (layer.renorm_stddev, stddev),
        ]
    if layer.momentum is None:
        counts = keras.ops.convert_to_numpy(layer.update_count)
        values.append((layer.update_count, np.where(seen, round(batches / weight), counts)))
    with np.errstate(divide="ignore"):  # An old variance of 0 or less: the ratio is infinite.
        log_ratio = np.log(stddev**2) - np.log(np.maximum(old_variance + layer.epsilon, 0))
    change = LayerChange(
        layer=name,
        outcome="recalibrated",
        calls=len(calls),
        values=float(np.mean(count)),
        mean_shift=float(np.sqrt(np.mean(np.square((mean - old_mean) / stddev)))),
        variance_ratio=float(np.exp(np.mean(log_ratio))),
    )
    return change, values


def _assign(assignments: Sequence[Assignment]) -> None:
    """Assigns all values, or none if it raises."""
    before = [(variable, keras.ops.convert_to_numpy(variable)) for variable, _ in assignments]
    try:
        for variable, value in assignments:
            variable.assign(tf.cast(value, variable.dtype))
    except BaseException:
        for variable, value in before:
            variable.assign(value)
        raise


class RecalibrateAfterTraining(keras.callbacks.Callback):
    """Recalibrates the model when training ends and, optionally, before each validation.

    Use it if training ends with weights other than those that the moving statistics were collected for:
    averaged weights (``use_ema=True``, `keras.callbacks.SwapEMAWeights`), restored weights, or the last
    weights with a momentum that lags. It works in `keras.Model.fit` and in `tfbn.TrainingLoop`.

    Callbacks run in order. Put it after callbacks that exchange weights, such as
    `keras.callbacks.SwapEMAWeights` and `keras.callbacks.EarlyStopping`, and before those that save.

    Training continues from the statistics that a validation used, so a checkpoint of that epoch
    reproduces the validation.

    Args:
        data: As in `tfbn.recalibrate`. It must be readable several times if it is used before validations.
        before_validation: Whether to recalibrate before each validation, too.
        **options: Further arguments of `tfbn.recalibrate`.

    Attributes:
        result: The `Recalibration` that the last recalibration returned; None before the first.

    Raises:
        TypeError: If `tfbn.recalibrate` does not have one of the options.

    Example:
        >>> model.compile(keras.optimizers.Adam(use_ema=True), loss)
        >>> model.fit(x, y, callbacks=[tfbn.RecalibrateAfterTraining(x)])
    """

    def __init__(self, data: Any, before_validation: bool = False, **options: Any):
        super().__init__()
        inspect.signature(recalibrate).bind(None, data, **options)
        self.result: Recalibration | None = None
        self._data = data
        self._options = {"verbose": 0, **options}  # `fit` has a bar of its own.
        self._before_validation = before_validation
        self._training = False

    def on_train_begin(self, logs: Any = None) -> None:
        """Remembers that validations belong to training from now on."""
        self._training = True

    def on_test_begin(self, logs: Any = None) -> None:
        """Recalibrates before a validation, if requested."""
        if self._training and self._before_validation:
            self._recalibrate()

    def on_train_end(self, logs: Any = None) -> None:
        """Recalibrates the model."""
        self._training = False
        self._recalibrate()

    def _recalibrate(self) -> None:
        self.result = recalibrate(self.model, self._data, **self._options)
