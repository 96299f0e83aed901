"""Moving statistics across replicas: one update for all layers of a step."""

from collections.abc import Sequence

from tfbn._models.walk import BatchNormLayer
from tfbn._moments import replicas
from tfbn._moments.moments import Moments


def update_statistics(collected: Sequence[tuple[BatchNormLayer, Moments]]) -> None:
    """Updates the moving statistics of all layers, with one all-reduce for all of them.

    Args:
        collected: Each call's layer and its moments on this replica. A synchronized layer's moments are
            those of all replicas already.
    """
    local = [moments for layer, moments in collected if not layer.synchronized]
    averaged = iter(replicas.all_reduce_mean(local) if local else ())
    for layer, moments in collected:
        layer.update_statistics(moments if layer.synchronized else next(averaged))
