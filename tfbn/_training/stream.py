"""The batches of all epochs in order, from any position."""

from collections.abc import Iterator
from typing import Any

import keras
import tensorflow as tf

from tfbn._data.sources import Source, as_source, spec_of

Position = tuple[int, int]
"""The number of the pass over the data, and the number of its batches that were consumed."""


class Stream:
    """The batches of a source, epoch by epoch.

    An epoch is one pass over the source or, with `steps_per_epoch`, that many batches: a pass then may span
    several epochs, and an epoch several passes.

    Args:
        name: The name of the argument that the data came in, for errors.
        source: The data.
        steps_per_epoch: The number of batches per epoch, or `None`.
    """

    def __init__(self, name: str, source: Source, steps_per_epoch: int | None = None):
        if steps_per_epoch is None and source.endless:
            raise ValueError(
                f"`{name}` is endless. Say how many batches to take: steps_per_epoch for training, "
                "validation_steps for validation, steps for evaluation. Received: None."
            )
        self.source = source
        self.steps = source.steps if steps_per_epoch is None else steps_per_epoch
        """The number of batches per epoch, if known."""
        self.spec = source.spec
        """A nested `tf.TypeSpec` that fits the last batch and, where it can, the batches before it."""
        self.position: Position = (0, 0)
        self._name = name
        self._steps_per_epoch = steps_per_epoch
        self._batches: Iterator[Any] | None = None
        self._ahead: Any = None

    def open(self, position: Position = (0, 0)) -> None:
        """Moves to a position and reads one batch ahead, which shows its spec.

        Raises:
            ValueError: If the data ends before it.
        """
        self.position = (position[0], 0)
        while self.position[1] < position[1]:
            if self._next() is None:
                raise ValueError(
                    f"`{self._name}` ended before the position where training was interrupted, so it is not "
                    f"the data of the interrupted run. Received: {self.position[1]} batches in pass "
                    f"{position[0]}, of which {position[1]} were trained on."
                )
        self._ahead = self._next()
        if self._ahead is not None:
            self.position = position
        elif position[1] == 0:
            raise ValueError(
                f"`{self._name}` has no batches. If it is a generator, it may be used up: create a new one. "
                f"Received: {self._name} with 0 batches."
            )

    def epoch(self, done: int = 0) -> Iterator[Any]:
        """Yields the batches of one epoch, without the first `done`.

        Yields fewer, or none, only if the data has run out for good.
        """
        while self._steps_per_epoch is None or done < self._steps_per_epoch:
            batch = self._next()
            if batch is None:
                self._next_pass()
                batch = None if self._steps_per_epoch is None else self._next()
            if batch is None:
                return
            done += 1
            yield batch

    @property
    def ahead(self) -> Any:
        """The batch that `open` read ahead, until `epoch` yields it."""
        return self._ahead

    @property
    def can_restart(self) -> bool:
        """Whether there is data for another epoch."""
        return self.source.replays or self._steps_per_epoch is not None

    def restart(self) -> None:
        """Starts a new pass, unless one has just started: every evaluation begins with the first batch."""
        if self.position[1] and self.source.replays:
            self._next_pass()

    def skip_epochs(self, number: int) -> None:
        """Reads past whole epochs."""
        for _ in range(number):
            for _ in self.epoch():
                pass

    def _next_pass(self) -> None:
        self.position = (self.position[0] + 1, 0)
        self._batches = self._ahead = None

    def _next(self) -> Any:
        if self._ahead is not None:
            batch, self._ahead = self._ahead, None
        else:
            if self._batches is None:
                self._batches = self.source.start(self.position[0])
            batch = next(self._batches, None)
        if batch is not None:
            self.position = (self.position[0], self.position[1] + 1)
            if self.source.spec is None:
                self.spec = _common_spec(self.spec, spec_of(batch))
        return batch


def with_targets(data: Any, y: Any, sample_weight: Any) -> Any:
    """Joins inputs, targets and weights that were passed one by one."""
    if y is None and sample_weight is None:
        return data
    if y is None or isinstance(data, tf.data.Dataset | keras.utils.PyDataset | Iterator):
        raise ValueError(
            "`y` and `sample_weight` belong to arrays: pass fit(x, y) or fit(x, y, sample_weight=...). Data that "
            f"comes in batches carries its own. Received: data of type {type(data).__name__}, y of type "
            f"{type(y).__name__} and sample_weight of type {type(sample_weight).__name__}."
        )
    return (data, y) if sample_weight is None else (data, y, sample_weight)


def stream_of(
    name: str,
    data: Any,
    steps: int | None,
    batch_size: int | None,
    shuffle: bool = False,
    seed: int = 0,
) -> Stream:
    """The stream of data of any supported kind, as the argument of this name."""
    return Stream(name, as_source(name, data, batch_size or 32, shuffle, seed), steps)


def _common_spec(known: Any, new: Any) -> Any:
    """Returns a spec that fits `new`, and `known` too where the two differ only in sizes.

    Returns the same object as long as it fits, so that its compiled step is found at once.
    """
    if new == known:
        return known
    try:
        tf.nest.assert_same_structure(known, new)
    except (TypeError, ValueError):
        return new
    both = tf.nest.map_structure(_with_open_sizes, known, new)
    return known if both == known else both


def _with_open_sizes(known: Any, new: Any) -> Any:
    if not isinstance(known, tf.TensorSpec) or not isinstance(new, tf.TensorSpec):
        return new
    if known.shape.rank != new.shape.rank:  # Their supertype has no rank, but layers need one.
        return new
    return known.most_specific_common_supertype([new]) or new
