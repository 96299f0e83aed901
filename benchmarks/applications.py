r"""Converts and folds every network of `keras.applications`, and writes down what came of it.

    python -m benchmarks.applications                        # all of them: some 10 minutes
    python -m benchmarks.applications DenseNet121 Xception   # these anew, the others as they were

Random weights and small random images: nothing is downloaded. Each network has a process of
its own, which bounds the memory. Writes `docs/applications.json`, and from that `docs/applications.md`.
"""

import argparse
import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import results
from benchmarks.tables import table

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs/applications.json"
PAGE = RESULTS.with_suffix(".md")
SIZE = 96
BAR = 1e-4
"""How far a folded network's outputs may be from the network's, of the largest output."""
SECONDS = 900.0


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.applications",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("networks", nargs="*", metavar="NETWORK", help="of keras.applications")
    parser.add_argument("--here", action="store_true", help="one network, in this process, as JSON")
    options = parser.parse_args(arguments)
    if options.here:
        print(json.dumps(measured(*options.networks)))
        return
    run = results.load(RESULTS) if options.networks and RESULTS.exists() else {"results": []}
    found = {result["network"]: result for result in run["results"]}
    for name in options.networks or names():
        found[name] = _in_a_process(name)
        print(_line(found[name]), flush=True)
        run = {
            "versions": _versions(),
            "not_run": sorted(set(names()) - set(found)),
            "results": [found[name] for name in sorted(found)],
        }
        results.save(run, RESULTS)
    PAGE.write_text(page(results.load(RESULTS)))


def names() -> list[str]:
    """All networks that this Keras has."""
    import keras

    return [name for name in sorted(vars(keras.applications)) if name[0].isupper()]


def built(name: str, size: int, **arguments: Any) -> Any:
    """A network of random weights, with the statistics of a batch of random images.

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
    """What converting and folding make of a network."""
    import keras
    import numpy as np

    import tfbn

    keras.utils.set_random_seed(0)
    stock = built(name, size, classifier_activation=None)  # Softmax would hide differences.
    images = np.random.default_rng(1).normal(size=(2, size, size, 3)).astype("float32")

    def outputs(model: Any) -> Any:
        return np.asarray(model(images, training=False))

    expected = outputs(stock)
    scale = float(np.max(np.abs(expected)))

    def difference(model: Any) -> float:
        return float(np.max(np.abs(outputs(model) - expected))) / scale

    converted = tfbn.convert(stock)
    ours = difference(converted)
    back = tfbn.convert(converted, to=keras.layers.BatchNormalization)
    del converted
    identical = _paths(back) == _paths(stock)
    for old, new in zip(stock.weights, back.weights, strict=True):
        identical = identical and np.array_equal(old.numpy(), new.numpy())
    identical = identical and np.array_equal(outputs(back), expected)
    del back
    folded = tfbn.fold(stock, images, tolerance=1.0)  # The page says which are over the bar.
    outcomes = Counter(str(row.outcome) for row in folded.report.rows)
    behind = directly_behind(stock)
    return {
        "network": name,
        "layers": sum(isinstance(x, keras.layers.BatchNormalization) for x in stock.layers),
        "directly_behind": len(behind),
        "directly_behind_left": sum(row.layer in behind for row in folded.report.left),
        "identical": identical,
        "converted_difference": ours,
        "folded": outcomes["folded into what it follows"]
        + outcomes["folded into what it precedes"],
        "multiply_add": outcomes["multiply-add"],
        "unchanged": outcomes["unchanged"],
        "left": [{"layer": row.layer, "reason": row.reason} for row in folded.report.left],
        "difference": difference(folded),
    }


def _paths(model: Any) -> list[str]:
    # Keras numbers weights that have no name, in ConvNeXt, anew in each copy.
    return [re.sub(r"/variable_\d+$", "/variable", weight.path) for weight in model.weights]


def directly_behind(model: Any) -> set[str]:
    """The batch normalization layers that alone take the output of a linear layer: they must all fold.

    Read from the config of the model, as it would be saved.
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
    """The names of the layers whose outputs go into a layer."""
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
    """The page of the docs."""
    found = run["results"]
    versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
    rows = [
        [
            result["network"],
            str(result["layers"]),
            "yes" if result["identical"] else "NO",
            f"{result['converted_difference']:.0e}",
            str(result["folded"]),
            str(result["multiply_add"] + result["unchanged"]),
            f"{result['difference']:.0e}",
        ]
        for result in found
    ]
    head = ["network", "layers", "bit-equal", "converted", "folded", "left", "difference"]
    normalized = [result for result in found if result["layers"]]

    def total(key: str) -> int:
        return sum(result[key] for result in normalized)

    behind, behind_left = total("directly_behind"), total("directly_behind_left")
    over = [r["network"] for r in normalized if r["difference"] > BAR]
    return f"""# The networks of keras.applications, converted and folded

Generated by `python -m benchmarks.applications`; do not edit. {versions}; on a CPU, in
float32, with random weights, the statistics of random images of {SIZE}×{SIZE}, and logits as outputs.

{len(found)} networks, {len(normalized)} of them with batch normalization: {total("layers")} layers, of which {behind}
stand directly behind a convolution that feeds nothing else. Of these, {behind - behind_left} folded.

Folding may change an output by {BAR:.0e} of the largest; over that: {", ".join(over) or "none"}. Deep networks
of random weights magnify rounding, whatever it is from: compare the column "converted", where the same formula
is computed by other operations. Not run: {", ".join(run["not_run"]) or "none"}.

{table(head, rows)}

- layers: of batch normalization.
- bit-equal: whether `tfbn.convert` to tfbn's layers and back to Keras's gave the same names, weights and outputs.
- converted: the largest difference between outputs with Keras's layers and with tfbn's, of the largest output.
- folded: into a convolution or a dense layer, by `tfbn.fold`. Left: became one multiply-add for each channel instead.
- difference: the largest between outputs of the network and of the folded one, of the largest output.

## What is left, and why

{table(["network", "why, in the first of them", "layers"], _reasons(normalized), left=2)}
"""


def _reasons(found: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Layers with the same reason, but for the names in it, share a row."""
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
