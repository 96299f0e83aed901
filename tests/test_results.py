"""What public functions return and raise is public: its classes, its fields, how it shows itself."""

import json

import keras
import numpy as np
import pytest

import tfbn

X = np.random.default_rng(0).normal(3.0, 2.0, (32, 4)).astype("float32")


@pytest.fixture(scope="module")
def model() -> keras.Model:
    keras.utils.set_random_seed(0)
    layers = [keras.Input((4,)), keras.layers.Dense(3), tfbn.BatchNormalization()]
    return keras.Sequential([*layers, keras.layers.Dense(1)])


@pytest.fixture(scope="module")
def results(model) -> dict[str, object]:
    return {
        "diagnosis": tfbn.diagnose(model, X, batch_size=8),
        "recalibration": tfbn.recalibrate(keras.models.clone_model(model), X, batch_size=8),
        "fold report": tfbn.fold(model).report,
    }


def test_results_and_what_they_hold_are_of_public_classes(results):
    diagnosis, recalibration = results["diagnosis"], results["recalibration"]
    assert type(diagnosis) is tfbn.Diagnosis
    assert {type(finding) for finding in diagnosis.findings} == {tfbn.Finding}
    assert {type(layer) for layer in diagnosis.layers} == {tfbn.LayerEvidence}
    assert type(recalibration) is tfbn.Recalibration
    assert {type(change) for change in recalibration.layers} == {tfbn.LayerChange}
    assert type(results["fold report"]) is tfbn.FoldReport
    assert {type(row) for row in results["fold report"].rows} == {tfbn.FoldedCall}


@pytest.mark.parametrize("name", ["diagnosis", "recalibration", "fold report"])
def test_results_show_themselves_in_a_terminal_in_a_notebook_and_as_json(results, name):
    result = results[name]
    assert "sequential" in str(result) or "batch_normalization" in str(result)
    assert "|" in result._repr_markdown_()
    json.dumps(result.to_dict(), allow_nan=False)


def test_errors_are_of_public_classes(model, tmp_path):
    with pytest.raises(tfbn.NotFiniteError):
        tfbn.recalibrate(keras.models.clone_model(model), np.full_like(X, np.nan))
    with pytest.raises(tfbn.FoldError):
        tfbn.fold(model, X, tolerance=0)
    with pytest.raises((tfbn.ExportError, tfbn.FoldError)):
        tfbn.export(model, tmp_path / "served", inputs=X, tolerance=0)


def test_moments_of_several_batches_can_update_a_layer():
    layer = tfbn.BatchNormalization(momentum=0.5)
    layer.build((None, 2))
    layer.update_statistics(tfbn.Moments(10.0, [2.0, 4.0], [1.0, 3.0]))
    np.testing.assert_allclose(layer.moving_mean, [1.0, 2.0])
    np.testing.assert_allclose(layer.moving_variance, [1.0, 2.0])
