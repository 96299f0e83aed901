"""Diagnoses broken and healthy training runs, and records how many findings are right.

    python -m benchmarks.diagnosis                                    # all: many hours on two cores
    python -m benchmarks.diagnosis small --seeds 0 1 2                # one network: half an hour
    python -m benchmarks.diagnosis resnet20 --layers keras --cases surgery pruning

Skips what `docs/diagnosis.json` already contains, unless --again is passed. Each network, layer and seed runs in
its own process. Writes `docs/diagnosis.json`, and generates `docs/diagnosis.md` from it. The training runs are
in `tests/harness/broken_trainings.py`.
"""

import collections
import itertools
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import command_line, results
from benchmarks.tables import table

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs/diagnosis.json"
PAGE = RESULTS.with_suffix(".md")
HARNESS = ROOT / "tests/harness"
NETWORKS = ("small", "resnet20", "mobilenetv2")
LAYERS = ("keras", "tfbn")
SEEDS = (0, 1, 2)
KEY = ("network", "layer", "seed", "case")

Result = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = command_line.parser("benchmarks.diagnosis", __doc__)
    parser.add_argument("networks", nargs="*", metavar="NETWORK", help=f"any of {NETWORKS}")
    parser.add_argument("--layers", nargs="+", default=LAYERS, choices=LAYERS)
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument("--cases", nargs="+", default=(), metavar="CASE", help="only these")
    parser.add_argument("--again", action="store_true", help="also run what has results already")
    parser.add_argument("--page", action="store_true", help="only write the page")
    parser.add_argument("--here", help="used by the processes that this starts")
    options = parser.parse_args(arguments)
    if options.here:
        _here(*json.loads(options.here))
        return
    found = {_key(r): r for r in _load()["results"]}
    if not options.page:
        for network in options.networks or NETWORKS:
            for seed in options.seeds:
                for layer in options.layers:
                    done = (
                        []
                        if options.again
                        else [k[3] for k in found if k[:3] == (network, layer, seed)]
                    )
                    for result in _in_a_process(network, layer, seed, options.cases, done):
                        found[_key(result)] = result
                        print(_line(result), flush=True)
                        _save(found)
    PAGE.write_text(page(_load()))


def _in_a_process(
    network: str, layer: str, seed: int, cases: Sequence[str], done: Sequence[str]
) -> Iterator[Result]:
    """Runs a new process, and yields its results as they come."""
    task = json.dumps([network, layer, seed, list(cases), list(done)])
    command = [sys.executable, "-m", "benchmarks.diagnosis", "--here", task]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("{"):
                yield json.loads(line)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)


def _here(network: str, layer: str, seed: int, names: Sequence[str], done: Sequence[str]) -> None:
    """Runs the cases of one network, layer and seed, and prints the results."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    sys.path.insert(0, str(HARNESS))
    import tensorflow as tf

    cpus = tf.config.list_physical_devices("CPU")
    two = [tf.config.LogicalDeviceConfiguration()] * 2
    tf.config.set_logical_device_configuration(cpus[0], two)  # for the replicas that diverge
    import broken_trainings

    lab = broken_trainings.Lab(network, layer, seed)
    for name, case in broken_trainings.CASES.items():
        wanted = network in case.networks and name not in done and (not names or name in names)
        if wanted:
            print(json.dumps(judged(lab, case)), flush=True)


def judged(lab: Any, case: Any) -> Result:
    """Trains, diagnoses, applies the cure, and returns the outcome."""
    import broken_trainings
    import tfbn

    trained = case.train(lab)
    diagnosis = tfbn.diagnose(trained.model, trained.data, **trained.options)
    findings = diagnosis.findings
    cure = findings[0].cure if findings else ""
    right = case.right_kinds(lab.layer)
    result = {
        "network": lab.network,
        "layer": lab.layer,
        "seed": lab.seed,
        "case": case.name,
        "about": (case.train.__doc__ or "").split("\n")[0].rstrip("."),
        "expected": list(right),
        "kinds": [finding.kind for finding in findings],
        "severities": [finding.severity for finding in findings],
        "right": findings[0].kind in right if findings and right else not findings and not right,
        "cure": cure,
        "cure_expected": bool(right) and case.cured,
        "losses": {mode: _number(values["loss"]) for mode, values in diagnosis.modes.items()},
    }
    if cure:
        before = broken_trainings.loss_on(trained.model, trained.test)
        broken_trainings.apply_cure(trained, cure)
        after = broken_trainings.loss_on(trained.model, trained.test)
        for when, values in (("before", before), ("after", after)):
            result[when] = {name: _number(value) for name, value in values.items()}
    return result


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def cure_works(result: Result) -> bool:
    """Returns whether the printed cure lowers the loss on held-out examples."""
    before, after = (result[when]["loss"] for when in ("before", "after"))
    return after is not None and (before is None or after < before)


def _load() -> dict[str, Any]:
    return results.load(RESULTS) if RESULTS.exists() else {"versions": {}, "results": []}


def _save(found: dict[Any, Result]) -> None:
    import keras
    import tensorflow as tf

    import tfbn

    versions = {"tfbn": tfbn.__version__, "TensorFlow": tf.__version__, "Keras": keras.__version__}
    order = sorted(found, key=lambda key: (NETWORKS.index(key[0]), *key[1:3]))
    results.save({"versions": versions, "results": [found[key] for key in order]}, RESULTS)


def _key(result: Result) -> tuple[Any, ...]:
    return tuple(result[name] for name in KEY)


def _line(result: Result) -> str:
    where = "/".join(str(result[name]) for name in KEY)
    got = ", ".join(result["kinds"]) or "no finding"
    verdict = (
        "right" if result["right"] else f"WRONG: {' or '.join(result['expected']) or 'healthy'}"
    )
    cure = ""
    if result["cure"]:
        losses = (result[when]["loss"] for when in ("before", "after"))
        cure = f"; loss {' → '.join('not finite' if x is None else f'{x:.4g}' for x in losses)}"
    return f"{where}: {got} ({verdict}){cure}"


# The page


def page(run: dict[str, Any]) -> str:
    """Formats the page of the documentation."""
    found = run["results"]
    versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
    broken = [r for r in found if r["expected"]]
    healthy = [r for r in found if not r["expected"]]
    cured = [r for r in broken if r["cure"]]
    improved = [r for r in healthy if r["cure"]]
    groups = list(dict.fromkeys((r["network"], r["layer"]) for r in found))
    head = ["case", "right first finding", *(f"{network}, {layer}" for network, layer in groups)]
    return f"""# Broken trainings, and what `tfbn.diagnose` says

