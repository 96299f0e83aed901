"""When each operation of a graph can run, if it is cut at calls of which the outputs are found one after the other."""

from collections.abc import Container, Iterable, Mapping, Sequence

from tfbn._statistics.changed_variables import ChangedVariables


def find_stages(
    inputs: Mapping[str, Sequence[str]],
    order: Mapping[str, Sequence[str]],
    batch: Iterable[str],
    cuts: Container[str],
    changed: ChangedVariables,
) -> dict[str, int]:
    """Stage 0 needs the data alone, and stage n outputs of cuts of stage n-1.

    What does not depend on the data has no stage, but for the uses of variables that change. Such a variable is
    read in the stage in which it is updated, unless the update depends on what is read through a cut.

    Args:
        inputs: The tensors that each operation reads, in the order of the graph.
        order: The other operations that must run before each operation: its control inputs.
        batch: The tensors of the data.
        cuts: The operations that are cut off: their outputs belong to the next stage.
        changed: The variables that change.
    """
    users = changed.users

    def starting(first: Mapping[str, int]) -> dict[str, int]:
        """The stages if each variable is not used before the stage that is given for it."""
        stages = {op_of(tensor): 0 for tensor in batch}
        for op, tensors in inputs.items():
            before = [stages[op_of(t)] for t in tensors if op_of(t) in stages]
            if op in users:  # Their order matters.
                before += [first[handle] for handle in users[op]]
                before += [stages.get(other, 0) for other in order[op]]
            if op in cuts:
                stages[op] = 1 + max(before, default=0)
            elif before:
                stages[op] = max(before)
        return stages

    def updated(stages: Mapping[str, int]) -> dict[str, int]:
        return {handle: max(stages[op] for op in ops) for handle, ops in changed.writers.items()}

    earliest = starting(dict.fromkeys(changed.writers, 0))
    if not users:
        return earliest
    stages = starting(updated(earliest))
    return stages if updated(stages) == updated(earliest) else earliest


def op_of(tensor: str) -> str:
    """The name of the operation that computes a tensor."""
    return tensor.split(":")[0]
