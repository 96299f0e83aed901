"""Writing a model as a SavedModel that is checked before it replaces anything."""

import contextlib
import os
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf

from tfbn._models import compare
from tfbn._models.fused_part import fused_parts
from tfbn._models.signature import Signature, signature_of
from tfbn._models.walk import batch_norm_layers, require_model, walk
from tfbn._normalize.by_hand import without_gradients
from tfbn._shipping import model_card
from tfbn._shipping.atomic_directory import atomic_directory
from tfbn._shipping.fold.fold import STAGES as FOLD_STAGES
from tfbn._shipping.fold.fold import fold_in_stages
from tfbn._shipping.fold.report import FoldReport
from tfbn._shipping.fold.trace import TraceError
from tfbn._shipping.fuse.fuse import unfuse
from tfbn._support import html
from tfbn._support.checks import first_line
from tfbn._support.progress import Progress, prints_result
from tfbn._support.reports import Report, plain

SIGNATURE = "serving_default"
LARGEST_CONSTANTS = 2**30
"""Bytes of weights above which they stay variables: a graph with constants is limited to 2 GiB."""


class ExportError(RuntimeError):
    """Raised by `tfbn.export` when the written SavedModel gives other outputs than the model.

    Nothing is kept: an existing SavedModel at the path is unchanged.

    Example:
        >>> try:
        ...     path = tfbn.export(model, "served/1", inputs=images)
        ... except tfbn.ExportError as error:
        ...     print(error)
    """


def export(
    model: keras.Model,
    path: str | os.PathLike[str],
    fold: bool = True,
    *,
    overwrite: bool = False,
    inputs: Any = None,
    tolerance: float | None = None,
    verbose: int | str = "auto",
) -> Path:
    """Writes the model as a SavedModel that a process with TensorFlow alone can serve.

    The signature `serving_default` accepts any batch size. It names its inputs after the input layers and
    its outputs after the output layers, or after the keys where the model uses dicts. The model runs in
    inference mode. Its weights become constants of the graph, which lets TensorFlow
    optimize them once; above 1 GiB they stay variables.

    The SavedModel is written to a temporary directory, loaded again and compared with the model before it
    moves to `path`. If anything fails, `path` is unchanged. If the process is killed, a hidden
    directory `.NAME.*.tmp` remains beside `path`; the next export to the same path removes it. The SavedModel
    contains a `MODEL_CARD.md` with the signature, the versions of the packages, what was folded, and
    the largest difference from the model's outputs.

    Args:
        model: A built Keras model. It is not modified. A fused model is unfused first.
        path: The directory to write. Missing parents are created.
        fold: Whether to fold batch normalization first; see `tfbn.fold`. A subclassed model whose `call`
            does not work on symbolic tensors is exported unfolded, with a warning.
        overwrite: Whether to replace an existing SavedModel. Anything else at `path` is never replaced.
        inputs: Inputs to compare outputs on, as you would call the model with them. Defaults to random
            inputs.
        tolerance: The largest allowed difference between outputs, relative to the largest output.
            Defaults to 1e-4, and more for models that compute in half precision.
        verbose: 0: silent. 1: a progress bar, then the report. 2: a line at the end, then the report. "auto": a
            progress bar in a terminal if it takes longer than a second, and no report.

    Returns:
        The path.

    Raises:
        TypeError: If `model` is not a Keras model.
        ValueError: If the model is not built or cannot be folded (see `tfbn.fold`), or `path` is a URL.
        FileExistsError: If `path` exists and `overwrite` is False, or it is not a SavedModel.
        OSError: If the files cannot be written, for example because the disk is full.
        ExportError: If the SavedModel gives other outputs than the model.

    Example:
        >>> tfbn.export(model, "served/1")
        >>> served = tf.saved_model.load("served/1").signatures["serving_default"]
        >>> served(image=images)
    """
    exported = write_saved_model(
        model,
        path,
        fold=fold,
        overwrite=overwrite,
        inputs=inputs,
        tolerance=tolerance,
        verbose=verbose,
    )
    if prints_result(verbose):
        print(exported)
    return exported.path


@dataclass(frozen=True)
class Exported(Report):
    """What `write_saved_model` did.

    Attributes:
        path: The directory of the SavedModel.
        difference: The largest difference between the outputs of the SavedModel and of the model,
            relative to the largest output.
        folded: What was folded; None if nothing was to be folded.
    """

    path: Path
    difference: float
    folded: FoldReport | None

    @property
    def card(self) -> Path:
        """The model card."""
        return self.path / "MODEL_CARD.md"

    def to_markdown(self) -> str:
        """Returns the model card."""
        return self.card.read_text(encoding="utf-8")

    def to_dict(self) -> dict[str, Any]:
        """Returns the report in plain types that JSON can represent."""
        return plain(
            {
                "path": str(self.path),
                "card": str(self.card),
                "difference": self.difference,
                "folded": self.folded and self.folded.to_dict(),
            }
        )

    def _page(self) -> tuple[str, list[str]]:
        _, parts = ("", []) if self.folded is None else self.folded._page()
        return "Exported model", [*(html.paragraph(text) for text in self._written()), *parts]

    def __str__(self) -> str:
        parts = [] if self.folded is None else [str(self.folded)]
        return "\n".join([*parts, *self._written()])

    def _written(self) -> list[str]:
        return [
            f"loaded again: outputs differ by at most {self.difference:.1e}",
            f"written: {self.path}",
            f"model card: {self.card}",
        ]


