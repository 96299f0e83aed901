"""Data of every kind, as batches in an order that can be repeated."""

import collections
import itertools
import math
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import keras
import numpy as np
import tensorflow as tf


class Source(Protocol):
    """Data that gives batches, pass after pass."""

    seed: int
    """What the order of every pass follows from, where the source shuffles."""
    steps: int | None
    """The number of batches of one pass, if it is known."""
    endless: bool
    """Whether a pass has no end."""
    spec: Any
    """The nested `tf.TypeSpec` of its batches; `None` where only a batch can tell."""
    replays: bool
    """Whether there is a second pass."""

    def start(self, index: int) -> Iterator[Any]:
        """The batches of the pass of this number, from its beginning."""


def as_source(name: str, data: Any, batch_size: int, shuffle: bool, seed: int) -> Source:
    """The source for data of any kind that the training loop takes; `name` is that of the argument.

    Raises:
        TypeError: if the data is of no kind that it takes.
        ValueError: if the arrays do not belong together.
    """
    if not isinstance(data, tf.data.Dataset | keras.utils.PyDataset):
        if isinstance(data, dict | list | tuple) or hasattr(data, "shape"):
            _check_arrays(name, data)
            return ArraySource(_without_lists(data), batch_size, shuffle, seed)
        if not isinstance(data, Iterable) or isinstance(
            data, str | bytes | tf.distribute.DistributedDataset
        ):
            raise TypeError(f"{_wanted(name)} Received: {name}={_described(data)}.")
    if isinstance(data, tf.data.Dataset):
        return DatasetSource(data)
    if isinstance(data, keras.utils.PyDataset):
        return PyDatasetSource(data, shuffle, seed)
    return IterableSource(data)


class ArraySource:
    """Arrays in any nesting, cut into batches; shuffled in every pass, by the seed and its number."""

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

    def start(self, index: int) -> Iterator[Any]:
        """The batches of this pass, gathered ahead of their use."""
        rows = np.arange(self._size)
        if self._shuffle:
            rows = np.random.default_rng((self.seed, index)).permutation(rows)
        with tf.device("CPU:0"):
            order = tf.constant(rows)

        def batch(step: tf.Tensor) -> Any:
            here = order[step * self._batch_size : (step + 1) * self._batch_size]
            return tf.nest.map_structure(
                lambda array: None if array is None else tf.gather(array, here), self._arrays
            )

        batches = tf.data.Dataset.range(self.steps).map(batch, num_parallel_calls=tf.data.AUTOTUNE)
        return iter(batches.prefetch(tf.data.AUTOTUNE))


class DatasetSource:
    """A `tf.data.Dataset`.

    One that shuffles anew in each iteration counts its iterators: pass number n is the n-th of them.
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
        """The batches of this pass."""
        while self._started < index:
            iter(self._dataset)
            self._started += 1
        self._started += 1
        return iter(self._dataset)


class PyDatasetSource:
    """A `keras.utils.PyDataset`: its batches in order, or shuffled by the seed and the pass's number."""

    replays = True
    spec = None

    def __init__(self, dataset: keras.utils.PyDataset, shuffle: bool, seed: int):
        self._dataset = dataset
        self._shuffle = shuffle
        self._ended = 0
        self.seed = seed
        self.steps = dataset.num_batches
        self.endless = self.steps is None

    def start(self, index: int) -> Iterator[Any]:
        """The batches of this pass, read ahead by as many threads as the data set has workers."""
        while self._ended < index:
            self._end_pass()
        if self.steps is None:
            return self._read(itertools.count())
        order = np.arange(self.steps)
        if self._shuffle:
            order = np.random.default_rng((self.seed, index)).permutation(order)
        return self._read(order.tolist())

    def _read(self, order: Iterable[int]) -> Iterator[Any]:
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
        self._end_pass()

    def _end_pass(self) -> None:
        self._dataset.on_epoch_end()
        self._ended += 1


class IterableSource:
    """A generator, which has one pass, or another iterable of batches, which has any number."""

    seed = 0
    steps: int | None = None
    endless = False
    spec = None

    def __init__(self, batches: Iterable[Any]):
        self._batches = batches
        self.replays = iter(batches) is not batches

    def start(self, index: int) -> Iterator[Any]:
        """The batches of this pass: a generator has none after its first."""
        again = index == 0 or self.replays
        return (as_tensors(batch) for batch in (self._batches if again else ()))


def spec_of(batch: Any) -> Any:
    """The nested `tf.TypeSpec` of a batch, the number of its examples left open."""

    def spec(part: Any) -> Any:
        if isinstance(part, tf.Tensor) and part.shape.rank:
            return tf.TensorSpec([None, *part.shape[1:]], part.dtype)
        return tf.type_spec_from_value(part)

    return tf.nest.map_structure(spec, batch)


def as_tensors(batch: Any) -> Any:
    """A batch of arrays as Keras feeds it: a list is a tuple, and double precision is Keras's float."""
    return tf.nest.map_structure(_tensor, tuple(batch) if isinstance(batch, list) else batch)


def _without_lists(part: Any) -> Any:
    """Tuples in place of lists, which tf.data takes for the rows of one tensor."""
    if isinstance(part, dict):
        return {name: _without_lists(value) for name, value in part.items()}
    return tuple(map(_without_lists, part)) if isinstance(part, list | tuple) else part


def _tensor(part: Any) -> Any:
    if part is None or tf.is_tensor(part):
        return part
    array = np.asarray(part)
    if array.dtype == np.float64:
        array = array.astype(keras.config.floatx())
    with tf.device("CPU:0"):
        return tf.constant(array)


def _check_arrays(name: str, arrays: Any) -> None:
    parts = [part for part in tf.nest.flatten(arrays) if part is not None]
    ragged = tf.RaggedTensor | tf.SparseTensor
    if not parts or any(isinstance(p, ragged) or not getattr(p, "shape", ()) for p in parts):
        raise TypeError(f"{_wanted(name)} Received: {name}={_described(arrays)}.")
    sizes = {len(part) for part in parts}
    if len(sizes) > 1 or 0 in sizes:
        raise ValueError(
            f"The arrays of `{name}` must all have the same number of examples along their first axis, "
            f"and not 0. Received: {name}={_described(arrays)}."
        )


def _wanted(name: str) -> str:
    return (
        f"`{name}` must be a tf.data.Dataset; arrays as x, (x, y) or (x, y, sample_weight), where each may "
        "be a tuple or a dict of arrays; a keras.utils.PyDataset; or an iterable of batches. Ragged and "
        "sparse tensors come in a tf.data.Dataset."
    )


def _described(data: Any) -> str:
    """The kinds of all parts of the data, and their shapes."""

    def kind(part: Any) -> str:
        shape = getattr(part, "shape", None)
        return type(part).__name__ + ("" if shape is None else str(tuple(shape)))

    return str(tf.nest.map_structure(kind, data)).replace("'", "")[:500]
