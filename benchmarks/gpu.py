"""Runs everything that needs a GPU: the marked tests, then the benchmark in parts, then a short table.

    python -m benchmarks.gpu [tests] [layers] [models] [ARGUMENTS of python -m benchmarks]

With `--minutes 9`, nothing new starts after nine minutes; `--resume` continues with the remaining test files
and cases.

Layers are timed in training only, and the model is ResNet-50, unless the arguments say otherwise. Steps are
queued for at least 50 ms before the wait that ends a sample, so the host's time does not show where the GPU is
the bottleneck. TensorFlow's float32 convolutions run in TF32, which is its default.

Where TensorFlow lists no GPU, the tests are skipped and the benchmark runs on the CPU, so that the command
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
    """Returns 1 if a test failed, after measuring everything."""
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
    """Lists the test files with tests for a GPU. Other files may import packages that are not installed."""
    every = sorted((ROOT / "tests").rglob("test_*.py"))
    return [path for path in every if _NEEDS_A_GPU.search(path.read_text())]


def report_name(path: Path) -> str:
    """Returns the name of a test file's report."""
    return ".".join(path.relative_to(ROOT / "tests").with_suffix("").parts)


def tested_in_time(reports: Path, minutes: float) -> list[str]:
    """Runs the test files that have no report yet, and returns those for which no time was left."""
    deadline = time.monotonic() + 60 * minutes
    missing = {report_name(path): path for path in files()}
    missing = {name: p for name, p in missing.items() if not (reports / f"{name}.xml").exists()}
    for number, (name, path) in enumerate(missing.items()):
        if time.monotonic() > deadline:
            return list(missing)[number:]
        tested([str(path), "-m", "gpu"], reports / f"{name}.xml")
    return []


def tested(arguments: Sequence[str], report: Path) -> Counter[str]:
    """Runs a test file, saves pytest's report, and returns how many tests passed, failed and were skipped."""
    command = [sys.executable, "-m", "pytest", "-q", f"--junitxml={report}", *arguments]
    code = subprocess.run(command, check=False).returncode
    if code not in (0, 1, 5):  # 5: no test was selected.
        report.unlink(missing_ok=True)  # An interrupted report would look complete.
        raise RuntimeError(
            f"pytest could not run the tests: it ended with exit code {code}. Received: {command}"
        )
    return counted(report)


def counted(report: Path) -> Counter[str]:
    """Reads the counts from the last line of a pytest report."""
    suites = ET.parse(report).getroot().iter("testsuite")
    found = [{key: int(suite.get(key, 0)) for key in _KEYS} for suite in suites]
    tests, failures, errors, skipped = (sum(suite[key] for suite in found) for key in _KEYS)
    failed = failures + errors
    return Counter(passed=tests - failed - skipped, failed=failed, skipped=skipped)


if __name__ == "__main__":
    main()
