"""The setting of an experiment: the data, the seeds, and whether it is a quick trial."""

import dataclasses
import functools
from typing import Any, NamedTuple, TypeVar

import numpy as np

T = TypeVar("T")


class Images(NamedTuple):
    """Flattened images, float32 in [0, 1] of shape (number, pixels), and their labels, int64 of shape (number,)."""

    images: np.ndarray
    labels: np.ndarray


@dataclasses.dataclass(frozen=True)
class Setting:
    """The options of the command line.

    Attributes:
        dataset: One of `examples.datasets.DATASETS`.
        seeds: The number of seeds for each measurement.
        quick: Whether this is a trial run of a few seconds.
    """

    dataset: str = "digits"
    seeds: int = 5
    quick: bool = False

    def pick(self, full: T, quick: T) -> T:
        """Returns the first value for a full run, and the second with `--quick`."""
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
        """The number of inputs of a network."""
        return self.train.images.shape[1]

    def to_dict(self) -> dict[str, Any]:
        """Returns the setting in plain types for JSON."""
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
