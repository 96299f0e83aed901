"""Runs the experiments of the lectures, and writes their figures, their numbers and the page."""

import argparse
import importlib
import sys
import time
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).parent
EXPERIMENTS = [
    "one_line",
    "original",
    "hyperparameters",
    "depth",
    "contours",
    "covariate_shift",
    "shifted_input",
    "noise",
    "regularization",
    "test_time",
    "moving_average",
    "placement",
    "bias",
    "parameters",
]


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command. An error that the user can fix is shown without a traceback."""
    from examples.quiet import quiet

    options = parse(arguments)
    quiet()
    try:
        run(options)
    except (ImportError, ConnectionError) as error:
        sys.exit(f"error: {error}")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the command line without importing TensorFlow, so that `--help` and errors are instant."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.lectures",
        description="Test the claims of lectures on batch normalization by experiment. Each experiment writes a "
        "figure and its numbers; README.md shows them all.",
    )
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"one of {', '.join(EXPERIMENTS)} (default: all)"
    )
    parser.add_argument("--dataset", choices=["digits", "mnist"], default="digits")
    parser.add_argument("--seeds", type=int, default=5, metavar="N", help="default: 5")
    parser.add_argument("--quick", action="store_true", help="a trial run of a few seconds")
    parser.add_argument(
        "--redraw",
        action="store_true",
        help="train nothing: redraw the figures from the saved numbers",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="the directory for README.md and gallery/ (default: examples/lectures, or saved_models/lectures for a "
        "quick run, another dataset, or fewer than 5 seeds)",
    )
    options = parser.parse_args(arguments)
    unknown = [name for name in options.names if name not in EXPERIMENTS]
    if unknown:
        parser.error(
            f"there is no experiment {unknown[0]!r}. Choose one of {', '.join(EXPERIMENTS)}."
        )
    if options.seeds < 1:
        parser.error(f"--seeds must be at least 1. Received: {options.seeds}.")
    options.names = options.names or EXPERIMENTS
    in_earnest = not options.quick and options.dataset == "digits" and options.seeds >= 5
    elsewhere = HERE.parents[1] / "saved_models" / "lectures"
    options.out = options.out or (HERE if in_earnest else elsewhere)
    return options


def run(options: argparse.Namespace) -> None:
    """Runs each experiment, or loads its results, and draws them."""
    from examples.lectures import page
    from examples.lectures.result import Result
    from examples.lectures.setting import Setting

    setting = Setting(options.dataset, options.seeds, options.quick)
    gallery = options.out / "gallery"
    gallery.mkdir(parents=True, exist_ok=True)
    for name in options.names:
        started = time.perf_counter()
        experiment = importlib.import_module(f"examples.lectures.{name}")
        numbers = gallery / f"{name}.json"
        if not options.redraw:
            experiment.run(setting).save(numbers)
        result = Result.load(numbers)
        experiment.draw(result).savefig(numbers.with_suffix(".png"))
        print(f"{name}: {time.perf_counter() - started:.0f} s")
        for claim in result.claims:
            print(
                f"  {claim.lecture:<4}{claim.verdict:<15}{claim.measured}: {page.measured(claim)}"
            )
    print(f"Page: {page.write(options.out, EXPERIMENTS)}")


if __name__ == "__main__":
    main()
