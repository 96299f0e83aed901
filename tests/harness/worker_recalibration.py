"""Diagnoses and recalibrates models as one of several workers, and writes down what came out.

    python tests/harness/worker_recalibration.py OUT.npz --addresses A:1,B:2 --index 0

The processes compute and the tests judge: a worker that failed would leave the others waiting.
"""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from replicas import Observed, local, meet, parser, started

TOGETHER = ("apart", "synchronized")
UPSTREAM = ("batch", "population")  # in turn
X = np.random.default_rng(0).normal(4.0, 2.0, (23, 2)).astype("float32")
RECALIBRATED = 11  # to a batch: the last one has one example, none for one of two replicas
DIAGNOSED = 8  # to a batch: so few that the diagnosis looks into each


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    (strategy,) = started(options.devices, options.addresses, options.index).values()
    observed: Observed = {}
    for together in TOGETHER:
        with strategy.scope():
            model = network(together == "synchronized")
        seen = measured(model, strategy, options.index)
        observed |= {f"{together}/{name}": value for name, value in seen.items()}
    meet(strategy)
    np.savez(options.output, **observed)


def network(synchronized: bool) -> Any:
    import keras

    import tfbn

    return keras.Sequential(
        [
            keras.Input((2,)),
            tfbn.BatchNormalization(synchronized=synchronized, name="first"),
            keras.layers.Dense(3, activation="relu", kernel_initializer="ones"),
            tfbn.BatchNormalization(synchronized=synchronized, name="second"),
        ]
    )


def measured(model: Any, strategy: Any, worker: int) -> Observed:
    """The reports of a worker, as JSON, and the statistics that each replica holds."""
    import tfbn

    observed: Observed = {}

    def write(name: str, report: Any) -> None:
        observed[f"{name}/{worker}"] = np.array(json.dumps(report.to_dict()))

    write("before", tfbn.diagnose(model, X, batch_size=DIAGNOSED))
    for upstream in UPSTREAM:
        write(upstream, tfbn.recalibrate(model, X, batch_size=RECALIBRATED, upstream=upstream))
        for layer in (model.get_layer(name) for name in ("first", "second")):
            for weight in (layer.moving_mean, layer.moving_variance):
                for replica, value in local(strategy, weight.value).items():
                    observed[f"{upstream}/{layer.name}/{weight.name}/{replica}"] = value.numpy()
    write("after", tfbn.diagnose(model, X, batch_size=DIAGNOSED))
    return observed


if __name__ == "__main__":
    main()
