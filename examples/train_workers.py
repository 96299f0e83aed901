"""Trains the digits on several worker processes, which end with the same network.

    python examples/train_workers.py --workers 2   # starts them all on this machine
    python examples/train_workers.py               # as one worker of a cluster: TF_CONFIG says which
    srun python examples/train_workers.py --slurm  # as one worker of a Slurm job

Every worker runs the whole script and reads the same batches; each of its replicas trains on its share of
them. The chief, the first worker, writes files and speaks.
"""

import argparse
import contextlib
import hashlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def main() -> int:
    """Starts the workers, or is one."""
    options = parse()
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    if "TF_CONFIG" in os.environ or options.slurm:
        return work(options)
    if options.workers is not None:
        return start(options.workers)
    sys.exit("error: which worker is this? Give --workers or --slurm, or set TF_CONFIG.")


def parse() -> argparse.Namespace:
    """Reads the command line, without TensorFlow."""
    parser = argparse.ArgumentParser(
        prog="train_workers", description="Train the digits on several worker processes."
    )
    parser.add_argument("--workers", type=int, metavar="N", help="start N of them on this machine")
    parser.add_argument("--slurm", action="store_true", help="the cluster is that of a Slurm job")
    parser.add_argument("--model", default="cnn", choices=["mlp", "cnn", "resnet"])
    parser.add_argument("--epochs", type=int, default=5, metavar="N")
    parser.add_argument(
        "--batch-size", type=int, default=64, metavar="N", help="over all workers (default: 64)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument(
        "--backup", metavar="DIR", help="go on from here if a run was killed; all workers read it"
    )
    options = parser.parse_args()
    if options.workers is not None and options.workers < 1:
        parser.error(f"--workers must be at least 1. Received: --workers {options.workers}.")
    return options


def start(number: int) -> int:
    """Runs this command once for each worker; when one of them fails, the others are ended."""
    cluster = {"worker": [f"127.0.0.1:{port}" for port in free_ports(number)]}
    with contextlib.ExitStack() as ending:
        workers = []
        for index in range(number):
            config = {"cluster": cluster, "task": {"type": "worker", "index": index}}
            process = subprocess.Popen(
                [sys.executable, *sys.argv], env={**os.environ, "TF_CONFIG": json.dumps(config)}
            )
            ending.callback(process.wait)
            ending.callback(process.kill)  # comes before the wait
            workers.append(process)
        while any(process.poll() is None for process in workers):
            if any(process.poll() for process in workers):
                return 1
            time.sleep(0.1)
        return max(abs(process.returncode) for process in workers)


def free_ports(number: int) -> list[int]:
    """Ports that nobody listened on just now, all different."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def work(options: argparse.Namespace) -> int:
    """Trains as one of the workers; 0 where all of them have ended with the same network."""
    # Here and not above: they take seconds.
    import keras
    import tensorflow as tf

    import tfbn
    from examples import datasets, models, optimizers

    # Before anything else that TensorFlow does: it starts the server through which workers meet.
    resolvers = tf.distribute.cluster_resolver
    resolver = resolvers.SlurmClusterResolver() if options.slurm else None
    strategy = tf.distribute.MultiWorkerMirroredStrategy(cluster_resolver=resolver)
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
    backups = [keras.callbacks.BackupAndRestore(options.backup)] if options.backup else []
    loop.fit(
        shuffled.batch(options.batch_size), epochs=options.epochs, callbacks=backups, verbose=2
    )
    accuracy = loop.evaluate(data.test.batch(256), verbose=0)["accuracy"]

    digests = gathered(strategy, model)
    equal = len(set(digests)) == 1
    if is_chief(strategy):
        for worker, (weights, statistics) in enumerate(digests):
            print(f"Worker {worker}  weights {weights:016x}  statistics {statistics:016x}")
        print("All equal" if equal else "error: they differ")
        print(f"Test accuracy  {accuracy:.4f}")
    return 0 if equal else 1


def gathered(strategy: Any, model: Any) -> list[tuple[int, int]]:
    """A digest of the weights and one of the moving statistics of the first replica of each worker."""
    import tensorflow as tf

    row = [[digest(model.trainable_variables), digest(model.non_trainable_variables)]]
    own = strategy.experimental_distribute_values_from_function(lambda context: tf.constant(row))
    return [tuple(each) for each in strategy.gather(own, axis=0).numpy().tolist()]


def digest(variables: Sequence[Any]) -> int:
    """63 bits that tell values apart."""
    content = b"".join(variable.numpy().tobytes() for variable in variables)
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "big") >> 1


def is_chief(strategy: Any) -> bool:
    """Whether this worker speaks for all."""
    resolver = strategy.cluster_resolver
    return resolver.task_type == "chief" or (
        resolver.task_id == 0 and "chief" not in resolver.cluster_spec().jobs
    )


if __name__ == "__main__":
    sys.path[0] = str(
        ROOT
    )  # not this folder: its modules must not pass for packages of the same name
    sys.exit(main())
