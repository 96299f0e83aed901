"""Clusters of worker processes: on this machine, and in a Slurm job. Needs no TensorFlow."""

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Mapping


def start_workers(number: int) -> int:
    """Runs this command once per worker. When one of them fails, ends the others."""
    cluster = {"worker": [f"127.0.0.1:{port}" for port in free_ports(number)]}
    with contextlib.ExitStack() as ending:
        workers = []
        for index in range(number):
            process = subprocess.Popen(
                [sys.executable, *sys.argv],
                env={**os.environ, "TF_CONFIG": tf_config(cluster["worker"], index)},
            )
            ending.callback(process.wait)
            ending.callback(process.kill)  # runs before the wait
            workers.append(process)
        while any(process.poll() is None for process in workers):
            if any(process.poll() for process in workers):
                return 1
            time.sleep(0.1)
        return max(abs(process.returncode) for process in workers)


def free_ports(number: int) -> list[int]:
    """Returns different ports on which nobody was listening just now."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def tf_config(addresses: list[str], index: int) -> str:
    """Returns the value of TF_CONFIG for one worker."""
    task = {"type": "worker", "index": index}
    return json.dumps({"cluster": {"worker": addresses}, "task": task})


def slurm_settings(environment: Mapping[str, str]) -> dict[str, str]:
    """Translates the environment of a Slurm task to TF_CONFIG and, if it has GPUs, CUDA_VISIBLE_DEVICES.

    `tf.distribute.cluster_resolver.SlurmClusterResolver` asks `nvidia-smi` for the number of GPUs, so it fails on
    nodes without one. It uses the same ports for every job on a node, and orders nodes by the alphabet, where
    Slurm puts n9 before n10.
    """
    if "SLURM_STEP_NODELIST" not in environment:
        sys.exit("error: --slurm runs as a task of a Slurm job: srun python ... --slurm")
    hosts = _hosts(environment["SLURM_STEP_NODELIST"])
    tasks = _tasks_per_node(environment["SLURM_STEP_TASKS_PER_NODE"])
    distribution = environment.get("SLURM_DISTRIBUTION", "block")
    if len(hosts) > 1 and not distribution.startswith("block"):
        sys.exit(
            "error: consecutive tasks must be on the same node: srun --distribution=block. "
            f"Received: --distribution={distribution}."
        )
    # Jobs that share a node need different ports. These are below those that systems hand out to clients.
    step = int(environment["SLURM_JOB_ID"]) + int(environment["SLURM_STEP_ID"])
    first_port = 12_000 + 100 * (step % 200)
    addresses = [
        f"{host}:{first_port + local}"
        for host, number in zip(hosts, tasks, strict=True)
        for local in range(number)
    ]
    settings = {"TF_CONFIG": tf_config(addresses, int(environment["SLURM_PROCID"]))}
    return settings | _own_gpus(environment, tasks[int(environment["SLURM_NODEID"])])


def _hosts(nodelist: str) -> list[str]:
    """Expands a list such as ``n[9-11],m5``, in the order of the tasks."""
    done = subprocess.run(
        ["scontrol", "show", "hostnames", nodelist], capture_output=True, text=True, check=True
    )
    return done.stdout.split()


def _tasks_per_node(expression: str) -> list[int]:
    """Expands an expression such as ``2(x3),1``."""
    counts = []
    for part in expression.split(","):
        number, repeats = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part).groups()
        counts += [int(number)] * int(repeats or 1)
    return counts


def _own_gpus(environment: Mapping[str, str], tasks: int) -> dict[str, str]:
    """Divides the GPUs that this task sees among the tasks of its node, unless Slurm has done so."""
    listed = environment.get("CUDA_VISIBLE_DEVICES", "").split(",")
    visible = [gpu for gpu in listed if gpu not in ("", "NoDevFiles")]
    bound_by_slurm = "SLURM_GPUS_PER_TASK" in environment or "SLURM_GPU_BIND" in environment
    if not visible or tasks == 1 or bound_by_slurm:
        return {}
    if len(visible) % tasks:
        sys.exit(
            "error: the GPUs of a node must be divisible by its tasks: srun --gpus-per-task=1. "
            f"Received: {len(visible)} GPUs for {tasks} tasks."
        )
    own = len(visible) // tasks
    first = own * int(environment["SLURM_LOCALID"])
    return {"CUDA_VISIBLE_DEVICES": ",".join(visible[first : first + own])}
