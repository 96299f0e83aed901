"""What an experiment is run on: the data, the seeds, and whether it is in earnest."""

import dataclasses
import functools
from typing import Any, NamedTuple, TypeVar

import numpy as np

T = TypeVar("T")


class Images(NamedTuple):
    """Flat images, float32 in [0, 1], (number, pixels), and their labels, int64, (number,)."""

    images: np.ndarray
    labels: np.ndarray


@dataclasses.dataclass(frozen=True)
class Setting:
    """What the command line says.

    Attributes:
        dataset: Of `examples.datasets.DATASETS`.
        seeds: Over how many seeds each number is measured.
        quick: Whether the experiment is to be tried only, in seconds.
    """

    dataset: str = "digits"
    seeds: int = 5
    quick: bool = False

    def pick(self, full: T, quick: T) -> T:
        """The first in earnest, the second with `--quick`."""
        return quick if self.quick else full

    @property
    def train(self) -> Images:
        """The training set, in a fixed order."""
        return _load(self.dataset)[0]

    @property
    def test(self) -> Images:
        """The test set, in a fixed order."""
        return _load(self.dataset)[1]

    @property
    def pixels(self) -> int:
        """Inputs of a network."""
        return self.train.images.shape[1]

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return dataclasses.asdict(self)


@functools.cache
def _load(dataset: str) -> tuple[Images, Images]:
    from examples import datasets

    data = datasets.load(dataset)
    train, test = (
        next(iter(part.batch(len(part)).as_numpy_iterator())) for part in (data.train, data.test)
    )
    return tuple(
        Images(images.reshape(len(images), -1), labels) for images, labels in (train, test)
    )
