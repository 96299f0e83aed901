"""Recalibration under a tf.distribute strategy pools over its replicas."""

import pytest

from replicas import run_processes

PROGRAM = "replica_recalibration.py"


@pytest.mark.timeout(250)
def test_two_devices_give_the_statistics_of_all_data():
    run_processes(PROGRAM, [[]])
