"""Reading a data set several times, and checking that each pass sees the same examples."""

from collections.abc import Callable, Iterator
from typing import Any

import keras
import tensorflow as tf

from tfbn._data.sources import ArraySource, as_source, spec_of
from tfbn._support.checks import check_count
from tfbn._support.reports import count


class MultiPassReader:
    """Reads data of any supported kind in several passes.

    Args:
        data: A `tf.data.Dataset`, arrays, a `keras.utils.PyDataset`, an iterable of batches, or a function
            without arguments that returns one, such as a generator function.
        steps: How many batches a pass has; by default all.
        batch_size: The batch size for arrays; by default 32.
        verbose: Whether to show a progress bar.

    Attributes:
        spec: The nested `tf.TypeSpec` of the first batch.
        batches: How many batches the first pass had, after it.
        examples: How many examples they held.

    Raises:
        TypeError: If the data is of another kind.
        ValueError: If the data has no batches, or is endless and ``steps`` is None.
    """

    def __init__(self, data: Any, steps: int | None, batch_size: int | None, verbose: bool):
        check_count("steps", steps, optional=True)
        check_count("batch_size", batch_size, optional=True)
        given = data
        if callable(data) and not isinstance(data, tf.data.Dataset | keras.utils.PyDataset):
            data = _Reiterable(data)
        self._source = as_source("data", data, batch_size or 32, shuffle=False, seed=0)
        if batch_size is not None and not isinstance(self._source, ArraySource):
            raise ValueError(
                "This data comes in batches, so it does not take a `batch_size`. Leave it out. "
                f"Received: batch_size={batch_size!r}, data={data!r}."
            )
        if steps is None and self._source.endless:
            raise ValueError(
                "The data is endless. Pass `steps`, the number of batches to use. Received: steps=None."
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
                "The data has no batches. A generator can be read only once: if this one was used before, pass "
                f"the generator function instead. Received: data={given!r}."
            )
        self.spec = self._source.spec or spec_of(self._ahead)

    def expect(self, passes: int) -> None:
        """Announces the number of passes.

        Raises:
            ValueError: If the data can be read only once, and there is more than one pass.
        """
        if passes > 1 and not self._source.replays:
            raise ValueError(
                "The data can be read only once, but this takes several passes. Pass arrays, a "
                "tf.data.Dataset, or a function that returns a new iterator, such as the generator function "
                'itself; or pass upstream="batch", which takes one pass. '
                f"Received: an iterator, {count(passes, 'pass', 'passes')}."
            )
        self._passes = passes
        steps = self._source.steps if self._steps is None else self._steps
        target = None if steps is None else steps * passes
        self._bar = keras.utils.Progbar(target, unit_name="batch") if self._verbose else None

    def read(self, number: int) -> Iterator[tuple[Any, Any]]:
        """Yields the batches of the pass with this number, each with its spec.

        Raises:
            ValueError: If the data ends before ``steps`` batches, has no examples, or has other numbers of
                batches or examples than in the first pass.
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
                f"The data ended after {batches} of {count(self._steps, 'batch', 'batches')}. Pass fewer "
                f"`steps`, or more data. Received: steps={self._steps}."
            )
        if number == 0:
            self.batches, self.examples = batches, examples
            if examples == 0:
                raise ValueError(
                    "The data has no examples: all batches are empty. Check how it is filtered. "
                    f"Received: {count(batches, 'batch', 'batches')} of 0 examples."
                )
        elif (batches, examples) != (self.batches, self.examples):
            raise ValueError(
                "The data changed between two passes. Each pass must see the same examples, in any order. "
                'Store random data with `dataset.cache()`, or pass upstream="batch", which takes one pass. '
                f"Received: {count(self.examples, 'example')} in {count(self.batches, 'batch', 'batches')}, "
                f"then {examples} in {batches}."
            )

    @staticmethod
    def size(batch: Any) -> int:
        """Returns the number of examples in a batch."""
        parts = [part for part in tf.nest.flatten(batch) if part is not None and part.shape.rank]
        return int(tf.shape(parts[0])[0]) if parts else 1

    def _begin(self, number: int) -> Iterator[Any]:
        if number > 0:
            yield from self._source.start(number)
            return
        yield self._ahead
        self._ahead = None  # Frees the memory.
        yield from self._first


class _Reiterable:
    """Calls a function in each pass, and iterates over what it returns."""

    def __init__(self, function: Callable[[], Any]):
        self._function = function

    def __iter__(self) -> Iterator[Any]:
        return iter(self._function())
