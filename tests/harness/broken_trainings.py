"""Trainings that go wrong in a known way, and healthy ones, on scikit-learn's handwritten digits.

Each case makes a trained model and the data to diagnose it with, and names the finding that is right.
`python -m benchmarks.diagnosis` runs them all; the tests run a handful on the small network.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import layers

import tfbn
from training_lab import (
    BATCH,
    CLASSES,
    EPOCHS,
    NETWORKS,
    PIXELS,
    RATE,
    TRAINING,
    Arrays,
    Fixed,
    Lab,
    NegativeLoss,
    Trained,
    Unaware,
    by_class,
    contrast,
    custom_loop,
    inverted,
    policy,
    prices,
    sequences,
    shifted,
)


@dataclasses.dataclass(frozen=True)
class Case:
    """A way to train a model.

    Attributes:
        name: What it is called.
        expected: The kinds of finding that are right as the first one; empty if none is.
        train: Makes the trained model.
        networks: The networks that it can be done to.
        layer: The only layer that it breaks; empty if it breaks both. The other is immune.
        cured: Whether the cure that the finding prints must bring the loss back.
    """

    name: str
    expected: tuple[str, ...]
    train: Callable[[Lab], Trained]
    networks: tuple[str, ...] = NETWORKS
    layer: str = ""
    cured: bool = False

    def right_kinds(self, layer: str) -> tuple[str, ...]:
        """The kinds that are right for this layer; empty if it is healthy."""
        return self.expected if self.layer in ("", layer) else ()


CASES: dict[str, Case] = {}


def case(*expected: str, **properties: Any) -> Callable[[Callable[[Lab], Trained]], Any]:
    def register(train: Callable[[Lab], Trained]) -> Callable[[Lab], Trained]:
        CASES[train.__name__] = Case(train.__name__, expected, train, **properties)
        return train

    return register


# Healthy trainings


@case()
def healthy(lab: Lab) -> Trained:
    return lab.trained(lab.healthy())


@case()
def healthy_in_validation(lab: Lab) -> Trained:
    return lab.trained(lab.healthy(), lab.test)


@case()
def healthy_without_labels(lab: Lab) -> Trained:
    return lab.trained(lab.healthy(), lab.train[0])


@case()
def healthy_in_batches_of_8(lab: Lab) -> Trained:
    return lab.trained(lab.healthy(), tuple(part[:400] for part in lab.train), batch_size=8)


@case()
def healthy_on_16_images(lab: Lab) -> Trained:
    return lab.trained(lab.healthy(), tuple(part[:16] for part in lab.train))


@case()
def healthy_on_sorted_data(lab: Lab) -> Trained:
    return lab.trained(lab.healthy(), by_class(lab.train))


@case()
def healthy_on_two_classes(lab: Lab) -> Trained:
    kept = lab.train[1] < 2
    return lab.trained(lab.healthy(), tuple(part[kept] for part in lab.train))


@case()
def constant_learning_rate(lab: Lab) -> Trained:
    return lab.trained(lab.fit(lab.build(), constant=True, rate=RATE[lab.network] / 3))


@case()
def quick_momentum(lab: Lab) -> Trained:
    return lab.trained(lab.fit(lab.build(momentum=0.9)))


@case()
def augmented_images(lab: Lab) -> Trained:
    """Augmentation in the input pipeline, in training only."""
    random = np.random.default_rng(lab.seed)
    x, y = lab.train
    copies = []
    for _ in range(4):
        moved = np.roll(x, random.integers(-1, 2) * PIXELS[lab.network] // 8, axis=2)
        gain = random.uniform(0.8, 1.2, (len(x), 1, 1, 1))
        copies.append(moved * gain + 0.1 * random.normal(size=x.shape))
    augmented = np.concatenate(copies).astype("float32"), np.tile(y, len(copies))
    return lab.trained(lab.fit(lab.build(), EPOCHS[lab.network] / 4, augmented))


@case()
def augmenting_layers(lab: Lab) -> Trained:
    """Augmentation by layers of the model, which do nothing in inference."""
    first = (layers.RandomTranslation(0.08, 0.08), layers.GaussianNoise(0.1))
    return lab.trained(lab.fit(lab.build(first=first)))


@case()
def dropout_behind_the_last_normalization(lab: Lab) -> Trained:
    return lab.trained(lab.fit(lab.build(head_dropout=0.5)))


@case()
def frozen_after_training(lab: Lab) -> Trained:
    model = lab.healthy()
    model.trainable = False
    return lab.trained(lab.compile(model))


@case()
def recalibrated(lab: Lab) -> Trained:
    model = lab.healthy()
    tfbn.recalibrate(model, lab.train[0], upstream="batch", batch_size=256)
    return lab.trained(model)


@case()
def averaged_and_recalibrated(lab: Lab) -> Trained:
    model = lab.fit(lab.build(), use_ema=True, ema_momentum=0.98)
    tfbn.recalibrate(model, lab.train[0], upstream="batch", batch_size=256)
    return lab.trained(model)


@case()
def negative_loss(lab: Lab) -> Trained:
    return lab.trained(lab.fit(lab.build(), loss=NegativeLoss()))


@case()
def bfloat16(lab: Lab) -> Trained:
    with policy("mixed_bfloat16"):
        return lab.trained(lab.fit(lab.build()))


# Too slow a momentum


@case("lagging_statistics", cured=True)
def twenty_steps(lab: Lab) -> Trained:
    """Keras's default momentum, and too few steps for it."""
    steps = {"small": 30, "resnet20": 60, "mobilenetv2": 80}[lab.network]
    return lab.trained(lab.fit(lab.build(momentum=0.99), steps * BATCH / TRAINING))


