"""The benchmark measures what it says: same work, every contender on its own, none lost unseen.

How long things take is never tested.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfbn
from benchmarks import __main__ as command
from benchmarks import (
    bars,
    cases,
    contenders,
    data,
    environment,
    floor,
    gpu,
    models,
    page,
    race,
    results,
    tables,
)

GPUS = tf.config.list_physical_devices("GPU")
ROOT = Path(__file__).parents[2]
SETTINGS = race.Settings(turns=2, seconds=0.0, threads=1)

# A contender that computes something else, raises for three axes and ends its process in training for five.
WRONG = """
import os, keras

class Layer(keras.layers.BatchNormalization):
    def build(self, shape):
        if len(shape) == 3:
            raise RuntimeError("no three axes today")
        super().build(shape)

    def call(self, inputs, training=None, mask=None):
        if len(inputs.shape) == 5 and training:
            os._exit(3)
        return 2 * super().call(inputs, training=training, mask=mask)
"""
CONTENDERS = [
    "keras",
    "torch",
]  # The others are compared in this process: each new one costs seconds.
SHAPES = ["6x8", "4x3x8", "3x2x3x4x8", "5x8x4x3@1"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run over tiny shapes, as the command line makes it, and where its JSON is."""
    folder = tmp_path_factory.mktemp("benchmark")
    (folder / "wrong.py").write_text(WRONG)
    arguments = f"""
        layers --quick --threads 1 --output {folder} --modes graph --precisions float32
        --shapes {" ".join(SHAPES)} --contenders {" ".join(CONTENDERS)} wrong:Layer nowhere:Layer
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))  # The workers inherit it.
        command.main(arguments.split())
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
    assert len(found) == len(run[0]["results"]) == len(SHAPES) * 2


def test_each_measurement_has_its_median_within_its_quartiles(run):
    for result in run[0]["results"]:
        for entry in result["contenders"].values():
            if "ms" in entry:
                assert 0 < entry["q1"] <= entry["ms"] <= entry["q3"]
                assert entry["samples"] >= 6  # Three turns of two samples or more.


def test_tracing_and_the_first_step_are_apart_from_running(run):
    for entry in entries(run[0], "keras"):
        assert entry["trace_seconds"] > 0
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


@pytest.mark.skipif(not installed("torch"), reason="PyTorch is not installed")
def test_pytorch_computes_the_same_numbers_as_keras(run):
    for entry in entries(run[0], "torch"):
        assert max(entry["difference"].values()) < 2e-5


@pytest.mark.parametrize("phase", cases.PHASES)
@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 2e-5), ("bfloat16", 0.05)])
@pytest.mark.parametrize("shape", ["6x8", "4x3x8", "5x4x3x8", "3x2x3x4x8", "5x8x4x3@1"])
@pytest.mark.parametrize("contender", ["tf_keras", "tfbn"])
def test_contenders_compute_the_same_numbers(contender, shape, precision, tolerance, phase):
    if not installed(contender):
        pytest.skip(f"{contender} is not installed")
    (case,) = cases.layer_cases([shape], [precision], [phase], ["eager"])
    found = {}
    for name in ("keras", contender):
        program = contenders.load(name).program(case)
        found[name] = {"values": program.values(program.step())}
    race._compare(found)
    difference = found[contender]["difference"]
    assert set(difference) == (
        {"y", "dx", "dgamma", "dbeta", "mean"} if phase == "train" else {"y"}
    )
    assert max(difference.values()) < tolerance


def test_no_normalization_is_the_identity_and_so_is_its_gradient():
    (case,) = cases.layer_cases(["6x8"], ["float32"], ["train"], ["graph"])
    stack = contenders.load("identity").program(case)
    found = stack.values(stack.step())
    for name, expected in zip(("y", "dx"), data.tensors(case), strict=True):
        np.testing.assert_array_equal(found[name], expected.reshape(-1))


@pytest.mark.skipif(bool(GPUS), reason="on a GPU the passes are TensorFlow's")
@pytest.mark.parametrize("name", contenders.FLOORS)
def test_a_floor_passes_over_as_many_bytes_as_the_case_has(name, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    touched = []
    multiply = np.multiply

    def counted(x, factor, out):
        assert out is x
        touched.append(x.nbytes)
        return multiply(x, factor, out=out)

    (case,) = cases.layer_cases(["64x8"], ["bfloat16"], ["infer"], ["graph"])
    program = contenders.load(name).program(case)
    monkeypatch.setattr(np, "multiply", counted)
    program.step()
    assert sum(touched) == program.parts * 64 * 8 * 2


def test_a_contender_that_computes_something_else_shows_it(run):
    for entry in entries(run[0], "wrong:Layer", subject="6x8"):
        assert entry["difference"]["y"] > 0.5


@pytest.mark.parametrize("phase", cases.PHASES)
@pytest.mark.parametrize("mode", cases.MODES)
def test_a_stack_computes_what_the_formula_says(phase, mode):
    case = cases.LayerCase((6, 5, 4), 2, "float32", phase, mode)
    stack = contenders.load("keras").program(case)
    assert (stack.trace_seconds is None) == (mode == "eager")
    y = stack.values(stack.step())["y"]
    expected = data.tensors(case)[0].astype(np.float64)
    for layer in data.parameters(case):
        mean, variance = layer.moving_mean, layer.moving_variance
        if phase == "train":
            mean, variance = expected.mean((0, 1)), expected.var((0, 1))
        expected = (expected - mean) / np.sqrt(variance + data.EPSILON) * layer.gamma + layer.beta
    np.testing.assert_allclose(y, expected.reshape(-1), atol=1e-5)


def test_a_model_computes_the_same_with_either_layer():
    found = []
    for name in ("keras", "tfbn"):
        contender = contenders.load(name)
        for case in cases.model_cases({"ResNet20": 2}, ["float32"], cases.PHASES, ["graph"]):
            program = contender.program(case)
            found.append(program.values(program.step()))
    for keras_values, our_values in zip(found[:2], found[2:], strict=True):
        assert keras_values.keys() == our_values.keys()
        for name, expected in keras_values.items():
            np.testing.assert_allclose(our_values[name], expected, rtol=1e-4, atol=1e-5)


def test_in_a_model_every_normalization_is_replaced():
    model, _ = models.built(tfbn.BatchNormalization, keras, "ResNet20", "float32")
    kinds = [type(layer) for layer in model.layers]
    # One after each of 19 convolutions, and in the two shortcuts that change the size.
    assert kinds.count(tfbn.BatchNormalization) == 21
    assert keras.layers.BatchNormalization not in kinds


def test_a_floor_of_tensorflow_runs_all_its_passes():
    program = floor._in_tensorflow(16)
    assert program.parts == 16
    # From any x, half of x and a half, over and over, goes to 1.
    np.testing.assert_allclose(program.step(), 1, atol=0.05)


def test_bandwidth_is_bytes_over_time():
    found = made_up(tfbn=[2.0, 4.0], floor=[0.5, 0.5])
    rows = tables.bandwidth(found, found["results"][:1]).splitlines()
    gigabytes = 32 * 56 * 56 * 64 * 4 / 1e9
    expected = [8 * gigabytes / 2e-3, 2 * gigabytes / 0.5e-3]
    assert rows[-1] == f"| 32x56x56x64 | {expected[0]:.0f} | {expected[1]:.0f} |"


# None lost unseen


def test_who_is_not_installed_is_named_and_left_out(run):
    found = run[0]
    missing = {name for name in CONTENDERS if not installed(name)}
    assert set(found["left_out"]) == {"nowhere:Layer", *missing}
    assert "nowhere" in found["left_out"]["nowhere:Layer"]
    assert "nowhere:Layer" not in found["contenders"]
    assert f"left out: nowhere:Layer: {found['left_out']['nowhere:Layer']}" in tables.document(
        found
    )


def test_a_contender_that_fails_in_a_case_is_named_there_and_runs_in_the_others(run):
    for result in run[0]["results"]:
        entry = result["contenders"]["wrong:Layer"]
        if result["subject"] == "4x3x8":
            assert entry == {"failed": "RuntimeError: no three axes today"}
        elif result["subject"] == "3x2x3x4x8" and result["phase"] == "train":
            assert entry == {"failed": "its process ended with exit code 3"}
        else:
            assert "ms" in entry
        assert "ms" in result["contenders"]["keras"]


def test_a_contender_that_hangs_is_ended(tmp_path, monkeypatch):
    (tmp_path / "hangs.py").write_text("import time; time.sleep(600)")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(race, "IMPORT_SECONDS", 1.0)
    with race.Race(["hangs:Layer"], SETTINGS) as running:
        assert running.left_out == {"hangs:Layer": "took longer than 1 s and was ended"}
        assert running.run(cases.layer_cases(["2x3"], ["float32"], ["infer"], ["graph"]), print)


def test_the_environment_of_the_workers_is_not_left_behind(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.delenv("KERAS_BACKEND", raising=False)
    with environment.variables({"OMP_NUM_THREADS": "1", "KERAS_BACKEND": "tensorflow"}):
        assert environment.described(1)["variables"]["OMP_NUM_THREADS"] == "1"
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
                **{"shape": cases.parse_shape(subject)[0]},
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
        (
            "layers, train, graph, float32: torch / tfbn, geometric mean",
            pytest.approx(0.5),
            False,
        ),
        (f"layers, train, graph, float32: keras / tfbn, least ({first})", 4.0, True),
        # Eight passes are four in place, of 0.25 ms.
        (f"layers, train, graph, float32: tfbn / 8 passes over memory, {first}", 2.0, True),
    ]
    assert second not in found[2].name


def test_a_missed_bar_is_called_so():
    (line,) = [
        row
        for row in bars.summary(made_up(torch=[1.0, 1.0], tfbn=[2.0, 2.0])).splitlines()
        if "torch" in row
    ]
    assert line.endswith("| 0.50 | ≥ 1 | missed |")


def test_a_ratio_of_times_is_the_median_of_the_ratios_turn_by_turn():
    run = made_up(keras=[2.0, 2.0], tfbn=[1.0, 1.0])
    contenders_ = run["results"][0]["contenders"]
    contenders_["keras"]["turns"] = [2.0, 30.0, 9.0]  # The machine was slower for two turns,
    contenders_["tfbn"]["turns"] = [1.0, 10.0, 3.0]  # for both.
    first, second = cases.CPU_SHAPES[:2]
    assert results.ratios(run["results"], "keras", "tfbn") == {first: 3.0, second: 2.0}
    contenders_["keras"]["turns"].pop()  # It was ended, and has other turns.
    assert results.ratios(run["results"], "keras", "tfbn")[first] == 2.0


def test_a_bar_of_every_shape_sees_the_slowest_of_all():
    run = made_up(keras=[2.0, 2.0], tfbn=[1.0, 1.0])
    slow = {"subject": "32x64x56x56@1", "contenders": {"keras": {"ms": 1.0}, "tfbn": {"ms": 2.0}}}
    run["results"].append(run["results"][0] | slow)
    (bar,) = [bar for bar in bars.bars(run) if "least" in bar.name]
    assert (bar.measured, bar.wanted, bar.met) == (0.5, 0.97, False)


def test_a_contender_that_a_case_lacks_has_no_ratio_there():
    run = made_up(keras=[1.0, 1.0], tfbn=[2.0, 4.0])
    run["results"][0]["contenders"]["keras"] = {"failed": "it did"}
    assert results.ratios(run["results"], "keras", "tfbn") == {cases.CPU_SHAPES[1]: 0.25}


# The page of numbers


def test_the_tables_of_the_page_are_those_of_the_committed_results():
    text = page.PAGE.read_text()
    assert page.rendered(text) == text, "Run: python -m benchmarks.page"
    committed = {f"{page.RESULTS}/{path.name}" for path in (ROOT / page.RESULTS).glob("*.json")}
    shown = {name for _, name, _, _ in page.MARKED.findall(text)}
    linked = {f"{page.RESULTS}/{name}.json" for name in re.findall(r"\(results/(\w+)\.md\)", text)}
    assert shown | linked == committed


def test_a_table_of_the_page_is_generated_anew_from_the_json(run):
    found, path = run
    marked = f"before\n<!-- {path.name} -->\nold\n<!-- end of {path.name} -->\nafter\n"
    text = page.rendered(marked, path.parent)
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "old" not in text
    assert "| 6×8 |" in text
    assert page.rendered(text, path.parent) == text
    path.with_name("less.json").write_text(json.dumps(found | {"results": found["results"][:1]}))
    assert page.rendered(text.replace(path.name, "less.json"), path.parent) != text


def test_the_page_shows_what_users_have_beside_what_the_benchmark_has():
    run = made_up(keras=[2.0, 2.0], tfbn=[1.0, 1.0])
    again = {"suite": "layers, default malloc"}
    again["contenders"] = {"keras": {"ms": 9.0}, "tfbn": {"ms": 3.0}}
    run["results"].append(run["results"][0] | again)
    subject = cases.CPU_SHAPES[0].replace("x", "×")
    assert page._default_malloc(run).splitlines()[-1] == f"| {subject} | 9 | 3 | 3 | 2 |"


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


def test_by_default_few_run_under_xla_and_eagerly_and_who_is_named_runs_everywhere():
    chosen = command.selection(command.parse([]), on_gpu=False)
    for case in chosen:
        expected = {"graph": None}.get(case.mode, ("keras", "tfbn"))
        if case.suite == "models":
            expected = ("keras", "tf_keras", "tfbn")
        assert contenders.of(case, None) == expected
        assert contenders.of(case, ["torch"]) == ["torch"]


def test_a_run_of_everything_measures_again_with_the_default_malloc_settings():
    assert command.with_default_malloc(command.parse([]))
    for other in ("--quick", "layers", "--malloc default", "--contenders keras tfbn"):
        assert not command.with_default_malloc(command.parse(other.split()))
    again = cases.default_malloc_cases()
    everything = command.selection(command.parse([]), on_gpu=False)
    assert set(again) < set(everything)
    assert {case.subject for case in again} == {*cases.MALLOC_SHAPES, *cases.MODELS}


def test_what_a_gpu_is_for_ends_with_how_many_tests_passed_failed_and_were_skipped(tmp_path):
    (tmp_path / "test_some.py").write_text(
        "import pytest\n"
        "def test_passes(): pass\n"
        "def test_fails(): assert False\n"
        "@pytest.fixture\n"
        "def broken(): raise ValueError\n"
        "def test_errs(broken): pass\n"
        "@pytest.mark.skip\n"
        "def test_skipped(): pass\n"
    )
    arguments = [str(tmp_path), f"--rootdir={tmp_path}", "-p", "no:cacheprovider"]
    assert gpu.tested(arguments, tmp_path / "report.xml") == {
        "passed": 1,
        "failed": 2,
        "skipped": 1,
    }
    with pytest.raises(RuntimeError, match="exit code 4"):  # pytest's: it was called wrongly
        gpu.tested([*arguments, "--no-such-option"], tmp_path / "none.xml")
