"""Trains the digits on several worker processes, which end with the same network.

    python examples/train_workers.py --workers 2   # starts all workers on this machine
    python examples/train_workers.py               # one worker of a cluster, which TF_CONFIG describes
    srun python examples/train_workers.py --slurm  # one worker of a Slurm job, with or without GPUs

Every worker runs the whole script and reads the same batches; each of its replicas trains on its shard of
them. The chief, which is the first worker, writes files and prints.
"""

import argparse
import hashlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def main() -> int:
    """Starts the workers, or runs one."""
    from examples import clusters
    from examples.quiet import quiet

    options = parse()
    quiet()
    if options.slurm:
        os.environ.update(clusters.slurm_settings(os.environ))
    if "TF_CONFIG" in os.environ:
        return work(options)
    if options.workers is not None:
        return clusters.start_workers(options.workers)
    sys.exit("error: which worker is this? Pass --workers or --slurm, or set TF_CONFIG.")


def parse() -> argparse.Namespace:
    """Reads the command line, without importing TensorFlow."""
    parser = argparse.ArgumentParser(
        prog="train_workers", description="Train the digits on several worker processes."
    )
    parser.add_argument("--workers", type=int, metavar="N", help="start N workers on this machine")
    parser.add_argument("--slurm", action="store_true", help="run as one task of a Slurm job")
    parser.add_argument("--model", default="cnn", choices=["mlp", "cnn", "resnet"])
    parser.add_argument("--epochs", type=int, default=5, metavar="N")
    parser.add_argument(
        "--batch-size", type=int, default=64, metavar="N", help="over all workers (default: 64)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument(
        "--backup",
        metavar="DIR",
        help="save progress here and resume from it; all workers must see this directory",
    )
    parser.add_argument(
        "--save-every",
        type=int,
        metavar="N",
        help="back up after every N batches (default: after every epoch)",
    )
    options = parser.parse_args()
    for name in ("workers", "save_every"):
        value, option = getattr(options, name), "--" + name.replace("_", "-")
        if value is not None and value < 1:
            parser.error(f"{option} must be at least 1. Received: {option} {value}.")
    return options


def work(options: argparse.Namespace) -> int:
    """Trains as one of the workers. Returns 0 if all of them end with the same network."""
    # Not at the top: these imports take seconds.
    import keras
    import tensorflow as tf

    import tfbn
    from examples import datasets, models, optimizers

    # First of all: it starts the server through which the workers communicate.
    strategy = tf.distribute.MultiWorkerMirroredStrategy()
    data = datasets.load("digits")
    keras.utils.set_random_seed(options.seed)
    # The seed makes the order the same on every worker.
    shuffled = data.train.cache().shuffle(len(data.train), seed=options.seed)

    with strategy.scope():
        model = models.MODELS[options.model](data.image_shape, data.classes, models.Hidden())
        loop = tfbn.TrainingLoop(
            model,
            optimizer=optimizers.optimizer("adam"),
            loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            metrics=["accuracy"],
            strategy=strategy,
        )
    callbacks = []
    if options.backup:
        save_freq = options.save_every or "epoch"
        callbacks.append(keras.callbacks.BackupAndRestore(options.backup, save_freq=save_freq))
    loop.fit(
        shuffled.batch(options.batch_size), epochs=options.epochs, callbacks=callbacks, verbose=2
    )
    accuracy = loop.evaluate(data.test.batch(256), verbose=0)["accuracy"]

    digests = gathered_digests(strategy, model)
    equal = len(set(digests)) == 1
    if is_chief(strategy):
        for worker, (weights, statistics) in enumerate(digests):
            print(f"Worker {worker}  weights {weights:016x}  statistics {statistics:016x}")
        print("All equal" if equal else "error: they differ")
        print(f"Test accuracy  {accuracy:.4f}")
    return 0 if equal else 1


def gathered_digests(strategy: Any, model: Any) -> list[tuple[int, int]]:
    """Returns, for each worker's first replica, a digest of the weights and one of the moving statistics."""
    import tensorflow as tf

    row = [[digest(model.trainable_variables), digest(model.non_trainable_variables)]]
    own = strategy.experimental_distribute_values_from_function(lambda context: tf.constant(row))
    return [tuple(each) for each in strategy.gather(own, axis=0).numpy().tolist()]


def digest(variables: Sequence[Any]) -> int:
    """Returns 63 bits that identify these values."""
    content = b"".join(variable.numpy().tobytes() for variable in variables)
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "big") >> 1


def is_chief(strategy: Any) -> bool:
    """Returns whether this worker prints for all."""
    resolver = strategy.cluster_resolver
    return resolver.task_type == "chief" or (
        resolver.task_id == 0 and "chief" not in resolver.cluster_spec().jobs
    )


if __name__ == "__main__":
    # Not this folder: its modules must not be mistaken for packages of the same name.
    sys.path[0] = str(ROOT)
    sys.exit(main())
