"""Sets batches of a data set aside, so that losses are computed on examples that were not measured."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import tensorflow as tf

from tfbn._data.multi_pass import MultiPassReader
from tfbn._data.sources import spec_of

EVERY = 4
"""One batch in this many is set aside."""
MOST_BATCHES = 32
MOST_BYTES = 2**28

Batch = tuple[Any, Any]
"""A batch and its spec."""


class SplitReader(MultiPassReader):
    """Reads the batches to be measured, and sets others aside.

    Every fourth batch is set aside. A single batch is split: its odd examples are set aside. Where there
    are many batches, or large ones, fewer are set aside, spread over the whole data set.

    Args:
        reader: Reads all batches.
        hold_out: Whether the batches set aside are left out of what is measured.
        inputs: Returns the model's inputs in a batch.

    Attributes:
        aside: The batches set aside, after the first pass.
        measured: How many batches were measured in the first pass.
        is_finite: Whether no input that was read in the first pass is NaN or infinite.
    """

    def __init__(self, reader: MultiPassReader, hold_out: bool, inputs: Callable[[Any], Any]):
        self._reader = reader
        self.spec = reader.spec
        self.tick = reader.tick  # type: ignore[method-assign]
        self.multiple_of = reader.multiple_of  # type: ignore[method-assign]
        self._hold_out = hold_out
        self._inputs = inputs
        self._every = EVERY
        self._left_out: set[int] = set()
        self.aside: list[Batch] = []
        self.measured = 0
        self.is_finite = True

    def read(self, number: int, compare: bool = False) -> Iterator[Batch]:
        """Reads the batches that are measured in the pass of this number."""
        for batch in self._split_read(number, compare):
            self.measured += number == 0
            yield batch

    def _split_read(self, number: int, compare: bool) -> Iterator[Batch]:
        # An empty batch has nothing to be measured, and no loss.
        batches: Iterator[Batch] = (
            one for one in self._reader.read(number, compare) if self._reader.size(one[0])
        )
        if number == 0:
            batches = map(self._checked, batches)
        ahead = list(itertools.islice(batches, 2))
        if len(ahead) == 1:
            yield self._split(ahead[0], number)
            return
        for index, (batch, spec) in enumerate(itertools.chain(ahead, batches)):
            if number == 0 and index % self._every == 1:
                self._set_aside(index, (batch, spec))
            if index not in self._left_out:
                yield batch, spec

    def _checked(self, batch: Batch) -> Batch:
        inputs = tf.nest.flatten(self._inputs(batch[0]))
        parts = [part for part in inputs if isinstance(part, tf.Tensor)]
        floats = [part for part in parts if part.dtype.is_floating]
        self.is_finite &= all(bool(tf.reduce_all(tf.math.is_finite(part))) for part in floats)
        return batch

    def _set_aside(self, index: int, batch: Batch) -> None:
        self.aside.append(batch)
        if self._hold_out:
            self._left_out.add(index)
        if len(self.aside) > MOST_BATCHES or sum(map(_bytes, self.aside)) > MOST_BYTES:
            if len(self.aside) > 1:
                self.aside = self.aside[::2]
            self._every *= 2

    def _split(self, only: Batch, number: int) -> Batch:
        batch, _ = only
        parts = [part for part in tf.nest.flatten(batch) if part is not None]
        can_split = all(tf.is_tensor(part) and part.shape.rank for part in parts)
        if not self._hold_out or not can_split or self._reader.size(batch) < 4:
            measured = aside = only
        else:
            measured, aside = (_with_spec(_every_other(batch, start)) for start in (0, 1))
        if number == 0:
            self.aside = [aside]
        return measured


def _every_other(batch: Any, start: int) -> Any:
    return tf.nest.map_structure(lambda part: None if part is None else part[start::2], batch)


def _with_spec(batch: Any) -> Batch:
    return batch, spec_of(batch)


def _bytes(batch: Batch) -> int:
    parts = [part for part in tf.nest.flatten(batch[0]) if isinstance(part, tf.Tensor)]
    return sum(int(tf.size(part)) * part.dtype.size for part in parts)
