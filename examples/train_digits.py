"""Trains a small network with batch normalization to read digits, exports it, and serves it.

    python -m examples.train_digits
    python -m examples.train_digits --model resnet --placement after --optimizer momentum
    python -m examples.train_digits --help

The same seed gives the same network, bit for bit on the same machine with the same versions.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
QUICK_EXAMPLES = 256


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command. An error that the user can fix prints a message without a traceback."""
    from examples.quiet import quiet

    options = parse(arguments)
    quiet()
    # The serving process needs a part of the GPU's memory, too.
    os.environ.setdefault("TF_FORCE_GPU_ALLOW_GROWTH", "true")
    try:
        run(options)
    except (ImportError, ConnectionError) as error:
        sys.exit(f"error: {error}")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the command line without importing TensorFlow, so that `--help` and errors appear at once."""
    parser = argparse.ArgumentParser(
        prog="train_digits",
        description="Train a small image classifier with batch normalization in a GradientTape "
        "loop. Plot its learning curves, export it as a SavedModel, and check that a "
        "process without tfbn serves it with the same predictions.",
    )
    parser.add_argument(
        "--dataset",
        default="digits",
        choices=["digits", "mnist", "fashion_mnist", "cifar10"],
        help="the digits come with scikit-learn, the others are downloaded once (default: digits)",
    )
    parser.add_argument(
        "--model", default="cnn", choices=["mlp", "cnn", "resnet"], help="default: cnn"
    )
    parser.add_argument(
        "--norm",
        default="tfbn",
        choices=["tfbn", "keras", "none"],
        help="batch normalization: tfbn's, Keras's own, or none (default: tfbn)",
    )
    parser.add_argument(
        "--placement",
        choices=["before", "after"],
        help="normalization before or after the activation (default: before)",
    )
    parser.add_argument(
        "--optimizer",
        default="adam",
        choices=["sgd", "momentum", "rmsprop", "adam"],
        help="momentum is sgd with momentum 0.9 (default: adam)",
    )
    parser.add_argument(
        "--learning-rate",
        type=positive,
        metavar="RATE",
        help="at the first step; decays to 0 along a cosine (default: depends on the optimizer)",
    )
    parser.add_argument(
        "--epochs", type=whole(1), metavar="N", help="default: 15, or 1 with --quick"
    )
    parser.add_argument(
        "--batch-size",
        type=whole(1),
        default=32,
        metavar="N",
        help="examples in a mini-batch (default: 32)",
    )
    parser.add_argument(
        "--seed",
        type=whole(0, 2**32 - 1),
        default=0,
        metavar="N",
        help="for the initial weights and the shuffling (default: 0)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="where to write curves and model (default: saved_models/DATASET-MODEL-NORM)",
    )
    parser.add_argument(
        "--quick", action="store_true", help=f"try it on {QUICK_EXAMPLES} examples, for one epoch"
    )
    options = parser.parse_args(arguments)
    if options.norm == "none" and options.placement is not None:
        parser.error(
            "--placement is that of the normalization, and with --norm none there is none. "
            f"Received: --placement {options.placement}. Leave one of the two out."
        )
    options.placement = options.placement or "before"
    options.epochs = options.epochs or (1 if options.quick else 15)
    name = f"{options.dataset}-{options.model}-{options.norm}"
    options.output = options.output or ROOT / "saved_models" / name
    if options.output.exists() and not options.output.is_dir():
        parser.error(f"--output must be a folder. Received: {options.output}, which is a file.")
    return options


def positive(text: str) -> float:
    """Parses a number greater than 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number over 0. Received: {text!r}")
    return value


def whole(least: int, most: int | None = None) -> Callable[[str], int]:
    """Parses an integer in a range."""

    def read(text: str) -> int:
        wanted = f"from {least}" if most is None else f"from {least} to {most}"
        if not text.isdecimal() or int(text) < least or (most is not None and int(text) > most):
            raise argparse.ArgumentTypeError(f"must be a whole number {wanted}. Received: {text!r}")
        return int(text)

    return read


def run(options: argparse.Namespace) -> None:
    """Trains, plots, exports and serves a model, and prints the results."""
    # Not at the top: these imports take seconds.
    import keras
    import tensorflow as tf

    import tfbn
    from examples import curves, datasets, models, optimizers

    data = datasets.load(options.dataset)
    # Not earlier: preparing data draws random numbers, but only in the first run.
    keras.utils.set_random_seed(options.seed)
    tf.config.experimental.enable_op_determinism()

    train, test = data.train, data.test
    if options.quick:
        train, test = train.take(QUICK_EXAMPLES), test.take(QUICK_EXAMPLES)
    shuffled = train.cache().shuffle(len(train), seed=options.seed).batch(options.batch_size)
    batches = shuffled.prefetch(tf.data.AUTOTUNE)
    test_batches = test.batch(256).cache()

    hidden = models.Hidden(norm=options.norm, placement=options.placement)
    model = models.MODELS[options.model](data.image_shape, data.classes, hidden)
    rate = options.learning_rate or optimizers.DEFAULT_RATES[options.optimizer]
    falling = keras.optimizers.schedules.CosineDecay(rate, options.epochs * len(batches))
    loop = tfbn.TrainingLoop(
        model,
        optimizer=optimizers.optimizer(options.optimizer, falling),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    history = loop.fit(batches, validation_data=test_batches, epochs=options.epochs).history
    accuracy = float(loop.evaluate(test_batches, verbose=0)["accuracy"])

    options.output.mkdir(parents=True, exist_ok=True)
    picture = options.output / "curves.png"
    saved_models = [options.output / name for name in ("saved_model", "saved_model_unfolded")]
    curves.plot(
        history, picture, f"{options.model} on {options.dataset}, normalization: {options.norm}"
    )
    for path in saved_models:
        tfbn.export(model, path, fold=path.name == "saved_model", overwrite=True)
    images = np.concatenate([images for images, _ in test_batches.as_numpy_iterator()])
    reports = serve(saved_models, images, model.predict(test_batches, verbose=0))
    folded, unfolded = (reports[str(path)] for path in saved_models)
    times = [report["milliseconds"]["median"] for report in (unfolded, folded)]

    print(f"\nTest accuracy  {accuracy:.4f} ({round(accuracy * len(test))} of {len(test)})")
    print(f"Curves         {shown(picture)}")
    print(f"SavedModel     {shown(saved_models[0])}, and unfolded beside it")
    print(
        f"Served         {folded['examples']} predictions by a process without tfbn and Keras "
        f"agree, the largest difference is {folded['largest_difference']:.1e}"
    )
    print(
        f"One image      {times[0]:.2f} ms as it is, {times[1]:.2f} ms folded, the same in any batch"
    )


def serve(saved_models: Sequence[Path], inputs: np.ndarray, outputs: np.ndarray) -> dict[str, Any]:
    """Loads and calls the SavedModels in a new process, and returns its reports, one per path."""
    examples = saved_models[0].with_name("served_examples.npz")
    np.savez(examples, inputs=inputs, outputs=outputs)
    # -P: modules in examples/ must not shadow packages of the same name.
    program = [sys.executable, "-P", str(Path(__file__).with_name("serve.py")), "--json"]
    done = subprocess.run(
        [*program, *map(str, saved_models)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(
            f"error: {saved_models[0].parent} does not serve the predictions of the model that was "
            f"exported. Received, from a fresh process: {done.stdout}{done.stderr}"
        )
    return json.loads(done.stdout)


def shown(path: Path) -> Path:
    """Returns the path relative to the current directory if it lies below."""
    path, here = path.resolve(), Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


if __name__ == "__main__":
    main()
