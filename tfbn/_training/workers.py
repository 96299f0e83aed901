"""The worker processes of a strategy, and what they must agree on."""

import contextlib
import functools
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

_LOST_WORKER = (
    "A worker of the strategy was lost or has stopped. The others cannot continue without it, and TensorFlow "
    "cannot bring it back. Start all workers again: with a keras.callbacks.BackupAndRestore they resume from "
    "the last backup."
)


class Workers:
    """This process among the workers of its strategy.

    Args:
        strategy: The strategy, or `None` for a process that trains alone.
    """

    def __init__(self, strategy: tf.distribute.Strategy | None):
        self._strategy = strategy
        self.replicas = 1 if strategy is None else strategy.num_replicas_in_sync
        """The number of replicas on all workers."""
        numbers = () if strategy is None else self._replicas_here(strategy)
        self.chief = strategy is None or 0 in numbers
        """Whether this is the worker that writes files and prints."""
        self._alone = strategy is None or len(numbers) == self.replicas

    def check_equal(self, **facts: Any) -> None:
        """Checks that each fact (a number or a batch) is the same on all workers.

        Raises:
            ValueError: On every worker, if one differs.
        """
        if self._alone:
            return
        digests = self._gathered([_digest(fact) for fact in facts.values()])
        different = [name for name, column in zip(facts, digests.T, strict=True) if np.ptp(column)]
        if different:
            raise ValueError(
                "All workers must train on the same batches in the same order, and start at the same "
                "position; each replica takes its shard of every batch. Pass the same arguments on all "
                "workers, shuffle a tf.data.Dataset with a seed, and let all workers read the chief's backup "
                f"from a shared file system. Received: workers that differ in {' and '.join(different)}."
            )

    def from_chief(self, number: int) -> int:
        """Returns the chief's number on every worker."""
        return number if self._alone else int(self._gathered([number])[0, 0])

    def any(self, here: bool) -> bool:
        """Returns whether this is true on any worker."""
        return here if self._alone else bool(self._gathered([int(here)]).any())

    @contextlib.contextmanager
    def explain_lost_worker(self) -> Iterator[None]:
        """Adds a note about what to do to an error that the loss of another worker raises in this block."""
        try:
            yield
        except (tf.errors.UnavailableError, tf.errors.AbortedError) as error:
            # The error may pass through several of these blocks.
            if not self._alone and _LOST_WORKER not in getattr(error, "__notes__", ()):
                error.add_note(_LOST_WORKER)
            raise

    def _gathered(self, numbers: Sequence[int]) -> np.ndarray:
        """Returns the numbers of all replicas, one row per replica, the chief's first."""
        with self.explain_lost_worker():
            return self._gather(tf.constant([numbers], tf.int64)).numpy()

    @functools.cached_property
    def _gather(self) -> Callable[[tf.Tensor], tf.Tensor]:
        strategy = self._strategy
        assert strategy is not None  # For the type checker: who is alone does not gather.

        @tf.function(input_signature=[tf.TensorSpec([1, None], tf.int64)], autograph=False)
        def gather(row: tf.Tensor) -> tf.Tensor:
            return strategy.gather(strategy.run(tf.identity, (row,)), axis=0)

        return gather

    @staticmethod
    def _replicas_here(strategy: tf.distribute.Strategy) -> list[int]:
        numbers = strategy.experimental_distribute_values_from_function(
            lambda context: tf.constant(context.replica_id_in_sync_group)
        )
        return [int(number) for number in strategy.experimental_local_results(numbers)]


def _digest(fact: Any) -> int:
    """Returns a checksum of the bytes, shapes and dtypes of a fact."""
    checksum = 0
    for part in tf.nest.flatten(fact, expand_composites=True):
        array = np.asarray(part)
        content = repr(array.tolist()).encode() if array.dtype == object else array.tobytes()
        checksum = zlib.crc32(f"{array.dtype}{array.shape}".encode() + content, checksum)
    return checksum
