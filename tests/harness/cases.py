"""The one table of cases that feeds the tests of the layer.

A case says how a layer is built, what it is fed and how it is run. The full product of the factors
has some 40,000 of them: `table(strength)` takes a fixed few in which every pair (strength 2) or
every triple (strength 3) of values still meets.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import random
import zlib
from typing import Any

import numpy as np

LAYOUTS: list[tuple[tuple[int, ...], int | list[int]]] = [  # shape without the batch, axis
    ((5,), -1),
    ((5,), 1),
    ((6, 4), -1),
    ((4, 6), 1),
    ((4, 6), [1, 2]),
    ((3, 4, 5), -1),
    ((5, 3, 4), 1),
    ((3, 5, 4), 2),
    ((3, 4, 5), [-1, 1]),
    ((2, 2, 9, 3), -1),  # rows long enough for the fused kernel to take them as such
    ((4, 3, 2, 2), 1),
    ((2, 3, 4, 2), -2),
    ((4, 2, 3, 2), [1, 3]),
]
DTYPES = ["float32", "float64", "float16", "bfloat16"]
AFFINE = [(True, True), (True, False), (False, True), (False, False)]  # center, scale
MASKS = [None, "examples", "steps", "positions", "elements"]
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "renorm": {"renorm": True, "renorm_momentum": 0.8},
    "clipped": {
        "renorm": True,
        "renorm_clipping": {"rmin": 0.7, "rmax": 1.2, "dmax": 0.3},
        "renorm_momentum": 0.8,
    },
    "virtual": {"virtual_batch_size": 8},
    "cumulative": {"momentum": None},
}
MODES = ["eager", "graph", "xla"]
FACTORS: dict[str, list[Any]] = {
    "layout": LAYOUTS,
    "dtype": DTYPES,
    "affine": AFFINE,
    "mask": MASKS,
    "variant": list(VARIANTS),
    "mode": MODES,
    "unknown_batch": [False, True],
}


@dataclasses.dataclass
class Batch:
    """One batch, its mask, and the gradient that arrives at the layer's output (float64)."""

    x: np.ndarray
    dy: np.ndarray
    mask: np.ndarray | None


