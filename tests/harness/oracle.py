"""Batch normalization in float64 NumPy, written from the papers: what every test compares with.

Nothing here knows TensorFlow, Keras or tfbn. Clarity before speed: the forward pass is section 3 of
Ioffe and Szegedy (2015), the backward pass is the chain rule over it by hand, renorm is algorithm 1
of Ioffe (2017), and virtual batches are the ghost batches of Hoffer et al. (2017).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np


@dataclasses.dataclass
class Pass:
    """What one forward and backward pass gives."""

    y: np.ndarray
    dx: np.ndarray
    dgamma: np.ndarray
    dbeta: np.ndarray


def align(mask: np.ndarray, x: np.ndarray) -> np.ndarray:
    """A mask as a full boolean array of x's shape: lower ranks meet x's leading axes."""
    mask = np.asarray(mask, bool)
    mask = mask.reshape(mask.shape + (1,) * (x.ndim - mask.ndim))
    return np.broadcast_to(mask, x.shape)


class BatchNorm:
    """A batch-norm layer with its state.

    `state` maps the names that Keras gives the weights to float64 arrays of shape
    `tuple(shape[a] for a in sorted axes)`; set entries to start from elsewhere.

    `count_epsilon` is added to the number of unmasked values where the layer divides by it: 0 by
    the formulas; Keras's layer adds 1e-7 wherever there is a mask.
    """

    def __init__(
        self,
        shape: Sequence[int | None],
        axis: int | Sequence[int] = -1,
        *,
        momentum: float | None = 0.99,
        epsilon: float = 1e-3,
        virtual_batch_size: int | None = None,
        renorm: bool = False,
        renorm_clipping: dict[str, float] | None = None,
        renorm_momentum: float = 0.99,
        count_epsilon: float = 0.0,
    ) -> None:
        axes = [axis] if isinstance(axis, int) else list(axis)
        self.axes = sorted(a % len(shape) for a in axes)
        self.rank = len(shape)
        self.momentum = momentum
        self.epsilon = epsilon
        self.virtual_batch_size = virtual_batch_size
        self.renorm = renorm
        self.clipping = renorm_clipping or {}
        self.renorm_momentum = renorm_momentum
        self.count_epsilon = count_epsilon
        channels = [shape[a] for a in self.axes]
        self.updates = np.zeros(channels)  # type: ignore[arg-type]
        zeros, ones = np.zeros(channels), np.ones(channels)  # type: ignore[arg-type]
        self.state = {"gamma": ones, "beta": zeros, "moving_mean": zeros, "moving_variance": ones}
        if renorm:
            self.state |= {"moving_stddev": ones, "renorm_mean": zeros, "renorm_stddev": ones}

    def train(self, x: np.ndarray, dy: np.ndarray, mask: np.ndarray | None = None) -> Pass:
        """Training mode: normalizes with the batch's statistics and moves the moving ones."""
        x = np.asarray(x, np.float64)
        counts = np.ones(x.shape, bool) if mask is None else align(mask, x)
        groups = 1
        if self.virtual_batch_size is not None:
            groups = x.shape[0] // self.virtual_batch_size
        z = x.reshape(groups, -1, *x.shape[1:])
        dz = np.asarray(dy, np.float64).reshape(z.shape)
        m = counts.reshape(z.shape)
        over = self._reduced(z.ndim)
        gamma, beta = self._broadcast("gamma", z.ndim), self._broadcast("beta", z.ndim)

        # The statistics of each group and channel. A channel without values counts as 0, 0.
        values = m.sum(over, keepdims=True)
        n = np.where(values > 0, values + (self.count_epsilon if mask is not None else 0.0), 1.0)
        # In two parts: the rounding of the sum would show where the mean dominates.
        exact = np.where(values > 0, values, 1.0)
        first = np.where(m, z, 0.0).sum(over, keepdims=True) / exact
        rest = np.where(m, z - first, 0.0).sum(over, keepdims=True) / exact
        mean = (first + rest) * (exact / n)
        centred = (z - first) - rest + (first + rest) * (1 - exact / n)
        variance = np.where(m, centred**2, 0.0).sum(over, keepdims=True) / n
        stddev = np.sqrt(variance + self.epsilon)
        x_hat = centred / stddev

        # r and d are constants to the gradient.
        r, d = self._renorm_correction(mean, stddev) if self.renorm else (1.0, 0.0)
        corrected = x_hat * r + d
        y = gamma * corrected + beta

        # The chain rule, from the output to the input.
        dgamma = (dz * corrected).sum((0, *over))
        dbeta = dz.sum((0, *over))
        dx_hat = dz * gamma * r
        dvariance = (dx_hat * centred).sum(over, keepdims=True) * -0.5 / stddev**3
        dmean = -(dx_hat / stddev).sum(over, keepdims=True)
        dmean += dvariance * np.where(m, -2.0 * centred, 0.0).sum(over, keepdims=True) / n
        dx = dx_hat / stddev + np.where(m, dvariance * 2.0 * centred / n + dmean / n, 0.0)

        self._move(values, mean, variance)
        return Pass(y.reshape(x.shape), dx.reshape(x.shape), dgamma, dbeta)

    def infer(self, x: np.ndarray, dy: np.ndarray) -> Pass:
        """Inference mode: normalizes with the moving statistics, which are constants."""
        x, dy = np.asarray(x, np.float64), np.asarray(dy, np.float64)
        stddev = np.sqrt(self._broadcast("moving_variance", x.ndim) + self.epsilon)
        gamma = self._broadcast("gamma", x.ndim)
        x_hat = (x - self._broadcast("moving_mean", x.ndim)) / stddev
        over = self._reduced(x.ndim)
        return Pass(
            y=gamma * x_hat + self._broadcast("beta", x.ndim),
            dx=dy * gamma / stddev,
            dgamma=(dy * x_hat).sum(over),
            dbeta=dy.sum(over),
        )

    def _channel_axes(self, rank: int) -> list[int]:
        return [a + rank - self.rank for a in self.axes]  # a leading axis of groups shifts them

    def _reduced(self, rank: int) -> tuple[int, ...]:
        return tuple(a for a in range(rank - self.rank, rank) if a not in self._channel_axes(rank))

    def _broadcast(self, name: str, rank: int) -> np.ndarray:
        shape = [1] * rank
        for a, size in zip(self._channel_axes(rank), self.state[name].shape, strict=True):
            shape[a] = size
        return self.state[name].reshape(shape)

    def _renorm_correction(
        self, mean: np.ndarray, stddev: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        # Keras's reading of the paper: the batch's standard deviation holds epsilon, and the
        # running one is kept from falling below sqrt(epsilon).
        running = np.maximum(self._broadcast("renorm_stddev", mean.ndim), np.sqrt(self.epsilon))
        r = stddev / running
        d = (mean - self._broadcast("renorm_mean", mean.ndim)) / running
        dmax = self.clipping.get("dmax", np.inf)
        r = np.clip(r, self.clipping.get("rmin", 0.0), self.clipping.get("rmax", np.inf))
        return r, np.clip(d, -dmax, dmax)

    def _move(self, values: np.ndarray, mean: np.ndarray, variance: np.ndarray) -> None:
        if values.sum() == 0 or not (np.isfinite(mean).all() and np.isfinite(variance).all()):
            return
        # The average over the groups, each with the weight of its values.
        total = values.sum(0)
        weight = values / np.maximum(total, 1)
        shape = self.state["moving_mean"].shape
        any_value = (total > 0).reshape(shape)
        mean, variance = (weight * mean).sum(0), (weight * variance).sum(0)
        mean, variance = mean.reshape(shape), variance.reshape(shape)
        stddev = np.sqrt(variance + self.epsilon)
        keep = self.updates / (self.updates + 1) if self.momentum is None else self.momentum
        self.updates = self.updates + any_value

        def step(name: str, new: np.ndarray, keep: float) -> None:
            old = self.state[name]
            self.state[name] = np.where(any_value, old * keep + new * (1.0 - keep), old)

        step("moving_mean", mean, keep)
        if not self.renorm:
            step("moving_variance", variance, keep)
            return
        step("renorm_mean", mean, self.renorm_momentum)
        step("renorm_stddev", stddev, self.renorm_momentum)
        step("moving_stddev", stddev, keep)
        moved = np.maximum(self.state["moving_stddev"] ** 2 - self.epsilon, 0.0)
        self.state["moving_variance"] = np.where(any_value, moved, self.state["moving_variance"])
