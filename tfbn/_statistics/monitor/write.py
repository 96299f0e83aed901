"""What a monitor writes: numbers for the logs of an epoch, lines of JSON, and summaries for TensorBoard."""

import dataclasses
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tensorflow as tf

from tfbn._statistics.diagnose.model_evidence import MEAN_SHIFT
from tfbn._statistics.monitor.record import LayerRecord
from tfbn._support.reports import plain

_COLORS = np.array([[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]])
"""Dark to light: a few colors of viridis. Distances from 1/16 to 4 times the limit of a diagnosis."""
_UNKNOWN = np.array([128, 128, 128])
_MOST_COLUMNS = 256
_SIDE = 512
"""How many pixels wide and high the picture is, at least."""


def writes_files(strategy: tf.distribute.Strategy) -> bool:
    """Whether this process is the one of all workers that writes."""
    resolver = strategy.cluster_resolver
    if resolver is None:
        return True
    first = not resolver.cluster_spec().as_dict().get("chief") and resolver.task_id == 0
    return resolver.task_type in (None, "", "chief") or (resolver.task_type == "worker" and first)


def summary(layers: Sequence[LayerRecord]) -> dict[str, float]:
    """Returns the numbers for the logs of an epoch."""
    shifts = [layer.mean_shift for layer in layers if math.isfinite(layer.mean_shift)]
    ratios = [layer.variance_ratio for layer in layers if math.isfinite(layer.variance_ratio)]
    return {
        "bn_mean_shift": max(shifts, default=math.nan),
        "bn_variance_ratio": max(ratios, key=lambda r: abs(math.log(r or 1e-30)), default=math.nan),
    }


class JsonLines:
    """Appends each record to a file, as a line of JSON.

    Args:
        path: The file. Its folder is created.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self._path = Path(path)
        self._path.parent.mkdir(parents=True, exist_ok=True)

    def write(self, step: int, epoch: int, layers: Sequence[LayerRecord]) -> None:
        """Writes the records of one step."""
        found = [dataclasses.asdict(layer) for layer in layers]
        line = json.dumps(plain({"step": step, "epoch": epoch, "layers": found}), allow_nan=False)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


class TensorBoardWriter:
    """Writes scalars of each layer, and the distances of all layers over time as a picture.

    Args:
        log_dir: The directory.
        model: The name of the model. Tags leave it out: Keras numbers models without a name, and runs that are
            compared must have the same tags.
    """

    def __init__(self, log_dir: str | os.PathLike[str], model: str):
        self._model = model
        self._writer = tf.summary.create_file_writer(os.fspath(log_dir))
        self._names: list[str] = []
        self._shifts: list[list[float]] = []
        self._every = 1
        self._number = 0
        self._drawn = 0

    def write(self, step: int, layers: Sequence[LayerRecord]) -> None:
        """Writes the records of one step, all scalars at once: one by one, they would cost more than the rest."""
        values = []
        for layer in layers:
            for name, value in dataclasses.asdict(layer).items():
                if isinstance(value, int | float) and math.isfinite(value):
                    tag = f"bn_{name}/{layer.layer.removeprefix(self._model + '/')}"
                    values.append(tf.compat.v1.Summary.Value(tag=tag, simple_value=float(value)))
        with self._writer.as_default():
            tf.summary.experimental.write_raw_pb(
                tf.compat.v1.Summary(value=values).SerializeToString(), step=step
            )
        self._remember(layers)

    def picture(self, step: int) -> None:
        """Draws the distances so far, if there are new ones."""
        if self._number == self._drawn:
            return
        self._drawn = self._number
        image = heat_map(np.array(self._shifts, float).T)
        rows = ", ".join(f"{number} {name}" for number, name in enumerate(self._names, 1))
        text = (
            "Distance of the moving mean from the batch's, in standard deviations: one row for each layer, from "
            "the top; one column for each record. Dark: near. Green: at the limit of what is healthy. Yellow: "
            f"far. Gray: unknown. Rows: {rows}"
        )
        with self._writer.as_default():
            tf.summary.image("batch normalization", image[np.newaxis], step, description=text)
            self._writer.flush()

    def close(self) -> None:
        """Closes the file."""
        self._writer.close()

    def _remember(self, layers: Sequence[LayerRecord]) -> None:
        names = [layer.layer for layer in layers]
        if names != self._names:
            self._names, self._shifts = names, []
        if self._number % self._every == 0:
            self._shifts.append([layer.mean_shift for layer in layers])
        self._number += 1
        if len(self._shifts) > _MOST_COLUMNS:  # A long training: only every other column stays.
            self._shifts = self._shifts[::2]
            self._every *= 2


def heat_map(shifts: np.ndarray) -> np.ndarray:
    """Draws an array of distances, in standard deviations, as an RGB picture. NaN is gray."""
    known = np.isfinite(shifts)
    scaled = np.log2(np.maximum(np.where(known, shifts, 1), 1e-9) / MEAN_SHIFT)
    position = np.clip((scaled + 4) / 6, 0, 1) * (len(_COLORS) - 1)
    colors = np.stack(
        [np.interp(position, np.arange(len(_COLORS)), channel) for channel in _COLORS.T], axis=-1
    )
    colors = np.where(known[..., np.newaxis], colors, _UNKNOWN).astype(np.uint8)
    height, width = (max(1, math.ceil(_SIDE / size)) for size in shifts.shape)
    return colors.repeat(min(height, 32), axis=0).repeat(width, axis=1)
