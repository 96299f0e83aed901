"""The batches of a data set, pass after pass, for tools that must see the same ones each time."""

from collections.abc import Callable, Iterator
from typing import Any

import keras
import tensorflow as tf

from tfbn._data.sources import ArraySource, as_source, spec_of
from tfbn._support.checks import check_count


class MultiPassReader:
    """Data of any kind, read in several passes.

    Args:
        data: A `tf.data.Dataset`, arrays, a `keras.utils.PyDataset`, an iterable of batches, or a
            function without arguments that returns one, such as a generator function.
        steps: How many batches make a pass; by default all.
        batch_size: For arrays.
        verbose: Whether to show a progress bar.

    Attributes:
        spec: The nested `tf.TypeSpec` of the first batch.
        batches: How many batches a pass has, once one has ended.
        examples: How many examples they hold.

    Raises:
        TypeError: For data of no kind that is known.
        ValueError: For data without batches, or without end while ``steps`` is None.
    """

    def __init__(self, data: Any, steps: int | None, batch_size: int | None, verbose: bool):
        check_count("steps", steps, optional=True)
        check_count("batch_size", batch_size, optional=True)
        given = data
        if callable(data) and not isinstance(data, tf.data.Dataset | keras.utils.PyDataset):
            data = _Called(data)
        self._source = as_source("data", data, batch_size or 32, shuffle=False, seed=0)
        if batch_size is not None and not isinstance(self._source, ArraySource):
            raise ValueError(
                "`batch_size` is for arrays, and this data comes in batches already: leave it out. "
                f"Received: batch_size={batch_size!r}, data={data!r}."
            )
        if steps is None and self._source.endless:
            raise ValueError(
                "The data is endless: say how many batches to use by `steps`. Received: steps=None."
            )
        self._steps = steps
        self._verbose = verbose
        self._passes = 1
        self._bar: keras.utils.Progbar | None = None
        self._done = 0
        self.batches = 0
        self.examples = 0
        self._first = self._source.start(0)
        self._ahead = next(self._first, None)
        if self._ahead is None:
            raise ValueError(
                "The data has no batches. If it is a generator, it may have been used up before: pass the "
                f"function that makes it. Received: data={given!r}."
            )
        self.spec = self._source.spec or spec_of(self._ahead)

    def expect(self, passes: int) -> None:
        """Says how many passes there will be.

        Raises:
            ValueError: If the data cannot be read that often.
        """
        if passes > 1 and not self._source.replays:
            raise ValueError(
                "The data can be read only once, and this takes several passes over it. Pass a function "
                "that makes the iterator anew, such as the generator function itself, or a "
                'tf.data.Dataset or arrays; or settle for upstream="batch", which takes one pass. '
                f"Received: an iterator, {passes} passes."
            )
        self._passes = passes
        steps = self._source.steps if self._steps is None else self._steps
        target = None if steps is None else steps * passes
        self._bar = keras.utils.Progbar(target, unit_name="batch") if self._verbose else None

    def read(self, number: int) -> Iterator[tuple[Any, Any]]:
        """The batches of the pass of this number, each with its spec.

        Raises:
            ValueError: If the pass ends before `steps` batches, sees no example, or sees other
                numbers of batches or examples than the first.
        """
        batches = examples = 0
        for batch in self._begin(number):
            batches += 1
            examples += self.size(batch)
            yield batch, self._source.spec or spec_of(batch)
            self._done += 1
            if self._bar is not None:
                self._bar.update(self._done)
            if batches == self._steps:
                break
        if self._steps is not None and batches < self._steps:
            raise ValueError(
                f"The data ended after {batches} of {self._steps} batches: pass fewer `steps`, or data that "
                f"goes on. Received: steps={self._steps}."
            )
        if number == 0:
            self.batches, self.examples = batches, examples
            if examples == 0:
                raise ValueError(
                    "The data has no examples: all batches are empty. Look at what filters it. "
                    f"Received: {batches} batches of 0 examples."
                )
        elif (batches, examples) != (self.batches, self.examples):
            raise ValueError(
                "The data changed between two passes over it: each must see the same examples, in any "
                "order. Store what is drawn at random (`dataset.cache()`), or pass "
                f'upstream="batch", which takes one pass. Received: {self.examples} examples in '
                f"{self.batches} batches, then {examples} in {batches}."
            )

    @staticmethod
    def size(batch: Any) -> int:
        """The number of examples in a batch."""
        parts = [part for part in tf.nest.flatten(batch) if part is not None and part.shape.rank]
        return int(tf.shape(parts[0])[0]) if parts else 1

    def _begin(self, number: int) -> Iterator[Any]:
        if number > 0:
            yield from self._source.start(number)
            return
        yield self._ahead
        self._ahead = None  # Not to keep it alive.
        yield from self._first


class _Called:
    """Iterates over what a function returns, which is called each time."""

    def __init__(self, function: Callable[[], Any]):
        self._function = function

    def __iter__(self) -> Iterator[Any]:
        return iter(self._function())
