"""Reading a data set several times, and checking that each pass sees the same examples."""

import zlib
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfbn._data.sharding import batch_size
from tfbn._data.sources import ArraySource, as_source, spec_of
from tfbn._support.checks import check_count
from tfbn._support.progress import Progress, check_verbose
from tfbn._support.reports import count

SAMPLED = 1000
"""How many bytes of an example are compared between passes."""


class MultiPassReader:
    """Reads data of any supported kind in several passes.

    Args:
        data: A `tf.data.Dataset`, arrays, a `keras.utils.PyDataset`, an iterable of batches, or a function
            without arguments that returns one, such as a generator function.
        steps: How many batches a pass has; by default all.
        batch_size: The batch size for arrays; by default 32.
        verbose: Whether to show a progress bar: 0, 1, 2 or "auto", as `Progress` takes it.

    Attributes:
        spec: The nested `tf.TypeSpec` of the first batch.
        batches: How many batches the first pass had, after it.
        examples: How many examples they held.

    Raises:
        TypeError: If the data is of another kind.
        ValueError: If the data has no batches, or is endless and ``steps`` is None.
    """

    def __init__(self, data: Any, steps: int | None, batch_size: int | None, verbose: int | str):
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
        check_verbose(verbose)
        self._verbose = verbose
        self._rounds = 1
        self._digest = 0
        self._progress = Progress(0)
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

    def expect(self, passes: int, rounds: int | None = None) -> None:
        """Announces how often the data will be read, and how often its batches will be worked on.

        Args:
            passes: The number of passes over the data.
            rounds: How often each batch counts in the progress bar; by default once a pass.

        Raises:
            ValueError: If the data can be read only once, and there is more than one pass.
        """
        self._check_replays(passes)
        self._rounds = passes if rounds is None else rounds
        self._progress = Progress(self._verbose, "batch")

    def tick(self) -> None:
        """Counts a batch in the progress bar."""
        batches = self.batches or self._expected_batches()
        self._progress.tick(None if batches is None else batches * self._rounds)

    def multiple_of(self, examples: int) -> float:
        """Returns how many times this number of examples the data has; 0 if that is not known yet."""
        if self.examples:
            return self.examples / examples if examples else 0
        return self._expected_batches() or 0

    def read(self, number: int, compare: bool = False) -> Iterator[tuple[Any, Any]]:
        """Yields the batches of the pass with this number, each with its spec.

        Args:
            number: The number of the pass, from 0.
            compare: Whether the examples must be the same in all passes that compare.

        Raises:
            ValueError: If the data ends before ``steps`` batches, has no examples, has other numbers of
                batches or examples than in the first pass, or cannot be read again.
        """
        self._check_replays(number + 1)
        batches = examples = digest = 0
        for batch in self._begin(number):
            batches += 1
            examples += self.size(batch)
            digest += digest_of(batch) if compare else 0
            yield batch, self._source.spec or spec_of(batch)
            self.tick()
            if batches == self._steps:
                break
        if self._steps is not None and batches < self._steps:
            raise ValueError(
                f"The data ended after {batches} of {count(self._steps, 'batch', 'batches')}. Pass fewer "
                f"`steps`, or more data. Received: steps={self._steps}."
            )
        if number == 0:
            self.batches, self.examples, self._digest = batches, examples, digest
            if examples == 0:
                raise ValueError(
                    "The data has no examples: all batches are empty. Check how it is filtered. "
                    f"Received: {count(batches, 'batch', 'batches')} of 0 examples."
                )
        elif (batches, examples) != (self.batches, self.examples) or (
            compare and digest != self._digest
        ):
            same = ", others than before" * ((batches, examples) == (self.batches, self.examples))
            raise ValueError(
                "The data changed between two passes. Each pass must see the same examples, in any order. "
                "Store random or reshuffled data with `dataset.cache()`, or pass "
                'upstream="batch", which takes one pass. '
                f"Received: {count(self.examples, 'example')} in {count(self.batches, 'batch', 'batches')}, "
                f"then {examples} in {batches}{same}."
            )

    @staticmethod
    def size(batch: Any) -> int:
        """Returns the number of examples in a batch."""
        return int(batch_size(batch))

    def _expected_batches(self) -> int | None:
        """The number of batches in a pass, if it is known before."""
        return self._source.steps if self._steps is None else self._steps

    def _check_replays(self, passes: int) -> None:
        if passes > 1 and not self._source.replays:
            raise ValueError(
                "The data can be read only once, but this takes several passes. Pass arrays, a "
                "tf.data.Dataset, or a function that returns a new iterator, such as the generator function "
                'itself; or pass upstream="batch", which takes one pass. '
                f"Received: an iterator, {count(passes, 'pass', 'passes')}."
            )

    def _begin(self, number: int) -> Iterator[Any]:
        if number > 0:
            yield from self._source.start(number)
            return
        yield self._ahead
        self._ahead = None  # Frees the memory.
        yield from self._first


def digest_of(batch: Any) -> int:
    """Returns a number that depends on the examples in a batch, but not on their order.

    It samples about a thousand bytes of each example. Sparse and ragged tensors do not count.
    """
    digest = 0
    for part in tf.nest.flatten(batch):
        if isinstance(part, tf.Tensor) and part.shape.rank and part.dtype != tf.string:
            values = np.ascontiguousarray(part.numpy()).view(np.uint8)
            rows = values.reshape(len(part), values.size // max(1, len(part)))
            sampled = np.ascontiguousarray(rows[:, :: max(1, rows.shape[1] // SAMPLED)])
            digest += sum(map(zlib.crc32, sampled))
    return digest


class _Reiterable:
    """Calls a function in each pass, and iterates over what it returns."""

    def __init__(self, function: Callable[[], Any]):
        self._function = function

    def __iter__(self) -> Iterator[Any]:
        return iter(self._function())
