"""Draws the curves of `benchmarks.curves`."""

from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from benchmarks import scaling

REPLICAS = (2, 4, 8, 16, 32, 64, 128, 256)
MODELLED = {
    "tfbn": "tfbn",
    "tfbn in TrainingLoop": "tfbn in TrainingLoop",
    "tfbn synchronized": "tfbn synchronized",
    "keras synchronized": "Keras synchronized",
    "gradients": "the model's gradients",
}


def draw(run: dict[str, Any], path: Path) -> None:
    figure = Figure(figsize=(15, 4.4), layout="constrained")
    by_values, by_layers, by_replicas = figure.subplots(1, 3)
    channels = sorted({point["channels"] for point in run["by_values"]})
    for index, count in enumerate(channels):
        color = mpl.colormaps["viridis"](index / len(channels))
        points = [p for p in run["by_values"] if p["channels"] == count]
        values = [p["values"] for p in points]
        label = f"{count} channels"
        by_values.loglog(values, [p["tfbn"] for p in points], color=color, label=f"tfbn, {label}")
        keras = [p["keras"] for p in points]
        by_values.loglog(values, keras, color=color, linestyle=":", label=f"Keras, {label}")
    by_values.set(xlabel="values", ylabel="ms a layer", title="A training step by values")
    for kind, name, style in (("tfbn", "tfbn", "-"), ("keras", "Keras", ":")):
        layers = [p["layers"] for p in run["by_layers"]]
        by_layers.plot(layers, [p[kind] for p in run["by_layers"]], "o" + style, label=name)
    by_layers.set(xlabel="layers of 8×4×4×64 values", ylabel="ms a step", title="By layers")
    network, (latency, bandwidth) = next(iter(scaling.PLANNED.items()))
    for kind, name in MODELLED.items():
        times = [
            1e3 * scaling.seconds(kind, scaling.RESNET50, replicas, latency, bandwidth)
            for replicas in REPLICAS
        ]
        by_replicas.loglog(REPLICAS, times, "o-", base=2, label=name)
    by_replicas.set(xlabel="replicas", ylabel="ms a step")
    by_replicas.set_title(f"A ResNet-50 by replicas: the model, {network}")
    by_replicas.set_yscale("log", base=10)
    for axes in (by_values, by_layers, by_replicas):
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=80)
