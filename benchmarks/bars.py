"""The requirements on ``tfbn.BatchNormalization``, and whether a run meets them."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from benchmarks.cases import CPU_SHAPES, GPU_SHAPES, MODES, PHASES
from benchmarks.results import geometric_mean, ratios, select
from benchmarks.tables import floor_multiples, table

OURS = "tfbn"
# The means concern these shapes; the others are extra.
SHAPES = {"cpu": CPU_SHAPES[:5], "gpu": GPU_SHAPES[:5]}
NOT_SLOWER = {"float32": 0.97, "bfloat16": 0.95}
"""How much of Keras's speed each shape must reach on a CPU."""


@dataclass(frozen=True)
class Bar:
    """A figure of a run and its requirement: at least ``wanted``, or at most, with ``at_most``."""

    name: str
    measured: float
    wanted: float
    at_most: bool = False

    @property
    def met(self) -> bool:
        return self.measured <= self.wanted if self.at_most else self.measured >= self.wanted


def bars(run: dict[str, Any]) -> list[Bar]:
    """Returns the requirements for which the run has figures."""
    on_gpu = run["environment"]["device"] == "gpu"
    return [*(_layers_on_gpu(run) if on_gpu else _layers_on_cpu(run)), *_models(run)]


def summary(run: dict[str, Any]) -> str:
    return table(
        ["", "measured", "wanted", ""],
        [
            [
                bar.name,
                f"{bar.measured:.2f}",
                f"{'≤' if bar.at_most else '≥'} {bar.wanted:g}",
                "" if bar.met else "missed",
            ]
            for bar in bars(run)
        ],
    )


def _layers_on_cpu(run: dict[str, Any]) -> Iterator[Bar]:
    yield from _against(run, "keras", "train", "graph", mean=3)
    yield from _against(run, "torch", "train", "graph", mean=1)
    yield from _against(run, "keras", "train", "xla", mean=1.2)
    yield from _against(run, "keras", "train", "eager", mean=2)
    for precision, least in NOT_SLOWER.items():
        for phase, mode in itertools.product(PHASES, MODES):
            yield from _against(run, "keras", phase, mode, precision, least=least, every=True)
    yield from _against_floor(run, wanted=2)


def _layers_on_gpu(run: dict[str, Any]) -> Iterator[Bar]:
    for precision in ("float32", "bfloat16", "float16"):
        yield from _against(run, "keras", "train", "graph", precision, mean=2, least=1)
        yield from _against(run, "keras", "train", "xla", precision, least=1)
        yield from _against(run, "keras", "train", "eager", precision, least=1)
        yield from _against(run, "torch", "train", "graph", precision, mean=1)
    for precision in ("bfloat16", "float16"):
        yield from _against(run, "keras", "train", "graph", precision, least=1, key="peak_mb")
    yield from _against_floor(run, wanted=1.3)


def _against(
    run: dict[str, Any],
    other: str,
    phase: str,
    mode: str,
    precision: str = "float32",
    *,
    mean: float | None = None,
    least: float | None = None,
    key: str = "ms",
    every: bool = False,
) -> Iterator[Bar]:
    results = select(run, suite="layers", phase=phase, mode=mode, precision=precision)
    shapes = SHAPES[run["environment"]["device"]]
    found = {s: r for s, r in ratios(results, other, OURS, key).items() if every or s in shapes}
    what = "memory " if key == "peak_mb" else ""
    name = f"layers, {phase}, {mode}, {precision}: {what}{other} / {OURS}"
    if found and mean is not None:
        yield Bar(f"{name}, geometric mean", geometric_mean(found.values()), mean)
    if found and least is not None:
        shape = min(found, key=lambda s: found[s])
        yield Bar(f"{name}, least ({shape})", found[shape], least)


def _against_floor(run: dict[str, Any], wanted: float) -> Iterator[Bar]:
    largest = SHAPES[run["environment"]["device"]][0]
    results = select(run, phase="train", mode="graph", precision="float32", subject=largest)
    for multiple in floor_multiples(results, OURS, "floor").values():
        name = f"layers, train, graph, float32: {OURS} / 8 passes over memory, {largest}"
        yield Bar(name, multiple, wanted, at_most=True)


def _models(run: dict[str, Any]) -> Iterator[Bar]:
    for precision in ("float32", "bfloat16"):
        results = select(run, suite="models", phase="train", mode="graph", precision=precision)
        for model, ratio in ratios(results, "keras", OURS).items():
            wanted = 1.2 if model == "ResNet50" else 1.3
            yield Bar(f"{model}, train, graph, {precision}: keras / {OURS}", ratio, wanted)
        if run["environment"]["device"] == "cpu":
            for model, ratio in ratios(results, "tf_keras", OURS).items():
                name = f"{model}, train, graph, {precision}: tf_keras / {OURS}"
                yield Bar(name, ratio, 1)
        for model, ratio in ratios(results, "keras", OURS, "peak_mb").items():
            yield Bar(f"{model}, train, graph, {precision}: memory keras / {OURS}", ratio, 1)
