"""Runs experiments of the lectures and writes their pictures, their numbers and the page."""

import argparse
import importlib
import os
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
    """Runs the command; what a user can mend ends it with a message and without a traceback."""
    options = parse(arguments)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    try:
        run(options)
    except (ImportError, ConnectionError) as error:
        sys.exit(f"error: {error}")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line, without TensorFlow: `--help` and mistakes are answered at once."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.lectures",
        description="The lectures on batch normalization as experiments: for each a picture and its numbers, "
        "for all a page, README.md.",
    )
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"of {', '.join(EXPERIMENTS)} (default: all)"
    )
    parser.add_argument("--dataset", choices=["digits", "mnist"], default="digits")
    parser.add_argument("--seeds", type=int, default=5, metavar="N", help="default: 5")
    parser.add_argument("--quick", action="store_true", help="try it, in seconds")
    parser.add_argument(
        "--redraw", action="store_true", help="run nothing: draw anew what the numbers at hand say"
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="where README.md and gallery/ go (default: examples/lectures; saved_models/lectures of a quick "
        "run, another dataset or fewer than 5 seeds)",
    )
    options = parser.parse_args(arguments)
    unknown = [name for name in options.names if name not in EXPERIMENTS]
    if unknown:
        parser.error(f"there is no experiment {unknown[0]!r}. Choose of {', '.join(EXPERIMENTS)}.")
    if options.seeds < 1:
        parser.error(f"--seeds must be at least 1. Received: {options.seeds}.")
    options.names = options.names or EXPERIMENTS
    in_earnest = not options.quick and options.dataset == "digits" and options.seeds >= 5
    elsewhere = HERE.parents[1] / "saved_models" / "lectures"
    options.out = options.out or (HERE if in_earnest else elsewhere)
    return options


def run(options: argparse.Namespace) -> None:
    """Runs each experiment, or reads what it found, and draws it."""
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
