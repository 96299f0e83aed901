"""Serves SavedModels one image at a time, with TensorFlow alone: neither tfbn nor Keras.

    python examples/serve.py saved_models/digits-cnn-tfbn/saved_model*
    python examples/serve.py SAVED_MODEL --examples EXAMPLES.npz --json

Checks that the predictions match those of the exported model, and that a prediction depends on its own
image alone, since batch normalization uses fixed statistics in inference. Measures how long one image takes,
with the model as it is and folded if both were exported. The exit status is 0 if the predictions match and do
not depend on the batch.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Less is logged where there is no GPU. What goes wrong still raises an error.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

# Importing one of these fails from now on: the SavedModel must work on its own.
for absent in ("tfbn", "keras", "tf_keras"):
    sys.modules[absent] = None  # type: ignore[assignment]

import numpy as np  # noqa: E402
import tensorflow as tf  # noqa: E402

TOLERANCE = 1e-3  # relative to the largest output; TF32 on a GPU needs it, a CPU stays below 1e-5
ALONE = 200  # number of images sent one at a time
BATCH = 256


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    inputs, expected = recorded(options.examples)
    models = {str(path): Served(path) for path in options.saved_models}
    milliseconds = latency(list(models.values()), inputs)
    reports = {
        name: {"examples": len(inputs)}
        | agreement(model, inputs, expected)
        | independence(model, inputs)
        | {"milliseconds": dict(zip(("q1", "median", "q3"), times, strict=True))}
        for (name, model), times in zip(models.items(), milliseconds, strict=True)
    }
    if options.json:
        print(json.dumps(reports))
    else:
        print("\n\n".join(text(name, report) for name, report in reports.items()))
    return 0 if all(r["agree"] and r["independent"] for r in reports.values()) else 1


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="serve", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("saved_models", nargs="+", type=Path, metavar="SAVED_MODEL")
    parser.add_argument(
        "--examples",
        type=Path,
        metavar="FILE.npz",
        help="the inputs of the model, and its outputs as they were when it was exported; by default "
        "served_examples.npz beside the first SavedModel",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(arguments)
    for path in options.saved_models:
        if not tf.saved_model.contains_saved_model(str(path)):
            parser.error(f"no SavedModel is there. Received: {path}. `make demo` exports some.")
    if options.examples is None:
        options.examples = options.saved_models[0].with_name("served_examples.npz")
    if not options.examples.is_file():
        parser.error(f"no examples are there. Received: --examples {options.examples}")
    return options


def recorded(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Loads the model's inputs, and its outputs at the time of export."""
    try:
        with np.load(path) as file:
            inputs, outputs = file["inputs"], file["outputs"]
    except Exception as error:  # NumPy raises many kinds of errors for a file of another format.
        sys.exit(f"serve: error: no file with arrays inputs and outputs. Received: {path}, {error}")
    if not len(inputs) == len(outputs) > 0:
        sys.exit(
            "serve: error: inputs and outputs must be as many, and one at least. "
            f"Received: {path}, {len(inputs)} and {len(outputs)}"
        )
    return inputs, outputs


class Served:
    """Maps a batch of images to predictions by the signature that TensorFlow Serving calls."""

    def __init__(self, path: Path) -> None:
        self._loaded = tf.saved_model.load(
            str(path)
        )  # Keep a reference: its variables live only as long as it does.
        self._signature = self._loaded.signatures["serving_default"]
        names = self._signature.structured_input_signature[1]
        if not len(names) == len(self._signature.structured_outputs) == 1:
            sys.exit(f"serve: error: one input and one output are served. Received: {path}")
        ((self._name, self._spec),) = names.items()

    def __call__(self, images: np.ndarray) -> np.ndarray:
        (outputs,) = self._signature(**{self._name: tf.cast(images, self._spec.dtype)}).values()
        return outputs.numpy()


def latency(models: Sequence[Served], inputs: np.ndarray) -> np.ndarray:
    """Measures the quartiles of the milliseconds per single image for each model, taking turns on the same images."""
    for model in models:
        model(inputs[:1])  # The first call is slower.
    times = np.empty((min(len(inputs), ALONE), len(models)))
    for turn, image in enumerate(inputs[:ALONE]):
        for number, model in enumerate(models):
            begin = time.perf_counter()
            model(image[None])
            times[turn, number] = 1e3 * (time.perf_counter() - begin)
    return np.percentile(times, [25, 50, 75], axis=0).T


def agreement(model: Served, inputs: np.ndarray, expected: np.ndarray) -> dict[str, Any]:
    """Checks that predictions match the recorded ones, for single images and in batches."""
    alone = [model(image[None]) for image in inputs[:ALONE]]
    rest = [model(inputs[i : i + BATCH]) for i in range(ALONE, len(inputs), BATCH)]
    difference = float(np.max(np.abs(np.concatenate(alone + rest) - expected)))
    agree = difference <= TOLERANCE * float(np.max(np.abs(expected)))
    return {"agree": agree, "largest_difference": difference}


def independence(model: Served, inputs: np.ndarray) -> dict[str, Any]:
    """Checks that an image gets the same prediction alone, among other images, and among much brighter ones."""
    images = inputs[:BATCH]
    alone = np.concatenate([model(image[None]) for image in images[:ALONE]])
    together = model(images)[:ALONE]
    brighter = np.concatenate([images[:ALONE], 10 * images + 5])
    among_others = model(brighter)[: len(alone)]
    difference = float(max(np.max(np.abs(other - alone)) for other in (together, among_others)))
    independent = difference <= TOLERANCE * float(np.max(np.abs(alone)))
    return {"independent": independent, "largest_difference_between_batches": difference}


def text(name: str, report: dict[str, Any]) -> str:
    agrees = "agree with" if report["agree"] else "DIFFER from"
    depends = "does not depend" if report["independent"] else "DEPENDS"
    times = report["milliseconds"]
    return f"""{name}
  {report["examples"]} predictions {agrees} those of the model: largest difference {report["largest_difference"]:.1e}
  A prediction {depends} on its batch: largest difference {report["largest_difference_between_batches"]:.1e}
  One image takes {times["median"]:.2f} ms (quartiles {times["q1"]:.2f} to {times["q3"]:.2f})"""


if __name__ == "__main__":
    sys.exit(main())
