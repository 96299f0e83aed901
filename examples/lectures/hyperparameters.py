"""Learning rates and initial scales.

Trains on a grid of learning rates and standard deviations of the initial weights, both in steps of √10. The grid
is the same for every optimizer and for networks with and without batch norm: 3 hidden layers of 50 ReLU units,
batches of 60, a short training run. A point of the grid works if the network ends at 95 % test accuracy or more.

L9: more of the grid works. L6: each of the four optimizers trains γ and β.
"""

import numpy as np

from examples.lectures import style
from examples.lectures.networks import Networks
from examples.lectures.result import Claim, Result
from examples.lectures.setting import Setting
from examples.models import Hidden

OPTIMIZERS = {
    "sgd": "gradient descent",
    "momentum": "momentum",
    "rmsprop": "RMSprop",
    "adam": "Adam",
}
RATES = 10 ** np.arange(-3, 1.5, 0.5)
GAINS = 10 ** np.arange(-1.5, 2, 0.5)  # times 1 / √inputs
GOAL = 0.95


def run(setting: Setting) -> Result:
    rates = setting.pick(RATES, RATES[2:6:3])
    accuracy = {
        name: {norm: grid(setting, name, norm, rates) for norm in ("tfbn", "none")}
        for name in setting.pick(list(OPTIMIZERS), ["momentum"])
    }
    share = {
        name: {norm: 100 * (found >= GOAL).mean((1, 2)) for norm, found in kinds.items()}
        for name, kinds in accuracy.items()
    }
    claims = [
        Claim(
            "L9",
            f"A wider range of hyperparameters works with {OPTIMIZERS[name]}",
            "share of the grid that reaches 95 %, with minus without",
            kinds["tfbn"] - kinds["none"],
            unit="% points",
            above=0,
        )
        for name, kinds in share.items()
    ]
    claims += [
        Claim(
            "L6",
            f"γ and β can be trained by {OPTIMIZERS[name]}, like the weights",
            "test accuracy at the best point of the grid",
            100 * kinds["tfbn"].max((1, 2)),
            unit="%",
            above=100 * GOAL,
        )
        for name, kinds in accuracy.items()
    ]
    seen = " ".join(
        f"{name} batch norm, the share of the grid that reaches 95 % is "
        + ", ".join(f"{np.median(s[norm]):.0f} % ({OPTIMIZERS[o]})" for o, s in share.items())
        + "."
        for name, norm in (("With", "tfbn"), ("Without", "none"))
    )
    numbers = {"rates": rates, "gains": GAINS, "accuracy": accuracy, "share": share}
    return Result("Learning rates and initial scales", claims, seen, numbers, setting.to_dict())


def grid(setting: Setting, optimizer: str, norm: str, rates: np.ndarray) -> np.ndarray:
    """Returns the test accuracy at each point of the grid: (seeds, gains, rates). All gains are trained at once."""
    networks = Networks(setting, Hidden(norm=norm), (50, 50, 50), optimizer, copies=len(GAINS))
    found = []
    for rate in rates:
        networks.begin(learning_rate=rate, gain=np.repeat(GAINS, setting.seeds))
        networks.train(setting.pick(200, 30))
        found.append(networks.accuracy().reshape(len(GAINS), setting.seeds).T)
    return np.stack(found, axis=-1)


def draw(result: Result) -> style.Figure:
    numbers = result.numbers
    rates, gains = (np.log10(numbers[key]) for key in ("rates", "gains"))
    optimizers = list(numbers["accuracy"])
    figure = style.figure(4.6)
    axes = figure.subplots(2, len(optimizers), sharex=True, sharey=True, squeeze=False)
    for column, name in enumerate(optimizers):
        for row, (norm, kind) in enumerate((("tfbn", "with batch norm"), ("none", "without"))):
            median = np.median(numbers["accuracy"][name][norm], axis=0)
            image = axes[row, column].pcolormesh(
                rates, gains, 100 * median, vmin=10, vmax=100, cmap=style.MAP
            )
            works = np.argwhere(median >= GOAL)
            axes[row, column].scatter(
                rates[works[:, 1]], gains[works[:, 0]], s=9, color=style.BLACK
            )
            share = f"{kind}: {np.median(numbers['share'][name][norm]):.0f} %"
            axes[row, column].set_title(share, fontsize="medium")
        axes[0, column].annotate(
            OPTIMIZERS[name], (0.5, 1.2), xycoords="axes fraction", ha="center", weight="bold"
        )
    figure.supxlabel("learning rate, log₁₀", fontsize="medium")
    figure.supylabel("first weights' standard deviation · √inputs, log₁₀", fontsize="medium")
    figure.colorbar(image, ax=axes, label="test accuracy (%), a dot from 95 %")
    return figure
