"""The commands: each applies a public function to files, prints what it returns, and returns an exit status."""

import argparse
import functools
import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras

from tfbn._command_line import files
from tfbn._command_line.files import CommandError
from tfbn._layer.batch_normalization import BatchNormalization
from tfbn._shipping.convert import convert as convert_model
from tfbn._shipping.export import write_saved_model
from tfbn._shipping.fold.fold import fold as fold_model
from tfbn._shipping.fuse.fuse import fuse as fuse_model
from tfbn._shipping.fuse.fuse import unfuse as unfuse_model
from tfbn._statistics.diagnose.diagnose import diagnose as diagnose_model
from tfbn._statistics.inspect import Inspection
from tfbn._statistics.recalibrate import recalibrate as recalibrate_model
from tfbn._support import html
from tfbn._support.reports import Report

HEALTHY, FINDINGS, ERROR = 0, 1, 2


def inspect(options: argparse.Namespace) -> int:
    """Lists the batch normalization layers."""
    inspection = Inspection.of(_load(options))
    _print(options, inspection, str(inspection))
    return HEALTHY


def diagnose(options: argparse.Namespace) -> int:
    """Compares the moving statistics with data."""
    data = files.load_arrays(options.data)
    model = _load(options, compiled=isinstance(data, tuple))
    diagnosis = diagnose_model(
        model,
        data,
        upstream=options.upstream,
        steps=options.steps,
        batch_size=options.batch_size,
        verbose=_verbose(options),
    )
    text = str(diagnosis)
    as_command = functools.partial(_as_command, options)
    for command in dict.fromkeys(as_command(finding.cure) for finding in diagnosis.findings):
        if command:
            text += f"\n\nTo recalibrate the model in the file:\n    {command}"
    _print(options, diagnosis, text, diagnosis._page(as_command))
    return FINDINGS if diagnosis else HEALTHY


def recalibrate(options: argparse.Namespace) -> int:
    """Sets the moving statistics to those of data."""
    files.require_output(options.output, options.overwrite)
    data = files.load_inputs(options.data)
    model = _load(options, compiled=True)
    result = recalibrate_model(
        model,
        data,
        upstream=options.upstream,
        steps=options.steps,
        batch_size=options.batch_size,
        include_frozen=options.include_frozen,
        prior=options.prior,
        verbose=_verbose(options),
    )
    return _finish(options, model, result)


def convert(options: argparse.Namespace) -> int:
    """Converts the batch normalization layers to another class."""
    files.require_output(options.output, options.overwrite)
    to = BatchNormalization if options.to == "tfbn" else keras.layers.BatchNormalization
    model = convert_model(_load(options, compiled=True), to=to, synchronized=options.synchronized)
    return _finish(options, model, Inspection.of(model))


def fuse(options: argparse.Namespace) -> int:
    """Fuses batch normalization with the layers before it."""
    return _compared(options, fuse_model)


def unfuse(options: argparse.Namespace) -> int:
    """Gives the ordinary layers of a fused model back."""
    files.require_output(options.output, options.overwrite)
    model = unfuse_model(_load(options))
    return _finish(options, model, Inspection.of(model))


def fold(options: argparse.Namespace) -> int:
    """Folds batch normalization into the adjacent layers."""
    return _compared(options, fold_model)


def export(options: argparse.Namespace) -> int:
    """Writes a SavedModel."""
    path: Path = options.output
    if path.is_dir() and any(path.iterdir()) and not options.overwrite:
        raise CommandError(f"The directory exists. Add --overwrite to replace it. Received: {path}")
    exported = write_saved_model(
        _load(options),
        path,
        fold=not options.no_fold,
        overwrite=options.overwrite,
        inputs=_inputs(options),
        tolerance=options.tolerance,
        verbose=_verbose(options),
    )
    _print(options, exported, str(exported))
    return HEALTHY


def _print(
    options: argparse.Namespace,
    report: Report,
    text: str,
    page: tuple[str, list[str]] | None = None,
) -> None:
    if options.html is not None:
        html.write(options.html, *(report._page() if page is None else page))
        text += f"\nwritten: {options.html}"
    print(json.dumps(report.to_dict(), indent=2, allow_nan=False) if options.json else text)


def _as_command(options: argparse.Namespace, cure: str) -> str:
    """Returns the command that does what the code does that recalibrates; nothing for other code."""
    if not cure.startswith("tfbn.recalibrate("):
        return ""
    words = [str(options.model), str(options.data)]
    words += ["--upstream", "batch"] * ("upstream='batch'" in cure)
    words += ["--include-frozen"] * ("include_frozen=True" in cure)
    words += [word for name in options.imports for word in ("--import", name)]
    words += ["--no-safe-mode"] * (not options.safe_mode)
    return f"{options.prog} recalibrate {shlex.join(words)} --output recalibrated.keras"


def _verbose(options: argparse.Namespace) -> int | str:
    return 0 if options.json else "auto"  # JSON is alone on the page.


def _load(options: argparse.Namespace, *, compiled: bool = False) -> keras.Model:
    return files.load_model(options.model, compiled=compiled, safe_mode=options.safe_mode)


def _finish(options: argparse.Namespace, model: keras.Model, report: Report) -> int:
    """Writes a model, and prints what was done."""
    files.save_model(model, options.output, safe_mode=options.safe_mode)
    _print(options, report, f"{report}\nwritten: {options.output}")
    return HEALTHY


def _compared(options: argparse.Namespace, tool: Callable[..., keras.Model]) -> int:
    """Runs a tool that compares outputs and leaves a report in the new model."""
    files.require_output(options.output, options.overwrite)
    model = tool(
        _load(options), _inputs(options), tolerance=options.tolerance, verbose=_verbose(options)
    )
    return _finish(options, model, model.report)


def _inputs(options: argparse.Namespace) -> Any:
    return None if options.inputs is None else files.load_inputs(options.inputs)
