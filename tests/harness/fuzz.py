"""Random layers and batches, extreme values included, against the float64 oracle and Keras's layer.

    python tests/harness/fuzz.py --count 10000 --seed 0    # or: make fuzz

Each configuration follows from its own seed, which a failure prints; `--only SEED` runs that one alone. A result
fails if it is further from the oracle than rounding explains and than Keras's layer is, where Keras has one. A
result that is only within the drift of the fused kernel's sums, as `tfbn/_normalize/fused.py` documents it, is
printed and counted on its own.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from pathlib import Path
from typing import Any

os.environ["KERAS_BACKEND"] = "tensorflow"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
sys.path[:0] = [str(Path(__file__).parents[2])]

import keras  # noqa: E402
import numpy as np  # noqa: E402
import tensorflow as tf  # noqa: E402

import tfbn  # noqa: E402
from oracle import BatchNorm  # noqa: E402

EPS = {"float64": 2.0**-52, "float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}
LIMIT = {"float64": 1e90, "float32": 1e12, "float16": 200.0, "bfloat16": 1e12}
"""The largest scale of values: their cubes, which derivatives need, fit the statistics, and x fits its dtype."""


@dataclasses.dataclass
class Configuration:
    seed: int
    shape: tuple[int, ...]
    axis: int
    dtype: str
    arguments: dict[str, Any]
    mode: str
    x: np.ndarray
    dy: np.ndarray
    mask: np.ndarray | None

    def __str__(self) -> str:
        masked = "" if self.mask is None else ", masked"
        return f"seed {self.seed}: {self.dtype} {self.shape}, axis {self.axis}{masked}, {self.mode}, {self.arguments}"


def draw(seed: int) -> Configuration:
    rng = np.random.default_rng(seed)
    rank = int(rng.choice([2, 2, 3, 3, 4, 4, 4, 5]))
    shape = tuple(int(n) for n in rng.choice([1, 2, 3, 4, 7, 8, 16, 33], rank))
    axis = int(rng.integers(1, rank))
    dtype = str(rng.choice(["float32", "float32", "float32", "bfloat16", "float16", "float64"]))
    mode = str(rng.choice(["eager"] * 8 + ["graph", "xla"]))
    channels = [shape[axis] if a == axis else 1 for a in range(rank)]

    def magnitude(low: float, high: float) -> np.ndarray:
        return 10.0 ** rng.uniform(np.log10(low), np.log10(high), channels)

    high = LIMIT[dtype]
    scale = (
        magnitude(max(1e-12, 1e-4 if dtype == "float16" else 0), high)
        if rng.random() < 0.5
        else 1.0
    )
    offset = rng.choice([0, 0, 1, 30, 1e3, 1e4], channels) * rng.choice([-1, 1], channels)
    values = rng.normal(size=shape)
    kind = rng.random()
    if kind < 0.2:
        values = np.maximum(values, 0)
    elif kind < 0.3:
        values = rng.integers(-1, 2, shape).astype(float)
    elif kind < 0.4:
        values = rng.standard_t(1.5, shape)
    x = scale * (values + np.minimum(np.abs(offset), high / np.max(scale) / 10) * np.sign(offset))
    if rng.random() < 0.2:  # a constant channel
        x[(slice(None),) * axis + (0,)] = rng.choice([0.0, 1.0, min(1e3, float(np.max(scale)))])
    if rng.random() < 0.05:
        x = x[:0]
    x = tf.cast(
        np.clip(x, -6e4 if dtype == "float16" else -1e300, 6e4 if dtype == "float16" else 1e300),
        dtype,
    )
    x = tf.cast(x, tf.float64).numpy()
    dy = tf.cast(tf.cast(rng.normal(size=x.shape), dtype), tf.float64).numpy()
    mask = None
    if rng.random() < 0.25 and rank > 2:
        mask = rng.random(x.shape[: int(rng.integers(1, rank))]) < rng.choice([0.1, 0.5, 0.9])
    arguments: dict[str, Any] = {
        "momentum": [0.99, 0.5, 0.0, None][rng.integers(4)],
        "epsilon": float(rng.choice([1e-3, 1e-5, 1e-2])),
    }
    divisors = [n for n in (1, 2, 4) if x.shape[0] and x.shape[0] % n == 0]
    if rng.random() < 0.15 and divisors:
        arguments["virtual_batch_size"] = int(rng.choice(divisors))
    return Configuration(seed, x.shape, axis, dtype, arguments, mode, x, dy, mask)


def run(
    layer: keras.layers.Layer, c: Configuration, mask: np.ndarray | None
) -> dict[str, np.ndarray]:
    def step(x: tf.Tensor, dy: tf.Tensor) -> list[tf.Tensor]:
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x, training=True, mask=mask)
        return [y, tape.gradient(y, x, output_gradients=dy)]

    call = step if c.mode == "eager" else tf.function(step, jit_compile=c.mode == "xla")
    y, dx = call(tf.cast(c.x, c.dtype), tf.cast(c.dy, c.dtype))
    results = {"y": y, "dx": dx, "mean": layer.moving_mean, "variance": layer.moving_variance}
    largest = float(tf.as_dtype(c.dtype).max)  # Beyond it an output is infinite, as it must be.
    arrays = {name: tf.cast(value, tf.float64).numpy() for name, value in results.items()}
    return arrays | {name: np.clip(arrays[name], -largest, largest) for name in ("y", "dx")}


def expected(c: Configuration) -> dict[str, np.ndarray]:
    oracle = BatchNorm(c.shape, c.axis, **c.arguments)
    result = oracle.train(c.x, c.dy, c.mask)
    largest = float(tf.as_dtype(c.dtype).max)
    return {
        "y": np.clip(result.y, -largest, largest),
        "dx": np.clip(result.dx, -largest, largest),
        "mean": oracle.state["moving_mean"],
        "variance": oracle.state["moving_variance"],
    }


def error(actual: np.ndarray, wanted: np.ndarray, scale: np.ndarray) -> float:
    """The largest error, relative to what such values are computed from."""
    if not wanted.size:
        return 0.0
    off = np.abs(actual - wanted) / scale
    return float(np.max(np.where(np.isfinite(off), off, np.inf)))


def scales(c: Configuration, wanted: dict[str, np.ndarray]) -> dict[str, Any]:
    """Rounding is relative to these: results themselves may cancel, or be scaled down by epsilon."""
    over = tuple(a for a in range(c.x.ndim) if a != c.axis)
    if not c.x.size:
        return dict.fromkeys(wanted, 1.0)
    size = c.arguments.get("virtual_batch_size") or c.x.shape[0]
    spread = c.x.reshape(-1, size, *c.x.shape[1:]).std(tuple(a + 1 for a in over), keepdims=True)
    s = 1 / np.sqrt(np.min(spread, 0) ** 2 + c.arguments["epsilon"])
    spread = c.x.std(over)
    return {
        "y": np.maximum(np.abs(wanted["y"]).max(over, keepdims=True), 0.1),
        "dx": np.maximum(np.abs(wanted["dx"]).max(over, keepdims=True), s * np.abs(c.dy).max()),
        "mean": np.abs(wanted["mean"]) + spread + 1e-30,
        # The layer adds epsilon to it: what lies so far below does not show.
        "variance": np.abs(wanted["variance"]) + 1e-6 * c.arguments["epsilon"],
    }


def conditioning(c: Configuration) -> float:
    """How much the rounding of a float32 mean can cost: the largest value in units of the standard deviation."""
    if not c.x.size:
        return 1.0
    size = c.arguments.get("virtual_batch_size") or c.x.shape[0]
    groups = c.x.reshape(-1, size, *c.x.shape[1:])
    over = tuple(a for a in range(1, groups.ndim) if a != c.axis + 1)
    spread = np.sqrt(groups.var(over) + c.arguments["epsilon"])
    return float(np.max(1 + np.abs(groups).max(over) / spread))


def judge(c: Configuration) -> tuple[list[str], bool]:
    """What is wrong with the results of one configuration, and whether the drift of sums explains it all."""
    wanted = expected(c)
    ours = run(tfbn.BatchNormalization(c.axis, dtype=c.dtype, **c.arguments), c, c.mask)
    stock: dict[str, np.ndarray] = {}
    arguments = dict(c.arguments)
    one_group = arguments.pop("virtual_batch_size", c.x.shape[0]) == c.x.shape[0]
    if c.mask is None and one_group and c.x.size:
        arguments["momentum"] = arguments["momentum"] or 0.0
        stock = run(keras.layers.BatchNormalization(c.axis, dtype=c.dtype, **arguments), c, None)
    scale = scales(c, wanted)
    wide = EPS["float64" if c.dtype == "float64" else "float32"]
    wrong, explained = [], True
    # What each value of a channel adds, at most, where the fused kernel adds float32.
    summed = c.x.size // c.x.shape[c.axis] if c.x.size and c.dtype != "float64" else 0
    drift = 1.2e-8 * summed * conditioning(c)
    for name, value in wanted.items():
        off = error(ours[name], value, scale[name])
        rounding = 4 * EPS[c.dtype] if name in ("y", "dx") else 0.0
        allowed = rounding + 32 * wide * conditioning(c) ** (2 if name in ("dx", "variance") else 1)
        keras_off = error(stock[name], value, scale[name]) if name in stock else 0.0
        if not off <= max(allowed, 2 * keras_off):
            wrong.append(f"{name} off by {off:.2g}, allowed {allowed:.2g}, Keras {keras_off:.2g}")
            explained &= off <= drift
    return wrong, explained


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int)
    options = parser.parse_args()
    seeds = (
        range(options.seed, options.seed + options.count)
        if options.only is None
        else [options.only]
    )
    failed = drifted = 0
    for number, seed in enumerate(seeds, 1):
        configuration = draw(seed)
        try:
            wrong, explained = judge(configuration)
        except Exception as problem:
            wrong, explained = [f"{type(problem).__name__}: {str(problem)[-300:]}"], False
        if wrong:
            failed += not explained
            drifted += explained
            print(
                "drift of sums:" if explained else "FAILED:",
                configuration,
                *wrong,
                sep="\n  ",
                flush=True,
            )
        if number % 1000 == 0:
            print(f"{number} configurations, {failed} failed, {drifted} drifted", flush=True)
            keras.backend.clear_session()
    print(
        f"{len(seeds)} configurations from seed {seeds[0]}: {failed} failed, "
        f"{drifted} within the drift of the fused kernel's sums"
    )
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
