"""From (x, γ, β, statistics) to y, with the right gradients of every order: this file chooses the kernel.

The choice is made while the graph is traced, from what is known then. `_training` and `_inference` make it:
the first row that applies decides.

===========================================  ===============================  ================================
case                                         training                         inference
===========================================  ===============================  ================================
channel axes that cannot be broadcast        transposed, then again           transposed, then again
under XLA                                    formula                          formula ¹
a mask, float64, channels of unknown number  formula                          formula ¹
the output of a Conv2D, channels last, CPU   as the rows below                fused, as it is ²
a small tensor on a CPU                      formula; eagerly as the rows     formula ¹
                                             below
channels last, synchronized                  fused or cuDNN, twice            fused or cuDNN
channels last                                fused; cuDNN on a GPU            fused; cuDNN on a GPU
channels elsewhere, on a CPU                 transposed, then again           formula ³; half precision:
                                                                              transposed, then again
channels in a row elsewhere, on a GPU, not   cuDNN, as NCHW                   formula ¹
synchronized, at most 880,801 examples
channels elsewhere, on a GPU                 formula                          formula ¹
===========================================  ===============================  ================================

¹ Differentiated by TensorFlow; all others have a gradient written by hand.

² TensorFlow's graph optimizer then joins convolution, normalization and activation (in half precision, the
latter two) in one operation, which it does not do across a view. MobileNetV2 inferred in 40 ms instead of 48
(Keras 49), in bfloat16 in 51 instead of 65 (Keras 71).

³ `Formula.inference`, two passes as in Keras: 1.9 ms on 32×64×56×56 values, where the formula ¹ makes three in 2.5.

Why, measured on a CPU. A call of the fused kernel costs 0.1 ms before it does anything: on 64×32 values,
forward and backward, a layer took 0.47 ms with it, 0.23 with the formula and in Keras. The two are equally fast
somewhere between 65,536 values (`SMALL`) and 100,000. With channels on axis 1, a training step on 32×64×56×56
values took 12 ms through two transpositions and 20 by the formula (Keras 25). Eager inference of 8×8×8×16 values
took 0.77 ms by the kernel and 0.41 by the formula (Keras 0.40).

XLA compiles the fused kernel badly, two to seven times slower than Keras's formula. What it makes of a formula
depends on the operation that ends it. On a CPU it hands a float32 sum of at least 32,768 values to a library, unless
the values are a product, a view or a cast: these it sums in windows, along the last axis at half of the speed. And
where dx is a product, it computes dx anew in each sum of the layer before: 2 to 8 times the time. So the formula's
gradient is written by hand, ends in a difference, and sums products behind a selection (`sum_of_products`). It also
sums twice as fast in a view with few axes. What the formula's accuracy at large means costs there: the median that
the shift is takes 8 % of a training step on 32×64×56×56 values with channels on axis 1; x·s + t would be one
multiply-add in inference, where (x − μ)·s + β is a subtraction more. That shows where XLA joins several layers
in one loop (8 layers on 8×8×28×28×32 values: 0.8 times Keras's speed; one layer: not slower).

The kernel's time depends on the view. (positions, 1, 1, channels) took up to half of the time of (N, H, W, C)
and of (1, positions, 1, channels); but each position has a price of its own there, which short rows share:
in training 128×32×32×16 ran forward in 1.23 ms, by rows in 0.82; 64×32×32×64 in bfloat16 in 0.90 and 0.61;
rows of 128×256 values were slower.

The formula computes in float32 (in float64 for float64). It copies a half-precision tensor for that, forward
and again backward, and keeps only the original in between: under a mask, in virtual batches of unknown number,
and on a GPU in the rows that say formula.
"""

import functools

import tensorflow as tf

from tfbn._moments import replicas
from tfbn._moments.moments import Moments
from tfbn._normalize import cudnn, formula, fused, reshape
from tfbn._normalize.by_hand import inferred_by, trained_by
from tfbn._normalize.cudnn import CuDNN
from tfbn._normalize.formula import Formula
from tfbn._normalize.fused import Fused
from tfbn._normalize.fused_synchronized import FusedSynchronized
from tfbn._normalize.kernel import Infer, Normalization, Train
from tfbn._normalize.reshape import View
from tfbn._support.keras_internals import compiling_with_xla

# Up to this many values the formula is faster than the fused kernel, in a graph on a CPU.
SMALL = 2**16
_TYPICAL_BATCH = 128  # Assumed where the batch size is unknown.


