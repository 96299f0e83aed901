"""Where the moments of a training batch go: into the moving averages, or to whoever asked for them."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import tensorflow as tf

from tfbn._moments.moments import Moments

Receiver = Callable[[Any, Moments], None]

_local = threading.local()


@contextlib.contextmanager
def redirect(receive: Receiver) -> Iterator[None]:
    """While open, layers that run in training mode hand their moments to ``receive(layer, moments)``.

    They leave their moving statistics alone; ``layer.update_statistics`` takes the moments later.
    It holds for the current thread and for calls and traces made inside the block; of nested ones
    the unwrap_optimizer wins.

    A layer that runs in a graph of its own (a branch of ``tf.cond``, a loop, a recomputed block)
    cannot let its tensors out of that graph: it updates its moving statistics at once, as it does
    without a receiver.

    On many replicas the moments are those of this one, and those of the global batch where
    ``layer.synchronized``: who receives them pools the former, with `_replicas.pooled`.
    """
    previous = getattr(_local, "receiver", None)
    _local.receiver = (receive, _graph())
    try:
        yield
    finally:
        _local.receiver = previous


def receiver() -> Receiver | None:
    """Who receives moments here, if anybody does."""
    current = getattr(_local, "receiver", None)
    if current is None or current[1] is not _graph():
        return None
    return current[0]


def _graph() -> tf.Graph | None:
    return None if tf.executing_eagerly() else tf.compat.v1.get_default_graph()
