"""Whole networks of Keras 3 or 2, with any layer in place of batch normalization."""

import functools
import time
from typing import Any

import numpy as np
import tensorflow as tf

from benchmarks import memory
from benchmarks.cases import SIZES, ModelCase
from benchmarks.keras_layers import device
from benchmarks.program import Program

CLASSES = 1000
MOMENTUM = 0.9
# Nothing is to be learned from noise, and a network without normalization would diverge: all the
# arithmetic of a step is done, and every step is like the first.
LEARNING_RATE = 0.0


def program(layer_class: Any, library: Any, case: ModelCase) -> Program:
    """Runs one training step with SGD and momentum, or one inference, from a batch to the loss or the logits."""
    model, held_before = built(layer_class, library, case.subject, case.precision)
    random = np.random.default_rng(0)
    size = SIZES[device()][case.subject]
    images = tf.constant(random.uniform(-1, 1, (case.batch, size, size, 3)), tf.float32)
    labels = tf.constant(random.integers(0, CLASSES, case.batch))
    optimizer = library.optimizers.SGD(LEARNING_RATE, momentum=MOMENTUM)
    variables = model.trainable_variables

    def train(images: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
        with tf.GradientTape() as tape:
            logits = tf.cast(model(images, training=True), tf.float32)
            loss = tf.reduce_mean(
                tf.nn.sparse_softmax_cross_entropy_with_logits(labels=labels, logits=logits)
            )
        gradients = tape.gradient(loss, variables)
        optimizer.apply_gradients(zip(gradients, variables, strict=True))
        return loss

    def infer(images: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
        del labels
        return model(images, training=False)

    function: Any = train if case.phase == "train" else infer
    if case.phase == "train":
        optimizer.build(variables)
    trace_seconds = None
    if case.mode != "eager":
        function = tf.function(function, jit_compile=case.mode == "xla", autograph=False)
        begin = time.perf_counter()
        function.get_concrete_function(images, labels)
        trace_seconds = time.perf_counter() - begin

    def peak(run: Any) -> float | None:
        if device() == "gpu":
            return memory.peak_on_gpu(run)
        most = memory.peak(run)
        return None if most is None or held_before is None else most - held_before

    return Program(
        step=lambda: function(images, labels),
        wait=tf.test.experimental.sync_devices,
        values=lambda result: {
            "loss" if case.phase == "train" else "logits": tf.cast(result, tf.float32).numpy()
        },
        parts=1,
        device=device(),
        trace_seconds=trace_seconds,
        peak=peak,
    )


@functools.lru_cache(maxsize=1)
def built(layer_class: Any, library: Any, name: str, precision: str) -> tuple[Any, float | None]:
    """Builds the network; also returns the megabytes that the process held before."""
    tf.random.normal([]).numpy()  # TensorFlow itself starts up with the first operation.
    held = memory.resident()
    policy = precision if precision == "float32" else f"mixed_{precision}"
    library.mixed_precision.set_global_policy(policy)
    size = SIZES[device()][name]
    if name == "ResNet20":
        stock = _resnet20(library)
    else:
        stock = getattr(library.applications, name)(
            weights=None,
            input_shape=(size, size, 3),
            classes=CLASSES,
            classifier_activation=None,
        )

    def replace(layer: Any) -> Any:
        original = isinstance(layer, library.layers.BatchNormalization)
        return (layer_class if original else type(layer)).from_config(layer.get_config())

    model = library.models.clone_model(stock, clone_function=replace)
    # Keras 2 and 3 draw different numbers from the same seed.
    random = np.random.default_rng(0)
    for weight in model.weights:
        if len(weight.shape) > 1:
            deviation = np.sqrt(2 / np.prod(weight.shape[:-1]))
            weight.assign(deviation * random.standard_normal(weight.shape, np.float32))
    return model, held


def _resnet20(library: Any) -> Any:
    """ResNet-20 for 32×32 images, as in section 4.2 of He et al. (2015), with projection shortcuts."""
    layers = library.layers

    def normalized(x: Any, filters: int, size: int, strides: int = 1) -> Any:
        x = layers.Conv2D(filters, size, strides, padding="same", use_bias=False)(x)
        return layers.BatchNormalization()(x)

    image = library.Input((32, 32, 3))
    x = layers.ReLU()(normalized(image, 16, 3))
    for filters in (16, 32, 64):
        for block in range(3):
            strides = 2 if block == 0 and filters > 16 else 1
            shortcut = x if strides == 1 else normalized(x, filters, 1, strides)
            x = layers.ReLU()(normalized(x, filters, 3, strides))
            x = layers.ReLU()(layers.Add()([normalized(x, filters, 3), shortcut]))
    x = layers.GlobalAveragePooling2D()(x)
    return library.Model(image, layers.Dense(CLASSES)(x))