def normalize_batch(
    x: tf.Tensor, gamma: tf.Tensor, beta: tf.Tensor, over: Normalization
) -> tuple[tf.Tensor, Moments]:
    """Normalizes x by the mean and biased variance of this batch, per channel.

    Args:
        x: Floating-point tensor of known rank.
        gamma: Scale, in the dtype of the statistics, with the shape of the channel axes of x.
        beta: Offset, likewise.
        over: What is normalized over what.

    Returns:
        The output in the dtype of x, differentiable in x, gamma and beta; and the batch's moments, which are
        not to be differentiated.
    """
    if over.synchronized and replicas.num_replicas() == 1:
        over = over._replace(synchronized=False)
    view, train = _training(x, over)
    return view.train(train, x, gamma, beta)


def normalize(
    x: tf.Tensor,
    mean: tf.Tensor,
    variance: tf.Tensor,
    gamma: tf.Tensor,
    beta: tf.Tensor,
    over: Normalization,
) -> tf.Tensor:
    """Normalizes x by the given statistics; differentiable in every argument.

    Shapes and dtypes as in `normalize_batch`; mean and variance are like gamma.
    """
    view, infer = _inference(x, over)
    return view.infer(infer, x, mean, variance, gamma, beta)


def _training(x: tf.Tensor, over: Normalization) -> tuple[View, Train]:
    """The column "training" of the table."""
    if reshape.interleaved(x, over.axes):
        return reshape.transposed(x, over), normalize_batch
    if compiling_with_xla():
        return reshape.merged(x, over), trained_by(Formula)
    if not _kernels_take(x, over):
        return reshape.unchanged(over), trained_by(Formula)
    on_gpu = _on_gpu()
    if not (on_gpu or tf.executing_eagerly()) and _has_few_values(x):
        return reshape.merged(x, over), trained_by(Formula)
    if _channels_last(x, over):
        kernel = CuDNN if on_gpu else Fused
        if over.synchronized:
            twice = functools.partial(FusedSynchronized, kernel=kernel)
            return _kernel_view(x, over, on_gpu), trained_by(twice)
        view = _kernel_view(x, over, on_gpu) if on_gpu else reshape.rows(x, over)
        return view, trained_by(kernel)
    if not on_gpu:
        return reshape.transposed(x, over), normalize_batch
    if _in_a_row(over) and not over.synchronized and cudnn.takes_second(x, over):
        return reshape.channels_second(x, over), trained_by(CuDNN)
    return reshape.unchanged(over), trained_by(Formula)


def _inference(x: tf.Tensor, over: Normalization) -> tuple[View, Infer]:
    """The column "inference" of the table."""
    if reshape.interleaved(x, over.axes):
        return reshape.transposed(x, over), normalize
    unchanged = reshape.unchanged(over)
    if compiling_with_xla() or not _kernels_take(x, over):
        return unchanged, formula.infer
    on_gpu = _on_gpu()
    if _channels_last(x, over) and _is_convolution(x, over) and not on_gpu:
        return unchanged, inferred_by(Fused)
    if not on_gpu and _has_few_values(x):
        return unchanged, formula.infer
    if _channels_last(x, over):
        return _kernel_view(x, over, on_gpu), inferred_by(CuDNN if on_gpu else Fused)
    if on_gpu:
        return unchanged, formula.infer
    if x.dtype != tf.float32:  # The formula would copy it.
        return reshape.transposed(x, over), normalize
    return unchanged, inferred_by(Formula)


def _kernels_take(x: tf.Tensor, over: Normalization) -> bool:
    # Virtual batches are channels, too.
    known = all(x.shape[axis] is not None for axis in over.axes)
    return x.dtype in fused.DTYPES and over.mask is None and known


def _has_few_values(x: tf.Tensor) -> bool:
    """Whether the formula is faster on a CPU. To train eagerly it is not: each operation has its price there."""
    batch = _TYPICAL_BATCH if x.shape[0] is None else x.shape[0]
    size = tf.TensorShape([batch, *x.shape[1:]]).num_elements()
    return size is not None and size <= SMALL


def _channels_last(x: tf.Tensor, over: Normalization) -> bool:
    return _in_a_row(over) and over.axes[-1] == x.shape.rank - 1


def _in_a_row(over: Normalization) -> bool:
    first = over.axes[0]
    return list(over.axes) == list(range(first, first + len(over.axes)))


def _kernel_view(x: tf.Tensor, over: Normalization, on_gpu: bool) -> View:
    if not on_gpu:
        return reshape.flat(x, over)
    return reshape.unchanged(over) if cudnn.takes_images(x, over) else reshape.one_image(x, over)


def _is_convolution(x: tf.Tensor, over: Normalization) -> bool:
    return not tf.executing_eagerly() and x.op.type == "Conv2D" and len(over.axes) == 1


def _on_gpu() -> bool:
    """Whether operations that have a GPU kernel run on a GPU here, wherever their inputs are."""
    if not tf.config.list_logical_devices("GPU"):
        return False
    device = _device()
    if not device:  # In a function, which runs where it is traced.
        with tf.init_scope():
            device = _device()
    return "CPU" not in device


def _device() -> str:
    return tf.fill([], 0.0).device
