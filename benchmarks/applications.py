r"""Converts, folds, fuses and recalibrates every network of `keras.applications`, and records the results.

    python -m benchmarks.applications                        # all of them: about half an hour
    python -m benchmarks.applications DenseNet121 Xception   # only these; the others keep their results

Uses random weights and small random images, so nothing is downloaded. Each network runs in its own process,
which limits memory to 5 GiB for the largest one. Writes `docs/applications.json`, and `docs/applications.md`
from it.
"""

import contextlib
import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import command_line, results
from benchmarks.tables import table

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs/applications.json"
PAGE = RESULTS.with_suffix(".md")
SIZE = 96
BAR = 1e-4
"""The largest allowed change of a folded network's outputs, relative to the largest output."""
RECALIBRATION = 8
"""On how many images networks are recalibrated, three at a time."""
SECONDS = 900.0


def main(arguments: Sequence[str] | None = None) -> None:
    parser = command_line.parser("benchmarks.applications", __doc__)
    parser.add_argument("networks", nargs="*", metavar="NETWORK", help="any of keras.applications")
    parser.add_argument(
        "--here", action="store_true", help="measure one network in this process and print JSON"
    )
    options = parser.parse_args(arguments)
    if options.here:
        (name,) = options.networks
        result = measured(name)
        print(json.dumps(result | recalibrated(name) if result["layers"] else result))
        return
    known = names()
    found = {name: old for name, old in results.by_network(RESULTS).items() if name in known}
    for name in options.networks or known:
        found[name] = _in_a_process(name)
        print(_line(found[name]), flush=True)
        run = {
            "versions": _versions(),
            "not_run": sorted(set(known) - set(found)),
            "results": [found[name] for name in sorted(found)],
        }
        results.save(run, RESULTS)
    PAGE.write_text(page(results.load(RESULTS)))


def names() -> list[str]:
    """Lists all networks of the installed Keras."""
    import keras

    return [name for name in sorted(vars(keras.applications)) if name[0].isupper()]


def built(name: str, size: int, **arguments: Any) -> Any:
    """Builds a network with random weights and the statistics of a batch of random images.

    With statistics that have nothing to do with its activations, a deep network either forgets its input or
    is chaotic: then float32 itself does not determine the outputs.
    """
    import keras
    import numpy as np

    model = getattr(keras.applications, name)(
        weights=None, input_shape=(size, size, 3), **arguments
    )
    rng = np.random.default_rng(0)
    for weight in model.weights:
        if weight.name == "gamma":
            sign = rng.choice([-1, 1], weight.shape, p=[0.1, 0.9])
            weight.assign(sign * rng.uniform(0.5, 1.5, weight.shape))
        elif weight.name == "beta":
            weight.assign(rng.normal(0, 0.1, weight.shape))
    layers = [x for x in model.layers if isinstance(x, keras.layers.BatchNormalization)]
    momentums = [layer.momentum for layer in layers]
    for layer in layers:
        layer.momentum = 0.0
    model(rng.normal(size=(4, size, size, 3)).astype("float32"), training=True)
    for layer, momentum in zip(layers, momentums, strict=True):
        layer.momentum = momentum
    return model


def measured(name: str, size: int = SIZE) -> dict[str, Any]:
    """Converts, folds and fuses a network, and measures the differences."""
    import keras
    import numpy as np

    import tfbn

    keras.utils.set_random_seed(0)
    stock = built(name, size, classifier_activation=None)  # Softmax would hide differences.
    images = np.random.default_rng(1).normal(size=(2, size, size, 3)).astype("float32")
    expected = _outputs(stock, images)
    converted = tfbn.convert(stock)
    ours = _difference(_outputs(converted, images), expected)
    back = tfbn.convert(converted, to=keras.layers.BatchNormalization)
    del converted
    identical = _paths(back) == _paths(stock)
    for old, new in zip(stock.weights, back.weights, strict=True):
        identical = identical and np.array_equal(old.numpy(), new.numpy())
    identical = identical and np.array_equal(_outputs(back, images), expected)
    del back
    behind = directly_behind(stock)
    fused = _fused(stock, behind, images, expected)
    # The page lists the networks above the tolerance.
    folded = tfbn.fold(stock, images, tolerance=1.0)
    after = _outputs(folded, images)
    outcomes = Counter(str(row.outcome) for row in folded.report.rows)
    return {
        "network": name,
        "layers": sum(isinstance(x, keras.layers.BatchNormalization) for x in stock.layers),
        "directly_behind": len(behind),
        "directly_behind_left": sum(row.layer in behind for row in folded.report.left),
        "identical": identical,
        "converted_difference": ours,
        "folded": outcomes["folded into the preceding layer"]
        + outcomes["folded into the following layer"],
        "multiply_add": outcomes["multiply-add"],
        "unchanged": outcomes["unchanged"],
        "left": [{"layer": row.layer, "reason": row.reason} for row in folded.report.left],
        "difference": _difference(after, expected),
        **fused,
        **(_in_float64(name, stock, images, after) if folded.report.rows else {}),
    }


