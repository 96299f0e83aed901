"""The Keras layer: weights, config, dtypes, the training flag, and what updates the moving statistics."""

import copy
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfbn._layer import arguments, collect_moments, moving_average, renorm, virtual_batches
from tfbn._layer.affine_weights import affine_weights
from tfbn._moments import replicas
from tfbn._moments.moments import Moments, statistics_dtype
from tfbn._normalize.dispatch import normalize, normalize_batch
from tfbn._normalize.kernel import Normalization
from tfbn._support.keras_internals import (
    added_losses_kept,
    compiling_with_xla,
    is_recomputing,
)


@keras.saving.register_keras_serializable(package="tfbn")
class BatchNormalization(keras.layers.Layer):
    r"""Normalizes its inputs per channel: a drop-in for `keras.layers.BatchNormalization`.

    In training mode, for each channel over the m positions :math:`i` of the batch,

    .. math:: \mu = \frac1m \sum_i x_i, \quad \sigma^2 = \frac1m \sum_i (x_i - \mu)^2, \quad
              y_i = \gamma \frac{x_i - \mu}{\sqrt{\sigma^2 + \epsilon}} + \beta

    and updates the moving statistics as Keras's layer does, with the *biased* variance:
    ``moving = moving * momentum + batch * (1 - momentum)``. (With ``renorm``, it averages the standard
    deviation, and derives the variance from it.) In inference mode, and always if
    ``layer.trainable`` is False, the layer normalizes by the moving statistics, so that an output depends on
    its own example alone.

    A batch whose statistics are not finite, or that has no values (empty, fully masked), leaves the moving
    statistics unchanged. A recomputed forward pass (`keras.remat`, `tf.recompute_grad`) does not update them
    again.

    Under a `tf.distribute` strategy every replica holds the same moving statistics, to the bit, after every
    step. By default each replica :math:`r` normalizes its own share of the batch, and the moving statistics
    are updated with the averages over replicas, :math:`\sum_r n_r \mu_r / n` and :math:`\sum_r n_r \sigma_r^2
    / n`, in one all-reduce a call. With ``synchronized=True`` all replicas normalize by the mean and variance
    of the global batch: one all-reduce forward (two on more than 16 replicas, twice as many with ``renorm``)
    and one backward. Shares may be unequal, empty or masked.

    Example:
        >>> layer = tfbn.BatchNormalization()
        >>> x = keras.random.normal((32, 8, 8, 16), mean=3.0)
        >>> y = layer(x, training=True)  # mean 0 and variance 1 for each of the 16 channels
        >>> y = layer(x)                 # by the moving statistics

    Args:
        axis: The axis of the channels, or a list of axes: then each combination of their indices is a
            channel. The weights have the shape of these axes, in ascending order.
        momentum: Weight of the old moving statistics, in [0, 1]. ``None`` gives the cumulative average
            instead: the plain mean of the statistics of all batches since the layer was built. The
            non-trainable variable ``update_count`` counts these batches for each channel.
        epsilon: Added to the variance; positive.
        center: Whether the layer has a :math:`\beta` (else 0).
        scale: Whether the layer has a :math:`\gamma` (else 1).
        beta_initializer: Initializer of beta.
        gamma_initializer: Initializer of gamma.
        moving_mean_initializer: Initializer of the moving mean.
        moving_variance_initializer: Initializer of the moving variance.
        beta_regularizer: Optional regularizer of beta.
        gamma_regularizer: Optional regularizer of gamma.
        beta_constraint: Optional constraint of beta.
        gamma_constraint: Optional constraint of gamma.
        renorm: Whether to train with batch renormalization.
        renorm_clipping: With ``renorm``: a dict with any of ``rmax``, ``rmin``, ``dmax``, the limits of the
            corrections.
        renorm_momentum: With ``renorm``: momentum of the statistics that the corrections refer to.
        synchronized: Whether the replicas of a `tf.distribute` strategy normalize by the statistics of the
            global batch. On one replica it makes no difference.
        virtual_batch_size: Number of examples that are normalized together (ghost batch normalization). The
            batch is split into groups of this size, each with its own statistics, and the moving statistics
            are updated with their average. The batch size must be a multiple of it.
        freeze_statistics: Whether the layer always runs in inference mode. No outer ``training`` or
            ``trainable`` overrides it. Also an attribute, which `tfbn.freeze` sets.
        freeze_affine: Whether gamma and beta stay out of ``trainable_variables``. No outer ``trainable``
            overrides it. Also an attribute, which `tfbn.freeze` sets.
        **kwargs: ``name``, ``dtype``, ``trainable``, as for every Keras layer.

    Call arguments:
        inputs: Floating-point tensor of rank 2 or more, the batch first.
        training: Whether to normalize by the batch and update the moving statistics: a bool, a boolean
            tensor, or None for the value of the enclosing call.
        mask: Optional boolean tensor. Only positions where it is True count in the statistics; all positions
            are normalized. Its axes are the leading axes of ``inputs``, each of the same size or of size 1, as
            in Keras's (batch, time) masks.

    Input shape:
        Any, with a known size along ``axis``. The output has the same shape.

    Weights:
        gamma, beta (trainable, where present), moving_mean, moving_variance (non-trainable), in Keras's
        order; at least float32 under every dtype policy. ``renorm`` adds Keras's moving_stddev, renorm_mean
        and renorm_stddev; ``momentum=None`` adds update_count.

    Raises:
        TypeError: For an argument of the wrong type; for integer, string, ragged or sparse inputs.
        ValueError: For an argument out of range; contradictory arguments; an axis that the input does not
            have, the batch axis, or an axis of unknown size; another rank or number of channels than the
            layer was built for; a mask that does not broadcast.
        RuntimeError: For a call in training mode inside of a `tf.cond`, a loop or a `tf.function` within
            ``strategy.run``: replicas cannot communicate there.
        tf.errors.InvalidArgumentError: If the batch size is not a multiple of ``virtual_batch_size``, and
            that shows only when the graph runs.

    References:
        - Chan, Golub and LeVeque, Algorithms for computing the sample variance. The American
          Statistician 37(3), 1983.
        - Ioffe and Szegedy, `Batch Normalization <https://arxiv.org/abs/1502.03167>`_, 2015.
        - Ioffe, `Batch Renormalization <https://arxiv.org/abs/1702.03275>`_, 2017.
        - Hoffer, Hubara and Soudry, `Train longer, generalize better
          <https://arxiv.org/abs/1705.08741>`_, 2017, for ghost batches.
    """

    def __init__(
        self,
        axis: int | Sequence[int] = -1,
        momentum: float | None = 0.99,
        epsilon: float = 1e-3,
        center: bool = True,
        scale: bool = True,
        beta_initializer: Any = "zeros",
        gamma_initializer: Any = "ones",
        moving_mean_initializer: Any = "zeros",
        moving_variance_initializer: Any = "ones",
        beta_regularizer: Any = None,
        gamma_regularizer: Any = None,
        beta_constraint: Any = None,
        gamma_constraint: Any = None,
        renorm: bool = False,
        renorm_clipping: dict[str, float] | None = None,
        renorm_momentum: float = 0.99,
        synchronized: bool = False,
        *,
        virtual_batch_size: int | None = None,
        freeze_statistics: bool = False,
        freeze_affine: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.axis = arguments.checked_axis(axis)
        self.momentum = None if momentum is None else arguments.checked_momentum(momentum)
        self.epsilon = arguments.checked_epsilon(epsilon)
        self.center = center
        self.scale = scale
        self.beta_initializer = keras.initializers.get(beta_initializer)
        self.gamma_initializer = keras.initializers.get(gamma_initializer)
        self.moving_mean_initializer = keras.initializers.get(moving_mean_initializer)
        self.moving_variance_initializer = keras.initializers.get(moving_variance_initializer)
        self.beta_regularizer = keras.regularizers.get(beta_regularizer)
        self.gamma_regularizer = keras.regularizers.get(gamma_regularizer)
        self.beta_constraint = keras.constraints.get(beta_constraint)
        self.gamma_constraint = keras.constraints.get(gamma_constraint)
        self.renorm = renorm
        self.renorm_clipping = arguments.checked_renorm_clipping(renorm_clipping, renorm)
        self.renorm_momentum = arguments.checked_momentum(renorm_momentum, "renorm_momentum")
        self.synchronized = synchronized
        self.virtual_batch_size = arguments.checked_virtual_batch_size(
            virtual_batch_size, renorm, synchronized
        )
        self.supports_masking = True
        self.gamma: Any = None
        self.beta: Any = None
        self.moving_mean: Any = None
        self.moving_variance: Any = None
        self.update_count: Any = None
        self.freeze_statistics = freeze_statistics
        self.freeze_affine = freeze_affine

    def build(self, input_shape: Sequence[int | None]) -> None:
        axes = arguments.resolved_axes(self.axis, input_shape)
        arguments.check_channels_known(input_shape, axes)
        self._rank = len(input_shape)
        self._axes = axes
        shape = tuple(input_shape[axis] for axis in axes)
        dtype = statistics_dtype(tf.as_dtype(self.variable_dtype)).name

        def add(name: str, initializer: Any, **kwargs: Any) -> keras.Variable:
            options = {"dtype": dtype, **kwargs}
            return self.add_weight(
                shape=shape, name=name, initializer=initializer, autocast=False, **options
            )

        def add_statistic(name: str, initializer: Any, **kwargs: Any) -> keras.Variable:
            return add(name, initializer, trainable=False, **kwargs)

        if self.scale:
            self.gamma = add(
                "gamma",
                self.gamma_initializer,
                regularizer=self.gamma_regularizer,
                constraint=self.gamma_constraint,
            )
        if self.center:
            self.beta = add(
                "beta",
                self.beta_initializer,
                regularizer=self.beta_regularizer,
                constraint=self.beta_constraint,
            )
        self.moving_mean = add_statistic("moving_mean", self.moving_mean_initializer)
        self.moving_variance = add_statistic("moving_variance", self.moving_variance_initializer)
        if self.renorm:
            stddev = renorm.stddev_initializer(self.moving_variance_initializer)
            mean = renorm.cloned(self.moving_mean_initializer)
            self.moving_stddev = add_statistic("moving_stddev", stddev)
            self.renorm_mean = add_statistic("renorm_mean", mean)
            self.renorm_stddev = add_statistic("renorm_stddev", stddev)
        if self.momentum is None:
            self.update_count = add_statistic("update_count", "zeros", dtype="int64")
        self._sync_affine_trainable()

    @property
    def trainable(self) -> bool:
        """Whether the layer trains. If it is False, the layer runs in inference mode, as in Keras."""
        return super().trainable

    @trainable.setter
    def trainable(self, value: bool) -> None:
        keras.layers.Layer.trainable.fset(self, value)
        self._sync_affine_trainable()

    @property
    def freeze_affine(self) -> bool:
        """Whether gamma and beta are not trained, whatever ``trainable`` is set to."""
        return self._freeze_affine

    @freeze_affine.setter
    def freeze_affine(self, value: bool) -> None:
        self._freeze_affine = value
        self._sync_affine_trainable()

    def _sync_affine_trainable(self) -> None:
        for weight in (self.gamma, self.beta):
            if weight is not None:
                weight.trainable = self.trainable and not self.freeze_affine

    def __call__(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        arguments.check_input(inputs, self.name)  # Before anything is built for it.
        return super().__call__(inputs, *args, **kwargs)

    def call(self, inputs: tf.Tensor, training: Any = None, mask: Any = None) -> tf.Tensor:
        inputs = tf.convert_to_tensor(inputs)
        arguments.check_built_for(
            inputs.shape, self._rank, self._axes, self.moving_mean.shape, self.name
        )
        if mask is not None:
            mask = arguments.fitted_mask(mask, inputs)
        if self.freeze_statistics or not self.trainable:
            return self._infer(inputs)
        if tf.is_tensor(training):
            value = tf.get_static_value(training)
            if value is None:
                return self._train_where(tf.cast(training, tf.bool), inputs, mask)
            training = bool(value)
        return self._train(inputs, mask) if training else self._infer(inputs)

    def update_statistics(self, moments: Moments) -> None:
        """Updates the moving statistics with the moments of one batch.

        Calling the layer in training mode does this. A training loop that merges the moments of several batches
        calls it once, with the result.

        Args:
            moments: Count, mean and biased variance per channel. A channel with count 0 is not updated. If
                the mean or variance of any channel with values is not finite, no channel is.
        """
        moments = Moments(*(tf.cast(m, self.moving_mean.dtype) for m in moments))
        can_update = moving_average.can_update(moments)
        rate = tf.where(can_update, self._count_and_weigh(can_update), 0)
        moving_average.update_moving_average(self.moving_mean, moments.mean, rate)
        if self.renorm:
            renorm.update_statistics(self, moments, can_update, rate)
        else:
            moving_average.update_moving_average(self.moving_variance, moments.variance, rate)

    def _count_and_weigh(self, can_update: tf.Tensor) -> tf.Tensor:
        """Counts the batch, and returns its weight against the old moving statistics."""
        if self.momentum is not None:
            return tf.constant(1 - self.momentum, self.moving_mean.dtype)
        one = tf.cast(can_update, self.update_count.dtype)
        self.update_count.assign_add(tf.broadcast_to(one, self.update_count.shape))
        return tf.math.reciprocal_no_nan(tf.cast(self.update_count, self.moving_mean.dtype))

    def _train(self, x: tf.Tensor, mask: tf.Tensor | None) -> tf.Tensor:
        with added_losses_kept(self):
            y, moments = self._normalize_batch(x, mask)
            self._update_or_collect(moments)
        return y

    def _train_where(self, training: tf.Tensor, x: tf.Tensor, mask: tf.Tensor | None) -> tf.Tensor:
        """Trains or infers, as the tensor says when the graph runs."""
        # Replicas cannot communicate in a branch. Nor can XLA differentiate a branch whose intermediate
        # tensors have an unknown number of groups. Both train outside, with a count of 0 for inference.
        in_groups = self.virtual_batch_size is not None and compiling_with_xla()
        if replicas.num_replicas() == 1 and not in_groups:
            return tf.cond(training, lambda: self._train(x, mask), lambda: self._infer(x))
        with added_losses_kept(self):
            own, moments = self._normalize_batch(x, mask)
            y = tf.cond(training, lambda: own, lambda: self._infer(x))
            self._update_or_collect(
                moments._replace(
                    count=tf.where(training, moments.count, tf.zeros_like(moments.count))
                )
            )
        return y

    def _normalize_batch(self, x: tf.Tensor, mask: tf.Tensor | None) -> tuple[tf.Tensor, Moments]:
        over = Normalization(self._axes, self.epsilon, mask, self.synchronized)
        gamma, beta = affine_weights(self, statistics_dtype(x.dtype))
        if self.virtual_batch_size is not None:
            y, moments = virtual_batches.normalize_groups(
                x, gamma, beta, over, self.virtual_batch_size
            )
        elif self.renorm:
            y, moments = renorm.renormalize_batch(
                x,
                gamma,
                beta,
                over,
                renorm_mean=tf.cast(self.renorm_mean, gamma.dtype),
                renorm_stddev=tf.cast(self.renorm_stddev, gamma.dtype),
                clipping=self.renorm_clipping or {},
            )
        else:
            y, moments = normalize_batch(x, gamma, beta, over)
        return tf.cast(y, self.compute_dtype), moments

    def _update_or_collect(self, moments: Moments) -> None:
        """Updates the moving statistics, on all replicas alike, or passes the moments to a receiver."""
        if is_recomputing():
            return  # The first forward pass did so.
        receive = collect_moments.receiver()
        if receive is not None:
            receive(self, moments)
            return
        if not self.synchronized:  # Else they are those of the global batch already.
            (moments,) = replicas.all_reduce_mean([moments])
        self.update_statistics(moments)

    def _infer(self, x: tf.Tensor) -> tf.Tensor:
        gamma, beta = affine_weights(self, statistics_dtype(x.dtype))
        mean, variance = (tf.cast(w, gamma.dtype) for w in (self.moving_mean, self.moving_variance))
        over = Normalization(self._axes, self.epsilon)
        return tf.cast(normalize(x, mean, variance, gamma, beta, over), self.compute_dtype)

    def load_own_variables(self, store: Any) -> None:
        """Loads the weights. In older files ``update_count`` is one number for all channels."""
        if self.update_count is not None:
            store = {name: store[name] for name in store.keys()}  # noqa: SIM118
            last = str(len(store) - 1)
            if store and np.ndim(store[last]) == 0:
                store[last] = np.broadcast_to(np.asarray(store[last]), self.update_count.shape)
        super().load_own_variables(store)

    def compute_output_shape(self, input_shape: Sequence[int | None]) -> tuple[int | None, ...]:
        arguments.resolved_axes(self.axis, input_shape)
        return tuple(input_shape)

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "axis": copy.copy(self.axis),
            "momentum": self.momentum,
            "epsilon": self.epsilon,
            "center": self.center,
            "scale": self.scale,
            "beta_initializer": keras.initializers.serialize(self.beta_initializer),
            "gamma_initializer": keras.initializers.serialize(self.gamma_initializer),
            "moving_mean_initializer": keras.initializers.serialize(self.moving_mean_initializer),
            "moving_variance_initializer": keras.initializers.serialize(
                self.moving_variance_initializer
            ),
            "beta_regularizer": keras.regularizers.serialize(self.beta_regularizer),
            "gamma_regularizer": keras.regularizers.serialize(self.gamma_regularizer),
            "beta_constraint": keras.constraints.serialize(self.beta_constraint),
            "gamma_constraint": keras.constraints.serialize(self.gamma_constraint),
            "renorm": self.renorm,
            "renorm_clipping": copy.copy(self.renorm_clipping),
            "renorm_momentum": self.renorm_momentum,
            "synchronized": self.synchronized,
            "virtual_batch_size": self.virtual_batch_size,
            "freeze_statistics": self.freeze_statistics,
            "freeze_affine": self.freeze_affine,
        }
