"""Why training looks good and validation does not: the moving statistics under examination."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfbn._data.multi_pass import MultiPassReader
from tfbn._models.intercept import calls_replaced, isolated_tracing
from tfbn._models.walk import BatchNormLayer, batch_norm_layers, name_of, statistics_are_frozen
from tfbn._statistics.diagnose.evidence import (
    SUMMARIES,
    LayerEvidence,
    compared,
    stored,
    within_batches,
)
from tfbn._statistics.diagnose.findings import ModelEvidence, find
from tfbn._statistics.diagnose.report import Diagnosis
from tfbn._statistics.layer_call import NotFiniteError
from tfbn._statistics.measure import Forward, StatisticsPasses
from tfbn._statistics.plan import plan_passes, run_model, unpacked
from tfbn._support.optimizers import unwrap_optimizer

TINY = 10.0
"""Batches of so few values of a channel show whether a variance is the biased one."""


def diagnose(
    model: keras.layers.Layer,
    data: Any,
    *,
    upstream: str = "population",
    forward: Forward | None = None,
    steps: int | None = None,
    batch_size: int | None = None,
    include_frozen: bool = False,
    verbose: bool = False,
) -> Diagnosis:
    r"""Compares the moving statistics of a model with those of a data set, and says what is wrong.

    For each batch normalization layer, Keras's or ours: how far the moving mean is from the true one, in
    units of :math:`\sigma`, and the moving variance, as a logarithm of their ratio; how much the means of
    batches differ; constant channels, dead gammas, values that are not finite or negative; whether it was
    ever updated, and whether and why it is frozen. For the model, if it is compiled and the data has
    labels: the loss and the metrics in training mode, in inference mode, and as they would be after
    `tfbn.recalibrate`, on the same data. Each finding names the call that cures it.

    The data should be what the model is to be used on, labels or not; a part of the training set to look
    for faults of the training. If it comes in the batches of the training, and these are tiny, it also
    shows which variance was kept, the biased or the unbiased one. Nothing of the model changes.
    Under a `tf.distribute` strategy, each worker calls it with the same data, as it trains; with more than one
    replica there are no losses, and a batch is what a layer normalizes together, a replica's share or all of it.

    It takes the passes of `tfbn.recalibrate`, three more for the losses, and one more if batches are tiny:
    use ``steps`` or ``upstream="batch"`` where that is much.

    Args:
        model: A Keras model or layer. It is built if it is not.
        data: As in `tfbn.recalibrate`.
        upstream: As in `tfbn.recalibrate`: what the true statistics are.
        forward: As in `tfbn.recalibrate`. With it, the flags that the model passes on are not examined.
        steps: How many batches to use; by default all.
        batch_size: For arrays; 32 by default.
        include_frozen: Whether frozen layers are compared with the data too, as if they were recalibrated.
        verbose: Whether to show a progress bar, and print the result.

    Returns:
        The diagnosis: print it, look at its ``findings``, or use ``to_dict``, ``to_markdown`` and ``plot``.

    Raises:
        TypeError: As `tfbn.recalibrate`.
        ValueError: As `tfbn.recalibrate`; but inputs that are not finite are a finding.
    """
    feed = MultiPassReader(data, steps, batch_size, verbose)
    layers, population = plan_passes(
        model, feed, upstream, forward, include_frozen=include_frozen, summaries=SUMMARIES
    )
    replicas = population.strategy.num_replicas_in_sync
    scored = _has_loss(model, feed, replicas)
    feed.expect(population.passes + 3 * scored)
    passes = population.passes
    modes: dict[str, dict[str, float]] = {}
    trouble = ""
    try:
        population.measure(feed.read)
    except NotFiniteError as error:
        trouble = str(error)
    if scored and not trouble:
        modes = _scores(model, feed, population)
        passes += len(modes)
    evidence = []
    for layer in layers:
        sites = [site for site in population.sites if site.layer is layer]
        if not sites or not all(site.found for site in sites):
            evidence.append(stored(layer, len(sites)))
        else:
            # A layer that is not synchronized normalizes the share of each replica by itself.
            alone = 1 if getattr(layer, "synchronized", False) else replicas
            evidence.append(compared(layer, sites, alone * feed.batches))
    if any(1 < layer.values_per_batch <= TINY for layer in evidence) and not trouble:
        evidence = _with_batches(model, feed, forward, include_frozen, layers, evidence, passes)
        passes += 1
    whole = ModelEvidence(
        modes=modes,
        averaged=_averages(model),
        not_finite=trouble,
        **({} if forward is not None else _flags(model, layers, feed.spec)),
    )
    diagnosis = Diagnosis(
        find(evidence, whole), tuple(evidence), modes, passes, feed.batches, feed.examples
    )
    if verbose:
        print(diagnosis)
    return diagnosis


def _with_batches(
    model: keras.layers.Layer,
    feed: MultiPassReader,
    forward: Forward | None,
    include_frozen: bool,
    layers: Sequence[BatchNormLayer],
    evidence: Sequence[LayerEvidence],
    first_pass: int,
) -> list[LayerEvidence]:
    """Adds what one more pass, with each batch normalized by itself, tells about tiny batches."""
    _, population = plan_passes(
        model, feed, "batch", forward, include_frozen=include_frozen, summaries=SUMMARIES
    )
    population.measure(lambda number: feed.read(first_pass + number))
    extended = []
    for layer, known in zip(layers, evidence, strict=True):
        if 1 < known.values_per_batch <= TINY and not known.not_finite and not known.negative:
            sites = [site for site in population.sites if site.layer is layer]
            known = dataclasses.replace(known, within_batch=within_batches(layer, sites))
        extended.append(known)
    return extended


def _has_loss(model: keras.layers.Layer, feed: MultiPassReader, replicas: int) -> bool:
    """Whether a loss can be computed: the model is compiled, there are labels, and one replica."""
    _, y, _ = unpacked(model, feed.spec)
    return getattr(model, "compiled", False) and y is not None and replicas == 1


def _scores(
    model: keras.Model, feed: MultiPassReader, population: StatisticsPasses
) -> dict[str, dict[str, float]]:
    """The loss and the metrics in each mode. The model's own metrics are left as they were."""
    before = [(variable, variable.numpy()) for variable in model.metrics_variables]
    scores = {}
    try:
        for number, mode in enumerate(("training", "inference", "recalibrated")):
            scores[mode] = _score(model, feed, population, mode, population.passes + number)
    finally:
        for variable, value in before:
            variable.assign(value)
    return scores


