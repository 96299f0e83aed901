"""The curves: what is read from the measurements is what they were made of, and a small run has every part."""

from pathlib import Path

import pytest

from benchmarks import curves, results, scaling


def made_up():
    """A run whose times follow the models exactly."""
    replicas, latency, bandwidth = 8, 2e-4, 5e8
    times = {n: 1e3 * scaling.all_reduce(4 * n, replicas, latency, bandwidth) for n in curves.SIZES}
    return {
        "settings": {"processes": replicas},
        "by_values": [
            {"channels": 64, "values": 2**k, "tfbn": 0.25 + 2e-6 * 2**k, "keras": 0.5 + 8e-6 * 2**k}
            for k in range(10, 22, 2)
        ],
        "all_reduces": {"by_size": {str(n): time for n, time in times.items()}},
    }


def test_the_price_of_a_call_and_the_rate_are_those_of_the_line():
    assert curves.price_of_a_call(made_up(), "tfbn", 64) == pytest.approx((0.25, 2e-6))
    assert curves.price_of_a_call(made_up(), "keras", 64) == pytest.approx((0.5, 8e-6))


def test_latency_and_bandwidth_are_those_of_the_network():
    assert curves.latency_and_bandwidth(made_up()) == pytest.approx((2e-4, 5e8), rel=0.01)


def test_a_resnet50_sums_the_means_and_variances_of_all_its_channels_either_way():
    each, all_at_once = curves.RESNET50.values()
    assert len(each) == 53
    assert [sum(each)] == all_at_once
    assert sum(each) == 2 * 26560 + 53


def test_the_committed_page_is_that_of_the_committed_numbers():
    folder = Path(curves.__file__).parent / "results"
    assert (folder / "curves.md").read_text() == curves.document(
        results.load(folder / "curves.json")
    )


@pytest.mark.parametrize(("processes", "cores", "paragraphs"), [(2, 2, 0), (8, 2, 1)])
def test_processes_that_share_cores_are_said_to(processes, cores, paragraphs):
    assert len(curves.shared_cores(processes, cores)) == paragraphs


def test_a_run_of_two_processes_has_every_part(tmp_path):
    arguments = "--processes 2 --turns 1 --largest 14 --depths 1 2 --threads 1 --output"
    curves.main([*arguments.split(), str(tmp_path)])
    run = results.load(tmp_path / "curves.json")
    assert [point["layers"] for point in run["by_layers"]] == [1, 2]
    assert {point["channels"] for point in run["by_values"]} == set(curves.CHANNELS)
    assert all(time > 0 for time in run["all_reduces"]["resnet50"].values())
    assert (tmp_path / "curves.md").read_text() == curves.document(run)
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
