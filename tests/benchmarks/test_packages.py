"""Every tool works on models of other packages, or refuses for a stated reason, as docs/packages.md has it."""

import json

import pytest

from benchmarks import package_models, packages

RUN = json.loads(packages.RESULTS.read_text())
RESULTS = {result["network"]: result for result in RUN["results"]}


def test_the_page_is_that_of_the_committed_results():
    assert packages.PAGE.read_text() == packages.page(RUN), "see benchmarks/packages.py"


def test_no_model_is_missing():
    assert sorted([*RESULTS, *RUN["not_run"]]) == sorted(package_models.makers())


@pytest.mark.parametrize("name", [name for name in RESULTS if "layers" in RESULTS[name]])
def test_no_tool_did_something_wrong(name):
    for tool in packages.TOOLS:
        found = RESULTS[name][tool]
        assert "wrong" not in found
        rounding = packages.AMPLIFIED.get(name, 0)
        assert found.get("difference", 0) <= max(1e-4, 2 * rounding)
