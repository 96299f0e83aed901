"""Who takes part, and what each needs."""

import importlib
from dataclasses import dataclass
from typing import Any

from benchmarks.cases import DEPTH, Case, ModelCase
from benchmarks.program import LeftOut, Program

LAYER_CLASSES = {
    "keras": "keras.layers:BatchNormalization",
    "tf_keras": "tf_keras.layers:BatchNormalization",
    "tfbn": "tfbn:BatchNormalization",
    "identity": "benchmarks.identity:Identity",
}
FLOORS = ("floor", "floor_cached")
DEFAULT = ("keras", "tf_keras", "torch", "tfbn", "identity", *FLOORS)


@dataclass(frozen=True)
class Contender:
    """A name of ``DEFAULT``, or "module:Class" of a Keras layer, loaded in this process."""

    name: str
    layer_class: Any = None
    library: Any = None

    def program(self, case: Case) -> Program:
        """Everything of the case that is not timed.

        Raises:
            LeftOut: If this contender has no such case.
        """
        if isinstance(case, ModelCase):
            if self.layer_class is None:
                raise LeftOut("has no whole models")
            from benchmarks import models

            return models.program(self.layer_class, self.library, case)
        if self.name in FLOORS:
            if case.mode != "graph":
                raise LeftOut("is the same in every mode: see graph")
            from benchmarks import floor

            return floor.program(case, tensors=DEPTH if self.name == "floor" else 1)
        if self.name == "torch":
            if case.mode == "xla":
                raise LeftOut("runs eagerly, hence beside graph and eager")
            from benchmarks import torch_layers

            return torch_layers.program(case)
        from benchmarks import keras_layers

        return keras_layers.program(self.layer_class, self.library, case)


def load(name: str) -> Contender:
    """Imports what the contender needs.

    Raises:
        LeftOut: If it is not installed, or cannot run on the device that the others run on.
    """
    try:
        if name == "torch":
            _check_torch_device()
        if name in ("torch", *FLOORS):
            return Contender(name)
        module, _, attribute = LAYER_CLASSES.get(name, name).partition(":")
        if not attribute:
            raise LeftOut(f"is none of {', '.join(DEFAULT)}, and no module:Class")
        layer_class = getattr(importlib.import_module(module), attribute)
        return Contender(name, layer_class, _library(layer_class))
    except (ImportError, AttributeError) as error:
        raise LeftOut(str(error)) from error


def _library(layer_class: type) -> Any:
    """The Keras that this layer belongs to."""
    if any(base.__module__.startswith("tf_keras.") for base in layer_class.__mro__):
        return importlib.import_module("tf_keras")
    return importlib.import_module("keras")


def _check_torch_device() -> None:
    import torch

    from benchmarks.keras_layers import device

    if device() == "gpu" and not torch.cuda.is_available():
        raise LeftOut("TensorFlow has a GPU, and this PyTorch cannot use one")
