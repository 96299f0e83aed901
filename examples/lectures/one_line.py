"""One line of a framework.

Runs a program that builds a network, with and without its line of batch norm: 3 hidden layers of 100 sigmoid
units, Adam with Keras's defaults, batches of 60.

L8: a framework provides batch norm in one line.
"""

import keras
import numpy as np

import tfbn
from examples.lectures import style
from examples.lectures.result import Claim, Result
from examples.lectures.setting import Setting

PROGRAM = """\
model = keras.Sequential()
for width in (100, 100, 100):
    model.add(keras.layers.Dense(width))
    model.add(tfbn.BatchNormalization(momentum=0.9))
    model.add(keras.layers.Activation("sigmoid"))
model.add(keras.layers.Dense(10))
"""


def run(setting: Setting) -> Result:
    whole = PROGRAM.splitlines()
    programs = {"with": whole, "without": [line for line in whole if "tfbn" not in line]}
    epochs = setting.pick(10, 2)
    accuracy = {
        key: 100 * np.array([train(setting, lines, s, epochs) for s in range(setting.seeds)])
        for key, lines in programs.items()
    }
    gain = (accuracy["with"] - accuracy["without"])[:, -1]
    lines = len(programs["with"]) - len(programs["without"])
    claims = [
        Claim("L8", "It takes one line", "lines added", [lines] * setting.seeds, at_most=1),
        Claim(
            "L8",
            "That line is all it takes",
            f"test accuracy after {epochs} epochs, with minus without",
            gain,
            unit="% points",
            above=0,
        ),
    ]
    seen = (
        f"With batch norm, a program of {len(programs['with'])} lines, the median network reaches "
        f"{np.median(accuracy['with'][:, 0]):.1f} % test accuracy after the first epoch and "
        f"{np.median(accuracy['with'][:, -1]):.1f} % after {epochs}. Without it, "
        f"{len(programs['without'])} lines, it reaches {np.median(accuracy['without'][:, 0]):.1f} % and "
        f"{np.median(accuracy['without'][:, -1]):.1f} %."
    )
    numbers = {"program": whole, "accuracy": accuracy}
    return Result("One line of a framework", claims, seen, numbers, setting.to_dict())


def train(setting: Setting, program: list[str], seed: int, epochs: int) -> list[float]:
    """Returns the test accuracy of the program's network after each epoch."""
    scope = {"keras": keras, "tfbn": tfbn}
    keras.utils.set_random_seed(seed)
    exec("\n".join(program), scope)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    loop = tfbn.TrainingLoop(scope["model"], "adam", loss, metrics=["accuracy"])
    history = loop.fit(
        tuple(setting.train),
        validation_data=tuple(setting.test),
        epochs=epochs,
        batch_size=60,
        seed=seed,
        verbose=0,
    )
    return history.history["val_accuracy"]


def draw(result: Result) -> style.Figure:
    figure = style.figure(3.2)
    text, axes = figure.subplots(1, 2, width_ratios=(1.3, 1))
    text.axis("off")
    program = result.numbers["program"]
    for row, line in enumerate(program):
        added = "tfbn" in line
        text.text(
            0,
            0.85 - 0.12 * row,
            line,
            family="monospace",
            fontsize=9,
            color=style.BLUE if added else style.BLACK,
            weight="bold" if added else "normal",
        )
    for key, look in (("with", style.WITH), ("without", style.WITHOUT)):
        curves = np.array(result.numbers["accuracy"][key])
        label = "with the blue line" if key == "with" else "without it"
        style.band(axes, range(1, curves.shape[1] + 1), curves, **look | {"label": label})
    axes.legend(loc="lower right")
    style.label(axes, "epochs", "test accuracy (%)")
    return figure
