"""The variables that a graph changes: the seeds of random layers, the states of recurrent layers, counters."""

from collections.abc import Container
from typing import NamedTuple

import tensorflow as tf

WRITES = ("Assign", "ResourceScatter", "ResourceStridedSliceAssign", "Rng")
"""What the types of operations begin with that change a variable."""


class ChangedVariables(NamedTuple):
    """The uses of the variables that change, as names of operations. A variable is called by its handle.

    Attributes:
        readers: For each operation that reads such a variable, which.
        writers: For each variable, the operations that change it.
    """

    readers: dict[str, str]
    writers: dict[str, list[str]]

    @classmethod
    def of(cls, graph: tf.Graph, captured: Container[str]) -> "ChangedVariables":
        """Finds them among the captured tensors of a graph."""
        readers: dict[str, str] = {}
        writers: dict[str, list[str]] = {}
        for operation in graph.get_operations():
            for handle in {x.name for x in operation.inputs if x.dtype == tf.resource}:
                if handle not in captured:
                    continue
                if operation.type.startswith(WRITES):
                    writers.setdefault(handle, []).append(operation.name)
                else:
                    readers[operation.name] = handle
        return cls({op: h for op, h in readers.items() if h in writers}, writers)

    def users(self) -> dict[str, str]:
        """The variable that each operation reads or changes."""
        return self.readers | {op: handle for handle, ops in self.writers.items() for op in ops}
