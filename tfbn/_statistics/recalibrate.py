"""Moving statistics of the whole data set, in place of an average over past batches."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfbn._data.multi_pass import MultiPassReader
from tfbn._models.walk import BatchNormLayer, name_of, statistics_are_frozen
from tfbn._statistics.layer_call import LayerCall, merge_calls
from tfbn._statistics.measure import Forward
from tfbn._statistics.plan import plan_passes
from tfbn._support import tables


@dataclasses.dataclass(frozen=True)
class LayerChange:
    """What became of one layer.

    Attributes:
        layer: Its name, after those of the models it is in.
        outcome: "recalibrated"; or why it was left as it was: "frozen", "not called" or, where masks
            show no value at all, "masked".
        calls: How often the model calls it.
        values: How many values stand behind each channel, of all calls; the mean over the channels.
        mean_shift: How far the mean moved, in standard deviations of the new statistics: the root
            mean square over the channels.
        variance_ratio: The new variance over the old one, the geometric mean over the channels.
    """

    layer: str
    outcome: str
    calls: int = 0
    values: float = 0.0
    mean_shift: float = 0.0
    variance_ratio: float = 1.0


@dataclasses.dataclass(frozen=True)
class Recalibration:
    """What `recalibrate` did. It prints as a table.

    Attributes:
        upstream: As given.
        passes: How many passes over the data it took.
        batches: How many batches a pass had.
        examples: How many examples they held.
        layers: What became of each layer.
    """

    upstream: str
    passes: int
    batches: int
    examples: int
    layers: tuple[LayerChange, ...]

    def to_dict(self) -> dict[str, Any]:
        """All of it in plain Python, ready for JSON."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        title = (
            f"Batch normalization recalibrated on {self.examples} examples in {self.batches} batches, "
            f"{self.passes} {'pass' if self.passes == 1 else 'passes'}"
        )
        header = ["layer", "outcome", "calls", "values", "mean moved by", "variance times"]
        rows = [
            [
                change.layer,
                change.outcome,
                str(change.calls),
                f"{change.values:.0f}",
                f"{change.mean_shift:.3g} σ",
                f"{change.variance_ratio:.3g}",
            ]
            for change in self.layers
        ]
        return tables.text(title, header, rows)