def recalibrated(name: str, size: int = SIZE) -> dict[str, float]:
    """Recalibrates a network on batches, and compares with Keras's training step on all images as one batch.

    Returns:
        The largest difference of a mean or a variance, in standard deviations or relative to the variance, in
        float64 and in float32.
    """
    import keras
    import numpy as np

    import tfbn

    keras.utils.set_random_seed(0)
    stock = built(name, size, classifier_activation=None)
    images = np.random.default_rng(2).normal(0.3, 1.7, (RECALIBRATION, size, size, 3))
    with _float64():
        exact, oracle = (
            getattr(keras.applications, name)(
                weights=None, input_shape=(size, size, 3), classifier_activation=None
            )
            for _ in range(2)
        )
        for model in (exact, oracle):
            model.set_weights(stock.get_weights())
        for layer in oracle.layers:
            if isinstance(layer, keras.layers.BatchNormalization):
                layer.momentum = 0.0
            elif isinstance(layer, keras.layers.Dropout):
                layer.rate = 0.0
        oracle(images, training=True)
        tfbn.recalibrate(exact, images, batch_size=3, verbose=0)
    tfbn.recalibrate(stock, images.astype("float32"), batch_size=3, verbose=0)
    return {
        "recalibrated_difference_in_float64": _difference_of_statistics(exact, oracle),
        "recalibrated_difference": _difference_of_statistics(stock, oracle),
    }


def _difference_of_statistics(model: Any, expected: Any) -> float:
    import keras
    import numpy as np

    worst = 0.0
    for one, other in zip(model.layers, expected.layers, strict=True):
        if isinstance(one, keras.layers.BatchNormalization):
            mean, variance, true_mean, true_variance = (
                np.asarray(value, "float64")
                for layer in (one, other)
                for value in (layer.moving_mean, layer.moving_variance)
            )
            spread = true_variance + other.epsilon
            shifts = abs(mean - true_mean) / np.sqrt(spread)
            worst = max(worst, shifts.max(), (abs(variance - true_variance) / spread).max())
    return float(worst)


def _fused(stock: Any, behind: set[str], images: Any, expected: Any) -> dict[str, Any]:
    """Fuses and unfuses a network; nothing if it has no batch normalization."""
    import numpy as np

    import tfbn

    if not behind:
        return {}
    model = tfbn.fuse(stock, images, tolerance=1.0)
    outputs = _outputs(model, images)
    unfused = tfbn.unfuse(model)
    back = _paths(unfused) == _paths(stock) and all(
        np.array_equal(old.numpy(), new.numpy())
        for old, new in zip(stock.weights, unfused.weights, strict=True)
    )
    fused = {row.layer for row in model.report.rows} - {row.layer for row in model.report.left}
    return {
        "fused": len(fused),
        "fused_as_expected": fused == behind,
        "fused_difference": _difference(outputs, expected),
        "unfused": back and np.array_equal(_outputs(unfused, images), expected),
    }


