"""The process of one contender: does what the parent asks for, one thing at a time."""

import gc
import os
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.program import LeftOut


def serve(connection: Connection, name: str, threads: int, messages: str) -> None:
    """Answers requests until the parent hangs up.

    A request is (verb, argument), an answer ("done", value), ("left out", why) or ("failed", why).
    The first answer comes unasked and says on what device this contender runs, or why it does not.
    """
    with Path(messages).open("ab") as file:
        os.dup2(file.fileno(), 2)
    from benchmarks import contenders

    try:
        contender = contenders.load(name)
        _limit_threads(name, threads)
    except LeftOut as reason:
        connection.send(("left out", str(reason)))
        return
    connection.send(("done", _device()))
    program: Any = None
    while True:
        try:
            verb, argument = connection.recv()
        except EOFError:
            return
        try:
            if verb == "start":
                program = None
                gc.collect()
                case, warm_seconds = argument
                program = contender.program(case)
                answer = program.start(warm_seconds)
            elif verb == "memory":
                answer = program.memory()
            else:
                answer = program.turn(argument)
            connection.send(("done", answer))
        except LeftOut as reason:
            connection.send(("left out", str(reason)))
        except Exception as error:
            traceback.print_exc()
            lines = str(error).strip().splitlines() or [""]
            connection.send(("failed", f"{type(error).__name__}: {lines[0]}"))


def _limit_threads(name: str, threads: int) -> None:
    if name == "torch":
        import torch

        torch.set_num_threads(threads)
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(threads)
    tf.config.threading.set_inter_op_parallelism_threads(threads)


def _device() -> dict[str, Any]:
    import tensorflow as tf

    gpus = tf.config.list_physical_devices("GPU")
    if not gpus:
        return {"device": "cpu"}
    details = tf.config.experimental.get_device_details(gpus[0])
    return {"device": "gpu", "gpu": details.get("device_name", "unknown"), "gpus": len(gpus)}
