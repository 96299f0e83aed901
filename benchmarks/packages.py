r"""Runs every tool of tfbn on models of other packages, and records what came of it.

    make test-models                                            # installs the packages, then runs what is missing
    python -m benchmarks.packages "keras-hub ResNetBackbone"    # only these; the others keep their results
    python -m benchmarks.packages --again                       # all of them

Uses random weights and small random inputs, so nothing is downloaded. Each model runs in its own process with a
time limit, and its results are saved as it ends: a second run goes on. Writes `docs/packages.json`, and
`docs/packages.md` from it. Exits with status 1 if a tool did something wrong, rather than refused or worked.
"""

import json
import re
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks import command_line, results
from benchmarks.package_models import makers
from benchmarks.tables import table

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs/packages.json"
PAGE = RESULTS.with_suffix(".md")
REQUIREMENTS = ROOT / "benchmarks/packages.txt"
SECONDS = 600.0
REASONS = {
    "keras-hub DeepLabV3ImageSegmenter": "`clone_model` makes a model whose weights have another "
    "order, with Keras's layers as with tfbn's.",
    "medicai DeepLabV3Plus, TransUNet": "Their layer `ResizingND` asks in Python whether a tensor is "
    "true, so TensorFlow cannot trace the models in a graph, which recalibration and export need.",
    "keras-hub BASNetImageSegmenter, kimm RepVGGA0, zeromodels Res2Net": "With random weights they "
    "amplify rounding: inputs that differ in the last bit change the outputs by 2e-4, 1e-5 and 2e-4, "
    "and each of 61 to 85 layers rounds. The default tolerance, 1e-4, leaves no room for that.",
    "keras-vision FastViT-T8": "`get_config` of its layer `ConvFFN` returns `dropout_val`, which its "
    "constructor does not take, so Keras cannot create the layer again. `convert` replaces all 70 "
    "layers by tfbn's, and refuses the way back.",
}
"""What the errors of a model come from."""
AMPLIFIED = {"keras-hub BASNetImageSegmenter": 1.9e-4, "zeromodels Res2Net": 1.6e-4}
"""How much outputs change if inputs differ in the last bit, by `compare.advice`, if more than 1e-4."""
TOOLS = ("convert", "load", "clone", "freeze", "fold", "inspect", "recalibrate", "export")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = command_line.parser("benchmarks.packages", __doc__)
    parser.add_argument("models", nargs="*", metavar="MODEL")
    parser.add_argument("--again", action="store_true", help="run models that have results, too")
    parser.add_argument("--here", action="store_true", help="one model, in this process, as JSON")
    options = parser.parse_args(arguments)
    if options.here:
        print("\n" + json.dumps(measured(makers()[options.models[0]])))
        return 0
    known = list(makers())
    found = results.by_network(RESULTS)
    missing = [name for name in known if options.again or name not in found]
    for name in options.models or missing:
        found[name] = {"network": name} | _in_a_process(name)
        print(name, *(f"{tool}: {found[name].get(tool)}" for tool in TOOLS), sep="\n  ", flush=True)
        ordered = [found[name] for name in known if name in found]
        left = [name for name in known if name not in found]
        results.save({"versions": _versions(), "not_run": left, "results": ordered}, RESULTS)
    run = results.load(RESULTS)
    PAGE.write_text(page(run))
    return min(1, sum("wrong" in _of(result, tool) for result in run["results"] for tool in TOOLS))