@dataclasses.dataclass(frozen=True)
class Case:
    """How a layer is built, what it is fed, and how it is run."""

    layout: tuple[tuple[int, ...], Any]
    dtype: str = "float32"
    affine: tuple[bool, bool] = (True, True)
    mask: str | None = None
    variant: str = "plain"
    mode: str = "eager"
    unknown_batch: bool = False

    def __str__(self) -> str:
        shape, axis = self.layout
        center, scale = self.affine
        parts = ["x".join(map(str, ("n", *shape))), f"axis{axis}", self.dtype, self.variant]
        parts += [] if center else ["uncentered"]
        parts += [] if scale else ["unscaled"]
        parts += [] if self.mask is None else [f"mask_{self.mask}"]
        parts += [self.mode] + (["unknown_batch"] if self.unknown_batch else [])
        return "-".join(parts)

    @property
    def input_shape(self) -> tuple[int | None, ...]:
        return (None, *self.layout[0])

    @property
    def keras_can(self) -> bool:
        """Whether Keras's own layer can be built and fed so."""
        return (
            isinstance(self.layout[1], int)
            and (self.variant == "plain" or "renorm" in self.numerics)
            and self.mask_is_for_keras
        )

    @property
    def mask_is_for_keras(self) -> bool:
        # Keras takes masks of one axis fewer than the input: the last one is out of its reach.
        rank = len(self.input_shape)
        return self.mask in (None, "examples", "positions") or (self.mask == "steps" and rank > 2)

    @property
    def numerics(self) -> dict[str, Any]:
        """Arguments that the layer and the oracle share."""
        return {
            "axis": self.layout[1],
            "momentum": 0.7,
            "epsilon": 2e-3,
            **VARIANTS[self.variant],
        }

    @property
    def arguments(self) -> dict[str, Any]:
        """Arguments of the layer."""
        return {**self.numerics, "center": self.affine[0], "scale": self.affine[1]}

    def batches(self, mean: float = 0.0) -> list[Batch]:
        """Two batches, of two sizes where the size is unknown to the compiled step.

        XLA compiles each size anew, so it gets the same size twice.
        """
        rng = self._rng("batches")
        sizes = (16, 24) if self.unknown_batch and self.mode != "xla" else (16, 16)
        return [self._batch(rng, size, mean) for size in sizes]

    def weights(self) -> dict[str, np.ndarray]:
        """A value for every weight that a layer can have, none of them its usual first one."""
        rng = self._rng("weights")
        shape, axis = self.layout
        axes = sorted(a % (len(shape) + 1) for a in ([axis] if isinstance(axis, int) else axis))
        channels = [shape[a - 1] for a in axes]

        def positive() -> np.ndarray:
            return rng.uniform(0.5, 1.5, channels)

        def anything() -> np.ndarray:
            return rng.normal(0.0, 0.5, channels)

        weights = {
            "gamma": positive() if self.affine[1] else np.ones(channels),
            "beta": anything() if self.affine[0] else np.zeros(channels),
            "moving_mean": anything(),
            "moving_variance": positive(),
        }
        if self.variant in ("renorm", "clipped"):
            weights |= {
                "moving_stddev": positive(),
                "renorm_mean": anything(),
                "renorm_stddev": positive(),
            }
        # Rounded, so that a layer of any dtype and the oracle start from the same numbers.
        return {
            name: value.astype(np.float32).astype(np.float64) for name, value in weights.items()
        }

    def _rng(self, purpose: str) -> np.random.Generator:
        return np.random.default_rng(zlib.crc32(f"{purpose} {self}".encode()))

    def _batch(self, rng: np.random.Generator, size: int, mean: float) -> Batch:
        shape = (size, *self.layout[0])
        spread = rng.uniform(0.5, 2.0, shape[1:])  # no two positions and channels alike
        x = mean + spread * rng.normal(size=shape) + rng.normal(0.0, 0.3, shape[1:])
        mask = None
        if self.mask is not None:
            seen = {
                "examples": (size,) + (1,) * len(shape[1:]),
                "steps": shape[:2] if len(shape) > 2 else shape[:1],
                "positions": shape[:-1],
                "elements": shape,
            }[self.mask]
            mask = rng.uniform(size=seen) < 0.7
            mask[::4] = True  # never a channel, nor a virtual batch, without any value
        return Batch(self._rounded(x), self._rounded(rng.normal(size=shape)), mask)

    def _rounded(self, x: np.ndarray) -> np.ndarray:
        if self.dtype == "bfloat16":  # NumPy has none: keep float32's upper 16 bits, cut off
            bits = x.astype(np.float32).view(np.uint32) & np.uint32(0xFFFF0000)
            return bits.view(np.float32).astype(np.float64)
        return x.astype(self.dtype).astype(np.float64)


@functools.cache
def table(strength: int, **fixed: Any) -> tuple[Case, ...]:
    """Few cases in which every `strength` values of different factors meet; the same every time.

    Args:
        strength: 2 for every pair, 3 for every triple.
        **fixed: a tuple of the values that a factor is held to, instead of all its values.
    """
    factors = {name: list(fixed.get(name, values)) for name, values in FACTORS.items()}
    names = list(factors)
    rng = random.Random(0)
    missing = {
        tuple(zip(some, map(repr, values), strict=True))
        for some in itertools.combinations(names, strength)
        for values in itertools.product(*(factors[name] for name in some))
    }

    def meetings(row: dict[str, Any]) -> set[tuple[tuple[str, str], ...]]:
        pairs = [(name, repr(value)) for name, value in row.items()]
        return set(itertools.combinations(pairs, strength)) & missing

    rows = []
    while missing:
        wanted = dict(rng.choice(sorted(missing)))
        draws = []
        for _ in range(20):
            row = {
                name: next(v for v in factors[name] if repr(v) == wanted[name])
                if name in wanted
                else rng.choice(factors[name])
                for name in names
            }
            draws.append(row)
        best = max(draws, key=lambda row: len(meetings(row)))
        missing -= meetings(best)
        rows.append(Case(**best))
    return tuple(rows)
