"""The four optimizers of the lectures. They update γ and β as they do all weights."""

from typing import Any

import keras

DEFAULT_RATES = {"sgd": 0.1, "momentum": 0.03, "rmsprop": 0.003, "adam": 0.01}


def optimizer(name: str, learning_rate: Any = None) -> keras.optimizers.Optimizer:
    """Returns the optimizer with this name.

    Args:
        name: A key of `DEFAULT_RATES`.
        learning_rate: A number or a Keras schedule; by default, the value in `DEFAULT_RATES`.
    """
    rate = DEFAULT_RATES[name] if learning_rate is None else learning_rate
    match name:
        case "sgd":
            return keras.optimizers.SGD(rate)
        case "momentum":
            return keras.optimizers.SGD(rate, momentum=0.9)
        case "rmsprop":
            return keras.optimizers.RMSprop(rate)
        case _:
            return keras.optimizers.Adam(rate)
