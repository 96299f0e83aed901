"""Builds the networks of `keras.applications`, and measures what the tools of tfbn do to them."""

import contextlib
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

SIZE = 96
"""How many pixels the images are wide and high."""
RECALIBRATION = 8
"""On how many images networks are recalibrated, three at a time."""


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
