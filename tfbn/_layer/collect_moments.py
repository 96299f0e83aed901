"""Collecting the moments of training batches instead of updating the moving averages with them."""

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
    """While open, layers in training mode pass their moments to ``receive(layer, moments)``.

    They do not update their moving statistics; ``layer.update_statistics`` does, later, with the moments. This
    holds for the current thread, and for calls and traces inside of the block. Of nested blocks the innermost
    wins.

    A layer that runs in a graph of its own (a branch of `tf.cond`, a loop) cannot pass its tensors out of that
    graph. It updates its moving statistics at once, as without a receiver.

    Under a `tf.distribute` strategy the moments are those of this replica, and those of the global batch where
    ``layer.synchronized``. The receiver averages the former, with `replicas.all_reduce_mean`.
    """
    previous = getattr(_local, "receiver", None)
    _local.receiver = (receive, _graph())
    try:
        yield
    finally:
        _local.receiver = previous


def receiver() -> Receiver | None:
    """The receiver that is open here, if there is one."""
    current = getattr(_local, "receiver", None)
    if current is None or current[1] is not _graph():
        return None
    return current[0]


def _graph() -> tf.Graph | None:
    return None if tf.executing_eagerly() else tf.compat.v1.get_default_graph()
