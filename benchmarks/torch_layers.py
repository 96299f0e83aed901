"""A stack of PyTorch layers, channels last in memory if the case has them last."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from benchmarks import data, memory
from benchmarks.cases import LayerCase
from benchmarks.program import Program, some

LAYERS = {
    2: torch.nn.BatchNorm1d,
    3: torch.nn.BatchNorm1d,
    4: torch.nn.BatchNorm2d,
    5: torch.nn.BatchNorm3d,
}


def program(case: LayerCase) -> Program:
    """Trains, or infers with, a stack of ``torch.nn.BatchNorm*d``, eagerly.

    Most PyTorch code runs eagerly, and on a CPU its compiler made these stacks slower.
    """
    place = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, case.precision)
    there, back = _layout(case)
    x, dy = (there(torch.from_numpy(t).to(place, dtype)) for t in data.tensors(case))
    layers = []
    for weights in data.parameters(case):
        # PyTorch's momentum is the weight of the new value, Keras's of the old one.
        layer = LAYERS[x.ndim](x.shape[1], eps=data.EPSILON, momentum=1 - data.MOMENTUM)
        layer.load_state_dict(
            {
                "weight": torch.from_numpy(weights.gamma),
                "bias": torch.from_numpy(weights.beta),
                "running_mean": torch.from_numpy(weights.moving_mean),
                "running_var": torch.from_numpy(weights.moving_variance),
            },
            strict=False,
        )
        layers.append(layer.to(place).train(case.phase == "train"))
    model = torch.nn.Sequential(*layers)
    x.requires_grad_(case.phase == "train")
    inputs = [x, *(p for layer in layers for p in (layer.weight, layer.bias))]

    def train() -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        y = model(x)
        return y, torch.autograd.grad(y, inputs, dy)

    @torch.inference_mode()
    def infer() -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        return model(x), ()

    def values(result: tuple[torch.Tensor, tuple[torch.Tensor, ...]]) -> dict[str, np.ndarray]:
        y, gradients = result
        found: dict[str, Any] = {"y": back(y)}
        if gradients:
            found.update(
                dx=back(gradients[0]),
                dgamma=gradients[-2],
                dbeta=gradients[-1],
                mean=layers[-1].running_mean,
            )
        return {name: some(v.detach().float().cpu().numpy()) for name, v in found.items()}

    def peak(run: Callable[[], Any]) -> float:
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated() / memory.MEGABYTE

    return Program(
        step=train if case.phase == "train" else infer,
        wait=torch.cuda.synchronize if place.type == "cuda" else lambda: None,
        values=values,
        parts=len(layers),
        device="gpu" if place.type == "cuda" else "cpu",
        peak=peak if place.type == "cuda" else None,
    )


def _layout(case: LayerCase) -> tuple[Callable, Callable]:
    """Converts to PyTorch's order of axes, channels second, and back, without moving data."""
    rank = len(case.shape)
    if case.axis == 1:
        return lambda t: t, lambda t: t
    if case.axis != rank - 1:
        raise ValueError(f"PyTorch has its channels second or last. Received: axis {case.axis}")
    if rank == 3:
        # (batch, time, channels) is fastest as a table of examples by channels.
        return lambda t: t.reshape(-1, t.shape[-1]), lambda t: t.reshape(case.shape)
    return lambda t: t.movedim(-1, 1), lambda t: t.movedim(1, -1)