Generated by `python -m benchmarks.diagnosis`; do not edit. {versions}; on a CPU. The trainings are in
`tests/harness/broken_trainings.py`: a small convolutional network, a ResNet-20 and a MobileNetV2
(α = 0.35) on scikit-learn's handwritten digits, with Keras's batch normalization layer and with tfbn's. The
thresholds of `diagnose` were set on trainings like these, so it may do worse on others.

- Broken: the first finding is right in {_rate([r["right"] for r in broken])}.
- Healthy: there is no finding in {_rate([r["right"] for r in healthy])}. Of the cures printed for the others, those
  that lowered the loss on the validation examples: {_rate([cure_works(r) for r in improved])}.
- Cures: a cure was printed for {len(cured)} broken trainings; applied as printed, it lowered the loss on the
  validation examples in {_rate([cure_works(r) for r in cured])}. Where recalibrating should have been the cure, it
  was printed in {_rate([bool(r["cure"]) for r in broken if r["cure_expected"]])}.

| network | layer | seeds | broken, right | healthy, no finding |
| --- | --- | --- | ---: | ---: |
{_summary(found)}

{_missing(found)}

## By case

How many runs were right, of how many.

{table(head, _rows(found, groups), left=2)}

## What was misjudged

{_misjudged(found)}
"""


def _rate(right: Sequence[bool]) -> str:
    if not right:
        return "0 of 0"
    return f"{sum(right)} of {len(right)} ({sum(right) / len(right):.1%})"


def _summary(found: Sequence[Result]) -> str:
    rows = []
    groups: dict[Any, list[Result]] = collections.defaultdict(list)
    for result in found:
        groups[result["network"], result["layer"]].append(result)
    for (network, layer), group in groups.items():
        seeds = ", ".join(str(seed) for seed in sorted({r["seed"] for r in group}))
        rates = [
            _rate([r["right"] for r in group if bool(r["expected"]) == b]) for b in (True, False)
        ]
        rows.append(f"| {network} | {layer} | {seeds} | {' | '.join(rates)} |")
    return "\n".join(rows)


def _missing(found: Sequence[Result]) -> str:
    """Names the runs of which there is no result yet."""
    begun = {_key(r)[:3] for r in found}
    lines = []
    for network, layer in itertools.product(NETWORKS, LAYERS):
        seeds = [str(seed) for seed in SEEDS if (network, layer, seed) not in begun]
        if seeds:
            lines.append(f"- {network}, {layer}: seeds {', '.join(seeds)}")
    return "\n".join(["Not run yet:", "", *lines]) if lines else "All runs are in the table."


def _rows(found: Sequence[Result], groups: Sequence[tuple[str, str]]) -> list[list[str]]:
    rows = []
    for name in dict.fromkeys(r["case"] for r in found):
        of_case = [r for r in found if r["case"] == name]
        expected = max((r["expected"] for r in of_case), key=len)
        about = of_case[0]["about"]
        row = [f"{name}: {about}" if about else name, " or ".join(expected) or "none"]
        for network, layer in groups:
            here = [r for r in of_case if (r["network"], r["layer"]) == (network, layer)]
            healthy = " (healthy)" if expected and here and not here[0]["expected"] else ""
            row.append(f"{sum(r['right'] for r in here)}/{len(here)}{healthy}" if here else "")
        rows.append(row)
    return rows


def _misjudged(found: Sequence[Result]) -> str:
    lines = [f"- {_line(r)}" for r in found if not r["right"]]
    lines += [
        f"- {_line(r)}: the cure did not help" for r in found if r["cure"] and not cure_works(r)
    ]
    return "\n".join(lines) or "Nothing."


if __name__ == "__main__":
    main()
