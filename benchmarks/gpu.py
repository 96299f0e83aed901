"""Everything that wants a GPU: the tests marked so, then the benchmark in parts, a short table last.

    python -m benchmarks.gpu [tests] [layers] [models] [ARGUMENTS of python -m benchmarks]

Where a command may not take long, `--minutes 9` starts nothing after so many, and `--resume` goes on with
what is left, test file by test file and case by case.

Layers are timed in training only, and the model is ResNet-50, unless the arguments say otherwise. Steps are
queued for 50 ms and more before the one wait that ends a sample: where the GPU has more to do than the host,
the host does not show. TensorFlow's convolutions in float32 run in TF32, as they do for everybody.

Where TensorFlow lists no GPU, the tests are skipped and the benchmark is the CPU's, so that all of it
can be tried anywhere.
"""

import itertools
import re
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from benchmarks import __main__ as benchmark
from benchmarks.tables import table

ROOT = Path(__file__).parents[1]
PARTS = {
    "tests": [],
    "layers": ["layers", "--phases", "train", "--contenders", "keras", "torch", "tfbn", "floor"],
    "models": ["models", "--models", "ResNet50", "--contenders", "keras", "tf_keras", "tfbn"],
}
_NEEDS_A_GPU = re.compile(r'mark\.gpu\b|usefixtures\("device"\)|def test_\w+\([^)]*\bdevice\b')
_KEYS = ("tests", "failures", "errors", "skipped")


def main(arguments: Sequence[str] | None = None) -> None:
    """Ends with exit code 1 if a test failed, but not before everything was measured."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    named = list(itertools.takewhile(lambda argument: not argument.startswith("-"), arguments))
    rest = arguments[len(named) :]
    if "--help" in rest or "-h" in rest:
        print(__doc__)
    elif unknown := set(named) - set(PARTS):
        sys.exit(f"error: a part is any of {', '.join(PARTS)}. Received: {', '.join(unknown)}")
    begin = time.monotonic()
    begun = False
    left: list[str] = []
    for part in named or PARTS:
        options = benchmark.parse([*PARTS[part], *rest])
        options.minutes -= (time.monotonic() - begin) / 60
        options.resume |= begun
        reports = options.output / "gpu-tests"
        if part == "tests":
            if not options.resume:
                shutil.rmtree(reports, ignore_errors=True)
            left = tested_in_time(reports, options.minutes)
        else:
            benchmark.run(options)
            begun = True
    if "tests" not in (named or PARTS):
        return
    counts = sum((counted(report) for report in reports.glob("*.xml")), Counter())
    rows = {name: str(counts[name]) for name in ("passed", "failed", "skipped")}
    if left:
        rows["files left"] = ", ".join(left)
    print("\n" + table([f"tests marked gpu: {name}" for name in rows], [list(rows.values())]))
    if counts["failed"]:
        sys.exit(1)


def files() -> list[Path]:
    """The files of tests that have some for a GPU. The others may import what is not installed there."""
    every = sorted((ROOT / "tests").rglob("test_*.py"))
    return [path for path in every if _NEEDS_A_GPU.search(path.read_text())]


def report_name(path: Path) -> str:
    """The file's path in tests/, as the name of its report."""
    return ".".join(path.relative_to(ROOT / "tests").with_suffix("").parts)


def tested_in_time(reports: Path, minutes: float) -> list[str]:
    """Runs the files that have no report yet, one after the other; returns those that no time was left for."""
    deadline = time.monotonic() + 60 * minutes
    missing = {report_name(path): path for path in files()}
    missing = {name: p for name, p in missing.items() if not (reports / f"{name}.xml").exists()}
    for number, (name, path) in enumerate(missing.items()):
        if time.monotonic() > deadline:
            return list(missing)[number:]
        tested([str(path), "-m", "gpu"], reports / f"{name}.xml")
    return []


def tested(arguments: Sequence[str], report: Path) -> Counter[str]:
    """How many tests passed, failed and were skipped; pytest's own report is kept beside the results."""
    command = [sys.executable, "-m", "pytest", "-q", f"--junitxml={report}", *arguments]
    code = subprocess.run(command, check=False).returncode
    if code not in (0, 1, 5):  # 5: no test was selected.
        report.unlink(missing_ok=True)  # Interrupted, it says too little, and would pass for whole.
        raise RuntimeError(
            f"pytest could not run the tests: it ended with exit code {code}. Received: {command}"
        )
    return counted(report)


def counted(report: Path) -> Counter[str]:
    """What a report of pytest says in the end."""
    suites = ET.parse(report).getroot().iter("testsuite")
    found = [{key: int(suite.get(key, 0)) for key in _KEYS} for suite in suites]
    tests, failures, errors, skipped = (sum(suite[key] for suite in found) for key in _KEYS)
    failed = failures + errors
    return Counter(passed=tests - failed - skipped, failed=failed, skipped=skipped)


if __name__ == "__main__":
    main()