def recalibrate(
    model: keras.layers.Layer,
    data: Any,
    *,
    upstream: str = "population",
    forward: Forward | None = None,
    steps: int | None = None,
    batch_size: int | None = None,
    include_frozen: bool = False,
    verbose: bool = False,
) -> Recalibration:
    r"""Sets the moving statistics of all batch normalization layers to those of a whole data set.

    It is the original paper's rule for test time, the mean and variance of the whole training
    set, and the cure wherever the moving average is not what the model needs: too few updates or a
    momentum that lags, weights that were averaged or loaded, data of another domain (its labels are
    not needed), a bad batch. Stock `keras.layers.BatchNormalization` layers and ours are served
    alike. For each channel over all :math:`N` values in the data,

    .. math:: \mu = \frac1N \sum_i x_i, \quad \sigma^2 = \frac1N \sum_i (x_i - \mu)^2

    - ``upstream="population"`` is exact: what one training-mode forward pass with all data as a
      single batch would compute, for any way of cutting the data into batches, without holding it
      in memory. A layer's inputs depend on the statistics of those before it, so this takes one
      pass over the data for each layer of the longest chain of layers that feed each other;
      layers beside each other share a pass, and a pass runs only the part of the model before its
      layers, half of it on average.
    - ``upstream="batch"`` takes one pass: the layers before see the statistics of each batch, as
      they do in training. Cut the data as in training. The statistics are pooled exactly all the
      same, for unequal batches too.

    All other layers (dropout among them) run in inference mode.

    A layer that is called several times gets the statistics of all its calls together; in the
    passes each call is normalized by its own, as it is in training. With ``renorm`` the statistics
    that its corrections pull towards are set too: both corrections become the identity. A virtual
    batch size makes no difference: what is sought does not depend on batches. To see upstream layers
    normalize by virtual batches, feed ``upstream="batch"`` batches of that size. With
    ``momentum=None`` the result counts as the average over the batches of one pass, to be continued.
    Under a `tf.distribute` strategy each replica takes a share of every batch, and statistics are those
    of all shares. (With ``upstream="batch"`` it normalizes its share by itself or, where the layer is
    synchronized, with the others.) Each worker calls it with the same data, as `tfbn.TrainingLoop` demands,
    and all of them get the same bits.

    Args:
        model: A Keras model or layer. It is built if it is not; otherwise, only the moving
            statistics change.
        data: A `tf.data.Dataset`; arrays; a `keras.utils.PyDataset`; an iterable of batches, or a
            function that returns one, such as a generator function. Batches are ``x``, ``(x, y)`` or
            ``(x, y, sample_weight)``, of which only ``x`` is used: a tensor, or a tuple or dict of
            them for several inputs. A tuple of as many tensors as the model has inputs, the first of
            which is a tensor, is taken as ``x``. Every pass must see the same examples.
        upstream: "population" or "batch".
        forward: ``forward(model, batch)`` runs the model on a batch, in inference mode; by default
            ``model(x, training=False)``. For models with keyword arguments or a method of their own.
        steps: How many batches to use; by default all. Endless data needs it.
        batch_size: For arrays; 32 by default.
        include_frozen: Whether layers are recalibrated whose statistics stand still
            (``trainable=False``, or `tfbn.freeze`). By default they are left as they are, and what
            feeds on them sees what they give.
        verbose: Whether to show a progress bar, and print the result.

    Returns:
        What became of each layer.

    Raises:
        TypeError: If `model` is no Keras model or layer, or the data of no kind that is known.
        ValueError: For an argument out of range; a model without batch normalization, with frozen
            ones only, or which calls none; data without examples, without end, that ends before
            ``steps`` batches, that can be read only once, or changes between two passes; inputs that
            are not finite; a layer in a loop of the graph (``upstream="population"`` only).

    Whatever it raises, Ctrl-C included, the model is as it was.

    Reference:
        - Ioffe and Szegedy, `Batch Normalization <https://arxiv.org/abs/1502.03167>`_, 2015,
          algorithm 2: statistics of the population at test time.
        - Wu and Johnson, `Rethinking "Batch" in BatchNorm <https://arxiv.org/abs/2105.07576>`_, 2021,
          section 3, for the pooled single pass.
        - Chan, Golub and LeVeque, Algorithms for computing the sample variance. The American
          Statistician 37(3), 1983, for the merging.
    """
    feed = MultiPassReader(data, steps, batch_size, verbose)
    layers, population = plan_passes(model, feed, upstream, forward, include_frozen=include_frozen)
    feed.expect(population.passes)
    population.measure(feed.read)
    changes, assignments = [], []
    for layer in layers:
        sites = [site for site in population.sites if site.layer is layer]
        change, values = _outcome(layer, sites, feed.batches, include_frozen)
        changes.append(change)
        assignments += values
    with population.strategy.scope():
        _assign(assignments)
    result = Recalibration(upstream, population.passes, feed.batches, feed.examples, tuple(changes))
    if verbose:
        print(result)
    return result


Assignment = tuple[Any, Any]


def _outcome(
    layer: BatchNormLayer, sites: Sequence[LayerCall], batches: int, include_frozen: bool
) -> tuple[LayerChange, list[Assignment]]:
    """What to report of a layer, and the new values of its weights."""
    name = name_of(layer)
    if statistics_are_frozen(layer) and not include_frozen:
        return LayerChange(name, "frozen"), []
    if not sites:
        return LayerChange(name, "not called"), []
    count, mean, variance = merge_calls(sites)
    seen = count > 0
    if not seen.any():
        return LayerChange(name, "masked", len(sites)), []
    old_mean, old_variance = (
        np.asarray(keras.ops.convert_to_numpy(weight), np.float64)
        for weight in (layer.moving_mean, layer.moving_variance)
    )
    mean, variance = np.where(seen, mean, old_mean), np.where(seen, variance, old_variance)
    stddev = np.sqrt(variance + layer.epsilon)
    values: list[Assignment] = [(layer.moving_mean, mean), (layer.moving_variance, variance)]
    if getattr(layer, "renorm", False):  # Keras's layer of 3.8 has no renorm
        values += [
            (layer.moving_stddev, stddev),
            (layer.renorm_mean, mean),
            (layer.renorm_stddev, stddev),
        ]
    if layer.momentum is None:
        values.append((layer.update_count, batches))
    logarithm = np.log(stddev**2) - np.log(np.maximum(old_variance + layer.epsilon, 0))
    change = LayerChange(
        layer=name,
        outcome="recalibrated",
        calls=len(sites),
        values=float(np.mean(count)),
        mean_shift=float(np.sqrt(np.mean(np.square((mean - old_mean) / stddev)))),
        variance_ratio=float(np.exp(np.mean(logarithm))),
    )
    return change, values


def _assign(assignments: Sequence[Assignment]) -> None:
    """Gives variables their values: all of them, or whatever happens none."""
    before = [(variable, keras.ops.convert_to_numpy(variable)) for variable, _ in assignments]
    try:
        for variable, value in assignments:
            variable.assign(tf.cast(value, variable.dtype))
    except BaseException:
        for variable, value in before:
            variable.assign(value)
        raise
