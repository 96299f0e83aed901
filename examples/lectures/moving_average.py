"""The statistics for test time.

L7: the fixed statistics are either an exponential moving average kept during training, or the mean and variance
over the entire training set.

Measures the test accuracy at several points in training: with the moving average, for Keras's momentum of 0.99 and
for 0.9, and with the statistics of the training set for the current weights (`tfbn.recalibrate`). The average
starts at mean 0 and variance 1, and averages over about 100 or 10 steps.
"""

from typing import Any

import numpy as np
import tensorflow as tf

import tfbn
from examples.lectures import style
from examples.lectures.networks import Networks
from examples.lectures.result import Claim, Result, bands
from examples.lectures.setting import Setting
from examples.models import Hidden

MOMENTA = (0.99, 0.9)


def run(setting: Setting) -> Result:
    at = setting.pick([1, 3, 10, 30, 100, 300, 1000, 2000], [5])
    found = {str(momentum): follow(setting, momentum, at) for momentum in MOMENTA}
    claims = [
        Claim(
            "L7",
            "The moving average works as well as the statistics of the training set",
            f"test accuracy after {at[-1]} steps, with the training set's statistics minus with the average of "
            f"momentum {momentum}",
            one["exact"][:, -1] - one["average"][:, -1],
            unit="% points",
            at_most=0.5,
        )
        for momentum, one in found.items()
    ]
    half = at[len(at) // 2]
    seen = ". ".join(
        f"With the average of momentum {momentum}, the median test accuracy is "
        f"{bands(one['average'])[1][at.index(half)]:.1f} % after {half} steps and "
        f"{bands(one['average'])[1][-1]:.1f} % after {at[-1]}; with the training set's statistics, "
        f"{bands(one['exact'])[1][at.index(half)]:.1f} % and {bands(one['exact'])[1][-1]:.1f} %"
        for momentum, one in found.items()
    )
    numbers = {"steps": at, "found": found}
    return Result("The statistics for test time", claims, f"{seen}.", numbers, setting.to_dict())


def follow(setting: Setting, momentum: float, at: list[int]) -> dict[str, np.ndarray]:
    """Returns the accuracies by both statistics, and the average's distance from the exact mean: (seeds, records)."""
    networks = Networks(setting, Hidden(activation="sigmoid", momentum=momentum))
    training_set = tf.data.Dataset.from_tensor_slices(setting.train.images).batch(500)
    records: list[Any] = []

    def record(step: int) -> None:
        average = networks.accuracy()
        weights, means = networks.model.get_weights(), moving_means(networks)
        tfbn.recalibrate(networks.model, training_set.map(networks.spread))
        exact, exact_means = networks.accuracy(), moving_means(networks)
        deviations = np.sqrt([layer.moving_variance.numpy() for layer in networks.normalizations()])
        networks.model.set_weights(weights)
        off = ((means - exact_means) / deviations).reshape(len(deviations), networks.number, -1)
        records.append([100 * average, 100 * exact, np.sqrt((off**2).mean(axis=(0, 2)))])

    networks.begin(learning_rate=0.3)
    networks.train(at[-1], at=at, call=record)
    average, exact, off = np.transpose(records, (1, 2, 0))
    return {"average": average, "exact": exact, "off": off}


def moving_means(networks: Networks) -> np.ndarray:
    """Returns the moving means of all layers: (layers, networks · units)."""
    return np.array([layer.moving_mean.numpy() for layer in networks.normalizations()])


def draw(result: Result) -> style.Figure:
    figure = style.figure(3.8)
    accuracy, distance = figure.subplots(1, 2)
    steps, found = result.numbers["steps"], result.numbers["found"]
    looks = (style.WITHOUT, {"color": style.GREEN, "linestyle": ":", "marker": "^"})
    for momentum, look in zip(MOMENTA, looks, strict=True):
        one, label = found[str(momentum)], {"label": f"moving average, momentum {momentum}"}
        style.band(accuracy, steps, one["average"], **look | label)
        style.band(distance, steps, one["off"], **look | label)
    # Both trained the same weights: only the moving averages differ.
    style.band(
        accuracy,
        steps,
        found[str(MOMENTA[0])]["exact"],
        **style.WITH | {"label": "whole training set"},
    )
    for axes in (accuracy, distance):
        axes.set_xscale("log")
    distance.set_yscale("log")
    figure.legend(*accuracy.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    style.label(accuracy, "training steps", "test accuracy (%)", "Test set read by")
    y = "distance of the means (σ)"
    style.label(distance, "training steps", y, "Moving average and whole training set")
    return figure