@case("lagging_statistics", networks=("mobilenetv2",), cured=True)
def default_momentum_and_small_variances(lab: Lab) -> Trained:
    """450 steps leave 1 % of the initial variance: far more than the true one of depthwise convolutions."""
    return lab.trained(lab.fit(lab.build(momentum=0.99), 20))


@case("lagging_statistics", cured=True)
def momentum_0999(lab: Lab) -> Trained:
    """As in keras.applications: 360 steps leave 0.7 of the initial statistics."""
    return lab.trained(lab.fit(lab.build(momentum=0.999), 360 * BATCH / TRAINING))


@case("lagging_statistics", cured=True)
def momentum_09999(lab: Lab) -> Trained:
    return lab.trained(lab.fit(lab.build(momentum=0.9999)))


@case("lagging_statistics", cured=True)
def lag_in_a_loop_of_ones_own(lab: Lab) -> Trained:
    """No optimizer tells how many steps there were."""
    return lab.trained(lab.lagging())


@case("lagging_statistics", cured=True)
def lag_with_a_negative_loss(lab: Lab) -> Trained:
    model = lab.build(momentum=0.999)
    return lab.trained(lab.fit(model, 360 * BATCH / TRAINING, loss=NegativeLoss()))


@case("lagging_statistics", cured=True)
def fine_tuned_for_a_few_steps(lab: Lab) -> Trained:
    """On a new domain: most of the statistics are still those of the old one."""
    model = lab.healthy()
    for layer in lab.norms(model):
        layer.momentum = 0.99
    data = contrast(lab.train)
    lab.fit(model, 20 * BATCH / TRAINING, data, rate=RATE[lab.network] / 3)
    return Trained(model, data, contrast(lab.test))


# Statistics of something else


@case("other_data_or_weights", cured=True)
def statistics_of_another_model(lab: Lab) -> Trained:
    model, other = lab.healthy(), lab.fit(lab.build(seed=7))
    for layer, source in zip(lab.norms(model), lab.norms(other), strict=True):
        layer.moving_mean.assign(source.moving_mean)
        layer.moving_variance.assign(source.moving_variance)
    return lab.trained(model)


@case("other_data_or_weights", "rescaled_inputs", cured=True)
def domain_of_other_colours(lab: Lab) -> Trained:
    return shifted(lab, lambda x: x * np.array([0.2, 1.0, 1.6], "float32"))


@case("other_data_or_weights")
def domain_inverted(lab: Lab) -> Trained:
    return shifted(lab, lambda x: 1 - x)


