"""Recalibration under a tf.distribute strategy pools over its replicas."""

import pytest

from replica_recalibration import LAWS
from replicas import run_processes

PROGRAM = "replica_recalibration.py"


@pytest.mark.timeout(250)
@pytest.mark.parametrize("law", LAWS)
def test_on_two_devices(law):
    run_processes(PROGRAM, [[law]])
