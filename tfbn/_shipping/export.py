"""Writing a model as a SavedModel: checked before anybody sees it, and put in place whole."""

import contextlib
import os
import re
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf

from tfbn._models import compare
from tfbn._models.signature import Signature, signature_of
from tfbn._models.walk import children, walk
from tfbn._shipping import model_card
from tfbn._shipping.atomic_directory import atomic_directory
from tfbn._shipping.fold.fold import fold as fold_model

SIGNATURE = "serving_default"
LARGEST_CONSTANTS = 2**30
"""Bytes of weights beyond which they stay variables: a graph with constants is one message of 2 GiB at most."""


class ExportError(RuntimeError):
    """The SavedModel, loaded again, does not give the outputs of the model."""


def export(
    model: keras.Model,
    path: str | os.PathLike[str],
    fold: bool = True,
    *,
    overwrite: bool = False,
    inputs: Any = None,
    tolerance: float | None = None,
) -> Path:
    """Writes the model as a SavedModel that a process with TensorFlow alone can serve.

    The signature `serving_default` takes the inputs by the names of the input layers (or the keys, where
    the model takes a dict) and any batch size, and gives the outputs by the names of the output layers (or
    keys). The model runs in inference mode. Its weights are written as constants, which lets
    TensorFlow prepare them once and run faster; above 1 GiB, as variables.

    The SavedModel is written beside its place, loaded again, and compared with the model; only then it is
    moved to its place. Whatever happens before, nothing is there that was not, and an old one
    is whole. A process that is killed leaves a hidden directory `.NAME.*.tmp` beside the place; the next
    export to the same path removes it. Beside the SavedModel's own files is a `MODEL_CARD.md`, which
    says what it takes and gives, with which versions it was written, what was folded, and how far
    its outputs are from the model's.

    Args:
        model: A Keras model, built. It stays as it is.
        path: The directory to write. Its parent is made if it is missing.
        fold: Whether to fold batch normalization first, see `tfbn.fold`.
        overwrite: Whether a SavedModel that is there may be replaced. Anything else that is there never
            is.
        inputs: Inputs to compare the outputs on, as you would call the model with; by default random
            ones.
        tolerance: The largest difference between outputs that is allowed, relative to the largest
            output. By default 1e-4; more for models that compute in half precision.

    Returns:
        The path.

    Raises:
        TypeError: if `model` is no Keras model.
        ValueError: if the model is not built, or cannot be folded, see `tfbn.fold`; if `path` is a URL.
        FileExistsError: if something is at `path`, and `overwrite` is False or it is no SavedModel.
        OSError: if the disk is full, or the directory cannot be written.
        ExportError: (a `RuntimeError`) if the SavedModel gives other outputs than the model.

    Example:
        >>> tfbn.export(model, "served/1")
        >>> served = tf.saved_model.load("served/1").signatures["serving_default"]
        >>> served(image=images)
    """
    if not isinstance(model, keras.Model):
        raise TypeError(
            f"Only a Keras model can be exported. Received: model={model!r} of type {type(model).__name__}."
        )
    if re.match(r"\w{2,}:/", str(path)):
        raise ValueError(
            "A SavedModel is moved to its place whole, which only a local path allows: export there and copy it. "
            f"Received: path={path!r}."
        )
    path, tolerance = Path(path), compare.tolerance_for(model, tolerance)
    with atomic_directory(path, overwrite, is_ours=tf.saved_model.contains_saved_model) as folder:
        signature = signature_of(model)
        served = fold_model(model, inputs, tolerance=tolerance) if fold else model
        _write(served, signature, folder)
        if inputs is None:
            examples = [compare.random_inputs(signature.structure, size) for size in (1, 3)]
        else:
            examples = [inputs]
        difference = max(_difference(model, signature, folder, example) for example in examples)
        if not difference <= tolerance:
            raise ExportError(
                "The SavedModel, loaded again, gives other outputs than the model, so it is not kept. "
                f"Received: a difference of {difference:.2g} of the largest output, "
                f"tolerance={tolerance:.2g}. {compare.advice(model, examples[0], tolerance)}"
            )
        report = served.report if fold else None
        card = model_card.text(model, signature, SIGNATURE, difference, report)
        (folder / "MODEL_CARD.md").write_text(card, encoding="utf-8")
    return path


def _write(model: keras.Model, signature: Signature, folder: Path) -> None:
    values = [variable.numpy() for variable in model.variables]
    constant = sum(value.nbytes for value in values) <= LARGEST_CONSTANTS

    def serve(*tensors: tf.Tensor) -> dict[str, tf.Tensor]:
        inputs = keras.tree.pack_sequence_as(signature.structure, tensors)
        with contextlib.ExitStack() as stack:
            if constant:
                constants = zip(model.variables, map(tf.constant, values), strict=True)
                stack.enter_context(keras.StatelessScope(constants))
            outputs = model(inputs, training=False)
        names = [spec.name for spec in signature.outputs]
        return dict(zip(names, keras.tree.flatten(outputs), strict=True))

    archive = keras.export.ExportArchive()
    for layer in walk(model, set()):
        if layer.built and not layer.weights and not list(children(layer)):
            archive.track(layer)  # It may hold a lookup table.
    archive.add_endpoint("serve", serve, signature.inputs)
    try:
        archive.write_out(str(folder), verbose=False)
    except tf.errors.OpError as error:  # TensorFlow writes the files, and has no OSError.
        raise OSError(
            f"The SavedModel cannot be written. Received: {type(error).__name__}: {error.message} "
            "Make room, or choose another path."
        ) from error


def _difference(model: keras.Model, signature: Signature, folder: Path, inputs: Any) -> float:
    """Between the outputs of the SavedModel in the folder and of the model, relative to the largest."""
    loaded = tf.saved_model.load(str(folder))  # Its variables live as long as it does.
    served = loaded.signatures[SIGNATURE]
    names = [spec.name for spec in signature.inputs]
    flat = [tf.convert_to_tensor(x) for x in keras.tree.flatten(inputs)]
    given = {
        name: tf.cast(x, spec.dtype)
        for name, x, spec in zip(names, flat, signature.inputs, strict=True)
    }
    outputs = served(**given)
    expected = keras.tree.flatten(model(inputs, training=False))
    return compare.difference(expected, [outputs[spec.name] for spec in signature.outputs])
