"""What wants a GPU can be run in parts: each goes on where the one before it had to stop."""

import pytest

from benchmarks import __main__ as command
from benchmarks import bars, cases, gpu, kernels, race, results
from benchmarks.contenders import Contender, load

TINY = [
    "layers",
    "--quick",
    "--threads",
    "1",
    "--phases",
    "infer",
    "--modes",
    "eager",
    "--precisions",
    "float32",
]


def test_no_file_with_a_test_for_a_gpu_is_forgotten(request):
    assert request.config.files_for_a_gpu <= set(gpu.files())
    assert gpu.ROOT / "tests" / "_normalize" / "test_gpu_sizes.py" in gpu.files()


def test_files_with_a_report_are_not_run_again(tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr(gpu, "tested", lambda arguments, report: ran.append(report.stem))
    first, *others = map(gpu.report_name, gpu.files())
    (tmp_path / f"{first}.xml").touch()
    assert gpu.tested_in_time(tmp_path, minutes=-1) == others
    assert gpu.tested_in_time(tmp_path, minutes=1) == []
    assert ran == others


def test_a_part_that_is_none_is_refused():
    with pytest.raises(SystemExit, match=r"tests, layers, models\. Received: all$"):
        gpu.main(["all"])


@pytest.fixture
def alone(monkeypatch):
    """One process for everything: what is measured does not matter here."""
    measured = []

    class Here(race.Race):
        def __enter__(self):
            self.device = {"device": "cpu"}
            return self

        def _start(self, names):
            pass

        def _measure(self, case, names):
            measured.append(case.subject)
            return {"keras": {"ms": 1.0, "q1": 1.0, "q3": 1.0}}

    monkeypatch.setattr(command, "Race", Here)
    return measured


def run(folder, *arguments):
    command.main([*TINY, "--contenders", "keras", "--output", str(folder), *arguments])
    return results.load(folder / "cpu.json")


def test_a_run_goes_on_with_what_is_left(alone, tmp_path, capsys):
    assert run(tmp_path, "--shapes", "4x3", "5x3", "--minutes", "-1")["results"] == []
    assert "2 cases are left" in capsys.readouterr().out
    run(tmp_path, "--shapes", "4x3", "--resume")
    found = run(tmp_path, "--shapes", "5x3", "4x3", "--resume")
    assert alone == ["4x3", "5x3"]
    assert [r["subject"] for r in found["results"]] == ["4x3", "5x3"]
    assert [r["subject"] for r in run(tmp_path, "--shapes", "6x3")["results"]] == ["6x3"]


def test_results_of_another_machine_are_not_gone_on_with(alone, tmp_path):
    found = run(tmp_path, "--shapes", "4x3")
    found["environment"]["processor"] = "abacus"
    results.save(found, tmp_path / "cpu.json")
    with pytest.raises(ValueError, match=r"in another way: {'processor': \('abacus'"):
        run(tmp_path, "--shapes", "5x3", "--resume")
    assert results.load(tmp_path / "cpu.json") == found


@pytest.mark.parametrize("kind", [kernels.Formula, kernels.Compiled])
def test_other_kernels_compute_the_same(kind):
    (case,) = cases.layer_cases(["5x4x3"], ["float32"], ["train"], ["graph"])
    contenders = {"keras": load("keras"), "other": Contender("other", kind, load("keras").library)}
    found = {}
    for name, contender in contenders.items():
        program = contender.program(case)
        found[name] = {"values": program.values(program.step())}
    race._compare(found)
    assert max(found["other"]["difference"].values()) < 2e-5


def test_on_a_gpu_less_memory_than_keras_in_half_precision_is_wanted():
    entries = {"keras": {"ms": 3.0, "peak_mb": 30.0}, "tfbn": {"ms": 1.0, "peak_mb": 20.0}}
    case = {"suite": "layers", "phase": "train", "mode": "graph", "subject": cases.GPU_SHAPES[0]}
    run = {
        "environment": {"device": "gpu"},
        "results": [case | {"precision": "bfloat16", "contenders": entries}],
    }
    (bar,) = [bar for bar in bars.bars(run) if "memory" in bar.name]
    assert (bar.measured, bar.wanted, bar.at_most) == (1.5, 1, False)