def _score(
    model: keras.Model, feed: MultiPassReader, population: StatisticsPasses, mode: str, number: int
) -> dict[str, float]:
    def step(batch: Any) -> tf.Tensor:
        x, y, weight = unpacked(model, batch)
        if mode == "inference":
            outputs = population.forward(model, batch)
        else:
            upstream = "batch" if mode == "training" else "population"
            outputs = population.predict(batch, upstream)
        model.compute_metrics(x, y, outputs, weight)
        return model.compute_loss(x=x, y=y, y_pred=outputs, sample_weight=weight, training=False)

    model.reset_metrics()
    compiled: dict[Any, Any] = {}
    total = 0.0
    for batch, spec in feed.read(number):
        key = tuple(tf.nest.flatten(spec))
        if key not in compiled:
            with isolated_tracing():
                compiled[key] = tf.function(step, autograph=False).get_concrete_function(spec)
        size = feed.size(batch)
        if size:
            total += size * float(compiled[key](batch))
    results = {name: float(np.mean(value)) for name, value in model.get_metrics_result().items()}
    return {**results, "loss": total / feed.examples}


def _averages(model: keras.layers.Layer) -> bool:
    """Whether the model's optimizer keeps averages of the weights."""
    return bool(getattr(unwrap_optimizer(getattr(model, "optimizer", None)), "use_ema", False))


def _flags(
    model: keras.layers.Layer, layers: Sequence[BatchNormLayer], spec: Any
) -> dict[str, tuple[str, ...]]:
    """Which layers do not run in the mode in which the model is called."""
    live = [layer for layer in layers if layer.built and not statistics_are_frozen(layer)]
    in_inference = _received(model, live, spec, training=False)
    in_training = _received(model, live, spec, training=True)
    set_apart = {id(layer) for layer in _called_with_training_false(model)}
    return {
        "forced": tuple(name_of(layer) for layer, seen in in_inference if any(seen)),
        "ignored": tuple(
            name_of(layer)
            for layer, seen in in_training
            if seen and not any(seen) and id(layer) not in set_apart
        ),
        "overridden": tuple(
            name_of(layer) for layer, seen in in_training if any(seen) and id(layer) in set_apart
        ),
    }


def _received(
    model: keras.layers.Layer, layers: Sequence[BatchNormLayer], spec: Any, training: bool
) -> list[tuple[BatchNormLayer, list[bool]]]:
    """The `training` that each call of each layer receives."""
    received: dict[int, list[bool]] = {id(layer): [] for layer in layers}

    def recorded(layer: BatchNormLayer) -> Any:
        infer = layer.call

        def call(inputs: Any, training: Any = None, mask: Any = None) -> tf.Tensor:
            value = tf.get_static_value(training) if tf.is_tensor(training) else training
            received[id(layer)].append(bool(value))
            return infer(inputs, training=False, mask=mask)

        return call

    def trace(batch: Any) -> None:
        with calls_replaced([(layer, recorded(layer)) for layer in layers]):
            run_model(model, batch, training)

    with isolated_tracing():
        tf.function(trace, autograph=False).get_concrete_function(spec)
    return [(layer, received[id(layer)]) for layer in layers]


def _called_with_training_false(model: keras.layers.Layer) -> list[BatchNormLayer]:
    """The layers in those parts of Functional models that are called with ``training=False``."""
    found: list[BatchNormLayer] = []
    if not isinstance(model, keras.Model):
        return found
    try:
        configs = model.get_config().get("layers", [])
    except NotImplementedError:  # A subclassed model: what it calls how stands in its code alone.
        configs = []
    for config in configs:
        nodes = config.get("inbound_nodes", [])
        if any(node["kwargs"].get("training") is False for node in nodes):
            found += batch_norm_layers(model.get_layer(config["name"]))
    for part in model.layers:
        found += _called_with_training_false(part)
    return found
