r"""Measures how fast folded models are served, against the stock model and one without batch normalization.

    python -m benchmarks.serving                          # three networks: a few minutes
    python -m benchmarks.serving ResNet50 --turns 30      # only this one; the others keep their results

Five SavedModels of each network, in the same process and in turns: `stock`, as `model.export` of Keras writes
it; `folded`, what `tfbn.fold` returns, written in the same way; `bare`, the network built without batch
normalization (with the biases that its convolutions then need), in the same way; `tfbn`, by `tfbn.export`; and
`bare tfbn`, the network without batch normalization by `tfbn.export`. Exporting and measuring run in
separate processes, the second one without tfbn and Keras. Writes JSON, and Markdown beside it.
"""

import datetime
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import command_line, environment, results
from benchmarks.application_models import built
from benchmarks.tables import table

NETWORKS = {"MobileNetV2": (8, 1.4), "EfficientNetB0": (8, 1.2), "ResNet50": (4, 1.15)}
"""The batch size, and the required speedup of the folded model over the stock model."""
SIZE = 128
MOST_BEHIND = 1.03
"""The largest allowed time of a folded network, relative to the network without batch normalization."""
KINDS = ["stock", "folded", "bare", "tfbn", "bare tfbn"]
RATIOS = [("stock", "folded"), ("stock", "tfbn"), ("folded", "bare"), ("tfbn", "bare tfbn")]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = command_line.parser("benchmarks.serving", __doc__)
    parser.add_argument("networks", nargs="*", metavar="NETWORK", help="any of keras.applications")
    parser.add_argument("--turns", type=int, default=60, help="turns per contender")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--models", type=Path, help="save the SavedModels here, or load them from here"
    )
    parser.add_argument("--output", type=Path, default=Path("build/benchmarks/serving.json"))
    parser.add_argument(
        "--export-only", action="store_true", help="export the models without measuring them"
    )
    options = parser.parse_args(arguments)
    found = results.by_network(options.output)
    with tempfile.TemporaryDirectory() as folder:
        models = options.models or Path(folder)
        for name in options.networks or list(NETWORKS):
            if not (models / name).exists():
                export(name, models / name)
            if not options.export_only:
                found[name] = measured(name, models / name, options.turns, options.threads)
                print(line(found[name]), flush=True)
    if found:
        run = {
            "suite": "serving",
            "date": datetime.date.today().isoformat(),
            "environment": environment.described(options.threads),
            "turns": options.turns,
            "results": [found[name] for name in sorted(found)],
        }
        results.save(run, options.output)
        page = f"# Serving with batch normalization folded\n\n{section(results.load(options.output))}\n"
        options.output.with_suffix(".md").write_text(page)
    return 0


def export(name: str, folder: Path) -> None:
    """Writes all SavedModels of a network with random weights and statistics."""
    import tfbn

    stock = built(name, SIZE)
    bare = without_batch_normalization(stock)
    for kind, model in {"stock": stock, "folded": tfbn.fold(stock), "bare": bare}.items():
        model.export(folder / kind, verbose=False)
    tfbn.export(stock, folder / "tfbn")
    tfbn.export(bare, folder / "bare tfbn")


def without_batch_normalization(model: Any) -> Any:
    """Builds the network without batch normalization, and with biases instead."""
    import keras

    def copy(layer: Any) -> Any:
        config = layer.get_config()
        if "use_bias" in config:
            config["use_bias"] = True
        return type(layer).from_config(config)

    def call(layer: Any, *args: Any, **kwargs: Any) -> Any:
        skipped = isinstance(layer, keras.layers.BatchNormalization)
        return args[0] if skipped else layer(*args, **kwargs)

    return keras.models.clone_model(model, clone_function=copy, call_function=call)


