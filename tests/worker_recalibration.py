"""Diagnoses and recalibrates models made under a tf.distribute strategy, and writes down what came out.

    python tests/worker_recalibration.py OUT.npz --devices 2               # virtual devices of one process
    python tests/worker_recalibration.py OUT.npz --addresses A:1,B:2 --index 0  # one of several workers

The processes compute and the tests judge: a worker that failed would leave the others waiting.
"""

import itertools
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from replicas import Observed, local, meet, parser, started

UPSTREAM = ("population", "batch")
X = np.random.default_rng(0).normal(4.0, 2.0, (23, 2)).astype("float32")
RECALIBRATED = 11  # to a batch: the last one has one example, none for one of two replicas
DIAGNOSED = 8  # to a batch: so few that the diagnosis looks into each


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    (strategy,) = started(options.devices, options.addresses, options.index).values()
    import keras

    import tfbn

    kinds = {"keras": keras.layers.BatchNormalization, "tfbn": tfbn.BatchNormalization}
    observed: Observed = {}
    for (kind, norm), synchronized, upstream in itertools.product(
        kinds.items(), (False, True), UPSTREAM
    ):
        if kind == "tfbn" or not options.addresses:
            with strategy.scope():
                model = network(norm, synchronized)
            seen = measured(model, strategy, upstream, options.index)
            together = "synchronized" if synchronized else "apart"
            observed |= {f"{kind}-{together}-{upstream}/{name}": v for name, v in seen.items()}
    if options.addresses:
        meet(strategy)
    np.savez(options.output, **observed)


def network(norm: Any, synchronized: bool) -> Any:
    import keras

    return keras.Sequential(
        [
            keras.Input((2,)),
            norm(synchronized=synchronized, name="first"),
            keras.layers.Dense(3, activation="relu", kernel_initializer="ones"),
            norm(synchronized=synchronized, name="second"),
        ]
    )


def measured(model: Any, strategy: Any, upstream: str, worker: int) -> Observed:
    """The reports of a worker, as JSON, and the statistics that each replica holds."""
    import tfbn

    reports = {
        "before": tfbn.diagnose(model, X, batch_size=DIAGNOSED),
        "result": tfbn.recalibrate(model, X, batch_size=RECALIBRATED, upstream=upstream),
        "after": tfbn.diagnose(model, X, batch_size=DIAGNOSED),
    }
    observed = {
        f"{name} {worker}": np.array(json.dumps(report.to_dict()))
        for name, report in reports.items()
    }
    for layer in (model.get_layer(name) for name in ("first", "second")):
        for weight in (layer.moving_mean, layer.moving_variance):
            for replica, value in local(strategy, weight.value).items():
                observed[f"{layer.name}/{weight.name}/{replica}"] = value.numpy()
    return observed


if __name__ == "__main__":
    main()