@case("rescaled_inputs", "other_data_or_weights", cured=True)
def domain_of_less_contrast(lab: Lab) -> Trained:
    return shifted(lab, lambda x: 0.3 * x + 0.4)


@case("other_data_or_weights", cured=True)
def domain_of_noise(lab: Lab) -> Trained:
    random = np.random.default_rng(lab.seed)
    return shifted(lab, lambda x: (x + 0.5 * random.normal(size=x.shape)).astype("float32"))


@case("rescaled_inputs", cured=True)
def preprocessing_forgotten(lab: Lab) -> Trained:
    """Trained on values from 0 to 1, used on values from 0 to 255."""
    return shifted(lab, lambda x: 255 * x)


@case("rescaled_inputs", cured=True)
def preprocessing_done_twice(lab: Lab) -> Trained:
    return shifted(lab, lambda x: x / 16)


# Weights that changed after


@case("other_data_or_weights", "rescaled_inputs", cured=True)
def other_data_soon_after_recalibration(lab: Lab) -> Trained:
    """Few steps, for which the moving averages would still lag, had they not been recalibrated."""
    model = lab.fit(lab.build(), 150 * BATCH / TRAINING)
    tfbn.recalibrate(model, lab.train[0], batch_size=256)
    data, test = contrast(lab.train), contrast(lab.test)
    return Trained(model, data, test)


@case("averaged_weights", cured=True)
def averaged_weights(lab: Lab) -> Trained:
    model = lab.build(momentum=0.9)
    options = {"use_ema": True, "ema_momentum": 0.97, "constant": True}
    return lab.trained(lab.fit(model, 3, rate=5 * RATE[lab.network], **options))


@case("other_data_or_weights", "changed_weights", cured=True)
def weights_averaged_by_hand(lab: Lab) -> Trained:
    """The trained weights of several checkpoints, averaged; the statistics are those of the last one."""
    model = lab.build(momentum=0.9)
    checkpoints = []
    for order in range(4):
        lab.fit(model, 2, rate=10 * RATE[lab.network], constant=True, order=order)
        checkpoints.append([v.numpy() for v in model.trainable_variables])
    for variable, *values in zip(model.trainable_variables, *checkpoints, strict=True):
        variable.assign(np.mean(values, axis=0))
    return lab.trained(lab.compile(model))


