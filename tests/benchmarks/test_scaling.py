"""The scaling benchmark: it counts what it says, its model is the one that it writes down, its page is its JSON's."""

from pathlib import Path

import pytest

from benchmarks import results, scaling

COMMITTED = Path(scaling.__file__).parent / "results"


def test_a_run_counts_the_collectives_of_each_kind(tmp_path, capsys):
    arguments = [
        "--replicas",
        "2",
        "--turns",
        "1",
        "--depth",
        "2",
        "--shape",
        "4",
        "2",
        "2",
        "3",
        "--output",
    ]
    scaling.main([*arguments, str(tmp_path)])
    (result,) = results.load(tmp_path / "scaling.json")["results"]
    counted = {kind: seen["collectives"] for kind, seen in result["contenders"].items()}
    assert counted == {
        "tfbn": 2,
        "tfbn synchronized": 4,
        "keras": 0,
        "keras synchronized": 10,
    }
    page = (tmp_path / "scaling.md").read_text()
    assert scaling.model_table() in page
    assert capsys.readouterr().out.strip().endswith(page.split("\n\n")[4])


def test_the_committed_page_is_that_of_the_committed_numbers():
    run = results.load(COMMITTED / "scaling.json")
    assert (COMMITTED / "scaling.md").read_text() == scaling.document(run)


def test_the_model_is_that_of_a_ring_or_a_tree():
    latency, bandwidth = 1e-3, 1e6
    assert scaling.all_reduce(1e6, 1, latency, bandwidth) == 0
    # Few bytes: the tree's 2·3 messages beat the ring's 2·7. Many: the ring sends each byte about twice.
    assert scaling.all_reduce(0, 8, latency, bandwidth) == pytest.approx(6e-3)
    assert scaling.all_reduce(8e6, 8, latency, bandwidth) == pytest.approx(14e-3 + 14)


def test_resnet50_has_53_layers_and_their_channels():
    import keras

    model = keras.applications.ResNet50(weights=None)
    norms = [x for x in model.layers if isinstance(x, keras.layers.BatchNormalization)]
    assert sorted(x.gamma.shape[0] for x in norms) == sorted(scaling.RESNET50)
    trainable = sum(v.value.shape.num_elements() for v in model.trainable_variables)
    assert abs(trainable - scaling.RESNET50_WEIGHTS) < 0.01 * trainable


def test_synchronized_forward_sends_rows_for_few_replicas_and_two_vectors_for_many():
    few, many = (scaling.seconds("tfbn synchronized", [100], n, 0, 4.0) for n in (16, 32))

    def sent(numbers: int, replicas: int) -> float:
        return 2 * numbers * (replicas - 1) / replicas

    assert few == pytest.approx(sent(16 * 301, 16) + sent(200, 16))
    assert many == pytest.approx(sent(101, 32) + sent(200, 32) + sent(200, 32))
