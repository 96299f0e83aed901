"""Recalibration under a tf.distribute strategy pools over its replicas."""

import json

import pytest

from replica_recalibration import LAWS
from replicas import run_processes

pytestmark = pytest.mark.timeout(250)


@pytest.fixture(scope="module")
def failures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    output = tmp_path_factory.mktemp("devices") / "failures.json"
    run_processes("replica_recalibration.py", [[str(output)]])
    return json.loads(output.read_text())


@pytest.mark.parametrize("law", LAWS)
def test_on_two_devices(law, failures):
    assert not failures[law], failures[law]
