"""The processes that train together, each of which runs the whole loop: where they have to agree."""

import contextlib
import functools
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

_LOST = (
    "A worker of the strategy was lost, or stopped: without it the others cannot go on, and TensorFlow "
    "cannot take it back. Start all workers again; with a keras.callbacks.BackupAndRestore they go on "
    "from the last backup."
)


class Workers:
    """This process among all that its strategy spans.

    Args:
        strategy: `None`: this process is alone.
    """

    def __init__(self, strategy: tf.distribute.Strategy | None):
        self._strategy = strategy
        self.replicas = 1 if strategy is None else strategy.num_replicas_in_sync
        """On how many devices, of all workers, the training runs."""
        numbers = () if strategy is None else self._replicas_here(strategy)
        self.chief = strategy is None or 0 in numbers
        """Whether this is the one worker that writes files and speaks."""
        self._alone = strategy is None or len(numbers) == self.replicas

    def check_alike(self, **facts: Any) -> None:
        """Checks that a fact, a number or a batch, is the same for all workers.

        Raises:
            ValueError: on every worker, if it is not.
        """
        if self._alone:
            return
        seen = self._gathered([_digest(fact) for fact in facts.values()])
        differ = [name for name, column in zip(facts, seen.T, strict=True) if np.ptp(column)]
        if differ:
            raise ValueError(
                "All workers must train on the same batches in the same order, of which each replica then "
                "takes its share, and begin at the same place. Give all of them the same arguments; shuffle "
                "a tf.data.Dataset with a seed; and let all of them read the backup of the chief, from a "
                "file system that they share. Received: workers that differ in "
                f"{' and '.join(differ)}."
            )

    def from_chief(self, number: int) -> int:
        """The chief's number."""
        return number if self._alone else int(self._gathered([number])[0, 0])

    def any(self, here: bool) -> bool:
        """Whether it is so for any worker."""
        return here if self._alone else bool(self._gathered([int(here)]).any())

    @contextlib.contextmanager
    def explain_lost_worker(self) -> Iterator[None]:
        """Where this worker needs the others: an error that tells of the loss of one says what to do."""
        try:
            yield
        except (tf.errors.UnavailableError, tf.errors.AbortedError) as error:
            # One that passes through several of these is told once.
            if not self._alone and _LOST not in getattr(error, "__notes__", ()):
                error.add_note(_LOST)
            raise

    def _gathered(self, numbers: Sequence[int]) -> np.ndarray:
        """The numbers of all replicas, a row for each, the chief's first."""
        with self.explain_lost_worker():
            return self._gather(tf.constant([numbers], tf.int64)).numpy()

    @functools.cached_property
    def _gather(self) -> Callable[[tf.Tensor], tf.Tensor]:
        strategy = self._strategy
        assert strategy is not None  # for the type checker: one process does not ask

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
    """A number that tells facts apart: a batch is its bytes, its shapes and its dtypes."""
    total = 0
    for part in tf.nest.flatten(fact, expand_composites=True):
        array = np.asarray(part)
        content = repr(array.tolist()).encode() if array.dtype == object else array.tobytes()
        total = zlib.crc32(f"{array.dtype}{array.shape}".encode() + content, total)
    return total
