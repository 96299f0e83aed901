"""Noise as a regularizer.

L13: the noise of the statistics regularizes slightly; a larger mini-batch reduces the effect, and batch norm
should not be used as a regularizer.

A smaller mini-batch also makes the gradient noisier. So that only the statistics differ, all networks train on
batches of 256, in which each group of m examples is normalized separately, as if it were a mini-batch of m.
"""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np

import tfbn
from examples.lectures import style
from examples.lectures.networks import Networks
from examples.lectures.result import Claim, Result, bands
from examples.lectures.setting import Images, Setting

BATCH = 256
SIZES = (4, 8, 16, 32, 64, 128, BATCH)


def run(setting: Setting) -> Result:
    sizes, records = setting.pick(SIZES, SIZES[::3]), []
    for size in sizes:
        networks = Networks(setting, normalized_in_groups_of(size))
        networks.begin(learning_rate=0.3)
        networks.train(setting.pick(500, 5), BATCH)
        sets = (setting.train, setting.test)
        losses = [cross_entropy(networks, images) for images in sets]
        records.append([*losses, 100 * networks.accuracy()])
    training, test, accuracy = np.transpose(records, (1, 2, 0))  # (seeds, sizes) each
    gap = test - training
    growth = [np.polyfit(np.log2(sizes), one, 1)[0] / one[-1] for one in gap]
    gained = accuracy[:, :-1].max(axis=1) - accuracy[:, -1]
    claims = [
        Claim(
            "L13",
            "The noise regularizes, and a larger mini-batch makes the effect smaller",
            f"growth of the gap (test loss minus training loss) per doubling of m, relative to the gap at {BATCH}",
            100 * np.array(growth),
            unit="%",
            above=0,
        ),
        Claim(
            "L13",
            "The effect is slight and does not replace a regularizer",
            f"test accuracy at the best m minus that at m = {BATCH}",
            gained,
            unit="% points",
            at_most=1,
        ),
    ]
    gaps, losses = bands(gap)[1], bands(test)[1]
    best = int(losses.argmin())
    seen = (
        f"Normalized in groups of {sizes[0]}, the median network has a gap of {gaps[0]:.4f} nats between the test and "
        f"the training loss; normalized over the whole batch of {BATCH}, it has {gaps[-1]:.4f}. The test loss is "
        f"lowest with groups of {sizes[best]}: {losses[best]:.4f} nats, compared with {losses[-1]:.4f} for {BATCH} "
        f"and {losses[0]:.4f} for {sizes[0]}."
    )
    numbers = {"sizes": sizes, "training": training, "test": test, "accuracy": accuracy}
    return Result("Noise as a regularizer", claims, seen, numbers, setting.to_dict())


def normalized_in_groups_of(size: int) -> Callable[..., Any]:
    """Returns the function with which `Networks` builds a hidden layer."""

    def hidden(a: Any, linear: Callable[..., Any], width: int) -> Any:
        normalize = tfbn.BatchNormalization(momentum=0.9, virtual_batch_size=size)
        return keras.layers.Activation("sigmoid")(normalize(linear(width, use_bias=False)(a)))

    return hidden


def cross_entropy(networks: Networks, images: Images) -> np.ndarray:
    """Returns the mean loss of each network in inference mode, over at most 10,000 images."""
    (logits,) = networks.probe([networks.model])(images.images[:10000])
    labels = np.tile(images.labels[:10000], (networks.number, 1))
    losses = keras.losses.sparse_categorical_crossentropy(labels, logits, from_logits=True)
    return losses.numpy().mean(axis=1)


def draw(result: Result) -> style.Figure:
    figure = style.figure()
    losses, gap = figure.subplots(1, 2)
    numbers, sizes = result.numbers, result.numbers["sizes"]
    training, test = np.array(numbers["training"]), np.array(numbers["test"])
    style.band(losses, sizes, test, **style.WITHOUT | {"label": "test set"})
    style.band(losses, sizes, training, **style.WITH | {"label": "training set"})
    style.band(gap, sizes, test - training, color=style.BLACK, marker="D")
    losses.legend()
    losses.set_ylim(bottom=0)
    x = "examples normalized together, m"
    style.label(losses, x, "cross-entropy (nats)", "Loss after training")
    style.label(gap, x, "cross-entropy (nats)", "Gap: test set minus training set")
    for axes in (losses, gap):
        axes.set_xscale("log")
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.minorticks_off()
    return figure
