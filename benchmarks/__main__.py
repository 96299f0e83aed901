r"""Measures batch normalization layers against each other.

Examples:
    python -m benchmarks                                # everything: about 15 minutes
    python -m benchmarks --quick                        # a first look: about 2 minutes
    python -m benchmarks compare main HEAD              # two commits
    python -m benchmarks --minutes 9                    # a part; with --resume, the next part
    python -m benchmarks layers --shapes 256x1024 --modes graph xla --phases train \
        --contenders keras tfbn my.module:MyLayer
"""

import argparse
import datetime
import itertools
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import bars, cases, command_line, contenders, environment, results, tables
from benchmarks.race import Race, Settings

DEFAULT_OUTPUT = Path("build/benchmarks")


def main(arguments: Sequence[str] | None = None) -> None:
    given = sys.argv[1:] if arguments is None else list(arguments)
    if given[:1] == ["compare"]:
        from benchmarks import compare

        compare.main(given[1:])
    else:
        run(parse(given))


def settings(options: argparse.Namespace) -> Settings:
    """How to measure, as the command line says."""
    return Settings(
        turns=3 if options.quick else 7,
        seconds=0.03 if options.quick else 0.05,
        network_turns=5 if options.quick else 30,
        threads=options.threads or _cores(),
        keep_memory=options.malloc == "keep",
    )


def run(options: argparse.Namespace) -> None:
    """Runs the benchmark, and writes JSON, Markdown and a picture to the directory ``options.output``."""
    deadline = time.monotonic() + 60 * options.minutes
    how = settings(options)
    found: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "contenders": list(options.contenders or contenders.DEFAULT),
        "settings": {
            "turns": how.turns,
            "seconds": how.seconds,
            "network_turns": how.network_turns,
        },
        "results": [],
    }
    with Race(found["contenders"], how) as race:
        if not race.device:
            sys.exit(f"error: nobody to measure: {race.left_out}")
        chosen = selection(options, on_gpu=race.device["device"] == "gpu")
        with environment.variables(environment.of_workers(how.threads, how.keep_memory)):
            found["environment"] = environment.described(how.threads) | race.device
        found["left_out"] = race.left_out
        name = found["environment"]["device"]
        path = options.output / f"{name}.json"
        if options.resume and path.exists():
            found = results.resumed(results.load(path), found)
        for contender, why in race.left_out.items():
            print(f"left out: {contender}: {why}", flush=True)

        def keep(result: dict[str, Any]) -> None:
            print(line(result), flush=True)
            found["results"].append(result)
            results.save(found, path)  # Results survive if this process is killed.

        missing = [case for case in chosen if not results.has(found, cases.described(case))]
        in_time = itertools.takewhile(lambda case: time.monotonic() < deadline, missing)
        who = partial(contenders.of, names=options.contenders)
        left = len(missing) - len(race.run(in_time, keep, who))
        found["left_out"] |= race.left_out
    if with_default_malloc(options) and name == "cpu" and not left:
        left = measure_with_default_malloc(how, found, keep, deadline)
    found["contenders"] = [n for n in found["contenders"] if n not in found["left_out"]]
    results.save(found, path)
    found = results.load(path)  # Everything else is generated from the JSON.
    if found["results"]:
        present(found, options.output / name)
    if left:
        print(f"{left} cases are left: the same command with --resume goes on")


def with_default_malloc(options: argparse.Namespace) -> bool:
    """Whether to measure some cases again with the C library's own settings: in a run of everything."""
    return (
        options.suite == "all"
        and options.malloc == "keep"
        and not options.quick
        and not (options.contenders or options.shapes or options.models)
    )


