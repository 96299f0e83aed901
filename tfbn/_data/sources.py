"""Data of every supported kind, as batches in a reproducible order."""

import collections
import itertools
import math
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import keras
import numpy as np
import tensorflow as tf

AHEAD = 2
"""How many batches of arrays are gathered at once, and how many are kept ready."""


class Source(Protocol):
    """Data that can be read in batches, pass after pass."""

    seed: int
    """The seed of the order of each pass, if the source shuffles."""
    steps: int | None
    """The number of batches in a pass, if it is known."""
    endless: bool
    """Whether a pass never ends."""
    spec: Any
    """The nested `tf.TypeSpec` of a batch, or None if it is known only from a batch."""
    replays: bool
    """Whether the data can be read more than once."""

    def start(self, index: int) -> Iterator[Any]:
        """Returns the batches of the pass with this number, from its beginning."""


def as_source(name: str, data: Any, batch_size: int, shuffle: bool, seed: int) -> Source:
    """Returns the source for data of any supported kind.

    Args:
        name: The name of the argument, for errors.
        data: A `tf.data.Dataset`, arrays, a `keras.utils.PyDataset`, or an iterable of batches.
        batch_size: The batch size for arrays.
        shuffle: Whether to shuffle arrays and `PyDataset`s in each pass.
        seed: The seed of the order.

    Raises:
        TypeError: If the data is of another kind.
        ValueError: If the arrays have different lengths, or length 0.
    """
    if not isinstance(data, tf.data.Dataset | keras.utils.PyDataset):
        if isinstance(data, dict | list | tuple) or hasattr(data, "shape"):
            _check_arrays(name, data)
            return ArraySource(_without_lists(data), batch_size, shuffle, seed)
        if not isinstance(data, Iterable) or isinstance(
            data, str | bytes | tf.distribute.DistributedDataset
        ):
            raise TypeError(f"{_expected(name)} Received: {name}={describe(data)}.")
    if isinstance(data, tf.data.Dataset):
        return DatasetSource(data)
    if isinstance(data, keras.utils.PyDataset):
        return PyDatasetSource(data, shuffle, seed)
    return IterableSource(data)


class ArraySource:
    """Nested arrays, cut into batches. The seed and the number of a pass determine its order."""

    endless = False
    replays = True

    def __init__(self, arrays: Any, batch_size: int, shuffle: bool, seed: int):
        self._arrays = tf.nest.map_structure(_tensor, arrays)
        self._size = len(next(a for a in tf.nest.flatten(self._arrays) if a is not None))
        self._batch_size = batch_size
        self._shuffle = shuffle
        self.seed = seed
        self.steps: int | None = math.ceil(self._size / batch_size)
        self.spec = spec_of(self._arrays)
        with tf.device("CPU:0"):  # Traced once for all passes.
            self._gathered = tf.function(self._gather, autograph=False).get_concrete_function(
                tf.TensorSpec([self._size], tf.int64)
            )

    def start(self, index: int) -> Iterator[Any]:
        """Returns the batches of this pass, gathered ahead of use."""
        rows = np.arange(self._size, dtype=np.int64)
        if self._shuffle:
            rows = np.random.default_rng((self.seed, index)).permutation(rows)
        with tf.device("CPU:0"):
            batches = self._gathered(tf.constant(rows))
        return iter(batches.prefetch(AHEAD).with_options(_untuned()))

    def _gather(self, order: tf.Tensor) -> tf.data.Dataset:
        def batch(step: tf.Tensor) -> Any:
            here = order[step * self._batch_size : (step + 1) * self._batch_size]
            return tf.nest.map_structure(
                lambda array: None if array is None else tf.gather(array, here), self._arrays
            )

        return tf.data.Dataset.range(self.steps).map(batch, num_parallel_calls=AHEAD)


def _untuned() -> tf.data.Options:
    # A thread tunes the parallelism of each iterator, and sleeps longer and longer, up to a minute. On busy
    # processors it misses the end of the iterator, and the epoch ends only when the thread wakes up.
    options = tf.data.Options()
    options.autotune.enabled = False
    return options


class DatasetSource:
    """A `tf.data.Dataset`.

    If it reshuffles in each iteration, the order depends on how many iterators were made before: pass n is
    the n-th iterator.
    """

    seed = 0
    replays = True

    def __init__(self, dataset: tf.data.Dataset):
        cardinality = int(dataset.cardinality())
        self.steps = cardinality if cardinality >= 0 else None
        self.endless = cardinality == tf.data.INFINITE_CARDINALITY
        self.spec = dataset.element_spec
        self._dataset = dataset
        self._started = 0

    def start(self, index: int) -> Iterator[Any]:
        """Returns the batches of this pass."""
        while self._started < index:
            iter(self._dataset)
            self._started += 1
        self._started += 1
        return iter(self._dataset)


