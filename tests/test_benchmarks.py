"""The benchmark measures what it says: same work, every contender on its own, none lost unseen.

How long things take is never tested.
"""

import importlib.util
import json
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from benchmarks import __main__ as command
from benchmarks import bars, cases, contenders, models, race, readme, results, tables

ROOT = Path(__file__).parents[1]
SETTINGS = race.Settings(turns=2, seconds=0.0, threads=1)

# Contenders that go wrong, each in one case only.
WRONG = """
import os, keras

class Doubles(keras.layers.BatchNormalization):
    def call(self, *arguments, **keywords):
        return 2 * super().call(*arguments, **keywords)

class Dies(keras.layers.BatchNormalization):
    def build(self, shape):
        if len(shape) == 3:
            os._exit(3)
        super().build(shape)

class Raises(keras.layers.BatchNormalization):
    def build(self, shape):
        if len(shape) == 3:
            raise RuntimeError("no three axes today")
        super().build(shape)
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run over tiny shapes with everybody, as the command line makes it; and where its files are."""
    folder = tmp_path_factory.mktemp("benchmark")
    (folder / "wrong.py").write_text(WRONG)
    shapes = ["5x4x3x8", "4x3x8", "6x8", "3x2x3x4x8", "5x8x4x3@1"]
    wrong = ["wrong:Doubles", "wrong:Dies", "wrong:Raises", "nowhere:Layer"]
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))  # The workers inherit it.
        command.main(
            [
                "layers",
                "--quick",
                "--threads",
                "1",
                "--output",
                str(folder),
                "--shapes",
                *shapes,
                "--precisions",
                "float32",
                "bfloat16",
                "--modes",
                "graph",
                "eager",
                "--contenders",
                *contenders.DEFAULT,
                *wrong,
            ]
        )
    (path,) = folder.glob("*.json")
    return results.load(path), path


def entries(run, contender, **wanted):
    return [r["contenders"][contender] for r in results.select(run, **wanted)]


def installed(name):
    return name not in ("torch", "tf_keras") or importlib.util.find_spec(name) is not None


# What a run has


def test_a_run_measures_every_case_it_was_asked_for(run):
    found = {
        (r["subject"], r["precision"], r["phase"], r["mode"], r["suite"]) for r in run[0]["results"]
    }
    assert len(found) == len(run[0]["results"]) == 5 * 2 * 2 * 2


def test_each_measurement_has_its_median_within_its_quartiles(run):
    for result in run[0]["results"]:
        for entry in result["contenders"].values():
            if "ms" in entry:
                assert 0 < entry["q1"] <= entry["ms"] <= entry["q3"]
                assert entry["samples"] >= 6  # Three turns of two samples or more.


def test_tracing_and_the_first_step_are_apart_from_running(run):
    for mode, traced in (("graph", True), ("eager", False)):
        for entry in entries(run[0], "tfbn", mode=mode):
            assert (entry["trace_seconds"] is not None) == traced
            assert entry["first_step_seconds"] > 0


def test_a_run_says_what_it_ran_on(run):
    environment = run[0]["environment"]
    assert environment["device"] in ("cpu", "gpu")
    assert environment["threads"] == 1
    assert environment["versions"]["tensorflow"]
    assert environment["variables"]["OMP_NUM_THREADS"] == "1"


def test_a_run_leaves_a_table_and_a_picture_beside_the_json(run):
    found, path = run
    markdown = path.with_suffix(".md").read_text()
    assert markdown == tables.document(found)
    assert "| 5x8x4x3@1 |" in markdown
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


# The same work


@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 2e-5), ("bfloat16", 0.05)])
@pytest.mark.parametrize("contender", ["tf_keras", "torch", "tfbn"])
def test_contenders_compute_the_same_numbers(run, contender, precision, tolerance):
    if not installed(contender):
        pytest.skip(f"{contender} is not installed")
    measured = [e for e in entries(run[0], contender, precision=precision) if "ms" in e]
    assert measured
    for entry in measured:
        assert max(entry["difference"].values()) < tolerance


def test_training_is_compared_by_outputs_gradients_and_statistics(run):
    for entry in entries(run[0], "tfbn", phase="train"):
        assert set(entry["difference"]) == {"y", "dx", "dgamma", "dbeta", "mean"}


def test_a_contender_that_computes_something_else_shows_it(run):
    for entry in entries(run[0], "wrong:Doubles"):
        assert entry["difference"]["y"] > 0.5