def write_saved_model(
    model: keras.Model,
    path: str | os.PathLike[str],
    *,
    fold: bool,
    overwrite: bool,
    inputs: Any,
    tolerance: float | None,
    verbose: int | str,
) -> Exported:
    """Does what `export` does, and returns a report."""
    progress = Progress(verbose, "stage", 2 + (FOLD_STAGES if fold else 0))
    require_model(model)
    if re.match(r"\w{2,}:/", str(path)):
        raise ValueError(
            "`path` must be a local path, so that the SavedModel can be moved there as a whole. Export to a local "
            f"path and copy it. Received: path={path!r}."
        )
    path, tolerance = Path(path), compare.tolerance_for(model, tolerance)
    if fused_parts(model):
        model = unfuse(model)
    with atomic_directory(path, overwrite, is_ours=tf.saved_model.contains_saved_model) as folder:
        signature = signature_of(model)
        served, report = _folded(model, inputs, tolerance, progress) if fold else (model, None)
        if inputs is None:
            examples = [compare.random_inputs(signature.structure, size) for size in (1, 3)]
        else:
            examples = [inputs]
        changes = compare.changes_variables(served, examples[0])
        _write(served, signature, folder, constant=not changes)
        progress.tick()
        loaded = tf.saved_model.load(str(folder))
        if changes:
            examples = examples[:1]  # The second call would find what the first one left.
        difference = max(_difference(model, signature, loaded, example) for example in examples)
        if not difference <= tolerance:
            raise ExportError(
                "The SavedModel gives other outputs than the model, so it was removed. "
                f"Received: a difference of {difference:.2g} relative to the largest output, "
                f"tolerance={tolerance:.2g}. {compare.advice(model, examples[0], tolerance)}"
            )
        progress.tick()
        card = model_card.text(model, signature, SIGNATURE, difference, report)
        (folder / "MODEL_CARD.md").write_text(card, encoding="utf-8")
    return Exported(path, difference, report)


def _folded(
    model: keras.Model, inputs: Any, tolerance: float, progress: Progress
) -> tuple[keras.Model, FoldReport | None]:
    """Returns the folded model and its report; the model itself if its graph cannot be traced."""
    try:
        folded = fold_in_stages(model, inputs, tolerance, progress)
    except TraceError as error:
        if batch_norm_layers(model):
            warnings.warn(f"The model is exported unfolded. {error}", stacklevel=4)
        progress.tick(units=FOLD_STAGES)
        return model, None
    return folded, folded.report


def _write(model: keras.Model, signature: Signature, folder: Path, *, constant: bool) -> None:
    values = [variable.numpy() for variable in model.variables]
    # As a constant, the seed of a random layer would give the same numbers in every call.
    constant = constant and sum(value.nbytes for value in values) <= LARGEST_CONSTANTS

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
    for layer in walk(model):
        if layer.built and not layer.weights:
            archive.track(layer)  # It may hold a lookup table, or a layer that does.
    try:
        with without_gradients():  # Otherwise, loading warns that gradients were not saved.
            archive.add_endpoint("serve", serve, signature.inputs)
            archive.write_out(str(folder), verbose=False)
    except tf.errors.OpError as error:  # TensorFlow's file system does not raise OSError.
        raise OSError(
            f"TensorFlow cannot write the SavedModel. Received: {type(error).__name__}: {error.message} "
            "Free some disk space, or choose another path."
        ) from error
    except OSError:
        raise
    except Exception as error:  # `call` is user code, which can raise anything.
        raise ValueError(
            f"Cannot write the model '{model.name}' of class {type(model).__name__} as a SavedModel: it must run in a "
            f"`tf.function`, and use only resources that its layers hold. Received: {first_line(error)}"
        ) from error


def _difference(model: keras.Model, signature: Signature, loaded: Any, inputs: Any) -> float:
    """The largest difference between the outputs of the SavedModel and of the model, relative to the largest."""
    served = loaded.signatures[SIGNATURE]
    names = [spec.name for spec in signature.inputs]
    flat = [tf.convert_to_tensor(x) for x in keras.tree.flatten(inputs)]
    given = {
        name: tf.cast(x, spec.dtype)
        for name, x, spec in zip(names, flat, signature.inputs, strict=True)
    }
    outputs = served(**given)
    expected = keras.tree.flatten(compare.outputs(model, inputs))
    return compare.difference(expected, [outputs[spec.name] for spec in signature.outputs])
