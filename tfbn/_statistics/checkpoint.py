"""All batches of a data set, as far as a model has computed them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from tfbn._statistics.tensor_cache import CacheFullError, TensorCache
from tfbn._statistics.traced_model import TracedModel


@dataclasses.dataclass(frozen=True)
class Batch:
    """A batch at some level.

    Attributes:
        traced: The graphs for batches of its kind.
        examples: The number of examples.
        parts: For each replica, the tensors that cross the cut at the level, or the cache's entry for them.
    """

    traced: TracedModel
    examples: int
    parts: dict[int, Any]


class Checkpoint:
    """The batches at one level, in a cache.

    Attributes:
        level: The level.
        intact: Whether none of them was freed.
    """

    def __init__(self, cache: TensorCache, level: int):
        self._cache = cache
        self._batches: list[Batch | None] = []
        self.level = level
        self.intact = True

    def append(self, batch: Batch) -> None:
        """Stores the tensors of a batch.

        Raises:
            CacheFullError: If they do not fit.
        """
        entries: dict[int, Any] = {}
        self._batches.append(dataclasses.replace(batch, parts=entries))
        for replica, tensors in batch.parts.items():
            entries[replica] = self._cache.put(tensors)

    def __iter__(self) -> Iterator[Batch]:
        for batch in self._batches:
            if batch is None:
                raise CacheFullError("a batch was freed before")
            parts = {replica: self._cache.get(entry) for replica, entry in batch.parts.items()}
            yield dataclasses.replace(batch, parts=parts)

    def free(self, number: int) -> None:
        """Frees a batch."""
        batch = self._batches[number]
        self._batches[number] = None
        self.intact = False
        for entry in batch.parts.values() if batch else ():
            self._cache.free(entry)

    def clear(self) -> None:
        """Frees all batches."""
        for number in range(len(self._batches)):
            self.free(number)
