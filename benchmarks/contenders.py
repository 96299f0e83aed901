"""The contenders, and what each of them needs."""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.cases import DEPTH, Case, LayerCase, ModelCase
from benchmarks.program import LeftOut, Program

LAYER_CLASSES = {
    "keras": "keras.layers:BatchNormalization",
    "tf_keras": "tf_keras.layers:BatchNormalization",
    "tfbn": "tfbn:BatchNormalization",
    "identity": "benchmarks.identity:Identity",
}
FLOORS = ("floor", "floor_cached")
DEFAULT = ("keras", "tf_keras", "torch", "tfbn", "identity", *FLOORS)
QUICK = ("keras", "tf_keras", "tfbn")
FEW = ("keras", "tfbn")
"""The contenders of layers under XLA and eagerly, and of all with the C library's own settings, by default."""
_COMMITS = Path("build/benchmarks/commits")


@dataclass(frozen=True)
class Contender:
    """A name of ``DEFAULT``, or "module:Class" of a Keras layer, loaded in this process."""

    name: str
    layer_class: Any = None
    library: Any = None

    def program(self, case: Case) -> Program:
        """Prepares a case: everything that is not timed.

        Raises:
            LeftOut: If the contender does not support the case.
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

    def limit_threads(self, threads: int) -> None:
        """Limits the threads. Call it before anything runs: afterwards the libraries ignore it."""
        if self.name == "torch":
            import torch

            torch.set_num_threads(threads)
        else:
            import tensorflow as tf

            tf.config.threading.set_intra_op_parallelism_threads(threads)
            tf.config.threading.set_inter_op_parallelism_threads(threads)

    def device(self) -> dict[str, Any]:
        """Returns the kind of device that the contender runs on."""
        if self.name == "torch":
            import torch

            names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        else:
            import tensorflow as tf

            gpus = tf.config.list_physical_devices("GPU")
            details = [tf.config.experimental.get_device_details(gpu) for gpu in gpus]
            names = [detail.get("device_name", "unknown") for detail in details]
        return (
            {"device": "gpu", "gpu": names[0], "gpus": len(names)} if names else {"device": "cpu"}
        )


def of(case: Case, names: Sequence[str] | None) -> Sequence[str] | None:
    """The contenders of a case: those named; by default all (None), but fewer where the others tell nothing new."""
    if names is not None:
        return names
    if isinstance(case, LayerCase):
        return FEW if case.mode != "graph" else None
    return QUICK


def load(name: str) -> Contender:
    """Imports the contender's packages.

    Raises:
        LeftOut: If one is not installed.
    """
    try:
        if name == "torch":
            importlib.import_module("torch")
        if name in ("torch", *FLOORS):
            return Contender(name)
        if not root(name).is_dir():
            raise LeftOut(f"is not checked out in {root(name)}")
        kind, _, _ = name.partition("@")
        module, _, attribute = LAYER_CLASSES.get(kind, kind).partition(":")
        if not attribute:
            raise LeftOut(f"is none of {', '.join(DEFAULT)}, and no module:Class")
        layer_class = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise LeftOut(str(error)) from error
    return Contender(name, layer_class, _library(layer_class))


def root(name: str) -> Path:
    """The directory from which the process of a contender `NAME@COMMIT` imports; of others the present one."""
    commit = name.partition("@")[2]
    return _COMMITS.resolve() / commit if commit else Path.cwd()


def _library(layer_class: type) -> Any:
    """Returns the Keras package that the layer belongs to."""
    ours = any(base.__module__.startswith("tf_keras.") for base in layer_class.__mro__)
    return importlib.import_module("tf_keras" if ours else "keras")
