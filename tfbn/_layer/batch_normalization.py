"""The Keras layer: weights, config, dtypes, the training flag, and what happens to the moving statistics."""

import copy
from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from tfbn._layer import arguments, collect_moments, moving_average, renorm, virtual_batches
from tfbn._moments import replicas
from tfbn._moments.moments import Moments, statistics_dtype
from tfbn._normalize.dispatch import normalize, normalize_batch


@keras.saving.register_keras_serializable(package="tfbn")
class BatchNormalization(keras.layers.Layer):
    r"""Batch normalization, a drop-in for ``keras.layers.BatchNormalization``.

    In training, for each channel over the positions :math:`i` of this batch,

    .. math:: \mu = \frac1m \sum_i x_i, \quad \sigma^2 = \frac1m \sum_i (x_i - \mu)^2, \quad
              y_i = \gamma \frac{x_i - \mu}{\sqrt{\sigma^2 + \epsilon}} + \beta

    and the moving statistics follow, both with the *biased* variance as above, as in Keras:
    ``moving = moving * momentum + batch * (1 - momentum)``. In inference, and wherever
    ``layer.trainable`` is False, :math:`\mu` and :math:`\sigma^2` are the moving statistics, so
    that an output depends on its own example alone.

    A batch without any value that counts (empty, fully masked), or whose statistics are not finite,
    leaves the moving statistics as they were.

    Under a ``tf.distribute`` strategy every replica holds the same moving statistics, to the bit, after
    every step. By default each replica :math:`r` normalizes by its own share of the batch, and the moving
    statistics follow the averages over replicas, :math:`\sum_r n_r \mu_r / n` and
    :math:`\sum_r n_r \sigma_r^2 / n`: the variance *within* replicas, without the spread of their
    means, since that is what training normalizes by and inference should expect. That is one
    all-reduce a call. With ``synchronized=True`` the batch is that of all replicas together: forward one
    all-reduce of count, mean and variance (two on more than 16 replicas, one more with ``renorm``), merged by
    the formula of Chan, Golub and LeVeque, and backward one of the two sums of the gradient, which is that
    of the global batch; the gradients of gamma and beta are each replica's share of it, since optimizers add
    them up. Shares may be unequal, empty or masked. A share that is not finite moves nothing on any replica.
    Replicas cannot meet inside of a ``tf.cond``, a loop or a ``tf.function`` within ``strategy.run``: a call
    in training mode there raises.

    Args:
        axis: The axis of the channels, or a list of axes: each combination of their indices is a
            channel. The weights have the shape of these axes, ascending.
        momentum: Weight of the old moving statistics, in [0, 1]. ``None`` takes the cumulative
            average instead: the plain mean of the statistics of all batches since the layer was
            built, counted in the weight ``update_count``.
        epsilon: Added to the variance; positive.
        center: Whether there is a :math:`\beta` (else 0).
        scale: Whether there is a :math:`\gamma` (else 1).
        beta_initializer: Initializer of beta.
        gamma_initializer: Initializer of gamma.
        moving_mean_initializer: Initializer of the moving mean.
        moving_variance_initializer: Initializer of the moving variance.
        beta_regularizer: Optional regularizer of beta.
        gamma_regularizer: Optional regularizer of gamma.
        beta_constraint: Optional constraint of beta.
        gamma_constraint: Optional constraint of gamma.
        renorm: Whether to train by batch renormalization.
        renorm_clipping: With ``renorm``: a dict with any of ``rmax``, ``rmin``, ``dmax``, the
            limits of the corrections.
        renorm_momentum: With ``renorm``: momentum of the statistics that the corrections pull
            towards.
        synchronized: Whether the replicas of a ``tf.distribute`` strategy normalize by the statistics
            of the global batch. On one replica it makes no difference.
        virtual_batch_size: Number of examples that are normalized together (ghost batch
            normalization): the batch is cut into groups of this size, each with its own statistics,
            of which the moving statistics take the average. The batch size must be a multiple of
            it.
        freeze_statistics: Whether the layer runs in inference mode whatever ``training`` says: the
            moving statistics stand still and are what it normalizes by. No outer call and no outer
            ``trainable`` overrides it. An attribute of the same name, which `tfbn.freeze` sets.
        freeze_affine: Whether gamma and beta stay out of ``trainable_variables``, whatever any outer
            ``trainable`` says. Likewise.
        **kwargs: ``name``, ``dtype``, ``trainable``, as for every Keras layer.

    Call arguments:
        inputs: Floating-point tensor of rank 2 or more, batch first.
        training: Whether to normalize by the batch and update the moving statistics: a bool, a
            boolean tensor, or None for what the enclosing call says.
        mask: Optional boolean tensor; only positions where it is True count in the statistics, all
            are normalized. It broadcasts to ``inputs``; a mask of lower rank names the leading
            axes, as Keras's (batch, time) masks do.

    Input shape:
        Any, with a known size along ``axis``. Output shape: the same.

    Weights:
        gamma, beta (trainable, where present), moving_mean, moving_variance (non-trainable), in
        Keras's order; at least float32 under every dtype policy. ``renorm`` adds Keras's
        moving_stddev, renorm_mean and renorm_stddev, ``momentum=None`` adds update_count.

    Raises:
        TypeError: For an argument of the wrong kind; integer, string, ragged or sparse inputs.
        ValueError: For an argument out of range; contradictory arguments; an axis that the input
            does not have, the batch axis, or an axis of unknown size; another rank or number of
            channels than at build; a mask that does not broadcast.
        RuntimeError: For a call in training mode where replicas cannot meet.
        tf.errors.InvalidArgumentError: When the batch size, known only as the graph runs, is no
            multiple of ``virtual_batch_size``.

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
            return self.add_weight(
                shape=shape,
                dtype=dtype,
                name=name,
                initializer=initializer,
                autocast=False,
                **kwargs,
            )

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
        self.moving_mean = add("moving_mean", self.moving_mean_initializer, trainable=False)
        self.moving_variance = add(
            "moving_variance", self.moving_variance_initializer, trainable=False
        )
        if self.renorm:
            stddev_initializer = renorm.stddev_initializer(self.moving_variance_initializer)
            self.moving_stddev = add("moving_stddev", stddev_initializer, trainable=False)
            self.renorm_mean = add(
                "renorm_mean", renorm.cloned(self.moving_mean_initializer), trainable=False
            )
            self.renorm_stddev = add("renorm_stddev", stddev_initializer, trainable=False)
        if self.momentum is None:
            self.update_count = self.add_weight(
                shape=(), dtype="int64", name="update_count", initializer="zeros", trainable=False
            )
        self._sync_affine_trainable()

    @property
    def trainable(self) -> bool:
        """Whether the layer learns, as in Keras; where it is False, the layer runs in inference mode."""
        return super().trainable

    @trainable.setter
    def trainable(self, value: bool) -> None:
        keras.layers.Layer.trainable.fset(self, value)
        self._sync_affine_trainable()

    @property
    def freeze_affine(self) -> bool:
        """Whether gamma and beta are kept from learning, whatever ``trainable`` is set to."""
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
        """Takes one step of the moving statistics towards these moments.

        It is what a call in training mode does with the moments of its batch. A training loop that
        pools the moments of several batches calls it once with the result.

        Args:
            moments: Count, mean and biased variance per channel. A channel with count 0 stays as it
                is; and if the mean or variance of any channel that counts is not finite, nothing
                moves at all.
        """
        moments = Moments(*(tf.cast(m, self.moving_mean.dtype) for m in moments))
        usable = moving_average.can_update(moments)
        rate = tf.where(usable, self._batch_weight(usable), 0)
        moving_average.update_moving_average(self.moving_mean, moments.mean, rate)
        if not self.renorm:
            moving_average.update_moving_average(self.moving_variance, moments.variance, rate)
            return
        stddev = tf.sqrt(moments.variance + self.epsilon)
        renorm_rate = tf.where(usable, tf.constant(1 - self.renorm_momentum, rate.dtype), 0)
        moving_average.update_moving_average(self.renorm_mean, moments.mean, renorm_rate)
        moving_average.update_moving_average(self.renorm_stddev, stddev, renorm_rate)
        moving_average.update_moving_average(self.moving_stddev, stddev, rate)
        # As Keras does: the average is taken of the standard deviation, and the variance derived
        # from it.
        derived = tf.nn.relu(tf.square(self.moving_stddev) - self.epsilon)
        self.moving_variance.assign(tf.where(usable, derived, self.moving_variance))

    def _batch_weight(self, usable: tf.Tensor) -> tf.Tensor:
        """How much a batch weighs against the old moving statistics."""
        if self.momentum is not None:
            return tf.constant(1 - self.momentum, self.moving_mean.dtype)
        self.update_count.assign_add(tf.cast(tf.reduce_any(usable), self.update_count.dtype))
        return tf.math.reciprocal_no_nan(tf.cast(self.update_count, self.moving_mean.dtype))

    def _train(self, x: tf.Tensor, mask: tf.Tensor | None) -> tf.Tensor:
        y, moments = self._by_own_statistics(x, mask)
        self._update_or_collect(moments)
        return y

    def _train_where(self, training: tf.Tensor, x: tf.Tensor, mask: tf.Tensor | None) -> tf.Tensor:
        """Trains or infers, as is known only when the graph runs."""
        if replicas.num_replicas() == 1:
            return tf.cond(training, lambda: self._train(x, mask), lambda: self._infer(x))
        # Replicas cannot meet in a branch: they meet outside, where to infer is to have counted nothing.
        if self.synchronized:
            own, moments = self._by_own_statistics(x, mask)
            y = tf.cond(training, lambda: own, lambda: self._infer(x))
            moments = moments._replace(count=tf.where(training, moments.count, 0))
        else:
            nothing = tf.zeros(self.moving_mean.shape, statistics_dtype(x.dtype))
            count = tf.zeros([], nothing.dtype) if mask is None else nothing

            def own() -> tuple[tf.Tensor, Moments]:
                y, moments = self._by_own_statistics(x, mask)
                # TensorFlow would differentiate what leaves a branch, and fail.
                return y, Moments(*map(tf.stop_gradient, moments))

            y, moments = tf.cond(
                training, own, lambda: (self._infer(x), Moments(count, nothing, nothing))
            )
        self._update_or_collect(moments)
        return y

    def _by_own_statistics(self, x: tf.Tensor, mask: tf.Tensor | None) -> tuple[tf.Tensor, Moments]:
        if self.virtual_batch_size is not None:
            y, moments = self._by_virtual_batches(x, mask, self.virtual_batch_size)
        elif self.renorm:
            y, moments = self._by_renorm(x, mask)
        else:
            y, moments = self._by_batch(x, self._scale(x), self._offset(x), self._axes, mask)
        return tf.cast(y, self.compute_dtype), moments

    def _update_or_collect(self, moments: Moments) -> None:
        """Hands the moments to who asked for them, or moves the statistics, on all replicas alike."""
        receive = collect_moments.receiver()
        if receive is not None:
            receive(self, moments)
            return
        if not self.synchronized:  # Else they are of the global batch already.
            (moments,) = replicas.all_reduce_mean([moments])
        self.update_statistics(moments)

    def _infer(self, x: tf.Tensor) -> tf.Tensor:
        dtype = statistics_dtype(x.dtype)
        y = normalize(
            x,
            tf.cast(self.moving_mean, dtype),
            tf.cast(self.moving_variance, dtype),
            self._scale(x),
            self._offset(x),
            axes=self._axes,
            epsilon=self.epsilon,
        )
        return tf.cast(y, self.compute_dtype)

    def _by_batch(
        self,
        x: tf.Tensor,
        scale: tf.Tensor,
        offset: tf.Tensor,
        axes: Sequence[int],
        mask: tf.Tensor | None,
    ) -> tuple[tf.Tensor, Moments]:
        return normalize_batch(
            x,
            scale,
            offset,
            axes=axes,
            epsilon=self.epsilon,
            mask=mask,
            synchronized=self.synchronized,
        )

    def _by_virtual_batches(
        self, x: tf.Tensor, mask: tf.Tensor | None, size: int
    ) -> tuple[tf.Tensor, Moments]:
        groups = virtual_batches.split(x, size)
        if mask is not None:
            everywhere = tf.broadcast_to(mask, tf.shape(x))
            mask = virtual_batches.split(tf.ensure_shape(everywhere, x.shape), size)
        number = tf.shape(groups)[0]
        y, moments = self._by_batch(
            groups,
            virtual_batches.repeat(self._scale(x), number),
            virtual_batches.repeat(self._offset(x), number),
            virtual_batches.shifted_axes(self._axes),
            mask,
        )
        return virtual_batches.ungroup(y, x), virtual_batches.average(moments)

    def _by_renorm(self, x: tf.Tensor, mask: tf.Tensor | None) -> tuple[tf.Tensor, Moments]:
        scale, offset = self._scale(x), self._offset(x)
        # Once for the moments, which r and d need; then all of it at once, so that half precision rounds only once.
        _, moments = self._by_batch(x, scale, offset, self._axes, mask)
        r, d = renorm.corrections(
            moments,
            tf.cast(self.renorm_mean, scale.dtype),
            tf.cast(self.renorm_stddev, scale.dtype),
            self.renorm_clipping or {},
            self.epsilon,
        )
        y, _ = self._by_batch(x, r * scale, d * scale + offset, self._axes, mask)
        return y, moments

    def _scale(self, x: tf.Tensor) -> tf.Tensor:
        dtype = statistics_dtype(x.dtype)
        if self.gamma is None:
            return tf.ones(self.moving_mean.shape, dtype)
        return tf.cast(self.gamma, dtype)

    def _offset(self, x: tf.Tensor) -> tf.Tensor:
        dtype = statistics_dtype(x.dtype)
        if self.beta is None:
            return tf.zeros(self.moving_mean.shape, dtype)
        return tf.cast(self.beta, dtype)

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
