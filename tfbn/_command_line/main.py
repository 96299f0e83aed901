"""What `python -m tfbn` does: the tools for models, on files."""

import argparse
import importlib
import json
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np

from tfbn._layer.batch_normalization import BatchNormalization
from tfbn._shipping.convert import convert
from tfbn._shipping.export import export
from tfbn._shipping.fold.fold import fold
from tfbn._statistics.diagnose.diagnose import diagnose
from tfbn._statistics.inspect import Inspection
from tfbn._support.checks import first_line
from tfbn._support.version import VERSION

EPILOG = """\
examples:
  python -m tfbn inspect model.keras
  python -m tfbn diagnose model.keras train.npz --steps 50
  python -m tfbn convert model.keras ours.keras --synchronized
  python -m tfbn convert ours.keras stock.keras --to keras
  python -m tfbn fold model.keras folded.keras
  python -m tfbn export model.keras served/1

exit status: 0 if all went well; 1 after an error, or if diagnose found something; 2 if the command line \
was not understood.
"""


class CommandError(Exception):
    """What went wrong, for the user to read."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line, and returns its exit status."""
    options = parser().parse_args(arguments)
    sys.path.insert(0, "")  # What --import names may lie in the current directory.
    try:
        for name in options.imports:
            importlib.import_module(name)
        return options.run(options)
    except (CommandError, ImportError, OSError, TypeError, ValueError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    finally:
        sys.path.remove("")


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="python -m tfbn",
        description="Tools for the batch normalization layers of a Keras model, Keras's and tfbn's.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=f"tfbn {VERSION}")
    commands = top.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def command(name: str, run: Any, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        sub.set_defaults(run=run)
        sub.add_argument("model", type=Path, metavar="MODEL.keras", help="a model that Keras saved")
        sub.add_argument("--json", action="store_true", help="print JSON")
        sub.add_argument(
            "--import",
            action="append",
            default=[],
            dest="imports",
            metavar="MODULE",
            help="import this first: it registers classes of your own that the model has",
        )
        return sub

    command("inspect", _inspect, "list the batch normalization layers")

    sub = command("diagnose", _diagnose, "say why training and inference disagree, and the cure")
    sub.add_argument(
        "data",
        type=Path,
        metavar="DATA",
        help="a .npz file with arrays x and, if there are labels, y; or a .npy file with inputs",
    )
    sub.add_argument("--steps", type=int, metavar="N", help="use only N batches")
    sub.add_argument("--batch-size", type=int, metavar="N", help="by default 32")

    sub = command("convert", _convert, "exchange the batch normalization layers")
    _add_output(sub)
    sub.add_argument(
        "--to", choices=["tfbn", "keras"], default="tfbn", help="whose layers; by default tfbn's"
    )
    sub.add_argument(
        "--synchronized",
        action=argparse.BooleanOptionalAction,
        help="whether replicas share statistics; by default each layer stays as it is",
    )

    sub = command("fold", _fold, "fold batch normalization into the layers around it")
    _add_output(sub)
    _add_check(sub)

    sub = command("export", _export, "write a SavedModel that TensorFlow alone can serve")
    sub.add_argument("output", type=Path, metavar="DIRECTORY", help="what to write")
    sub.add_argument("--overwrite", action="store_true", help="replace a SavedModel that is there")
    sub.add_argument("--no-fold", action="store_true", help="keep batch normalization")
    _add_check(sub)
    return top


def _add_output(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("output", type=Path, metavar="OUTPUT.keras", help="the file to write")
    sub.add_argument("--overwrite", action="store_true", help="replace the file if it is there")


def _add_check(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--inputs",
        type=Path,
        metavar="FILE",
        help="a .npy file, or a .npz file with an array x, to compare outputs on; by default random",
    )
    sub.add_argument(
        "--tolerance", type=float, metavar="T", help="of the largest output; by default 1e-4"
    )


def _inspect(options: argparse.Namespace) -> int:
    inspection = Inspection.of(_load(options.model))
    _show(options, inspection.to_dict(), str(inspection))
    return 0


def _diagnose(options: argparse.Namespace) -> int:
    data = _arrays(options.data)
    model = _load(options.model)
    diagnosis = diagnose(model, data, steps=options.steps, batch_size=options.batch_size)
    _show(options, diagnosis.to_dict(), str(diagnosis))
    return 1 if diagnosis else 0


def _convert(options: argparse.Namespace) -> int:
    _check_output(options)
    to = BatchNormalization if options.to == "tfbn" else keras.layers.BatchNormalization
    model = convert(_load(options.model), to=to, synchronized=options.synchronized)
    _save(model, options.output)
    inspection = Inspection.of(model)
    _show(options, inspection.to_dict(), f"{inspection}\nwritten: {options.output}")
    return 0


def _fold(options: argparse.Namespace) -> int:
    _check_output(options)
    inputs = _array(options.inputs)
    model = fold(_load(options.model), inputs, tolerance=options.tolerance)
    _save(model, options.output)
    _show(options, model.report.to_dict(), f"{model.report}\nwritten: {options.output}")
    return 0


def _export(options: argparse.Namespace) -> int:
    inputs = _array(options.inputs)
    path = export(
        _load(options.model),
        options.output,
        fold=not options.no_fold,
        overwrite=options.overwrite,
        inputs=inputs,
        tolerance=options.tolerance,
    )
    card = path / "MODEL_CARD.md"
    _show(options, {"path": str(path), "card": str(card)}, f"{card.read_text()}\nwritten: {path}")
    return 0


def _show(options: argparse.Namespace, data: Any, text: str) -> None:
    print(json.dumps(data, indent=2) if options.json else text)


def _load(path: Path) -> keras.Model:
    """The model in a file, with an error that says what is wrong with the file."""
    if not path.exists():
        raise CommandError(f"There is no such file. Received: {path}")
    if path.is_dir():
        raise CommandError(
            f"This is a directory, and a .keras file is needed: a SavedModel cannot be changed. Received: {path}"
        )
    if path.suffix not in (".h5", ".hdf5"):
        if not zipfile.is_zipfile(path):
            raise CommandError(
                "The file is no Keras model, or was cut short: save the model again by "
                f'model.save("model.keras"). Received: {path}, {path.stat().st_size:,} bytes'
            )
        with zipfile.ZipFile(path) as archive:
            if "config.json" not in archive.namelist():
                raise CommandError(
                    f"The file is a zip archive without a Keras model. Received: {path}"
                )
    try:
        return keras.models.load_model(path)
    except Exception as error:  # Keras lets through what its readers of zip, JSON and HDF5 raise.
        raise CommandError(
            f"Keras cannot load the model. Received: {path}, {first_line(error)} "
            "If it has classes of your own, name the module that registers them: --import MODULE."
        ) from error


def _array(path: Path | None) -> np.ndarray | None:
    arrays = None if path is None else _arrays(path)
    return arrays[0] if isinstance(arrays, tuple) else arrays


def _arrays(path: Path) -> Any:
    """What a .npy file holds; of a .npz file, x and y."""
    if not path.is_file():
        raise CommandError(f"There is no such file. Received: {path}")
    try:
        content = np.load(path)
    except Exception as error:
        raise CommandError(
            f"NumPy cannot load the file. Received: {path}, {type(error).__name__}: {error}"
        ) from error
    if isinstance(content, np.ndarray):
        return content
    with content:
        if "x" not in content:
            raise CommandError(
                "The file must have an array x, and may have an array y. "
                f"Received: {path} with {', '.join(content) or 'nothing'}"
            )
        return (content["x"], content["y"]) if "y" in content else content["x"]


def _check_output(options: argparse.Namespace) -> None:
    path = options.output
    if path.suffix != ".keras":
        raise CommandError(f"The output must end in .keras. Received: {path}")
    if path.exists() and not options.overwrite:
        raise CommandError(f"The output is there already: add --overwrite. Received: {path}")


def _save(model: keras.Model, path: Path) -> None:
    """Writes beside the place first: what is there stays whole until the new one is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        written = Path(folder) / path.name
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Keras's own about NumPy.
            model.save(written)
        written.replace(path)
