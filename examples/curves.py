"""Learning curves as a picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from examples.extras import from_extra

with from_extra("plots"):
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

# Okabe and Ito's blue and vermilion, which colour-blind readers can tell apart; the dashes help in print.
TRAINING = {"color": "#0072B2", "linestyle": "-", "label": "training set"}
TEST = {"color": "#D55E00", "linestyle": "--", "label": "test set"}


def plot(history: Mapping[str, Sequence[float]], path: Path, title: str) -> None:
    """Draws loss and accuracy against epochs.

    Args:
        history: For each epoch `loss`, `accuracy`, `val_loss`, `val_accuracy`, as in Keras's History.
        path: Where to write the PNG.
        title: The title of the picture.
    """
    figure = Figure(figsize=(10, 4), dpi=120, layout="constrained")
    figure.suptitle(title)
    loss, accuracy = figure.subplots(1, 2)
    for axes, key, unit in ((loss, "loss", 1), (accuracy, "accuracy", 100)):
        epochs = range(1, len(history[key]) + 1)
        for values, style in ((history[key], TRAINING), (history[f"val_{key}"], TEST)):
            axes.plot(epochs, [unit * v for v in values], marker="o", markersize=3, **style)
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.legend()
    loss.set_ylabel("cross-entropy (nats)")
    loss.set_yscale("log")
    accuracy.set_ylabel("accuracy (%)")
    figure.savefig(path)
