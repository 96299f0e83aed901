"""Checks of the layer's arguments and inputs. Each error says what was wrong, what was received and what to do."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import tensorflow as tf

from tfbn._support.checks import is_integer, is_number

RENORM_CLIPPING_KEYS = ("rmax", "rmin", "dmax")


def checked_axis(axis: Any) -> int | list[int]:
    """``axis`` as an int, or as a list of at least two ints."""
    axes = list(axis) if isinstance(axis, Sequence) and not isinstance(axis, str) else [axis]
    if not axes or not all(is_integer(a) for a in axes):
        raise TypeError(
            "`axis` must be an integer or a non-empty list of integers: the axes that hold the channels. "
            f"Received: axis={axis!r}"
        )
    axes = [int(a) for a in axes]
    if len(set(axes)) < len(axes):
        raise ValueError(
            f"`axis` contains an axis twice; pass each axis once. Received: axis={axis!r}"
        )
    return axes[0] if len(axes) == 1 else axes


def checked_momentum(momentum: Any, name: str = "momentum") -> float:
    """``momentum`` as a float in [0, 1]."""
    if not is_number(momentum):
        raise TypeError(f"`{name}` must be a number in [0, 1]. Received: {name}={momentum!r}")
    if not 0 <= momentum <= 1:
        raise ValueError(
            f"`{name}` must be in [0, 1]: it is the weight of the old moving statistics in "
            f"moving * {name} + batch * (1 - {name}). Received: {name}={momentum!r}"
        )
    return float(momentum)


def checked_epsilon(epsilon: Any) -> float:
    """``epsilon`` as a positive float."""
    if not is_number(epsilon):
        raise TypeError(f"`epsilon` must be a positive number. Received: epsilon={epsilon!r}")
    if not 0 < epsilon < math.inf:
        raise ValueError(
            "`epsilon` must be positive and finite: without it a constant channel divides by zero. "
            f"Received: epsilon={epsilon!r}"
        )
    return float(epsilon)


def checked_virtual_batch_size(size: Any, renorm: bool, synchronized: bool) -> int | None:
    """``virtual_batch_size`` as a positive int or None, free of contradictions."""
    if size is None:
        return None
    if not is_integer(size):
        raise TypeError(
            "`virtual_batch_size` must be an integer, the number of examples that share their statistics, "
            f"or None. Received: virtual_batch_size={size!r}"
        )
    if size < 1:
        raise ValueError(
            f"`virtual_batch_size` must be at least 1. Received: virtual_batch_size={size!r}"
        )
    merges = "merges the examples of all replicas, and virtual batches separate them"
    smooths = "removes the noise of small batches, and virtual batches add it"
    for name, value, why in (("synchronized", synchronized, merges), ("renorm", renorm, smooths)):
        if value:
            raise ValueError(
                f"`virtual_batch_size` and `{name}=True` contradict each other: `{name}` {why}. "
                "Use one of them. "
                f"Received: virtual_batch_size={size!r}, {name}={value!r}"
            )
    return int(size)


def checked_renorm_clipping(clipping: Any, renorm: bool) -> dict[str, float] | None:
    """``renorm_clipping`` as a dict (empty where not given) for renorm, None without."""
    if not renorm:
        if clipping:
            raise ValueError(
                "`renorm_clipping` needs `renorm=True`: set it, or leave `renorm_clipping` out. "
                f"Received: renorm=False, renorm_clipping={clipping!r}"
            )
        return None
    clipping = {} if clipping is None else clipping
    if not isinstance(clipping, Mapping) or set(clipping) - set(RENORM_CLIPPING_KEYS):
        raise ValueError(
            f"`renorm_clipping` must be a dict with keys among {list(RENORM_CLIPPING_KEYS)}. "
            f"Received: renorm_clipping={clipping!r}"
        )
    for key, limit in clipping.items():
        if limit is None:  # As in Keras: no limit.
            continue
        if not is_number(limit):
            raise TypeError(
                f"The limits in `renorm_clipping` must be numbers. Received: {key}={limit!r}"
            )
        if not limit >= 0:  # This catches NaN, too.
            raise ValueError(
                "`renorm_clipping` clips r to [rmin, rmax] and d to [-dmax, dmax], so no limit may be "
                f"negative. Received: {key}={limit!r}"
            )
    rmin, rmax = clipping.get("rmin"), clipping.get("rmax")
    if rmin is not None and rmax is not None and rmax < rmin:
        raise ValueError(
            "`renorm_clipping` clips r to [rmin, rmax], so rmax must not be smaller than rmin. "
            f"Received: rmax={rmax!r}, rmin={rmin!r}"
        )
    return dict(clipping)


def resolved_axes(axis: int | list[int], shape: Sequence[int | None]) -> tuple[int, ...]:
    """The channel axes of an input of this shape, ascending and non-negative.

    Raises:
        ValueError: If the input has no such axes, or one of them is the batch.
    """
    rank = len(shape)
    axes = [axis] if isinstance(axis, int) else axis
    received = f"Received: axis={axis!r}, input shape {tuple(shape)}"
    if rank < 2:
        raise ValueError(
            "Batch normalization needs an input with at least 2 dimensions, the batch first. "
            f"{received}"
        )
    for a in axes:
        if not -rank <= a < rank:
            raise ValueError(
                f"Axis {a} is out of range: this input has axes {-rank} to {rank - 1}. {received}"
            )
    resolved = tuple(sorted(a % rank for a in axes))
    if 0 in resolved:
        raise ValueError(
            "Axis 0 is the batch, over which statistics are computed, so it cannot hold the channels. Pass the "
            "axis of the channels: -1 for channels last, or 1 for channels first. "
            f"{received}"
        )
    if len(set(resolved)) < len(resolved):
        raise ValueError(f"`axis` contains an axis twice; pass each axis once. {received}")
    return resolved


def check_channels_known(shape: Sequence[int | None], axes: Sequence[int]) -> None:
    """Raises an error unless every channel axis has a static size."""
    if any(shape[axis] is None for axis in axes):
        raise ValueError(
            "The number of channels must be known to create gamma and beta, but a channel axis of "
            "the input has an unknown size. Give the model an Input with that size, or build the layer with it. "
            f"Received: input shape {tuple(shape)}, channel axes {list(axes)}"
        )


def check_input(inputs: Any, name: str) -> None:
    """Raises an error for inputs that the layer cannot normalize, whatever their size."""
    # Not by the attribute `sparse` of a symbolic tensor: Keras sets it for `2 * x` with a dense x, too.
    if isinstance(inputs, tf.RaggedTensor) or getattr(inputs, "ragged", False):
        kind = "ragged"
    elif isinstance(inputs, tf.SparseTensor):
        kind = "sparse"
    else:
        kind = None
    if kind is not None:
        to_dense = {
            "ragged": "`inputs.to_tensor()` and a mask",
            "sparse": "`tf.sparse.to_dense(inputs)`",
        }
        raise TypeError(
            f"Batch normalization takes dense tensors; pass {to_dense[kind]} instead. "
            f"Received: a {kind} tensor for layer {name!r}"
        )
    shape = getattr(inputs, "shape", None)
    if isinstance(shape, tf.TensorShape) and shape.rank is None:
        raise ValueError(
            "Batch normalization needs inputs of known rank. Tell TensorFlow the shape, for example with "
            f"`tf.ensure_shape(inputs, [None, 28, 28, 3])`. Received: a tensor of unknown rank for layer {name!r}"
        )
    dtype = getattr(inputs, "dtype", None)
    if dtype is not None and not tf.as_dtype(dtype).is_floating:
        raise TypeError(
            "Batch normalization takes floating-point inputs; cast them first, "
            "for example with `keras.ops.cast(inputs, 'float32')`. "
            f"Received: inputs of dtype {tf.as_dtype(dtype).name} for layer {name!r}"
        )


def check_built_for(
    shape: tf.TensorShape, built_rank: int, axes: Sequence[int], channels: Sequence[int], name: str
) -> None:
    """Raises an error if the layer was built for another rank or number of channels."""
    if shape.rank != built_rank:
        raise ValueError(
            f"Layer {name!r} was built for inputs of rank {built_rank}; use a new layer for another rank. "
            f"Received: an input of shape {tuple(shape)}"
        )
    for axis, size in zip(axes, channels, strict=True):
        if shape[axis] not in (None, size):
            raise ValueError(
                f"Layer {name!r} was built for {size} channels on axis {axis}; use a new layer for another "
                f"number of channels, or check the layer before it. Received: {shape[axis]} channels, "
                f"an input of shape {tuple(shape)}"
            )


def fitted_mask(mask: tf.Tensor, x: tf.Tensor) -> tf.Tensor:
    """``mask`` as a boolean tensor of the rank of ``x``.

    Raises:
        ValueError: If it does not broadcast to ``x``.
    """
    mask = tf.cast(mask, tf.bool)
    if mask.shape.rank is None:
        raise ValueError(
            "The mask needs a known rank. Tell TensorFlow its shape, for example with "
            "`tf.ensure_shape(mask, [None, None])`. Received: a mask of unknown rank"
        )
    missing = x.shape.rank - mask.shape.rank
    # Keras's masks are (batch, time): they refer to the leading axes, so the missing ones are appended.
    shape = mask.shape.as_list() + [1] * missing
    if missing < 0 or any(
        m not in (None, 1) and n is not None and m != n for m, n in zip(shape, x.shape, strict=True)
    ):
        raise ValueError(
            "The mask does not broadcast to the input. Its axes are the leading axes of the input, each of "
            "the same size or of size 1; with channels first, give the channel axis size 1. "
            f"Received: mask of shape {tuple(mask.shape)}, input of shape {tuple(x.shape)}"
        )
    if missing:
        mask = tf.reshape(mask, tf.concat([tf.shape(mask), [1] * missing], 0))
        mask = tf.ensure_shape(mask, shape)
    # An unknown size may be 1, and the code that counts values needs the real one.
    if None in shape:
        sizes = [tf.shape(x)[i] if size is None else size for i, size in enumerate(shape)]
        mask = tf.broadcast_to(mask, sizes)
    return mask