def _in_float64(name: str, stock: Any, images: Any, folded_outputs: Any) -> dict[str, float]:
    """Measures what folding and fusing change in float64, where little is rounded, and the error of float32."""
    import keras

    import tfbn

    with _float64():
        exact = getattr(keras.applications, name)(
            weights=None, input_shape=images.shape[1:], classifier_activation=None
        )
        exact.set_weights(stock.get_weights())
        truth = _outputs(exact, images)
        folded = tfbn.fold(exact, images, tolerance=1.0)
        fused = tfbn.fuse(exact, images, tolerance=1.0)
        return {
            "difference_in_float64": _difference(_outputs(folded, images), truth),
            "fused_difference_in_float64": _difference(_outputs(fused, images), truth),
            "rounding": _difference(_outputs(stock, images), truth),
            "rounding_folded": _difference(folded_outputs, truth),
        }


def _outputs(model: Any, images: Any) -> Any:
    import numpy as np

    return np.asarray(model(images, training=False))


def _difference(outputs: Any, expected: Any) -> float:
    """Returns the largest difference relative to the largest output."""
    return float(abs(outputs - expected).max() / abs(expected).max())


@contextlib.contextmanager
def _float64() -> Iterator[None]:
    """Inside the context, networks are built with float64 weights and computations."""
    import keras

    floatx, policy = keras.config.floatx(), keras.config.dtype_policy()
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    try:
        yield
    finally:
        keras.config.set_floatx(floatx)
        keras.config.set_dtype_policy(policy)


def _paths(model: Any) -> list[str]:
    # In ConvNeXt, Keras numbers unnamed weights differently in each copy.
    return [re.sub(r"/variable_\d+$", "/variable", weight.path) for weight in model.weights]


def directly_behind(model: Any) -> set[str]:
    """Lists the batch normalization layers that are the only consumer of a linear layer: all of them must fold.

    They are read from the config of the model.
    """
    layers = {entry["name"]: entry for entry in model.get_config()["layers"]}
    before = {name: _producers(entry["inbound_nodes"]) for name, entry in layers.items()}
    takers = Counter(producer for producers in before.values() for producer in producers)
    return {
        name
        for name, entry in layers.items()
        if entry["class_name"] == "BatchNormalization"
        and _is_linear(layers[before[name][0]])
        and takers[before[name][0]] == 1
    }


def _producers(value: Any) -> list[str]:
    """Returns the names of the layers whose outputs a layer receives."""
    if isinstance(value, dict):
        if "keras_history" in value:
            return [value["keras_history"][0]]
        value = list(value.values())
    if isinstance(value, list | tuple):
        return [name for item in value for name in _producers(item)]
    return []


def _is_linear(entry: dict[str, Any]) -> bool:
    kinds = {"Conv2D", "DepthwiseConv2D", "SeparableConv2D", "Dense"}
    return entry["class_name"] in kinds and entry["config"]["activation"] == "linear"


