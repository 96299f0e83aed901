"""Compiling the copy of a model as the model is compiled, or not at all."""

import contextlib
import warnings
from collections.abc import Iterator

import keras

from tfbn._support.checks import first_line


def compile_alike(old: keras.Model, new: keras.Model) -> None:
    """Compiles the copy of a compiled model, and copies the state of the optimizer."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Keras warns that a lambda cannot be saved.
            config = old.get_compile_config()
            if type(new).compile_from_config is not keras.Model.compile_from_config:
                new.compile_from_config(config)
            elif not new.compiled or new.get_compile_config() != config:
                # Keras's `compile_from_config` skips classes with their own `compile`.
                new.compile(**keras.saving.deserialize_keras_object(config))
    except Exception as error:  # A custom loss or metric can raise anything.
        warnings.warn(
            f"Cannot compile the copy of the model '{old.name}' from its compile config. "
            f"Received: {first_line(error)} "
            "Compile the copy with the arguments that you passed to `compile`.",
            stacklevel=4,
        )
        return
    if getattr(old.optimizer, "built", False):
        new.optimizer.build(new.trainable_variables)
        variables = [model.optimizer.variables for model in (old, new)]
        if [v.shape for v in variables[0]] == [v.shape for v in variables[1]]:
            for source, target in zip(*variables, strict=True):
                target.assign(source)


@contextlib.contextmanager
def without_compilation(model: keras.Model) -> Iterator[None]:
    """While open, the model claims not to be compiled.

    Otherwise `keras.models.clone_model` compiles the clone and fails on losses that it cannot serialize.
    """
    compiled, model.compiled = model.compiled, False
    try:
        yield
    finally:
        model.compiled = compiled
