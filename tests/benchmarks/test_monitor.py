"""The benchmark of the monitor, on its smallest network."""

import pytest

monitor = pytest.importorskip("benchmarks.monitor")


@pytest.mark.filterwarnings("ignore:.*lagging_statistics")
def test_it_counts_records_and_says_what_they_cost(monkeypatch):
    line = monitor.line("tiny", *monitor.measured("tiny", 3, 2, warm_up=1))
    assert line.startswith("tiny: a step takes ")
    assert line.endswith(" % of the training")
