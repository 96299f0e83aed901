"""Everything that wants a GPU, in one go: the tests marked so, then the benchmark, a short table last.

    python -m benchmarks.gpu [ARGUMENTS of python -m benchmarks]

Where TensorFlow lists no GPU, the tests are skipped and the benchmark is the CPU's, so that all of it
can be tried anywhere.
"""

import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from pathlib import Path

from benchmarks import __main__ as benchmark
from benchmarks.tables import table

ROOT = Path(__file__).parents[1]
_KEYS = ("tests", "failures", "errors", "skipped")


def main(arguments: Sequence[str] | None = None) -> None:
    """Ends with exit code 1 if a test failed, but not before everything was measured."""
    options = benchmark.parse(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    counts = tested([str(ROOT / "tests"), "-m", "gpu"], options.output / "gpu-tests.xml")
    benchmark.run(options)
    print(
        "\n" + table([f"tests marked gpu: {name}" for name in counts], [map(str, counts.values())])
    )
    if counts["failed"]:
        sys.exit(1)


def tested(arguments: Sequence[str], report: Path) -> dict[str, int]:
    """How many tests passed, failed and were skipped; pytest's own report is kept beside the results."""
    command = [sys.executable, "-m", "pytest", "-q", f"--junitxml={report}", *arguments]
    code = subprocess.run(command, check=False).returncode
    if code not in (0, 1):
        raise RuntimeError(
            f"pytest could not run the tests: it ended with exit code {code}. Received: {command}"
        )
    suites = ET.parse(report).getroot().iter("testsuite")
    found = [{key: int(suite.get(key, 0)) for key in _KEYS} for suite in suites]
    tests, failures, errors, skipped = (sum(suite[key] for suite in found) for key in _KEYS)
    failed = failures + errors
    return {"passed": tests - failed - skipped, "failed": failed, "skipped": skipped}


if __name__ == "__main__":
    main()
