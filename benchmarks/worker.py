"""The process of a contender: answers requests of the parent one at a time."""

import gc
import os
import sys
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.program import LeftOut


def serve(connection: Connection, name: str, threads: int, messages: str) -> None:
    """Answers requests until the parent closes the connection.

    A request is (verb, argument), an answer ("done", value), ("left out", why) or ("failed", why).
    The first answer comes without a request: the device of the contender, or why it does not run.
    """
    with Path(messages).open("ab") as file:
        os.dup2(file.fileno(), 2)
    from benchmarks import contenders

    sys.path.insert(0, str(contenders.root(name)))
    try:
        contender = contenders.load(name)
        contender.limit_threads(threads)
    except LeftOut as reason:
        connection.send(("left out", str(reason)))
        return
    connection.send(("done", contender.device()))
    program: Any = None
    answer: Any
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