@pytest.mark.parametrize("phase", cases.PHASES)
def test_a_stack_computes_what_the_formula_says(phase):
    case = cases.LayerCase((6, 5, 4), 2, "float32", phase, "graph")
    stack = contenders.load("keras").program(case)
    y = stack.values(stack.step())["y"]
    from benchmarks import data

    expected = data.tensors(case)[0].astype(np.float64)
    for layer in data.parameters(case):
        mean, variance = layer.moving_mean, layer.moving_variance
        if phase == "train":
            mean, variance = expected.mean((0, 1)), expected.var((0, 1))
        expected = (expected - mean) / np.sqrt(variance + data.EPSILON) * layer.gamma + layer.beta
    np.testing.assert_allclose(y, expected.reshape(-1), atol=1e-5)


@pytest.mark.parametrize(("phase", "what"), [("train", "loss"), ("infer", "logits")])
def test_a_model_computes_the_same_with_either_layer(phase, what):
    case = cases.ModelCase("ResNet20", 2, "float32", phase, "graph")
    found = []
    for name in ("keras", "tfbn"):
        program = contenders.load(name).program(case)
        found.append(program.values(program.step())[what])
    np.testing.assert_allclose(found[1], found[0], rtol=1e-4, atol=1e-5)


def test_in_a_model_every_normalization_is_replaced():
    import keras

    import tfbn

    model, _ = models._built(tfbn.BatchNormalization, keras, "ResNet20", "float32")
    kinds = [type(layer) for layer in model.layers]
    # One after each of 19 convolutions, and in the two shortcuts that change the size.
    assert kinds.count(tfbn.BatchNormalization) == 21
    assert keras.layers.BatchNormalization not in kinds


# None lost unseen


def test_who_is_not_installed_is_named_and_left_out(run):
    found = run[0]
    missing = {name for name in contenders.DEFAULT if not installed(name)}
    assert set(found["left_out"]) == {"nowhere:Layer", *missing}
    assert "nowhere" in found["left_out"]["nowhere:Layer"]
    assert "nowhere:Layer" not in found["contenders"]
    assert f"left out: nowhere:Layer: {found['left_out']['nowhere:Layer']}" in tables.document(
        found
    )


def test_a_contender_that_raises_in_one_case_is_named_there_and_runs_in_the_others(run):
    for result in run[0]["results"]:
        entry = result["contenders"]["wrong:Raises"]
        if result["subject"] == "4x3x8":
            assert entry == {"failed": "RuntimeError: no three axes today"}
        else:
            assert "ms" in entry


def test_a_contender_that_dies_in_one_case_is_started_again_for_the_next(run):
    for result in run[0]["results"]:
        entry = result["contenders"]["wrong:Dies"]
        if result["subject"] == "4x3x8":
            assert entry == {"failed": "its process ended with exit code 3"}
        else:
            assert "ms" in entry


def test_a_contender_that_hangs_is_ended(tmp_path, monkeypatch):
    (tmp_path / "hangs.py").write_text("import time; time.sleep(600)")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(race, "IMPORT_SECONDS", 1.0)
    with race.Race(["hangs:Layer"], SETTINGS) as running:
        assert running.left_out == {"hangs:Layer": "took longer than 1 s and was ended"}
        assert running.run(cases.layer_cases(["2x3"], ["float32"], ["infer"], ["graph"]), print)