@case("changed_weights", cured=True)
def surgery(lab: Lab) -> Trained:
    """One layer in the middle got other weights."""
    model = lab.healthy()
    kernels = [v for v in model.trainable_variables if v.name == "kernel"]
    kernel = kernels[len(kernels) // 2]
    noise = np.random.default_rng(lab.seed).normal(size=kernel.shape)
    kernel.assign(kernel + 2 * np.std(kernel) * noise)
    return lab.trained(model)


@case("pruned_weights", cured=True)
def pruning(lab: Lab) -> Trained:
    model = lab.healthy()
    for variable in model.trainable_variables:
        if "kernel" in variable.name and "head" not in variable.path:
            values = variable.numpy()
            limit = np.quantile(np.abs(values), 0.5)
            variable.assign(np.where(np.abs(values) < limit, 0, values))
    return lab.trained(model)


# The flag


@case("trained_in_inference_mode")
def loop_without_training_true(lab: Lab) -> Trained:
    model = lab.build()
    lab.compile(model)
    custom_loop(lab, model, training=False)
    return lab.trained(model)


@case("never_updated", cured=True)
def updates_lost(lab: Lab) -> Trained:
    """A loop that drops the non-trainable variables, as `stateless_call` makes easy."""
    model = lab.build()
    with tfbn.pause_statistics(model):
        lab.fit(model)
    return lab.trained(model)


@case("training_not_passed_on")
def call_that_says_training_false(lab: Lab) -> Trained:
    model = Fixed(lab.build(), training=False)
    model(lab.train[0][:1])
    return lab.trained(lab.fit(model))


@case("training_not_passed_on")
def call_that_takes_no_training(lab: Lab) -> Trained:
    """Keras's `fit` then passes none either, and the layers run in inference mode."""
    model = Unaware(lab.build())
    model(lab.train[0][:1])
    return lab.trained(lab.fit(model))


@case("training_forced")
def training_true_at_test_time(lab: Lab) -> Trained:
    model = Fixed(lab.build(), training=True)
    model(lab.train[0][:1])
    return lab.trained(lab.fit(model))


@case("training_false_overridden")
def training_false_that_keras_overrides(lab: Lab) -> Trained:
    model = lab.healthy()
    base = keras.Model(model.inputs, model.layers[-1].input, name="base")
    image = keras.Input(model.input_shape[1:])
    model = keras.Model(image, layers.Dense(CLASSES)(base(image, training=False)))
    return lab.trained(lab.fit(model, 4, rate=RATE[lab.network] / 10))


# Bad batches


@case("not_finite_statistics", layer="keras", cured=True)
def one_batch_with_a_nan(lab: Lab) -> Trained:
    model = lab.healthy()
    batch = lab.train[0][:BATCH].copy()
    batch[3, 2, 2] = np.nan
    model(batch, training=True)
    return lab.trained(model)


@case("not_finite_statistics", layer="keras", cured=True)
def one_batch_with_an_infinity(lab: Lab) -> Trained:
    model = lab.healthy()
    batch = lab.train[0][:BATCH].copy()
    batch[3, 2, 2] = np.inf
    model(batch, training=True)
    return lab.trained(model)


@case("not_finite_inputs")
def a_weight_that_is_nan(lab: Lab) -> Trained:
    model = lab.healthy()
    kernel = next(v for v in model.trainable_variables if v.name == "kernel")
    values = kernel.numpy()
    values.flat[0] = np.nan
    kernel.assign(values)
    return lab.trained(model)


@case("half_precision_overflow")
def overflow_in_half_precision(lab: Lab) -> Trained:
    """The data has larger values than float16 can hold."""
    with policy("mixed_float16"):
        model = lab.build()
    model.set_weights(lab.healthy().get_weights())
    scaled, test = ((x * np.float32(1e6), y) for x, y in (lab.train, lab.test))
    return Trained(lab.compile(model), scaled, test)


# Batches


@case("small_batches")
def batches_of_one(lab: Lab) -> Trained:
    data = tuple(part[:800] for part in lab.train)
    return lab.trained(lab.fit(lab.build(), 2, data, batch_size=1))


@case("small_batches", networks=("small",))
def batches_of_two(lab: Lab) -> Trained:
    return lab.trained(lab.fit(lab.build(), 4, batch_size=2))


@case("unlike_batches")
def sorted_classes(lab: Lab) -> Trained:
    """A data set sorted by class, read in order."""
    model = lab.fit(lab.build(), data=by_class(lab.train), shuffle=False)
    return lab.trained(model)


@case("replicas_diverged", networks=("small",), layer="keras")
def replicas_with_unlike_shares(lab: Lab) -> Trained:
    """Two replicas, each with half of the classes. It needs two devices."""
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    x, y = by_class(lab.train)
    random = np.random.default_rng(lab.seed)
    halves = random.permutation(704), 704 + random.permutation(704)
    rows = np.stack([part.reshape(-1, BATCH // 2) for part in halves], axis=1).ravel()
    with strategy.scope():
        model = lab.build()
        lab.fit(model, data=(x[rows], y[rows]), shuffle=False)
    return lab.trained(model)


# Layers that behave differently in training


@case("variance_shift", cured=True)
def dropout_before_normalization(lab: Lab) -> Trained:
    return lab.trained(lab.fit(lab.build(dropout=0.5)))


@case("frozen_statistics")
def frozen_before_training(lab: Lab) -> Trained:
    model = lab.build()
    for layer in lab.norms(model):
        layer.trainable = False
    return lab.trained(lab.fit(model))


@case("frozen_statistics")
def frozen_base_on_another_domain(lab: Lab) -> Trained:
    """All batch normalization is frozen, everything else is fine-tuned: freezing is right."""
    model = lab.healthy()
    for layer in lab.norms(model):
        layer.trainable = False
    data, test = (inverted(part) for part in (lab.train, lab.test))
    return Trained(lab.fit(model, 8, data), data, test)


@case("frozen_statistics", cured=True)
def frozen_by_mistake(lab: Lab) -> Trained:
    """Statistics that lag, frozen as they were, on the data of the training."""
    model = lab.lagging()
    for layer in lab.norms(model):
        layer.trainable = False
    return lab.trained(lab.compile(model))


# Arguments


@case("changed_epsilon", cured=True)
def another_epsilon_at_load(lab: Lab) -> Trained:
    """Trained with PyTorch's epsilon on inputs of small variance, loaded with Keras's."""
    small = lab.train[0] * np.float32(0.02), lab.train[1]
    model = lab.fit(lab.build(epsilon=1e-5, momentum=0.9), data=small)
    loaded = lab.build(epsilon=1e-3, momentum=0.9)
    loaded.set_weights(model.get_weights())
    return Trained(lab.compile(loaded), small, (lab.test[0] * np.float32(0.02), lab.test[1]))


@case("noisy_statistics", cured=True)
def another_momentum_at_load(lab: Lab) -> Trained:
    """PyTorch's momentum, 0.1, taken for Keras's: only the last batch counts."""
    return lab.trained(lab.fit(lab.build(momentum=0.1), batch_size=16, constant=True))


# Channels


@case("constant_channels")
def dead_units(lab: Lab) -> Trained:
    """ReLUs that never let anything through, by a large negative beta before them."""
    model = lab.healthy()
    norms = lab.norms(model)
    layer = norms[len(norms) // 2 - 1]
    layer.beta.assign(np.full(layer.beta.shape, -50.0))
    return lab.trained(model)


@case("constant_channels")
def dead_first_convolution(lab: Lab) -> Trained:
    model = lab.healthy()
    kernel = next(v for v in model.trainable_variables if v.name == "kernel")
    kernel.assign(np.zeros(kernel.shape))
    return lab.trained(model)


@case("negative_variance", cured=True)
def negative_variances(lab: Lab) -> Trained:
    model = lab.healthy()
    for layer in lab.norms(model)[::2]:
        layer.moving_variance.assign(-layer.moving_variance.numpy())
    return lab.trained(model)


# Data


@case("varied_batches", networks=("small",), cured=True)
def inputs_with_rare_large_values(lab: Lab) -> Trained:
    """A hidden layer that sees other values behind a layer that normalizes by batches than behind inference."""
    model, data = prices(lab)
    return Trained(model, data, data, {"batch_size": 32})


@case("nothing_learned", networks=("small",))
def labels_in_another_order(lab: Lab) -> Trained:
    x, y = lab.train
    return lab.trained(lab.healthy(), (x, np.random.default_rng(lab.seed).permutation(y)))


# Sequences


@case("masks_ignored", networks=("small",))
def masks_ignored(lab: Lab) -> Trained:
    """Trained without masks, used with them."""
    blind, data = sequences(lab, mask=False)
    model, _ = sequences(lab, epochs=0)
    model.set_weights(blind.get_weights())
    return Trained(model, data, data)


@case(networks=("small",))
def healthy_with_masks(lab: Lab) -> Trained:
    model, data = sequences(lab)
    return Trained(model, data, data)


@case("empty_batches", networks=("small",), layer="keras", cured=True)
def fully_masked_batches(lab: Lab) -> Trained:
    """Batches of nothing but padding, which pull the statistics of Keras's layer to 0."""
    model, data = sequences(lab)
    for _ in range(10):
        model(np.zeros((BATCH, *data[0].shape[1:]), "float32"), training=True)
    return Trained(model, data, data)


@case("not_finite_statistics", networks=("small",), layer="keras", cured=True)
def one_empty_batch(lab: Lab) -> Trained:
    model, data = sequences(lab, mask=False)
    model(data[0][:0], training=True)
    return Trained(model, data, data)


# Judging


def loss_on(model: keras.Model, data: Arrays) -> Mapping[str, float]:
    """The loss and the metrics in inference mode."""
    return model.evaluate(*data, verbose=0, return_dict=True, batch_size=256)


def apply_cure(trained: Trained, cure: str) -> None:
    """Runs the code of a cure."""
    data = trained.data
    exec(cure, {"tfbn": tfbn, "keras": keras, "model": trained.model, "data": data})