def measure_with_default_malloc(
    how: Settings, found: dict[str, Any], keep: Callable[[dict], None], deadline: float
) -> int:
    """Measures the cases that users have with no environment variables; returns how many are left."""

    def renamed(result: dict[str, Any]) -> dict[str, Any]:
        return result | {"suite": cases.MALLOC_SUITES[result["suite"]]}

    missing = [
        case
        for case in cases.default_malloc_cases()
        if not results.has(found, renamed(cases.described(case)))
    ]
    in_time = itertools.takewhile(lambda case: time.monotonic() < deadline, missing)
    how = replace(how, keep_memory=False, network_turns=how.network_turns // 3)
    with Race(contenders.FEW, how) as race:
        return len(missing) - len(race.run(in_time, lambda result: keep(renamed(result))))


def present(found: dict[str, Any], path: Path) -> None:
    """Writes Markdown and a picture beside the JSON, and prints the bars."""
    path.with_suffix(".md").write_text(tables.document(found))
    try:
        from benchmarks import picture
    except ImportError as error:
        print(f"no picture: {error}. Install it: pip install '.[plots]'", file=sys.stderr)
    else:
        picture.draw(found, path.with_suffix(".png"))
    print(f"\n{bars.summary(found)}\n\nresults: {path}.json, .md, .png")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = command_line.parser("benchmarks", __doc__)
    parser.add_argument("suite", nargs="?", default="all", choices=["layers", "models", "all"])
    parser.add_argument(
        "--contenders",
        nargs="+",
        metavar="NAME",
        help=f"any of {' '.join(contenders.DEFAULT)}, or module:Class of a Keras layer",
    )
    parser.add_argument(
        "--shapes", nargs="+", metavar="SHAPE", help="as 32x56x56x64, or 32x64x56x56@1"
    )
    parser.add_argument("--models", nargs="+", choices=cases.MODELS)
    parser.add_argument("--precisions", nargs="+", choices=cases.PRECISIONS)
    parser.add_argument("--phases", nargs="+", choices=cases.PHASES, default=cases.PHASES)
    parser.add_argument(
        "--modes",
        nargs="+",
        choices=cases.MODES,
        help="default: all for layers, graph for models",
    )
    parser.add_argument("--threads", type=int, help="default: the number of cores")
    parser.add_argument(
        "--malloc",
        choices=["keep", "default"],
        default="keep",
        help="whether the C library keeps freed memory, for every contender (default: keep)",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="fewer turns, and by default fewer cases and contenders",
    )
    parser.add_argument(
        "--minutes", type=float, default=math.inf, help="start no case after this many minutes"
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="keep existing results and measure only what is missing",
    )
    parser.add_argument("--output", type=Path, default=DEFAULT_OUTPUT, metavar="DIR")
    options = parser.parse_args(arguments)
    if options.quick:
        for name, value in cases.QUICK.items():
            setattr(options, name, getattr(options, name) or value)
        options.contenders = options.contenders or contenders.QUICK
    for shape in options.shapes or ():
        try:
            cases.parse_shape(shape)
        except ValueError as error:
            parser.error(str(error))
    return options


def selection(options: argparse.Namespace, on_gpu: bool) -> list[cases.Case]:
    """Returns the cases that the command line selects; the defaults depend on the device."""
    chosen: list[cases.Case] = []
    half = ("bfloat16", "float16") if on_gpu else ("bfloat16",)
    if options.suite in ("layers", "all"):
        chosen += cases.layer_cases(
            options.shapes or (cases.GPU_SHAPES if on_gpu else cases.CPU_SHAPES),
            options.precisions or ("float32", *half),
            options.phases,
            options.modes or cases.MODES,
        )
    if options.suite in ("models", "all"):
        batches = cases.GPU_BATCHES if on_gpu else cases.CPU_BATCHES
        chosen += cases.model_cases(
            {name: batches[name] for name in options.models or cases.MODELS},
            options.precisions or ("float32", "bfloat16"),
            options.phases,
            options.modes or ("graph",),
        )
    return chosen


def line(result: dict[str, Any]) -> str:
    """Formats the result of a case as a line of progress."""
    case = " ".join(result[key] for key in ("subject", "precision", "phase", "mode"))
    found = []
    for name, entry in result["contenders"].items():
        if "ms" in entry:
            memory = f" {entry['peak_mb']:.0f} MB" if "peak_mb" in entry else ""
            found.append(f"{name} {entry['ms']:.3g}{memory}")
        elif "failed" in entry:
            found.append(f"{name} failed: {entry['failed']}")
    return f"{case}: {', '.join(found)}"


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


if __name__ == "__main__":
    main()
