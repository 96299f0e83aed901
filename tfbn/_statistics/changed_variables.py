"""The variables that a graph changes: the seeds of random layers, the states of recurrent layers, counters."""

from collections.abc import Container, Iterator, Mapping
from typing import Any, NamedTuple

WRITES = ("Assign", "ResourceScatter", "ResourceStridedSliceAssign", "Rng")
"""What the types of operations begin with that change a variable, which is their first input."""
SELECTORS = {"If": 1, "StatelessIf": 1, "Case": 1, "StatelessCase": 1}
"""How many inputs of an operation choose a function. The others are the arguments of the function."""


class ChangedVariables(NamedTuple):
    """The uses of the variables that change, as names of operations. A variable is called by its handle.

    Attributes:
        users: For each operation that reads or changes such variables, which.
        writers: For each variable, the operations that change it.
    """

    users: dict[str, set[str]]
    writers: dict[str, list[str]]

    @classmethod
    def of(cls, definition: Any, captured: Container[str]) -> "ChangedVariables":
        """Finds them among the captured tensors of a `GraphDef`."""
        functions = {function.signature.name: function for function in definition.library.function}
        users: dict[str, set[str]] = {}
        writers: dict[str, list[str]] = {}
        for node in definition.node:
            changed = _changed_inputs(node, functions)
            for number, name in enumerate(node.input):
                handle = name if ":" in name else f"{name}:0"
                if handle not in captured:
                    continue
                users.setdefault(node.name, set()).add(handle)
                if number in changed:
                    writers.setdefault(handle, []).append(node.name)
        used = {name: handles & writers.keys() for name, handles in users.items()}
        return cls({name: handles for name, handles in used.items() if handles}, writers)


def _changed_inputs(node: Any, functions: Mapping[str, Any]) -> set[int]:
    """The inputs of an operation that are variables which it changes, itself or in its branches and loops."""
    if node.op.startswith(WRITES):
        return {0}
    found = set()
    for function in _functions_of(node, functions):
        arguments = [argument.name for argument in function.signature.input_arg]
        for inner in function.node_def:
            changed = {inner.input[number] for number in _changed_inputs(inner, functions)}
            found |= {arguments.index(name) for name in changed.intersection(arguments)}
    return {SELECTORS.get(node.op, 0) + number for number in found}


def _functions_of(node: Any, functions: Mapping[str, Any]) -> Iterator[Any]:
    for value in node.attr.values():
        for function in [value.func, *value.list.func]:
            if function.name in functions:
                yield functions[function.name]
