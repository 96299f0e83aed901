"""The networks of keras.applications are converted, folded and fused as docs/applications.md has it."""

import json

import keras
import pytest

from benchmarks import application_models, applications

RUN = json.loads(applications.RESULTS.read_text())
RESULTS = {result["network"]: result for result in RUN["results"]}
NORMALIZED = [name for name in RESULTS if RESULTS[name]["layers"]]


def test_the_page_is_that_of_the_committed_results():
    assert applications.PAGE.read_text() == applications.page(RUN), "see benchmarks/applications.py"


@pytest.mark.parametrize("name", RESULTS)
def test_each_network_keeps_its_outputs_and_what_is_left_is_explained(name):
    result = RESULTS[name]
    assert result["identical"]
    assert result["directly_behind_left"] == result["unchanged"] == 0
    left = result["layers"] - result["folded"]
    assert left == result["multiply_add"] == len(result["left"])
    assert all(row["reason"] for row in result["left"])


@pytest.mark.parametrize("name", NORMALIZED)
def test_what_folding_changes_is_rounding(name):
    result = RESULTS[name]
    assert result["difference_in_float64"] <= 1e-6 * result["difference"]
    assert result["difference"] <= max(applications.BAR, 2 * result["rounding"])
    assert result["rounding_folded"] <= 2 * result["rounding"]


@pytest.mark.parametrize("name", NORMALIZED)
def test_each_layer_directly_behind_a_linear_one_is_fused_and_comes_back(name):
    result = RESULTS[name]
    assert result["fused_as_expected"]
    assert result["unfused"]
    assert result["fused"] == result["directly_behind"]
    assert result["fused_difference_in_float64"] <= 1e-6 * result["fused_difference"]
    assert result["fused_difference"] <= max(applications.BAR, 2 * result["rounding"])


@pytest.mark.parametrize("name", NORMALIZED)
def test_recalibration_is_a_step_on_one_large_batch(name):
    assert RESULTS[name]["recalibrated_difference_in_float64"] <= 1e-9
    # In float32, what the layers before make of rounding adds up.
    assert RESULTS[name]["recalibrated_difference"] <= 1e-2


@pytest.mark.slow
def test_a_network_is_recalibrated_as_it_was():
    found = application_models.recalibrated("MobileNetV3Small", size=72)
    assert found["recalibrated_difference_in_float64"] <= 1e-9
    assert found["recalibrated_difference"] <= 1e-3


def test_no_network_is_missing():
    if keras.__version__ == RUN["versions"]["Keras"]:  # Another one may have others.
        assert sorted(RESULTS) == applications.names()


@pytest.mark.parametrize(
    "name", ["MobileNetV2", pytest.param("ResNet50V2", marks=pytest.mark.slow)]
)
def test_a_network_comes_out_as_it_did(name):
    keras.utils.clear_session()  # Keras numbers layers without a name through the whole process.
    result = application_models.measured(name, size=72)
    keys = ["layers", "directly_behind", "directly_behind_left", "identical", "folded", "left"]
    keys += ["fused", "fused_as_expected", "unfused"]
    assert {key: result[key] for key in keys} == {key: RESULTS[name][key] for key in keys}
    assert result["difference"] <= applications.BAR
    assert result["fused_difference"] <= applications.BAR
    assert result["converted_difference"] <= applications.BAR
    assert result["difference_in_float64"] <= 1e-6 * result["difference"]
    assert keras.config.floatx() == keras.config.dtype_policy().name == "float32"


def test_a_layer_directly_behind_is_one_that_alone_takes_the_output_of_a_linear_layer():
    x = keras.Input((8, 8, 3))
    conv, norm = keras.layers.Conv2D, keras.layers.BatchNormalization
    linear, curved = conv(4, 3, name="linear")(x), conv(4, 3, activation="relu")(x)
    shared = conv(4, 3)(x)
    outputs = [norm(name="yes")(linear), norm()(curved), norm()(shared), shared * 2.0, norm()(x)]
    assert application_models.directly_behind(keras.Model(x, outputs)) == {"yes"}
