"""The batches of all epochs, one after the other, from any place on."""

from collections.abc import Iterator
from typing import Any

import tensorflow as tf

from tfbn._data.sources import Source, spec_of

Position = tuple[int, int]


class Stream:
    """The batches of a source, epoch by epoch.

    An epoch is one pass over the source. With `steps_per_epoch` it is that many batches: a pass may then
    serve several epochs, and an epoch take several passes.
    """

    def __init__(self, name: str, source: Source, steps_per_epoch: int | None = None):
        if steps_per_epoch is None and source.endless:
            raise ValueError(
                f"`{name}` is endless: say how many of its batches to take, by steps_per_epoch in "
                "training, validation_steps in validation, steps in evaluation. Received: None."
            )
        self.source = source
        self.steps = source.steps if steps_per_epoch is None else steps_per_epoch
        """The number of batches of an epoch, if it is known."""
        self.spec = source.spec
        """A nested `tf.TypeSpec` for the batch that came last, and for those of other sizes before it."""
        self.position: Position = (0, 0)
        """The number of the pass, and how many of its batches were handed out."""
        self._name = name
        self._steps_per_epoch = steps_per_epoch
        self._batches: Iterator[Any] | None = None
        self._ahead: Any = None

    def open(self, position: Position = (0, 0)) -> None:
        """Goes to a position, and reads a batch ahead to know that there is one, and of what kind.

        Raises:
            ValueError: if there is none.
        """
        self.position = (position[0], 0)
        while self.position[1] < position[1]:
            if self._next() is None:
                raise ValueError(
                    f"`{self._name}` ended before the place where training was interrupted: it is not the "
                    f"data of the interrupted run. Received: {self.position[1]} batches in pass "
                    f"{position[0]}, of which {position[1]} were trained on."
                )
        self._ahead = self._next()
        if self._ahead is not None:
            self.position = position
        elif position[1] == 0:
            raise ValueError(
                f"`{self._name}` has no batches: it ended at once, so there is nothing to do. If it is a "
                "generator, it may have been used up before: make a new one. "
                f"Received: {self._name} that gave 0 batches."
            )

    def epoch(self, done: int = 0) -> Iterator[Any]:
        """The batches of one epoch, or what remains of it after the first `done`.

        It is short, or empty, only where the data has run out for good.
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
        """The batch that `open` has read ahead, as long as it was not handed out."""
        return self._ahead

    @property
    def can_restart(self) -> bool:
        """Whether there is data for another epoch."""
        return self.source.replays or self._steps_per_epoch is not None

    def restart(self) -> None:
        """Begins a new pass if one was begun: every evaluation sees the data from its beginning."""
        if self.position[1] and self.source.replays:
            self._next_pass()

    def skip_epochs(self, number: int) -> None:
        """Passes over whole epochs."""
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
                self.spec = _serving_both(self.spec, spec_of(batch))
        return batch


def _serving_both(known: Any, new: Any) -> Any:
    """A spec for what `new` is for and, where they differ in no more than sizes, for what `known` is for.

    It is the same object as long as that one serves: its step is then found at once.
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
    if known.shape.rank != new.shape.rank:  # Their supertype has no rank, and layers need one.
        return new
    return known.most_specific_common_supertype([new]) or new