def page(run: dict[str, Any]) -> str:
    """Formats the page of the documentation."""
    found = [result for result in run["results"] if result["layers"]]
    none = [result for result in run["results"] if not result["layers"]]
    versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
    head = ["network", "layers", "bit-equal", "folded", "left", "converted", "difference"]
    head += ["in float64", "rounding", "rounding, folded", "fused", "difference, fused"]
    head += ["recalibrated", "in float64"]
    numbers = ["converted_difference", "difference"]
    numbers += ["difference_in_float64", "rounding", "rounding_folded"]
    rows = [
        [
            result["network"],
            str(result["layers"]),
            "yes" if result["identical"] else "NO",
            str(result["folded"]),
            str(result["multiply_add"] + result["unchanged"]),
            *(f"{result[key]:.0e}" for key in numbers),
            str(result.get("fused", "")),
            f"{result['fused_difference']:.0e}" if "fused" in result else "not run",
            *(
                f"{result[key]:.0e}" if key in result else "not run"
                for key in ("recalibrated_difference", "recalibrated_difference_in_float64")
            ),
        ]
        for result in found
    ]

    def total(key: str) -> int:
        return sum(result[key] for result in found)

    behind, behind_left = total("directly_behind"), total("directly_behind_left")
    over = [f"{r['network']} ({r['rounding']:.0e})" for r in found if r["difference"] > BAR]
    exact = max(r["difference_in_float64"] for r in found)
    worse = max(r["rounding_folded"] / r["rounding"] for r in found)
    nearer = sum(r["rounding_folded"] <= r["rounding"] for r in found)
    fused = [r for r in found if "fused" in r]
    fused_exact = max(r["fused_difference_in_float64"] for r in fused)
    exactly = "exactly" if all(r["fused_as_expected"] for r in fused) else "NOT exactly"
    unfused = "bit for bit" if all(r["unfused"] for r in fused) else "but NOT everywhere"
    key = "recalibrated_difference_in_float64"
    giant = max(r[key] for r in found if key in r)
    same = all(r["identical"] and not r["difference"] for r in none)
    return f"""# The networks of keras.applications, converted, folded, fused and recalibrated

Generated by `python -m benchmarks.applications`; do not edit. {versions}; on a CPU, in
float32, with random weights, the statistics of random images of {SIZE}×{SIZE}, and logits as outputs.

{len(found)} networks have batch normalization: {total("layers")} layers, of which {behind} stand directly behind a
convolution that feeds nothing else. Of these, {behind - behind_left} folded. {len(none)} networks have none, and came
out {"bit-equal" if same else "DIFFERENT"}: {", ".join(r["network"] for r in none)}.
Not run: {", ".join(run["not_run"]) or "none"}.

Folding may change an output by {BAR:.0e} of the largest; over that, in brackets how far the network's own outputs
in float32 are from those in float64: {", ".join(over) or "none"}.
That is rounding, which depth magnifies, not the algebra: where the same networks compute in float64, folding changes
no output by more than {exact:.0e}. The folded networks are off by at most {worse:.1f} times as much as the networks,
and by no more in {nearer} of {len(found)}.

For fine-tuning, `tfbn.fuse` fused {sum(r["fused"] for r in fused)} layers of {len(fused)} networks, {exactly} those
directly behind a convolution. `tfbn.unfuse` gave the same names, weights and outputs back, {unfused}. Where the
networks compute in float64, fusing changes no output by more than {fused_exact:.0e}.

`tfbn.recalibrate` on {RECALIBRATION} images, three at a time, gave the statistics that a training step of Keras's
layers gives on all of them as one batch, with a momentum of 0 and without dropout: in float64 up to {giant:.0e}.

{table(head, rows)}

- layers: of batch normalization.
- bit-equal: whether `tfbn.convert` to tfbn's layers and back to Keras's gave the same names, weights and outputs.
- folded: into a convolution or a dense layer, by `tfbn.fold`. Left: became one multiply-add for each channel instead.
- converted: the largest difference between outputs with Keras's layers and with tfbn's, of the largest output.
- difference: the largest between outputs of the network and of the folded one, of the largest output. In float64: the
  same, where both compute in float64.
- rounding: the largest difference between outputs in float32 and in float64, of the largest output, of the network
  and of the folded one.
- fused: with the convolution before it, by `tfbn.fuse`; the other layers keep their frozen statistics. The difference
  is the largest between outputs of the network and of the fused one, of the largest output.
- recalibrated: the largest difference of a mean, in standard deviations, or of a variance, relative to it, between
  `tfbn.recalibrate` in float32 and the one large batch in float64. In float64: where both compute in float64.

## What is left, and why

{table(["network", "why, in the first of them", "layers"], _reasons(found), left=2)}
"""


def _reasons(found: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Groups layers whose reasons differ only in names into one row."""
    rows = []
    for result in found:
        kinds: dict[str, list[dict[str, Any]]] = {}
        for left in result["left"]:
            kinds.setdefault(re.sub(r"'[^']*'|\d+", "", left["reason"]), []).append(left)
        for alike in kinds.values():
            first = alike[0]
            why = f"{first['layer']}: {first['reason']}"
            rows.append([result["network"], why, str(len(alike))])
    return rows


def _in_a_process(name: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.applications", "--here", name]
    done = subprocess.run(
        command, cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=SECONDS, check=True
    )
    return json.loads(done.stdout)


def _versions() -> dict[str, str]:
    import keras
    import tensorflow as tf

    import tfbn

    return {"tfbn": tfbn.__version__, "TensorFlow": tf.__version__, "Keras": keras.__version__}


def _line(result: dict[str, Any]) -> str:
    left = result["multiply_add"] + result["unchanged"]
    return (
        f"{result['network']}: {result['layers']} layers, {result['folded']} folded, {left} left, "
        f"difference {result['difference']:.0e}, bit-equal: {result['identical']}"
    )


if __name__ == "__main__":
    main()