def measured(make: Callable[[], Any]) -> dict[str, Any]:
    """Runs each tool on a model; what one raises does not stop the others."""
    import keras
    import tensorflow as tf

    import tfbn
    from tfbn._models.compare import random_inputs
    from tfbn._models.walk import batch_norm_layers

    warnings.simplefilter("ignore")
    keras.utils.set_random_seed(0)
    stock = make()
    unknown = 64 if max(len(x.shape) for x in stock.inputs) > 3 else 16
    inputs = random_inputs(stock.input, 2, unknown)
    _randomize(stock, random_inputs(stock.input, 8, unknown))
    expected = _outputs(stock, inputs)
    layers = len(batch_norm_layers(stock))
    ours = stock

    def convert() -> dict[str, Any]:
        nonlocal ours
        ours = tfbn.convert(stock)
        back = tfbn.convert(ours, to=keras.layers.BatchNormalization)
        same = [w.path for w in back.weights] == [w.path for w in stock.weights]
        same = same and all(
            map(_equal, [w.numpy() for w in stock.weights], [w.numpy() for w in back.weights])
        )
        if not (same and all(map(_equal, expected, _outputs(back, inputs)))):
            return {"wrong": "there and back again is not the same model"}
        return _compared(ours)

    def _compared(model: Any) -> dict[str, Any]:
        kept = sum(isinstance(x, tfbn.BatchNormalization) for x in batch_norm_layers(model))
        if kept != layers:
            return {"wrong": f"{kept} of {layers} layers are of tfbn"}
        return _difference(model, inputs, expected)

    def load() -> dict[str, Any]:
        return _control(lambda: _compared(_saved(ours)), lambda: _saved(stock))

    def clone() -> dict[str, Any]:
        return _control(lambda: _compared(_cloned(ours)), lambda: _cloned(stock))

    def freeze() -> dict[str, Any]:
        from tfbn._models.walk import statistics_are_frozen

        frozen = tfbn.convert(stock)
        tfbn.freeze(frozen)
        if not all(map(statistics_are_frozen, batch_norm_layers(frozen))):
            return {"wrong": "a layer is not frozen"}
        before = [layer.moving_mean.numpy() for layer in batch_norm_layers(frozen)]
        frozen(inputs, training=True)
        after = [layer.moving_mean.numpy() for layer in batch_norm_layers(frozen)]
        return {} if all(map(_equal, before, after)) else {"wrong": "frozen statistics moved"}

    def fold() -> dict[str, Any]:
        folded = tfbn.fold(stock, inputs, tolerance=1.0)
        left = len(folded.report.left)
        return _difference(folded, inputs, expected) | {"left": left}

    def inspect() -> dict[str, Any]:
        from tfbn._statistics.inspect import Inspection

        found = len(Inspection.of(stock).layers)
        return {} if found == layers else {"wrong": f"it lists {found} layers"}

    def recalibrate() -> dict[str, Any]:
        several = isinstance(inputs, list)  # tf.data makes one tensor of a list.
        data = tf.data.Dataset.from_tensors((tuple(inputs) if several else inputs,)).repeat(2)
        tfbn.recalibrate(ours, data)
        return {}

    def export() -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as folder:
            tfbn.export(stock, f"{folder}/model")
        return {}

    run: dict[str, Any] = {"model": type(stock).__name__, "layers": layers}
    for tool in (convert, load, clone, freeze, fold, inspect, recalibrate, export):
        try:
            run[tool.__name__] = tool()
        except Exception as error:
            run[tool.__name__] = {"refused": f"{type(error).__name__}: {_short(error)}"}
    return run


def _control(tool: Callable[[], dict[str, Any]], stock: Callable[[], Any]) -> dict[str, Any]:
    """Where a tool fails, tries the same on the package's own model with Keras's layers."""
    try:
        return tool()
    except Exception as error:
        try:
            stock()
        except Exception as own:
            return {"not_even_keras": f"{type(own).__name__}: {_short(own)}"}
        raise error


def _saved(model: Any) -> Any:
    import keras

    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/model.keras"
        model.save(path)
        return keras.models.load_model(path, compile=False, safe_mode=False)


def _cloned(model: Any) -> Any:
    import keras

    clone = keras.models.clone_model(model)
    clone.set_weights(model.get_weights())
    return clone


def _randomize(model: Any, inputs: Any) -> None:
    """Gives layers random γ and β, and the statistics of a batch: others would make deep networks chaotic."""
    import numpy as np

    from tfbn._models.walk import batch_norm_layers

    rng = np.random.default_rng(0)
    layers = batch_norm_layers(model)
    momentums = [layer.momentum for layer in layers]
    for layer in layers:
        layer.momentum = 0.0
        for weight, low, high in ((layer.gamma, 0.5, 1.5), (layer.beta, -0.2, 0.2)):
            if weight is not None:
                weight.assign(rng.uniform(low, high, weight.shape))
    model(inputs, training=True)
    for layer, momentum in zip(layers, momentums, strict=True):
        layer.momentum = momentum


