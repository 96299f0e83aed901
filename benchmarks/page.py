"""Writes results into the page of numbers and README, between markers that name the JSON files.

Usage:
    python -m benchmarks.page
"""

import importlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import cases, results
from benchmarks.bars import OURS
from benchmarks.results import geometric_mean, ratios, select, value
from benchmarks.tables import floor_multiples, kinds, setting, table

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/numbers.md"
README = ROOT / "README.md"
RESULTS = Path("benchmarks/results")
MARKED = re.compile(r"(<!-- (\S+\.json) -->\n)(.*?)(<!-- end of \2 -->)", re.DOTALL)
COLUMNS = {"keras": "Keras 3", "tf_keras": "tf_keras (Keras 2)", "torch": "PyTorch", OURS: "tfbn"}


def rendered(
    text: str, root: Path = ROOT, show: Callable[[dict[str, Any]], str] | None = None
) -> str:
    """Replaces the text between markers by `show(run)`, by default `section(run)`."""

    def replace(match: re.Match[str]) -> str:
        begin, name, _, end = match.groups()
        return f"{begin}\n{(show or section)(results.load(root / name))}\n\n{end}"

    return MARKED.sub(replace, text)


def section(run: dict[str, Any]) -> str:
    """Formats a run for the page of numbers. Parts without results are left out."""
    if "suite" in run:
        return importlib.import_module(f"benchmarks.{run['suite']}").section(run)
    parts = [setting(run), _layers(run), _ratios(run), _models(run), _default_malloc(run)]
    return "\n\n".join(part for part in parts if part)


def figures(run: dict[str, Any]) -> str:
    """Formats the three figures that README quotes: the training speedup of the layer and of two networks."""
    kind = {"phase": "train", "mode": "graph", "precision": "float32"}
    layers = ratios(select(run, suite="layers", **kind), "keras", OURS)
    networks = ratios(select(run, suite="models", **kind), "keras", OURS)
    e = run["environment"]
    return (
        f"Training in graph mode and float32 on {e['cores']} cores of an {e['processor']}, compared with Keras "
        f"{e['versions']['keras']}: the layer is **{geometric_mean(layers.values()):.1f} times** as fast (geometric "
        f"mean over {len(layers)} shapes), a step of MobileNetV2 **{networks['MobileNetV2']:.1f} times**, and a "
        f"step of ResNet50 **{networks['ResNet50']:.1f} times**."
    )


def _layers(run: dict[str, Any]) -> str:
    found = select(run, suite="layers", phase="train", mode="graph", precision="float32")
    if not found:
        return ""
    names = [name for name in COLUMNS if name in run["contenders"]]
    speed, floor = ratios(found, "keras", OURS), floor_multiples(found, OURS, "floor")
    rows = [
        [
            result["subject"].replace("x", "×"),
            *(_number(value(result, name)) for name in names),
            _number(speed.get(result["subject"])),
            _number(floor.get(result["subject"])),
        ]
        for result in found
    ]
    columns = [COLUMNS[name] for name in names]
    return (
        "Milliseconds per layer, forward and backward, in graph mode and float32, in a stack of 8 layers "
        "(`@1`: channels on axis 1):\n\n"
        + table(["", *columns, "Keras 3 / tfbn", "tfbn / 8 passes over memory"], rows)
    )


def _ratios(run: dict[str, Any]) -> str:
    rows = []
    for phase, precision, mode in kinds(run, "layers"):
        found = ratios(
            select(run, suite="layers", phase=phase, precision=precision, mode=mode), "keras", OURS
        )
        if found:
            least = min(found, key=lambda subject: found[subject])
            rows.append(
                [
                    f"{'training' if phase == 'train' else 'inference'}, {mode}, {precision}",
                    _number(geometric_mean(found.values())),
                    f"{_number(found[least])} ({least.replace('x', '×')})",
                ]
            )
    head = ["Keras 3's time / tfbn's, over all shapes", "geometric mean", "least"]
    return table(head, rows) if rows else ""


def _models(run: dict[str, Any]) -> str:
    names = [name for name in ("keras", "tf_keras", OURS) if name in run["contenders"]]
    sizes = cases.SIZES[run["environment"]["device"]]
    rows = []
    for phase, precision, mode in kinds(run, "models"):
        for r in select(run, suite="models", phase=phase, precision=precision, mode=mode):
            images = f"{r['batch']} of {sizes[r['subject']]}×{sizes[r['subject']]}"
            what = f"{r['subject']}, {images}, {phase}, {mode}, {precision}"
            entries = [f"{_number(value(r, n))} ({_number(value(r, n, 'peak_mb'))})" for n in names]
            others = [_number(ratios([r], n, OURS).get(r["subject"])) for n in names if n != OURS]
            rows.append([what, *entries, *others])
    if not rows:
        return ""
    return "Milliseconds per step (and peak memory in MB):\n\n" + table(
        [
            "",
            *(COLUMNS[name] for name in names),
            *(f"{COLUMNS[name]} / tfbn" for name in names if name != OURS),
        ],
        rows,
    )


def _default_malloc(run: dict[str, Any]) -> str:
    rows = []
    for suite, again in cases.MALLOC_SUITES.items():
        kept = ratios(
            select(run, suite=suite, phase="train", mode="graph", precision="float32"),
            "keras",
            OURS,
        )
        for r in select(run, suite=again):
            rows.append(
                [
                    r["subject"].replace("x", "×") if suite == "layers" else r["subject"],
                    *(_number(value(r, name)) for name in ("keras", OURS)),
                    _number(ratios([r], "keras", OURS).get(r["subject"])),
                    _number(kept.get(r["subject"])),
                ]
            )
    if not rows:
        return ""
    return (
        "Every contender above runs with variables that make the C library keep freed memory. Without them, as users "
        "run it, in milliseconds per training step (of a layer, or of a network), graph mode and float32:\n\n"
        + table(["", "Keras 3", "tfbn", "Keras 3 / tfbn", "with memory kept"], rows)
    )


def _number(number: float | None) -> str:
    """Formats a number with three digits, or a dash if nothing was measured."""
    return "–" if number is None else f"{number:.0f}" if number >= 100 else f"{number:.3g}"


if __name__ == "__main__":
    PAGE.write_text(rendered(PAGE.read_text()))
    README.write_text(rendered(README.read_text(), show=figures))
