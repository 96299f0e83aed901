"""Formats the results of a run as Markdown."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.cases import MALLOC_SUITES
from benchmarks.results import geometric_mean, ratios, select, value

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
PASSES = {"train": 8, "infer": 2}
"""The minimum number of reads and writes of tensors of the input's size. Training reads x twice and writes y, then
reads x and dy twice and writes dx; inference reads x and writes y. A pass in place is one read and one write."""


def document(run: dict[str, Any]) -> str:
    """Returns the whole document, for the file beside the JSON."""
    parts = [f"# {title(run)}", setting(run)]
    units = {"layers": "a layer, in a stack of 8", "models": "a step"}
    for suite, unit in (units | {MALLOC_SUITES[s]: units[s] for s in units}).items():
        for phase, precision, mode in kinds(run, suite):
            results = select(run, suite=suite, phase=phase, precision=precision, mode=mode)
            parts.append(
                f"## {suite.capitalize()}: {phase}, {mode}, {precision} (milliseconds {unit})\n\n"
                + timings(run, results)
            )
            if suite == "layers" and mode == "graph":
                parts.append(
                    f"GB/s, if each makes its {PASSES[phase]} passes and a floor its 2:\n\n"
                    + bandwidth(run, results)
                )
            if any(value(r, n, "peak_mb") for r in results for n in run["contenders"]):
                parts.append("Peak memory, MB:\n\n" + memory(run, results))
    parts.append("## Ratios\n\n" + comparison(run))
    return "\n\n".join(parts) + "\n"


def title(run: dict[str, Any]) -> str:
    environment = run["environment"]
    where = environment.get("gpu") or f"{environment['cores']} cores, {environment['processor']}"
    return f"Batch normalization on {where}"


def setting(run: dict[str, Any]) -> str:
    """Describes the environment, the settings, and who did not take part."""
    e = run["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in e["versions"].items())
    variables = ", ".join(f"`{name}={v}`" for name, v in e["variables"].items()) or "none"
    s = run["settings"]
    lines = [
        f"- {run['date']}; {e['system']}, {e['processor']}, {e['cores']} cores, "
        f"{e['memory_gib']} GiB; {e['threads']} threads" + (f"; {e['gpu']}" if "gpu" in e else ""),
        f"- Python {e['python']}, {versions}",
        f"- variables: {variables}",
        f"- median (and quartiles) of {s['turns']} turns of about {1000 * s['seconds']:.0f} ms each"
        + (f", of {s['network_turns']} to train a network" if "network_turns" in s else "")
        + ", the contenders in turn; "
        + ("ratios are medians of ratios turn by turn; " if "network_turns" in s else "")
        + "tracing, and the first step with what it compiles, are apart; PyTorch runs eagerly, beside graphs too",
    ]
    lines += [f"- left out: {name}: {why}" for name, why in run["left_out"].items()]
    return "\n".join(lines)


def timings(run: dict[str, Any], results: Sequence[dict[str, Any]]) -> str:
    names = _running(run, results)
    rows = [[r["subject"], *(_time(r["contenders"].get(n, {})) for n in names)] for r in results]
    starts = [
        [f"{r['subject']}, to start", *(_start(r["contenders"].get(n, {})) for n in names)]
        for r in results
    ]
    return table(["", *names], rows + starts)


def bandwidth(run: dict[str, Any], results: Sequence[dict[str, Any]]) -> str:
    """Formats memory bandwidths; the floor's is the machine's limit."""
    names = [name for name in _running(run, results) if name != "identity"]
    rows = []
    for result in results:
        size = math.prod(result["shape"]) * BYTES[result["precision"]]
        row = [result["subject"]]
        for name in names:
            passes = 2 if name.startswith("floor") else PASSES[result["phase"]]
            ms = value(result, name)
            row.append("" if ms is None else f"{1e-6 * passes * size / ms:.0f}")
        rows.append(row)
    return table(["", *names], rows)


def memory(run: dict[str, Any], results: Sequence[dict[str, Any]]) -> str:
    names = [n for n in run["contenders"] if any(value(r, n, "peak_mb") for r in results)]
    return table(
        ["", *names],
        [[r["subject"], *(_number(value(r, n, "peak_mb"), 0) for n in names)] for r in results],
    )


def comparison(run: dict[str, Any], ours: str = "tfbn") -> str:
    """Formats the ratios of the others to tfbn: above 1, tfbn is faster or needs less memory."""
    rows = []
    for suite in ("layers", "models", *MALLOC_SUITES.values()):
        for phase, precision, mode in kinds(run, suite):
            results = select(run, suite=suite, phase=phase, precision=precision, mode=mode)
            kind = f"{suite}, {phase}, {mode}, {precision}"
            for other in run["contenders"]:
                if other not in (ours, "floor", "floor_cached", "identity"):
                    rows += _ratio_row(f"{kind}: {other} / {ours}", ratios(results, other, ours))
                    rows += _ratio_row(
                        f"{kind}: memory {other} / {ours}",
                        ratios(results, other, ours, "peak_mb"),
                    )
            passes = PASSES[phase]
            for floor, where in (("floor", "memory"), ("floor_cached", "caches")):
                found = floor_multiples(results, ours, floor)
                rows += _ratio_row(f"{kind}: {ours} / {passes} passes over {where}", found)
    return table(["", "geometric mean", "least", "most", "each"], rows)


def floor_multiples(
    results: Sequence[dict[str, Any]], contender: str, floor: str
) -> dict[str, float]:
    """Returns by subject the contender's time relative to the unavoidable passes over memory."""
    passes = {result["subject"]: PASSES[result["phase"]] for result in results}
    return {s: 2 * ratio / passes[s] for s, ratio in ratios(results, contender, floor).items()}


def table(head: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """Formats a Markdown table; the first columns are text, aligned left, the others numbers."""
    lines = [head, ["---"] * left + ["---:"] * (len(head) - left), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _ratio_row(name: str, found: dict[str, float]) -> list[list[str]]:
    if not found:
        return []
    each = ", ".join(f"{subject} {ratio:.2f}" for subject, ratio in found.items())
    numbers = [geometric_mean(found.values()), min(found.values()), max(found.values())]
    return [[name, *(f"{n:.2f}" for n in numbers), each]]


def kinds(run: dict[str, Any], suite: str) -> list[tuple[str, str, str]]:
    """Lists the phases, precisions and modes of a run, training first."""
    found = {(r["phase"], r["precision"], r["mode"]) for r in select(run, suite=suite)}
    order = ("train", "infer", "float32", "bfloat16", "float16", "graph", "xla", "eager")
    return sorted(found, key=lambda kind: [order.index(part) for part in kind])


def _running(run: dict[str, Any], results: Sequence[dict[str, Any]]) -> list[str]:
    """Lists the contenders that have results here."""
    return [
        n
        for n in run["contenders"]
        if any("left_out" not in r["contenders"].get(n, {"left_out": ""}) for r in results)
    ]


def _time(entry: dict[str, Any]) -> str:
    if "failed" in entry:
        return f"failed: {entry['failed']}"
    if "ms" not in entry:
        return ""
    return f"{entry['ms']:.3g} ({entry['q1']:.3g}–{entry['q3']:.3g})"


def _start(entry: dict[str, Any]) -> str:
    if "first_step_seconds" not in entry:
        return ""
    trace = entry["trace_seconds"]
    traced = "" if trace is None else f"{trace:.1f} s + "
    return f"{traced}{entry['first_step_seconds']:.1f} s"


def _number(number: float | None, digits: int) -> str:
    return "" if number is None else f"{number:.{digits}f}"
