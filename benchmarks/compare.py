r"""Measures the layer as two commits have it, in turns, so that a change that slows something is seen.

Both run the benchmark of the working tree. Options are those of `python -m benchmarks`.

Examples:
    python -m benchmarks compare main HEAD              # about 2 minutes, by the cases of --quick
    python -m benchmarks compare v0.1.0 HEAD layers --shapes 256x1024 --modes xla
"""

import contextlib
import subprocess
from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks import command_line, contenders
from benchmarks.race import Race
from benchmarks.results import geometric_mean, ratios, value
from benchmarks.tables import table


def main(arguments: Sequence[str]) -> None:
    from benchmarks import __main__ as benchmarks

    parser = command_line.parser("benchmarks compare", __doc__)
    parser.add_argument("before", help="a commit, as git understands it")
    parser.add_argument("after")
    commits, others = parser.parse_known_args(arguments)
    options = benchmarks.parse([*others, "--quick"])
    names = [_name(commits.before), _name(commits.after)]
    with _checked_out(names), Race(names, benchmarks.settings(options)) as race:
        cases = benchmarks.selection(options, on_gpu=race.device["device"] == "gpu")
        found = race.run(cases, lambda result: print(benchmarks.line(result), flush=True))
        for name, why in race.left_out.items():
            print(f"left out: {name}: {why}")
    print(f"\n{summary(found, *names)}")


def summary(found: Sequence[dict[str, Any]], before: str, after: str) -> str:
    """Formats the times of both by case, the one that became slowest first."""
    rows = []
    for result in found:
        then, now = value(result, before), value(result, after)
        if then and now:
            case = " ".join(result[key] for key in ("subject", "precision", "phase", "mode"))
            ratio = ratios([result], before, after)[result["subject"]]
            rows.append((ratio, case, then, now))
    if not rows:
        return "No case ran at both commits."
    shown = [
        [c, f"{then:.3g}", f"{now:.3g}", f"{ratio:.2f}"] for ratio, c, then, now in sorted(rows)
    ]
    mean = geometric_mean(ratio for ratio, *_ in rows)
    return table(
        ["milliseconds", before, after, "before / after"],
        [*shown, ["geometric mean", "", "", f"{mean:.2f}"]],
    )


def _name(commit: str) -> str:
    """The contender of a commit: `tfbn@` and its hash.

    Raises:
        SystemExit: If there is no such commit.
    """
    try:
        return f"tfbn@{_git('rev-parse', '--short', '--verify', '--quiet', commit + '^{commit}')}"
    except subprocess.CalledProcessError:
        raise SystemExit(f"error: git knows no commit {commit!r}") from None


@contextlib.contextmanager
def _checked_out(names: Sequence[str]) -> Iterator[None]:
    """Has each contender's commit checked out where `contenders.root` looks for it."""
    roots = {name: contenders.root(name) for name in names}
    try:
        for name, root in roots.items():
            if not root.exists():
                _git("worktree", "add", "--quiet", "--detach", str(root), name.partition("@")[2])
        yield
    finally:
        for root in {*roots.values()}:
            if root.exists():
                _git("worktree", "remove", "--force", str(root))


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], check=True, capture_output=True, text=True)
    return done.stdout.strip()
