"""What a monitor records of each layer at one step."""

import dataclasses
import math

import numpy as np

from tfbn._statistics.diagnose.evidence import DEAD_GAMMA
from tfbn._statistics.monitor.estimate import BatchEstimate
from tfbn._statistics.monitor.snapshot import Snapshot, WatchedLayers

SATURATED = 4.0
"""How many times gamma beta must be, for practically all outputs of a channel to have the same sign."""
CAUGHT_UP = 0.01
"""The weight of the old statistics at which the moving average has caught up."""


@dataclasses.dataclass(frozen=True)
class LayerRecord:
    r"""What `tfbn.StatisticsMonitor` recorded of one layer at one step.

    Here :math:`m, v` are the moving mean and variance before the step, and :math:`\mu, \sigma^2` those of the
    batch. Numbers that could not be found out are NaN.

    Attributes:
        layer: The path of the layer.
        state: "learns", "frozen", or "refused" if the step did not update the statistics.
        mean_shift: :math:`|m - \mu| / \sqrt{\sigma^2 + \epsilon}`, the root mean square over the channels.
        variance_ratio: :math:`(v + \epsilon) / (\sigma^2 + \epsilon)`, the geometric mean over the channels.
        gamma_mean: The mean of gamma.
        gamma_spread: The standard deviation of gamma over the channels.
        beta_mean: The mean of beta.
        beta_spread: The standard deviation of beta over the channels.
        dead_channels: How many channels had a constant input since the last record, or have a gamma of 0.
        saturated_channels: In how many channels beta is so large beside gamma (4 times) that practically all
            outputs have the same sign: a ReLU after them is always off, or always on.
        refused_updates: In how many of the recorded steps so far the statistics did not change.
        initial_weight: The weight that the statistics from before the training still have.
        steps_to_catch_up: After how many more steps this weight is 1 %; 0 if it is less already,
            and with a momentum of None, 0 or 1.

    Example:
        >>> monitor = tfbn.StatisticsMonitor()
        >>> history = model.fit(images, labels, epochs=100, callbacks=[monitor], verbose=0)
        >>> [record.state for record in monitor.layers]
        ['learns']
    """

    layer: str
    state: str
    mean_shift: float
    variance_ratio: float
    gamma_mean: float
    gamma_spread: float
    beta_mean: float
    beta_spread: float
    dead_channels: int
    saturated_channels: int
    refused_updates: int
    initial_weight: float
    steps_to_catch_up: int


def records(
    layers: WatchedLayers,
    before: Snapshot,
    batch: BatchEstimate,
    constant: np.ndarray,
    refused: np.ndarray,
    initial: np.ndarray,
    per_update: np.ndarray,
) -> tuple[LayerRecord, ...]:
    """Describes the layers at one step.

    Args:
        layers: The layers.
        before: The moving statistics before the step.
        batch: What the step did to them.
        constant: Which channels have a constant input.
        refused: The number of recorded steps that updated nothing, for each layer.
        initial: The weight of the statistics from before the training, for each layer.
        per_update: How many steps an update takes, for each layer.
    """
    gamma, beta = layers.affine()
    live = batch.known & ~constant
    variance = np.maximum(batch.variance, 0) + layers.epsilon
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        shift = np.sqrt(layers.means(np.square(before.mean - batch.mean) / variance, live))
        old = np.maximum(layers.variance(before.spread), 0) + layers.epsilon
        ratio = np.exp(layers.means(np.log(old / variance), live))
    every = np.ones(len(gamma), bool)
    gamma_mean, beta_mean = layers.means(gamma, every), layers.means(beta, every)
    gamma_off = np.square(gamma - layers.to_channels(gamma_mean))
    beta_off = np.square(beta - layers.to_channels(beta_mean))
    saturated = (np.abs(beta) > SATURATED * np.abs(gamma)) & (beta != 0)
    moved = layers.sums(batch.moved) > 0
    columns = {
        "state": np.where(layers.learns, np.where(moved, "learns", "refused"), "frozen"),
        "mean_shift": shift,
        "variance_ratio": ratio,
        "gamma_mean": gamma_mean,
        "gamma_spread": np.sqrt(layers.means(gamma_off, every)),
        "beta_mean": beta_mean,
        "beta_spread": np.sqrt(layers.means(beta_off, every)),
        "dead_channels": layers.sums(constant | (np.abs(gamma) < DEAD_GAMMA)).astype(int),
        "saturated_channels": layers.sums(saturated).astype(int),
        "refused_updates": refused,
        "initial_weight": initial,
        "steps_to_catch_up": _steps_left(layers, initial, per_update),
    }
    return tuple(
        LayerRecord(layer=name, **{key: column[i].item() for key, column in columns.items()})
        for i, name in enumerate(layers.names)
    )


def _steps_left(layers: WatchedLayers, weight: np.ndarray, per_update: np.ndarray) -> np.ndarray:
    steps = np.zeros(len(weight), int)
    for index, layer in enumerate(layers.layers):
        if layer.momentum and layer.momentum < 1 and weight[index] > CAUGHT_UP:
            updates = math.log(CAUGHT_UP / weight[index]) / math.log(layer.momentum)
            steps[index] = math.ceil(updates * per_update[index])
    return steps
