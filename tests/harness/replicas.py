"""Runs layers on several replicas in processes of their own, which write down what each replica saw.

    python tests/harness/replicas.py OUT.npz --devices 4                    # virtual devices of one process
    python tests/harness/replicas.py OUT.npz --devices 2 --kind GPU         # cut out of the first GPU
    python tests/harness/replicas.py OUT.npz --addresses A:1,B:2 --index 0  # one of several workers

The processes compute and the tests judge: nothing in here compares. Virtual devices and workers have
to be there before TensorFlow starts, hence a process for each.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from examples.clusters import free_ports

ROOT = Path(__file__).parents[2]
Observed = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Case:
    """A layer, and what each replica feeds it."""

    id: str
    sizes: tuple[
        int, ...
    ]  # of the batch of each replica, in the first step; the next one turns them
    layer: dict[str, Any] = dataclasses.field(default_factory=dict)
    shape: tuple[int, ...] = (3,)  # of an example
    dtype: str = "float32"
    mask: str = "none"  # or "leading": no value of the channel axis; or "full"
    offset: float = 0.0
    slope: float = 0.0  # the mean of what comes from above in the backward pass
    mode: str = "graph"
    stock: bool = False  # Keras's layer
    spoiled: int | None = None  # the replica whose batch is not finite
    workers: bool = False  # whether worker processes run it too
    many: bool = False  # whether the replicas are as good as many
    large: bool = False  # whether it takes the kernels that large tensors take

    @property
    def replicas(self) -> int:
        return len(self.sizes)


@dataclasses.dataclass(frozen=True)
class Shard:
    """What a replica sees in one step."""

    x: np.ndarray
    dy: np.ndarray
    mask: np.ndarray | None


def shards(case: Case, step: int) -> list[Shard]:
    """Numbers as the dtype of the case holds them, so that rounding the input is no error."""
    rng = np.random.default_rng([step, *case.sizes])
    found = []
    for replica, size in enumerate(np.roll(case.sizes, step)):
        shape = (size, *case.shape)
        x = rng.normal(case.offset + replica, 1 + replica, shape)
        if replica == case.spoiled:
            x[0] = np.nan
        mask = {
            "none": None,
            "leading": rng.random(shape[:-1]) < 0.7,
            "full": rng.random(shape) < 0.7,
        }[case.mask]
        found.append(
            Shard(
                rounded(x, case.dtype), rounded(rng.normal(case.slope, 1, shape), case.dtype), mask
            )
        )
    return found


def rounded(values: np.ndarray, dtype: str) -> np.ndarray:
    import ml_dtypes

    return values.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype).astype(np.float64)


SYNCHRONIZED = {"synchronized": True}
STEPS = 2
CASES = [
    Case("even", (3, 3), SYNCHRONIZED, workers=True),
    Case("uneven", (5, 2, 3), SYNCHRONIZED),
    Case("empty", (4, 0, 3, 2), SYNCHRONIZED),
    Case("empty-of-two", (4, 0), SYNCHRONIZED, workers=True),
    Case("eager", (4, 1), SYNCHRONIZED, mode="eager"),
    Case("one-in-all", (0, 1), SYNCHRONIZED),
    Case("nothing-in-all", (0, 0), SYNCHRONIZED),
    Case("far", (5, 2, 3), SYNCHRONIZED, offset=1e6),
    Case("far-mask-empty", (5, 0, 3), SYNCHRONIZED, (4, 3), mask="full", offset=1e6),
    Case("mask", (3, 2), SYNCHRONIZED, (4, 3), mask="leading", workers=True),
    Case("axis-1", (2, 3), SYNCHRONIZED | {"axis": 1}, (3, 2, 2), workers=True),
    Case("axes", (3, 4), SYNCHRONIZED | {"axis": [1, 3]}, (2, 3, 2)),
    Case("axes-interleaved", (2, 3), SYNCHRONIZED | {"axis": [1, 3, 5]}, (2, 2, 1, 2, 3)),
    Case("many", (5, 2, 3), SYNCHRONIZED, offset=1e6, many=True),
    Case("many-mask-empty", (5, 0, 3), SYNCHRONIZED, (4, 3), mask="full", many=True),
    Case("many-spoiled", (3, 2), SYNCHRONIZED, spoiled=1, many=True),
    Case("float64", (3, 2), SYNCHRONIZED, dtype="float64"),
    Case("float16", (3, 2), SYNCHRONIZED, dtype="float16"),
    Case("bfloat16", (3, 2), SYNCHRONIZED | {"axis": 1}, (3, 2), dtype="bfloat16"),
    Case("slope", (5, 2), SYNCHRONIZED, (4, 3), dtype="bfloat16", slope=10.0),
    Case("renorm", (5, 2), SYNCHRONIZED | {"renorm": True}),
    Case("cumulative", (5, 2), SYNCHRONIZED | {"momentum": None}),
    Case("plain", (5, 2), SYNCHRONIZED | {"center": False, "scale": False}),
    Case("training-tensor", (5, 2), SYNCHRONIZED, mode="training tensor"),
    Case("spoiled", (3, 2), SYNCHRONIZED, spoiled=1, workers=True),
    Case("apart", (5, 2, 3), shape=(4, 3)),
    Case("apart-empty", (4, 0, 3, 2), shape=(4, 3)),
    Case("apart-eager", (5, 2), shape=(4, 3), mode="eager"),
    Case("apart-nothing", (0, 0)),
    Case("apart-mask", (5, 0), shape=(4, 3), mask="full", offset=1e4, workers=True),
    Case("apart-renorm", (5, 2), {"renorm": True}, shape=(4, 3)),
    Case("apart-cumulative", (5, 2), {"momentum": None}, shape=(4, 3)),
    Case("apart-virtual", (4, 2), {"virtual_batch_size": 2}, (8, 3)),
    Case(
        "apart-virtual-mask", (4, 2), {"virtual_batch_size": 2}, (8, 3), mask="full", workers=True
    ),
    Case("apart-float16", (5, 2), shape=(4, 3), dtype="float16"),
    Case("apart-training-tensor", (5, 2), shape=(4, 3), mode="training tensor"),
    Case("apart-training-tensor-mask", (5, 2), shape=(4, 3), mode="training tensor", mask="full"),
    Case("apart-spoiled", (3, 2), spoiled=1),
    Case("stock-apart", (5, 2), stock=True, workers=True),
    Case("stock-far", (64, 64), SYNCHRONIZED, offset=1e4, stock=True),
    Case("stock-mask", (5, 2), SYNCHRONIZED, (4, 3), mask="leading", stock=True),
]
# The fused kernel sees no float64 and no mask, and merges no moments: a few cases are enough.
LARGE = (
    *("far", "empty-of-two", "one-in-all", "nothing-in-all", "axis-1", "axes-interleaved", "plain"),
    *("float16", "slope", "renorm", "training-tensor", "spoiled"),
)
CASES += [
    dataclasses.replace(case, id=f"{case.id}-large", large=True, workers=False)
    for case in CASES
    if case.id in LARGE
]


# In the process of the replicas


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    strategies = started(options.devices, options.addresses, options.index, options.kind)
    observed: Observed = {}
    for case in CASES:
        if case.replicas in strategies and (case.workers or not options.addresses):
            observed |= {
                f"{case.id}/{name}": value
                for name, value in run_case(case, strategies[case.replicas]).items()
            }
    if options.addresses:
        from replica_models import trained

        (strategy,) = strategies.values()
        observed |= {f"trained/{name}": value for name, value in trained(strategy).items()}
        meet(strategy)
    np.savez(options.output, **observed)


def parser() -> argparse.ArgumentParser:
    """What each program of replicas is told: where its output goes, and which process it is."""
    new = argparse.ArgumentParser()
    new.add_argument("output", type=Path)
    new.add_argument("--devices", type=int, default=1)
    new.add_argument("--kind", choices=["CPU", "GPU"], default="CPU")
    new.add_argument("--addresses", default="")
    new.add_argument("--index", type=int, default=0)
    return new


def started(devices: int, addresses: str = "", index: int = 0, kind: str = "CPU") -> dict[int, Any]:
    """The strategies that there are, by the number of their replicas."""
    if addresses:
        task = {"type": "worker", "index": index}
        cluster = {"worker": addresses.split(",")}
        os.environ["TF_CONFIG"] = json.dumps({"cluster": cluster, "task": task})
    from quick_start import tf

    if addresses:
        return {len(cluster["worker"]): tf.distribute.MultiWorkerMirroredStrategy()}
    # A GPU is cut by its memory, a CPU is not.
    part = tf.config.LogicalDeviceConfiguration(memory_limit=1024 if kind == "GPU" else None)
    tf.config.set_logical_device_configuration(
        tf.config.list_physical_devices(kind)[0], [part] * devices
    )
    # Collectives know one group of devices in a process: the other strategies reduce in other ways.
    ways = {3: tf.distribute.ReductionToOneDevice(), 4: tf.distribute.HierarchicalCopyAllReduce()}
    return {
        n: tf.distribute.MirroredStrategy([f"{kind}:{i}" for i in range(n)], ways.get(n))
        for n in range(2, devices + 1)
    }


def meet(strategy: Any) -> None:
    """Waits for the other workers: who leaves first would look to them as if it had died."""
    import tensorflow as tf

    strategy.run(lambda: tf.distribute.get_replica_context().all_reduce("SUM", tf.constant(1.0)))


def run_case(case: Case, strategy: Any) -> Observed:
    """`1/0/y` is what the layer gave replica 0 in step 1; beside it dx, the other gradients, all weights."""
    import keras
    import tensorflow as tf

    import tfbn
    from tfbn._moments import replicas
    from tfbn._normalize import dispatch

    replicas.FEW = 0 if case.many else 16
    dispatch.SMALL = 0 if case.large else 2**16
    with strategy.scope():
        policy = {"float16": "mixed_float16", "bfloat16": "mixed_bfloat16"}.get(
            case.dtype, case.dtype
        )
        kind = keras.layers.BatchNormalization if case.stock else tfbn.BatchNormalization
        layer = kind(**case.layer, dtype=policy)
        layer.build((None, *case.shape))

    def step(x: Any, dy: Any, mask: Any, training: Any) -> dict[str, Any]:
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x, training=training, mask=mask)
        sources = {"dx": x} | {"d" + v.name: v.value for v in layer.trainable_variables}
        return {"y": y, **tape.gradient(y, sources, output_gradients=dy)}

    def run(x: Any, dy: Any, mask: Any, training: Any = True) -> Any:
        return strategy.run(step, (x, dy, mask, training))

    if case.mode != "eager":
        run = tf.function(run, reduce_retracing=True, autograph=False)
    training = (tf.constant(True),) if case.mode == "training tensor" else ()
    observed: Observed = {}
    for number in range(STEPS):
        fed = shards(case, number)

        def values(name: str, dtype: str, fed: list[Shard] = fed) -> Any:
            if getattr(fed[0], name) is None:
                return None
            return strategy.experimental_distribute_values_from_function(
                lambda context: tf.cast(getattr(fed[context.replica_id_in_sync_group], name), dtype)
            )

        batch = (values("x", case.dtype), values("dy", case.dtype), values("mask", "bool"))
        if training:
            run(*batch, tf.constant(False))  # leaves no trace
        results = run(*batch, *training) | {w.name: w.value for w in layer.weights}
        for name, value in results.items():
            for replica, part in local(strategy, value).items():
                observed[f"{number}/{replica}/{name}"] = tf.cast(part, tf.float64).numpy()
    return observed


def local(strategy: Any, value: Any) -> dict[int, Any]:
    """The parts of a value on the replicas of this process, by replica."""
    parts = strategy.experimental_local_results(value)
    resolver = strategy.cluster_resolver
    task = resolver.task_id if resolver is not None and resolver.task_type == "worker" else 0
    return {task * len(parts) + i: part for i, part in enumerate(parts)}


# In the process of the tests


def run_devices(program: str, output: Path, *arguments: str) -> Observed:
    run_processes(program, [[str(output), *arguments]])
    return dict(np.load(output))


def run_workers(folder: Path, workers: int, program: str = "replicas.py") -> Observed:
    """What all workers together have seen."""
    addresses = ",".join(f"127.0.0.1:{port}" for port in free_ports(workers))
    outputs = [folder / f"{workers}-{i}.npz" for i in range(workers)]
    run_processes(
        program,
        [[str(o), "--addresses", addresses, "--index", str(i)] for i, o in enumerate(outputs)],
    )
    return {name: value for output in outputs for name, value in np.load(output).items()}


def run_processes(program: str, arguments: Sequence[Sequence[str]]) -> None:
    """Runs a program of this folder with each of the arguments, all at once, to the end."""
    with processes(program, arguments) as started:
        for process in started:
            finish(process)


@contextlib.contextmanager
def processes(
    program: str, arguments: Sequence[Sequence[str]]
) -> Iterator[list[subprocess.Popen[str]]]:
    """Starts a program of this folder with each of the arguments, and ends what is left of them."""
    counted = {**os.environ, "PYTHONPATH": str(ROOT)}
    # Coverage is counted in the first alone: the others do what it does.
    uncounted = {k: v for k, v in counted.items() if k != "COVERAGE_PROCESS_CONFIG"}
    started = [
        subprocess.Popen(
            [sys.executable, str(ROOT / "tests" / "harness" / program), *each],
            env=uncounted if index else counted,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index, each in enumerate(arguments)
    ]
    try:
        yield started
    finally:
        for process in started:
            process.kill()
            process.communicate()


def finish(process: subprocess.Popen[str], code: int = 0, limit: float = 240) -> str:
    """Waits for the end of the process, and returns what it has printed."""
    output, _ = process.communicate(timeout=limit)
    assert process.returncode == code, output
    return output


if __name__ == "__main__":
    main()
