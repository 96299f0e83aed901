"""Reading and writing the files that commands work on, with errors that name the file."""

import contextlib
import itertools
import tempfile
import warnings
import zipfile
from pathlib import Path
from typing import Any

import keras
import numpy as np

from tfbn._models import compare
from tfbn._models.signature import signature_of
from tfbn._models.walk import BatchNormLayer, batch_norm_layers, name_of
from tfbn._support.checks import first_line


class CommandError(Exception):
    """An error for the user of a command to read."""


def load_model(path: Path, *, compiled: bool = False, safe_mode: bool = True) -> keras.Model:
    """Loads a model from a file.

    Args:
        path: A `.keras` file, or an HDF5 file.
        compiled: Whether to compile the model as it was saved. If Keras cannot, it is loaded without, with a
            warning.
        safe_mode: As in `keras.models.load_model`.

    Raises:
        CommandError: If there is no such file, or Keras cannot load it.
    """
    _require_keras_file(path)
    if compiled:
        try:
            with warnings.catch_warnings():
                # The state of an optimizer that has done nothing: its count of steps, and its learning rate.
                warnings.filterwarnings(
                    "ignore", ".* the saved optimizer has 2 variables", UserWarning
                )
                return keras.models.load_model(path, safe_mode=safe_mode)
        except Exception as error:  # Losses and optimizers of users can raise anything.
            reason = first_line(error)
    try:
        model = keras.models.load_model(path, compile=False, safe_mode=safe_mode)
    except Exception as error:  # Readers of zip, JSON and HDF5, and custom classes raise anything.
        raise CommandError(
            f"Keras cannot load the model. Received: {path}, {first_line(error)} "
            "If the model has custom classes, name the module that registers them: --import MODULE. If it has "
            "Lambda layers and you trust the file: --no-safe-mode."
        ) from error
    if compiled:
        warnings.warn(
            f"Keras cannot compile the model, so it has no loss and no optimizer. Received: {reason}",
            stacklevel=2,
        )
    return model


def load_arrays(path: Path) -> Any:
    """Returns the array of a .npy file, or the array x, or arrays x and y, of a .npz file."""
    if not path.is_file():
        raise CommandError(f"The file does not exist. Received: {path}")
    try:
        content = np.load(path)
    except Exception as error:  # NumPy raises several kinds.
        raise CommandError(
            f"NumPy cannot load the file. Received: {path}, {first_line(error)}"
        ) from error
    if isinstance(content, np.ndarray):
        return content
    with content:
        if "x" not in content:
            raise CommandError(
                "The file must contain an array x, and can contain an array y. "
                f"Received: {path} with {', '.join(content) or 'nothing'}"
            )
        return (content["x"], content["y"]) if "y" in content else content["x"]


def load_inputs(path: Path) -> np.ndarray:
    """Returns what `load_arrays` does, without labels."""
    arrays = load_arrays(path)
    return arrays[0] if isinstance(arrays, tuple) else arrays


def require_output(path: Path, overwrite: bool) -> None:
    """Raises unless a `.keras` file can be written."""
    if path.suffix != ".keras":
        raise CommandError(f"The output must end in .keras. Received: {path}")
    if path.exists() and not overwrite:
        raise CommandError(f"The output exists. Add --overwrite to replace it. Received: {path}")


def save_model(model: keras.Model, path: Path, *, safe_mode: bool = True) -> None:
    """Saves a model, once the file has been loaded again and compared with the model.

    Raises:
        CommandError: If the file cannot be loaded, or gives another model. Nothing is written then.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        written = Path(folder) / path.name
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # Keras's own, about NumPy.
            model.save(written)
        _require_same(model, load_model(written, safe_mode=safe_mode))
        written.replace(path)


def _require_keras_file(path: Path) -> None:
    if not path.exists():
        raise CommandError(f"The file does not exist. Received: {path}")
    if path.is_dir():
        raise CommandError(
            "The path is a directory. The command needs a .keras file, since a SavedModel cannot be modified. "
            f"Received: {path}"
        )
    if path.suffix in (".h5", ".hdf5"):
        return
    if not zipfile.is_zipfile(path):
        raise CommandError(
            "The file is not a Keras model, or it is incomplete. Save the model again with "
            f'model.save("model.keras"). Received: {path}, {path.stat().st_size:,} bytes'
        )
    with zipfile.ZipFile(path) as archive:
        if "config.json" not in archive.namelist():
            raise CommandError(f"The file is a zip archive without a Keras model. Received: {path}")


def _require_same(model: keras.Model, loaded: keras.Model) -> None:
    """Raises if a model that was saved and loaded differs from the original."""
    layers = [batch_norm_layers(m) for m in (model, loaded)]
    changed = [
        name_of(old or new)
        for old, new in itertools.zip_longest(*layers)
        if old is None or new is None or _identity(old) != _identity(new)
    ]
    if changed:
        raise CommandError(
            "The model changes when it is loaded again, so it was not written: its classes create batch "
            f"normalization layers in their own code. Received: {', '.join(changed)}. Change that code."
        )
    values = [[weight.numpy().tobytes() for weight in m.weights] for m in (model, loaded)]
    if values[0] != values[1]:
        raise CommandError(
            "The weights change when the model is loaded again, so it was not written."
        )
    with contextlib.suppress(ValueError):  # No inputs can be drawn, or outputs are not finite.
        inputs = compare.random_inputs(signature_of(model).structure, batch_size=2)
        first, again, reloaded = (m(inputs, training=False) for m in (model, model, loaded))
        tolerance = compare.tolerance_for(model, None)
        is_random = compare.difference(first, again) > tolerance
        if not (is_random or compare.difference(first, reloaded) <= tolerance):
            raise CommandError(
                "The outputs change when the model is loaded again, so it was not written."
            )


def _identity(layer: BatchNormLayer) -> tuple[type, dict[str, Any]]:
    """The class and the config of a layer, without the name: Keras numbers unnamed layers anew."""
    return type(layer), {key: value for key, value in layer.get_config().items() if key != "name"}