class PyDatasetSource:
    """A `keras.utils.PyDataset`. The seed and the number of a pass determine the order of its batches.

    As in Keras, ``on_epoch_begin`` runs before each pass and ``on_epoch_end`` after it.
    """

    replays = True
    spec = None

    def __init__(self, dataset: keras.utils.PyDataset, shuffle: bool, seed: int):
        self._dataset = dataset
        self._shuffle = shuffle
        self._finished = 0
        self._is_open = False
        self.seed = seed
        self.steps = dataset.num_batches
        self.endless = self.steps is None

    def start(self, index: int) -> Iterator[Any]:
        """Returns the batches of this pass, read ahead by as many threads as the data set has workers."""
        while self._finished < index:
            self._begin_pass()
            self._finish_pass()
        if self.steps is None:
            return self._read(itertools.count())
        order = np.arange(self.steps)
        if self._shuffle:
            order = np.random.default_rng((self.seed, index)).permutation(order)
        return self._read(order.tolist())

    def _read(self, order: Iterable[int]) -> Iterator[Any]:
        self._begin_pass()
        if self._dataset.workers <= 1:
            yield from (as_tensors(self._dataset[index]) for index in order)
        else:
            ahead: collections.deque[Future[Any]] = collections.deque()
            with ThreadPoolExecutor(self._dataset.workers) as pool:
                for index in order:
                    ahead.append(pool.submit(self._dataset.__getitem__, index))
                    if len(ahead) >= self._dataset.max_queue_size:
                        yield as_tensors(ahead.popleft().result())
                while ahead:
                    yield as_tensors(ahead.popleft().result())
        self._finish_pass()

    def _begin_pass(self) -> None:
        if not self._is_open:  # A pass that was left early is still open.
            self._dataset.on_epoch_begin()
            self._is_open = True

    def _finish_pass(self) -> None:
        self._dataset.on_epoch_end()
        self._is_open = False
        self._finished += 1


class IterableSource:
    """An iterable of batches. A generator can be read once, other iterables any number of times."""

    seed = 0
    steps: int | None = None
    endless = False
    spec = None

    def __init__(self, batches: Iterable[Any]):
        self._batches = batches
        self.replays = iter(batches) is not batches

    def start(self, index: int) -> Iterator[Any]:
        """Returns the batches of this pass. After its first pass, a generator has none."""
        again = index == 0 or self.replays
        return (as_tensors(batch) for batch in (self._batches if again else ()))


def spec_of(batch: Any) -> Any:
    """Returns the nested `tf.TypeSpec` of a batch, with an unknown batch size."""

    def spec(part: Any) -> Any:
        if isinstance(part, tf.Tensor) and part.shape.rank:
            return tf.TensorSpec([None, *part.shape[1:]], part.dtype)
        return tf.type_spec_from_value(part)

    return tf.nest.map_structure(spec, batch)


def as_tensors(batch: Any) -> Any:
    """Converts a batch as Keras does: a list becomes a tuple, and float64 becomes ``keras.config.floatx()``."""
    return tf.nest.map_structure(_tensor, tuple(batch) if isinstance(batch, list) else batch)


def _without_lists(part: Any) -> Any:
    """Replaces lists by tuples: tf.data reads a list as the rows of one tensor."""
    if isinstance(part, dict):
        return {name: _without_lists(value) for name, value in part.items()}
    return tuple(map(_without_lists, part)) if isinstance(part, list | tuple) else part


def _tensor(part: Any) -> Any:
    if part is None or tf.is_tensor(part):
        return part
    array = np.asarray(part)
    mixed = array.dtype == object and hasattr(part, "columns")  # A pandas.DataFrame.
    try:
        if array.dtype == np.float64 or mixed:
            array = array.astype(keras.config.floatx())
        with tf.device("CPU:0"):
            return tf.constant(array)
    except (TypeError, ValueError) as error:
        raise TypeError(
            "TensorFlow makes no tensor of an array like this. Convert it, as in `array.astype('float32')`, or pass "
            "columns of several kinds as a dict of arrays. Received: "
            f"an array of dtype {array.dtype} and shape {array.shape}. TensorFlow says: {error}"
        ) from error


def _check_arrays(name: str, arrays: Any) -> None:
    parts = [part for part in tf.nest.flatten(arrays) if part is not None]
    ragged = tf.RaggedTensor | tf.SparseTensor
    if not parts or any(isinstance(p, ragged) or not getattr(p, "shape", ()) for p in parts):
        raise TypeError(f"{_expected(name)} Received: {name}={describe(arrays)}.")
    sizes = {len(part) for part in parts}
    if len(sizes) > 1 or 0 in sizes:
        raise ValueError(
            f"All arrays in `{name}` must have the same number of examples along the first axis, and at "
            f"least one. Received: {name}={describe(arrays)}."
        )


def _expected(name: str) -> str:
    return (
        f"`{name}` must be a tf.data.Dataset; arrays as x, (x, y) or (x, y, sample_weight), where each may "
        "be a tuple or a dict of arrays; a keras.utils.PyDataset; or an iterable of batches. Put ragged and "
        "sparse tensors into a tf.data.Dataset."
    )


def describe(data: Any) -> str:
    """Returns the types and shapes in nested data, for errors."""

    def kind(part: Any) -> str:
        shape = getattr(part, "shape", None)
        name = "Tensor" if isinstance(part, tf.Tensor) else type(part).__name__
        return name + ("" if shape is None else str(tuple(shape)))

    return str(tf.nest.map_structure(kind, data)).replace("'", "")[:500]