def _outputs(model: Any, inputs: Any) -> list[Any]:
    import keras
    import numpy as np

    return [np.asarray(y, "float32") for y in keras.tree.flatten(model(inputs, training=False))]


def _equal(a: Any, b: Any) -> bool:
    import numpy as np

    return bool(np.array_equal(a, b, equal_nan=a.dtype.kind == "f"))


def _difference(model: Any, inputs: Any, expected: list[Any]) -> dict[str, Any]:
    """The largest difference of outputs, of the largest value of each output."""
    pairs = zip(_outputs(model, inputs), expected, strict=True)
    worst = max(float(abs(a - b).max() / max(abs(b).max(), 1e-30)) for a, b in pairs)
    found: dict[str, Any] = {"difference": worst}
    return found if worst < 1e-3 else found | {"wrong": "the outputs are others"}


def _short(error: Exception) -> str:
    """The first sentences of an error, on one line."""
    plain = re.sub("\x1b\\[[0-9]*m", "", str(error))  # Keras prints some in bold.
    text = " ".join(plain.split()) or "no message"
    return text if len(text) < 400 else text[:400] + " …"


def _in_a_process(name: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.packages", "--here", name]
    began = time.monotonic()
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return {"not_run": f"took longer than {SECONDS:.0f} seconds"}
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        return {"not_run": lines[-1][:400] if lines else f"exit status {done.returncode}"}
    return json.loads(done.stdout.splitlines()[-1]) | {"seconds": round(time.monotonic() - began)}


def _versions() -> dict[str, str]:
    lines = [line for line in REQUIREMENTS.read_text().splitlines() if line[:1].isalpha()]
    return {name: version(name) for name in ("tfbn", "tensorflow", "keras", *lines)}


def _of(result: dict[str, Any], tool: str) -> dict[str, Any]:
    return result.get(tool) or {}


def page(run: dict[str, Any]) -> str:
    """Formats the page of the documentation."""
    notes: list[str] = []

    def note(text: str) -> str:
        if text not in notes:
            notes.append(text)
        return f"[{notes.index(text) + 1}]"

    def cell(result: dict[str, Any], tool: str) -> str:
        found = _of(result, tool)
        if "wrong" in found:
            return f"WRONG {note(found['wrong'])}"
        if "refused" in found:
            return f"refused {note(found['refused'])}"
        if "not_even_keras" in found:
            return f"neither {note(found['not_even_keras'])}"
        text = f"{found['difference']:.0e}" if "difference" in found else "yes"
        return f"{text}, {found['left']} left" if found.get("left") else text

    rows = [
        [result["network"], str(result["layers"]), *(cell(result, tool) for tool in TOOLS)]
        for result in run["results"]
        if "layers" in result
    ]
    not_run = [f"- {r['network']}: {r['not_run']}" for r in run["results"] if "not_run" in r]
    not_run += [f"- {name}: not tried yet" for name in run["not_run"]]
    versions = ", ".join(f"{name} {number}" for name, number in run["versions"].items())
    reasons = "\n".join(f"- {name}: {why}" for name, why in REASONS.items())
    listed = "\n".join(f"{number}. {text}" for number, text in enumerate(notes, 1))
    return f"""# Models of other packages

Generated by `make test-models`; do not edit. {versions}. On a CPU, in float32, with small random inputs and
random weights, γ, β and statistics.

{table(["model", "layers", *TOOLS], rows)}

- layers: of batch normalization, all of them Keras's before.
- A number is the largest difference from the outputs of the package's model, of the largest output. "yes" stands
  where there is none to measure. A number in brackets leads to the notes below.
- convert: `tfbn.convert` to tfbn's layers, and back to Keras's: the same weights and outputs, to the bit.
- load: the converted model, saved as `.keras` and loaded. clone: by `keras.models.clone_model`. In both all layers
  must be tfbn's. "neither": the package's own model cannot be loaded or cloned either; the note says why.
- freeze: of the converted model; a training call then must move no statistics.
- fold: `tfbn.fold` of the package's model. "left": layers that became one multiply-add, or stayed as they were.
- inspect; recalibrate, of the converted model; export, of the package's model, folded, as a SavedModel that is checked.

## Notes

{listed or "None."}

{reasons}

## Not run

{chr(10).join(not_run) or "None."}
"""


if __name__ == "__main__":
    sys.exit(main())