def measured(name: str, folder: Path, turns: int, threads: int) -> dict[str, Any]:
    """Measures the SavedModels in a process without tfbn and Keras."""
    batch = NETWORKS.get(name, (8, 1.0))[0]
    command = [sys.executable, "-m", "benchmarks.serving", "--serve", str(folder.resolve())]
    done = subprocess.run(
        [*command, str(batch), str(turns), str(threads)],
        cwd=Path(__file__).parents[1],
        env=os.environ | {"TF_CPP_MIN_LOG_LEVEL": "2"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    times = json.loads(done.stdout)
    return {
        "network": name,
        "batch": batch,
        "size": SIZE,
        "threads": threads,
        "milliseconds": times,
        **{ratio: times.pop(ratio) for ratio in (f"{one} / {other}" for one, other in RATIOS)},
    }


def line(result: dict[str, Any]) -> str:
    name = result["network"]
    bar = NETWORKS.get(name, (8, 1.0))[1]
    times = ", ".join(f"{k} {result['milliseconds'][k]['median']:.2f}" for k in KINDS)
    return (
        f"{name}, {result['batch']} images, ms: {times}\n"
        f"  folded {result['stock / folded']:.2f} times as fast as stock (at least {bar}); "
        f"by tfbn.export {result['stock / tfbn']:.2f} times\n"
        f"  of the time without batch normalization: {result['folded / bare']:.3f}, by tfbn.export "
        f"{result['tfbn / bare tfbn']:.3f} (at most {MOST_BEHIND})"
    )


def section(run: dict[str, Any]) -> str:
    """Formats a run as a table for the page of numbers."""
    e = run["environment"]
    versions = ", ".join(f"{n} {e['versions'][n]}" for n in ("tensorflow", "keras"))
    rows = []
    for r in run["results"]:
        times = [f"{r['milliseconds'][kind]['median']:.1f}" for kind in ("stock", "folded", "bare")]
        bar = NETWORKS.get(r["network"], (8, 1.0))[1]
        rows.append(
            [
                f"{r['network']}, {r['batch']} images",
                *times,
                f"{r['stock / folded']:.2f} (≥ {bar})",
                f"{r['folded / bare']:.3f} (≤ {MOST_BEHIND})",
                f"{r['stock / tfbn']:.2f}",
            ]
        )
    head = ["", "as it is", "folded", "without BN", "folded: times as fast"]
    head += ["folded: of the time without BN", "by tfbn.export: times as fast"]
    return (
        f"Milliseconds per batch of {SIZE}×{SIZE} images, served as SavedModels by TensorFlow alone; {e['processor']}, "
        f"{e['threads']} threads; {versions}; {run['date']}. Medians of {run['turns']} turns; the ratios are "
        "medians of ratios turn by turn, not quotients of the columns. In brackets: what a run must reach.\n\n"
        + table(head, rows)
    )


def serve(folder: Path, batch: int, turns: int, threads: int) -> None:
    """Runs the SavedModels in turns, and prints the times as JSON."""
    import time

    for absent in ("tfbn", "keras"):
        sys.modules[absent] = None  # type: ignore[assignment]
    import numpy as np
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(threads)
    images = tf.random.normal((batch, SIZE, SIZE, 3), seed=0)
    loaded = {kind: tf.saved_model.load(str(folder / kind)) for kind in KINDS}
    functions = {}
    for kind, model in loaded.items():
        function = model.signatures["serving_default"]
        (name,) = function.structured_input_signature[1]
        functions[kind] = (function, name)
        for _ in range(5):
            function(**{name: images})
    times: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for turn in range(turns):
        for kind in np.roll(KINDS, -turn):
            function, name = functions[kind]
            for again in range(3):
                start = time.perf_counter()
                (outputs,) = function(**{name: images}).values()
                outputs.numpy()
                if again:  # The first call of a turn fills the caches.
                    times[kind].append(1e3 * (time.perf_counter() - start))
    result: dict[str, Any] = {
        kind: dict(zip(("q1", "median", "q3"), np.percentile(values, [25, 50, 75]), strict=True))
        for kind, values in times.items()
    }
    for one, other in RATIOS:
        # Ratios turn by turn: other load on the machine affects both.
        result[f"{one} / {other}"] = float(np.median(np.divide(times[one], times[other])))
    print(json.dumps(result))


if __name__ == "__main__":
    if "--serve" in sys.argv:
        where, *numbers = sys.argv[2:]
        serve(Path(where), *map(int, numbers))
    else:
        sys.exit(main())
