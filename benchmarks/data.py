"""The data that every contender receives: the same in each process."""

import math
from dataclasses import dataclass

import numpy as np

from benchmarks.cases import DEPTH, LayerCase

# Drawing a GPU's tensors takes seconds: repeat a short sequence whose length shifts it against the channels.
_MOST_DRAWN, _DRAWN = 2**24, 2**20 + 1

MOMENTUM = 0.9
EPSILON = 1e-3


@dataclass(frozen=True)
class Parameters:
    """One layer's weights, in Keras's order."""

    gamma: np.ndarray
    beta: np.ndarray
    moving_mean: np.ndarray
    moving_variance: np.ndarray


def tensors(case: LayerCase) -> tuple[np.ndarray, np.ndarray]:
    """Returns the input and the upstream gradient, in float32."""
    random = np.random.default_rng(0)

    def normal() -> np.ndarray:
        if math.prod(case.shape) <= _MOST_DRAWN:
            return random.standard_normal(case.shape, np.float32)
        return np.resize(random.standard_normal(_DRAWN, np.float32), case.shape)

    x = normal()
    x *= 2
    x += 0.5
    return x, normal()


def parameters(case: LayerCase) -> list[Parameters]:
    """Returns the weights of each layer of the stack; no layer is the identity, and none explodes."""
    random = np.random.default_rng(1)
    channels = case.shape[case.axis]
    return [
        Parameters(
            random.uniform(0.8, 1.2, channels).astype(np.float32),
            random.uniform(-0.1, 0.1, channels).astype(np.float32),
            random.uniform(-0.1, 0.1, channels).astype(np.float32),
            random.uniform(0.8, 1.2, channels).astype(np.float32),
        )
        for _ in range(DEPTH)
    ]
