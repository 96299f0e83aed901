"""Intercepting the calls of layers, and tracing a model without leaving anything behind in it."""

import contextlib
import functools
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import keras
import tensorflow as tf

from tfbn._normalize.by_hand import without_gradients


@contextlib.contextmanager
def intercept_calls(
    layers: Iterable[keras.layers.Layer], run: Callable[..., Any], *, all_threads: bool = False
) -> Iterator[None]:
    """While open, ``run(layer, call, inputs, training=..., mask=...)`` replaces each layer's ``call``.

    The argument ``call`` is what is replaced: the layer's own method, or the replacement of an outer block.

    Keras looks ``layer.call`` up on the instance, so this works wherever the layer is: in a Functional,
    Sequential or subclassed model, in a wrapper, or shared by several parents. Functions that were
    compiled before keep what they were traced with.

    Args:
        layers: The layers to intercept.
        run: Called with a layer, the call that it replaces, and the arguments that Keras passes.
        all_threads: Whether calls in other threads are replaced, too. By default, they run as before: another
            thread may serve the model.
    """
    here = threading.get_ident()

    def dispatch(layer: keras.layers.Layer, call: Any, *args: Any, **kwargs: Any) -> Any:
        if all_threads or threading.get_ident() == here:
            return run(layer, call, *args, **kwargs)
        return call(*args, **kwargs)

    before = []
    try:
        for layer in layers:
            before.append((layer, vars(layer).get("call")))
            layer.call = functools.partial(dispatch, layer, layer.call)
        yield
    finally:
        for layer, call in reversed(before):
            if call is None:
                del layer.call
            else:
                layer.call = call


class _FunctionsRunEagerly:
    """A process-wide switch of TensorFlow, on while anybody needs it, then as it was before."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._before = False

    def __enter__(self) -> None:
        with self._lock:
            if self._users == 0:
                self._before = tf.config.functions_run_eagerly()
                tf.config.run_functions_eagerly(True)
            self._users += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._users -= 1
            if self._users == 0:
                tf.config.run_functions_eagerly(self._before)


_functions_run_eagerly = _FunctionsRunEagerly()


@contextlib.contextmanager
def isolated_tracing() -> Iterator[None]:
    """While open, a model can be traced without leaving anything behind in it.

    Trace with ``get_concrete_function``. A ``tf.function`` inside of the traced code becomes a part of the
    new graph. Otherwise, it would run what it was traced with before, and it would keep what it is traced
    with now for later calls by its owner. TensorFlow can inline these functions only for the whole
    process: while the block is open, a ``tf.function`` in another thread runs eagerly, which is slower
    and equally right. So keep the block short. tfbn's layers leave out their gradient functions, which
    TensorFlow would keep.
    """
    with _functions_run_eagerly, without_gradients():
        yield


def traced_once(step: Callable[[Any], Any]) -> Callable[[Any, Any], Any]:
    """Compiles a function of a batch, once for each kind of batch, without leaving anything behind.

    Returns:
        A function of a batch and its nested `tf.TypeSpec`.
    """
    compiled: dict[Any, Any] = {}

    def run(batch: Any, spec: Any) -> Any:
        key = tuple(tf.nest.flatten(spec))
        if key not in compiled:
            with isolated_tracing():
                compiled[key] = tf.function(step, autograph=False).get_concrete_function(spec)
        return compiled[key](batch)

    return run