def test_the_environment_of_the_workers_is_not_left_behind(monkeypatch):
    from benchmarks import environment

    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.delenv("KERAS_BACKEND", raising=False)
    with environment.variables({"OMP_NUM_THREADS": "1", "KERAS_BACKEND": "tensorflow"}):
        assert environment.described(1)["variables"]["OMP_NUM_THREADS"] == "1"
    import os

    assert os.environ["OMP_NUM_THREADS"] == "7"
    assert "KERAS_BACKEND" not in os.environ


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from Linux's /proc")
def test_the_peak_is_what_is_held_at_once_and_not_what_was_kept():
    code = """
    import numpy as np
    from benchmarks import memory

    def run():
        for _ in range(3):
            a = np.ones(40 * 2**17)  # 40 MB
            b = a + 1
            del a, b

    def once(megabytes):
        np.ones(megabytes * 2**17)

    once(200)  # A peak before is none of this one.
    before = memory.resident()
    print(memory.peak(run) - before)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert 76 < float(done.stdout) < 84


# What is read from the results


def made_up(**times):
    """A run of two shapes with these milliseconds for each contender, by shape."""
    subjects = cases.CPU_SHAPES[:2]
    return {
        "contenders": list(times),
        "environment": {"device": "cpu"},
        "results": [
            {
                **{"suite": "layers", "subject": subject, "precision": "float32"},
                **{"phase": "train", "mode": "graph"},
                "contenders": {name: {"ms": each[place]} for name, each in times.items()},
            }
            for place, subject in enumerate(subjects)
        ],
    }


def test_bars_are_the_geometric_mean_and_the_least_of_the_ratios():
    found = bars.bars(made_up(keras=[8.0, 9.0], tfbn=[2.0, 1.0], torch=[1.0, 0.5], floor=[0.25, 1]))
    first, second = cases.CPU_SHAPES[:2]
    assert [(bar.name, bar.measured, bar.met) for bar in found] == [
        (
            "layers, train, graph, float32: keras / tfbn, geometric mean",
            pytest.approx(6.0),
            True,
        ),
        (f"layers, train, graph, float32: keras / tfbn, least ({first})", 4.0, True),
        (
            "layers, train, graph, float32: torch / tfbn, geometric mean",
            pytest.approx(0.5),
            False,
        ),
        # Eight passes are four in place, of 0.25 ms.
        (f"layers, train, graph, float32: tfbn / 8 passes over memory, {first}", 2.0, True),
    ]
    assert second not in found[1].name


def test_a_missed_bar_is_called_so():
    (line,) = [
        row
        for row in bars.summary(made_up(torch=[1.0, 1.0], tfbn=[2.0, 2.0])).splitlines()
        if "torch" in row
    ]
    assert line.endswith("| 0.50 | ≥ 1 | missed |")


def test_a_contender_that_a_case_lacks_has_no_ratio_there():
    run = made_up(keras=[1.0, 1.0], tfbn=[2.0, 4.0])
    run["results"][0]["contenders"]["keras"] = {"failed": "it did"}
    assert results.ratios(run["results"], "keras", "tfbn") == {cases.CPU_SHAPES[1]: 0.25}


# README


def test_the_tables_of_the_readme_are_those_of_the_committed_results():
    text = (ROOT / "README.md").read_text()
    assert readme.rendered(text) == text, "Run: python -m benchmarks.readme"
    committed = {f"{readme.RESULTS}/{path.name}" for path in (ROOT / readme.RESULTS).glob("*.json")}
    assert {name for _, name, _, _ in readme.MARKED.findall(text)} == committed


def test_a_table_of_the_readme_is_generated_anew_from_the_json(run):
    found, path = run
    marked = f"before\n<!-- {path.name} -->\nold\n<!-- end of {path.name} -->\nafter\n"
    text = readme.rendered(marked, path.parent)
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "old" not in text
    assert "| 5×4×3×8 |" in text
    assert readme.rendered(text, path.parent) == text
    path.with_name("less.json").write_text(json.dumps(found | {"results": found["results"][:1]}))
    assert readme.rendered(text.replace(path.name, "less.json"), path.parent) != text


# The command line


@pytest.mark.parametrize("shape", ["8", "0x4", "4x", "4x8@2", "4x8@0", "axb", ""])
def test_a_shape_that_is_none_is_refused_with_what_one_is_like(shape, capsys):
    with pytest.raises(SystemExit):
        command.main(["layers", "--shapes", shape])
    error = capsys.readouterr().err
    assert "A shape is like 32x56x56x64" in error
    assert f"Received: {shape}" in error


@pytest.mark.parametrize("shape", [*cases.CPU_SHAPES, *cases.GPU_SHAPES])
def test_a_shape_is_read_as_it_is_written(shape):
    (case,) = cases.layer_cases([shape], ["float32"], ["train"], ["graph"])
    assert case.subject == shape


def test_a_run_of_everything_has_every_part_of_the_plan():
    chosen = command.selection(command.parse([]), on_gpu=False)
    assert {c.subject for c in chosen} == {*cases.CPU_SHAPES, *cases.MODELS}
    layers = [c for c in chosen if c.suite == "layers"]
    assert len(layers) == len(cases.CPU_SHAPES) * 2 * 2 * 3
    assert {c.precision for c in command.selection(command.parse([]), on_gpu=True)} == {
        "float32",
        "bfloat16",
        "float16",
    }
