"""The loop is to Keras users what `fit` is: losses, metrics, callbacks, precision, errors."""

import contextlib
import csv
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from tfbn._layer.batch_normalization import BatchNormalization
from tfbn._training.class_weights import class_weights
from tfbn._training.loop import TrainingLoop

LAYERS = keras.layers


def data(number: int = 24, classes: int = 3) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(number)
    return rng.normal(2, 3, (number, 4)).astype("float32"), rng.integers(0, classes, number)


def network(outputs: int = 3, dtype: str | None = None) -> keras.Model:
    """The same network at every call."""
    keras.utils.set_random_seed(1)
    inputs = keras.Input((4,))
    x = LAYERS.Dense(5, use_bias=False, dtype=dtype)(inputs)
    x = LAYERS.ReLU(dtype=dtype)(BatchNormalization(dtype=dtype)(x))
    return keras.Model(inputs, LAYERS.Dense(outputs, dtype=dtype)(x))


def two_headed(container: type = list) -> keras.Model:
    keras.utils.set_random_seed(1)
    inputs = keras.Input((4,))
    x = BatchNormalization()(inputs)
    heads = {"a": LAYERS.Dense(1, name="a")(x), "b": LAYERS.Dense(3, name="b")(x)}
    return keras.Model(inputs, heads if container is dict else list(heads.values()))


SPARSE = "sparse_categorical_crossentropy"
TWO_HEADED = {
    "lists": (
        list,
        {"loss": ["mse", keras.losses.SparseCategoricalCrossentropy(from_logits=True)]},
    ),
    "dicts": (
        dict,
        {
            "loss": {"a": "mae", "b": lambda y, p: keras.ops.mean(p, -1) ** 2},
            "loss_weights": {"a": 0.25, "b": 2.0},
            "metrics": {"a": ["mae"], "b": ["accuracy", "sparse_top_k_categorical_accuracy"]},
            "weighted_metrics": {"a": ["mse"]},
        },
    ),
}


@pytest.mark.parametrize("kind", TWO_HEADED)
def test_losses_and_metrics_of_several_outputs_equal_those_of_fit(kind):
    container, settings = TWO_HEADED[kind]
    x, labels = data()
    y = (x[:, :1], labels) if container is list else {"a": x[:, :1], "b": labels}
    batches = tf.data.Dataset.from_tensor_slices((x, y)).batch(8)
    ours, theirs = two_headed(container), two_headed(container)
    seen = TrainingLoop(ours, "sgd", **settings).fit(batches, epochs=2, verbose=0)
    theirs.compile("sgd", **settings)
    expected = theirs.fit(batches, epochs=2, shuffle=False, verbose=0)
    assert seen.history == expected.history
    for mine, other in zip(ours.get_weights(), theirs.get_weights(), strict=True):
        np.testing.assert_array_equal(mine, other)


OPTIMIZERS = {
    "name": "adam",
    "config": {"class_name": "SGD", "config": {"learning_rate": 0.5, "momentum": 0.5}},
    "schedule": keras.optimizers.SGD(keras.optimizers.schedules.ExponentialDecay(0.5, 2, 0.5)),
    "averaging": keras.optimizers.SGD(0.5, use_ema=True, clipnorm=0.1),
    "decaying": keras.optimizers.AdamW(0.1, weight_decay=0.1),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_every_kind_of_optimizer_does_what_it_does_in_fit(kind):
    def optimizer() -> Any:
        given = OPTIMIZERS[kind]
        return type(given).from_config(given.get_config()) if hasattr(given, "apply") else given

    x, _ = data()
    batches = tf.data.Dataset.from_tensor_slices((x, x)).batch(8)
    ours, theirs = network(4), network(4)
    TrainingLoop(ours, optimizer(), "mse").fit(batches, epochs=2, verbose=0)
    theirs.compile(optimizer(), "mse")
    theirs.fit(batches, epochs=2, shuffle=False, verbose=0)
    for mine, other in zip(ours.get_weights(), theirs.get_weights(), strict=True):
        np.testing.assert_array_equal(mine, other)


def test_arrays_may_be_passed_one_by_one_as_in_fit():
    x, y = data()
    weight = np.linspace(0, 2, len(x))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    ours, theirs = network(), network()
    loop = TrainingLoop(ours, "sgd", loss)
    theirs.compile("sgd", loss)
    fit = {"epochs": 2, "batch_size": 8, "shuffle": False, "verbose": 0}
    for weights in ({}, {"sample_weight": weight}):
        seen = loop.fit(x, y, **weights, **fit).history
        assert seen == theirs.fit(x, y, **weights, **fit).history
        result = loop.evaluate(x, y, **weights, verbose=0)
        assert result == theirs.evaluate(x, y, **weights, verbose=0, return_dict=True)


@pytest.mark.parametrize("labels", ["integers", "column", "one-hot"])
def test_class_weights_equal_those_of_fit(labels):
    x, y = data()
    y = {"integers": y, "column": y[:, None], "one-hot": np.eye(3)[y]}[labels]
    loss = keras.losses.CategoricalCrossentropy if labels == "one-hot" else None
    loss = (loss or keras.losses.SparseCategoricalCrossentropy)(from_logits=True)
    ours, theirs = network(), network()
    fit = {"class_weight": {0: 0.5, 2: 3.0}, "batch_size": 8, "shuffle": False, "verbose": 0}
    TrainingLoop(ours, "sgd", loss).fit((x, y), **fit)
    theirs.compile("sgd", loss)
    theirs.fit(x, y, **fit)
    for mine, other in zip(ours.get_weights(), theirs.get_weights(), strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-6)


def test_the_smallest_class_weight_keeps_its_digits():
    weights = class_weights(tf.constant([0, 1, 2]), None, {0: 1e-8, 2: 3.0})
    np.testing.assert_array_equal(weights, np.float32([1e-8, 1, 3]))


class OwnLoss(keras.Model):
    """The example in the docstring of `keras.Model.compute_loss`, as Keras 3.2 had it."""

    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs)
        self.loss_tracker = keras.metrics.Mean(name="loss")

    def compute_loss(self, x, y, y_pred, sample_weight):
        loss = keras.ops.mean((y_pred - y) ** 2) + sum(self.losses)
        self.loss_tracker.update_state(loss)
        return loss

    def reset_metrics(self):
        self.loss_tracker.reset_state()

    @property
    def metrics(self):
        return [self.loss_tracker]


class OwnMetrics(keras.Model):
    """The example in the docstring of `keras.Model.compute_metrics`."""

    def compute_metrics(self, x, y, y_pred, sample_weight):
        logs = super().compute_metrics(x, y, y_pred, sample_weight)
        return logs | {"largest": keras.ops.max(y_pred)}


@pytest.mark.parametrize("kind", [OwnLoss, OwnMetrics])
def test_a_model_with_its_own_compute_loss_or_compute_metrics_trains_as_in_fit(kind):
    x, _ = data()
    histories, weights, evaluations = [], [], []
    for use_loop in (True, False):
        base = network(4)
        model = kind(base.inputs, base.outputs)
        batches = tf.data.Dataset.from_tensor_slices((x, x)).batch(10)
        fit = {"validation_data": batches, "epochs": 2, "shuffle": False, "verbose": 0}
        if use_loop:
            loop = TrainingLoop(model, "sgd", "mse")
            history = loop.fit(batches, **fit)
            evaluations.append(loop.evaluate(batches, verbose=0))
        else:
            model.compile("sgd", "mse")
            history = model.fit(batches, **fit)
            evaluations.append(model.evaluate(batches, verbose=0, return_dict=True))
        histories.append(history.history)
        weights.append(model.get_weights())
    assert histories[0] == histories[1]
    assert evaluations[0] == evaluations[1]
    for mine, other in zip(*weights, strict=True):
        np.testing.assert_array_equal(mine, other)


@pytest.mark.parametrize("name", ["train_step", "test_step"])
def test_a_model_with_its_own_step_raises(name):
    kind = type("Own", (keras.Model,), {name: lambda self, data: {}})
    base = network(4)
    model = kind(base.inputs, base.outputs)
    with pytest.raises(ValueError, match=rf"Received: a Own that overrides {name}\."):
        TrainingLoop(model, "sgd", "mse")
    assert getattr(model, "optimizer", None) is None


def test_a_model_may_add_all_its_losses_itself():
    class Model(keras.Model):
        def __init__(self):
            super().__init__()
            self.bn = BatchNormalization(gamma_regularizer="l2")

        def call(self, x, training=False):
            y = self.bn(x, training=training)
            self.add_loss(tf.reduce_mean(tf.square(y - 5)))
            return y

    model = Model()
    history = TrainingLoop(model, keras.optimizers.SGD(0.1)).fit(data()[0], epochs=20, verbose=0)
    # For each channel (beta - 5)² + gamma² in the mean, and a hundredth of gamma² in the sum.
    assert history.history["loss"][-1] < 0.2 * history.history["loss"][0]
    assert np.all(model.bn.beta.numpy() > 3)


@pytest.mark.parametrize("steps", [1, 2])
def test_an_update_that_overflows_is_skipped_and_halves_the_loss_scale(steps):
    """The scaled gradients overflow at first: such updates are left out, and the scale is halved."""
    x, y = data(32)
    loop = TrainingLoop(
        network(dtype="mixed_float16"),
        keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1), initial_scale=2.0**22),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        accumulation_steps=steps,
    )
    before = loop.model.trainable_variables[0].numpy()
    seen = []

    class Watch(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            scale = float(self.model.optimizer.dynamic_scale.numpy())
            seen.append((scale, self.model.trainable_variables[0].numpy()))

    loop.fit((x, y), batch_size=2, epochs=2, callbacks=Watch(), verbose=0)
    scales = [scale for scale, _ in seen]
    updates = seen[steps - 1 :: steps]
    assert 2.0 < scales[-1] < scales[0] * steps
    assert scales[-2] == scales[-1]  # it has found its size
    for (scale, weight), (last, old) in zip(updates, [(2.0**22, before), *updates], strict=False):
        assert np.array_equal(weight, old) == (scale < last)
    assert np.all(np.isfinite(seen[-1][1]))


def test_a_half_precision_model_trains_as_in_fit():
    x, _ = data()
    policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_float16")
    try:
        ours, theirs = network(4), network(4)
    finally:
        keras.config.set_dtype_policy(policy)
    loop = TrainingLoop(ours, "adam", "mse")
    assert isinstance(loop.optimizer, keras.optimizers.LossScaleOptimizer)
    theirs.compile("adam", "mse")
    seen = loop.fit((x, x), epochs=2, shuffle=False, verbose=0)
    expected = theirs.fit(x, x, epochs=2, shuffle=False, verbose=0)
    assert seen.history == expected.history
    for mine, other in zip(ours.get_weights(), theirs.get_weights(), strict=True):
        np.testing.assert_array_equal(mine, other)


# Callbacks


class Recorder(keras.callbacks.Callback):
    """Every call, with what it was given."""

    def __init__(self):
        super().__init__()
        self.calls = []


for name in dir(keras.callbacks.Callback):
    if name.startswith("on_") and name not in ("on_batch_begin", "on_batch_end"):

        def record(self, *args, name=name, **kwargs):
            self.calls.append((name, *args, *kwargs.values()))

        setattr(Recorder, name, record)


def test_callbacks_are_called_as_in_fit():
    x, _ = data(20)
    fit = {"epochs": 2, "batch_size": 8, "shuffle": False, "verbose": 0}
    ours, theirs = network(4), network(4)
    one, other = Recorder(), Recorder()
    TrainingLoop(ours, "sgd", "mse", ["mae"]).fit(
        (x, x), validation_data=(x, x), callbacks=[one], **fit
    )
    theirs.compile("sgd", "mse", metrics=["mae"])
    theirs.fit(x, x, validation_data=(x, x), callbacks=[other], **fit)
    assert one.params == {"accumulation_steps": 1} | other.params  # `fit` does not accumulate.
    assert one.model is ours
    assert one.calls == other.calls
    assert {name for name, *_ in one.calls} == {
        f"on_{phase}_{when}"
        for phase in ("train", "test", "epoch", "train_batch", "test_batch")
        for when in ("begin", "end")
    }


def test_a_callback_may_stop_an_evaluation():
    x, _ = data(20)
    loop, one = TrainingLoop(network(4), "sgd", "mse"), Recorder()
    loop.evaluate((x, x), batch_size=8, callbacks=one, verbose=0)
    assert [call[:2] for call in one.calls if "batch_end" in call[0]] == [
        ("on_test_batch_end", step) for step in range(3)
    ]

    class Stop(keras.callbacks.Callback):
        def on_test_batch_end(self, batch, logs=None):
            self.model.stop_evaluating = True

    first = loop.evaluate((x[:8], x[:8]), verbose=0)
    assert loop.evaluate((x, x), batch_size=8, callbacks=Stop(), verbose=0) == first
    assert loop.evaluate((x, x), batch_size=8, steps=1, verbose=0) == first
    assert loop.evaluate((x, x), batch_size=8, verbose=0) != first


def test_keras_callbacks_work_unchanged(tmp_path, capsys):
    x, _ = data()
    rates = []
    model = network(4)
    loop = TrainingLoop(model, keras.optimizers.Adam(0.1), "mse", ["mae"])
    history = loop.fit(
        (x, x),
        validation_data=(x, x),
        epochs=6,
        verbose=1,
        callbacks=[
            keras.callbacks.ModelCheckpoint(tmp_path / "{epoch}.keras"),
            keras.callbacks.ModelCheckpoint(tmp_path / "best.weights.h5", save_weights_only=True),
            keras.callbacks.TensorBoard(tmp_path / "logs", histogram_freq=1, update_freq="batch"),
            keras.callbacks.CSVLogger(tmp_path / "log.csv"),
            keras.callbacks.LearningRateScheduler(lambda epoch, rate: rate * 0.9),
            keras.callbacks.ReduceLROnPlateau(patience=2, min_delta=1e9),
            keras.callbacks.TerminateOnNaN(),
            keras.callbacks.LambdaCallback(
                on_epoch_end=lambda epoch, logs: rates.append(float(model.optimizer.learning_rate))
            ),
            keras.callbacks.EarlyStopping(
                monitor="val_mae", mode="max", patience=2, restore_best_weights=True
            ),
        ],
    )
    assert history.epoch == [0, 1, 2]
    assert list(history.history) == ["loss", "mae", "val_loss", "val_mae", "learning_rate"]
    np.testing.assert_allclose(rates, [0.09, 0.081, 0.00729], rtol=1e-5)
    rows = csv.DictReader((tmp_path / "log.csv").read_text().splitlines())
    assert [row["epoch"] for row in rows] == list("012")
    assert list((tmp_path / "logs" / "train").iterdir())
    assert list((tmp_path / "logs" / "validation").iterdir())
    printed = capsys.readouterr().out
    assert "Epoch 3/6" in printed
    assert "val_mae" in printed
    first = keras.models.load_model(tmp_path / "1.keras")
    for weight, best in zip(model.get_weights(), first.get_weights(), strict=True):
        np.testing.assert_array_equal(weight, best)  # EarlyStopping went back to it
    assert int(first.optimizer.iterations) == 1


def test_a_saved_model_continues_where_it_was(tmp_path):
    x, _ = data()
    loop = TrainingLoop(network(4), "adam", "mse")
    loop.fit((x, x), epochs=2, shuffle=False, verbose=0)
    loop.model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    resumed = TrainingLoop(loaded, loaded.optimizer, "mse")
    for one in (loop, resumed):
        one.fit((x, x), epochs=3, initial_epoch=2, shuffle=False, verbose=0)
    for weight, same in zip(loaded.get_weights(), loop.model.get_weights(), strict=True):
        np.testing.assert_array_equal(weight, same)


def test_a_callback_may_stop_training_in_mid_epoch():
    class Stop(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            self.model.stop_training = batch == 1

    x, _ = data()
    loop = TrainingLoop(network(4), "sgd", "mse", accumulation_steps=3)
    history = loop.fit((x, x), batch_size=4, epochs=5, callbacks=Stop(), verbose=0)
    assert history.epoch == [0]
    assert int(loop.optimizer.iterations) == 1  # what was accumulated is not lost


@pytest.mark.parametrize(
    "strategy", [None, tf.distribute.OneDeviceStrategy("CPU:0")], ids=["none", "one"]
)
def test_batches_left_over_from_an_error_are_not_in_the_next_update(strategy):
    def fail(batch, logs):
        raise InterruptedError

    x, _ = data()
    fit = {"batch_size": 8, "shuffle": False, "verbose": 0}
    loops = []
    for _ in range(2):
        with contextlib.nullcontext() if strategy is None else strategy.scope():
            loops.append(make(strategy=strategy, accumulation_steps=2))
    failing = keras.callbacks.LambdaCallback(on_train_batch_end=fail)
    with pytest.raises(InterruptedError):
        loops[0].fit((x, x), callbacks=failing, **fit)
    for loop in loops:
        loop.fit((x, x), **fit)
    for weight, fresh in zip(*(loop.model.get_weights() for loop in loops), strict=True):
        np.testing.assert_array_equal(weight, fresh)


def test_callbacks_may_be_a_keras_callback_list():
    x, _ = data()
    history = keras.callbacks.History()
    given = keras.callbacks.CallbackList([history])
    assert TrainingLoop(network(4), "sgd", "mse").fit((x, x), callbacks=given, verbose=0) is history


# The step


class Counting(keras.Model):
    """Counts how often Python runs its call: once for each trace."""

    def __init__(self):
        super().__init__()
        self.bn, self.dense = BatchNormalization(), LAYERS.Dense(4)
        self.calls = []

    def call(self, x, training=False):
        self.calls.append(training)
        return self.dense(self.bn(x, training=training))


@pytest.mark.parametrize("of", ["arrays", "generator"])
def test_the_step_is_traced_once_for_all_batch_sizes(of):
    x, _ = data(20)
    parts = [(x[i : i + 8], x[i : i + 8]) for i in range(0, 20, 8)]
    model = Counting()
    loop = TrainingLoop(model, "sgd", "mse")
    for number in range(2):
        if number == 1:
            model.calls.clear()
        given = (x, x) if of == "arrays" else iter(parts)
        size = {"batch_size": 8} if of == "arrays" else {}
        loop.fit(given, validation_data=(x, x), verbose=0, **size)
        assert model.calls.count(True) == 1 - number
    assert model.calls == []


def test_trainable_layers_may_change_between_runs():
    x, _ = data()
    loop = TrainingLoop(network(4), "sgd", "mse")
    loop.fit((x, x), verbose=0)
    first = loop.model.layers[1]
    first.trainable = False
    frozen, free = first.get_weights(), loop.model.layers[-1].get_weights()
    loop.fit((x, x), verbose=0)
    np.testing.assert_array_equal(first.get_weights(), frozen)
    assert not np.array_equal(loop.model.layers[-1].get_weights()[0], free[0])
    first.trainable = True
    loop.fit((x, x), verbose=0)
    assert not np.array_equal(first.get_weights(), frozen)


def test_class_weights_may_change_between_runs():
    """In the caller's own dict too; an empty one is none."""
    x, labels = data()
    labels[:] = 0
    loop = make(loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    weights: dict[int, float] = {}
    moved = []
    for step in ({}, {0: 1.0}, {0: 0.0}, {0: 1.0}):
        weights |= step
        before = loop.model.layers[-1].get_weights()[0]
        loop.fit((x, labels), class_weight=weights, verbose=0)
        moved.append(not np.array_equal(loop.model.layers[-1].get_weights()[0], before))
    assert moved == [True, True, False, True]


@pytest.mark.parametrize("compiled", [False, True])
def test_sequences_of_any_length_take_two_traces_and_train_as_in_keras(compiled):
    rng = np.random.default_rng(0)
    lengths = (5, 7, 6, 1)
    batches = [
        (rng.normal(size=(4 - n % 2, n, 4)), rng.normal(size=(4 - n % 2, n, 4))) for n in lengths
    ]
    loops = []
    for jit_compile in (compiled, False):
        keras.utils.set_random_seed(1)
        loops.append(make(model=Counting(), jit_compile=jit_compile))
    ours, theirs = (loop.model for loop in loops)
    loops[0].fit(iter(batches), validation_data=iter(batches), verbose=0)
    assert ours.calls.count(True) == 2
    assert list(ours.calls)[-3:] == [True, False, False]  # in evaluation it takes two as well
    for batch in batches:
        theirs.train_on_batch(*batch)
    for weight, expected in zip(ours.get_weights(), theirs.get_weights(), strict=True):
        np.testing.assert_allclose(weight, expected, rtol=1e-4, atol=1e-6)


def test_batches_of_another_rank_or_structure_get_another_trace():
    """What they have in common has no rank, with which Keras could not compute a loss."""
    x, labels = data(8)
    batches = [(x, labels), (x, labels[:, None]), (x, labels[:, None], np.ones(8)), (x, labels)]
    loop = make(model=Counting(), loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    loop.fit(iter(batches), verbose=0)
    assert loop.model.calls.count(True) == 3
    assert int(loop.optimizer.iterations) == 4


@pytest.mark.parametrize("steps", [1, 2])
def test_a_variable_that_the_loss_does_not_depend_on_is_kept_with_a_warning(steps):
    class Model(Counting):
        def __init__(self):
            super().__init__()
            self.idle = LAYERS.Dense(2)
            self.idle.build((None, 4))

    x, _ = data()
    loop = TrainingLoop(Model(), "sgd", "mse", accumulation_steps=steps)
    idle = loop.model.idle.get_weights()
    with pytest.warns(UserWarning, match="Gradients do not exist for variables"):
        loop.fit((x, x), verbose=0)
    np.testing.assert_array_equal(loop.model.idle.get_weights()[0], idle[0])


@pytest.mark.parametrize("steps", [1, 2])
def test_a_model_without_trainable_weights_warns_as_in_keras(steps):
    """Its moving statistics learn all the same."""
    x, _ = data()
    layer = BatchNormalization(center=False, scale=False, momentum=0.0)
    model = keras.Sequential([keras.Input((4,)), layer])
    loop = TrainingLoop(model, "sgd", "mse", accumulation_steps=steps)
    with pytest.warns(UserWarning, match="does not have any trainable weights"):
        loop.fit((x, x), verbose=0)
    np.testing.assert_allclose(layer.moving_mean, x.mean(axis=0), rtol=1e-5)


# Bad arguments


def make(**arguments: Any) -> TrainingLoop:
    return TrainingLoop(**({"model": network(4), "optimizer": "sgd", "loss": "mse"} | arguments))


BAD_LOOPS = {
    "no model": ({"model": LAYERS.Dense(1)}, TypeError, r"Received: model=<Dense .* of type Dense"),
    "strategy by name": (
        {"strategy": "mirrored"},
        TypeError,
        "OneDeviceStrategy. Received: strategy='mirrored' of type str",
    ),
    "strategy": (
        {"strategy": tf.distribute.get_strategy()},
        TypeError,
        "MultiWorkerMirroredStrategy or OneDeviceStrategy. Received: strategy=<.*DefaultDistribution",
    ),
    "optimizer": ({"optimizer": "sdg"}, ValueError, "sdg"),
    "loss": ({"loss_weights": "much"}, ValueError, "Received instead: loss_weights=much"),
    "metrics": ({"metrics": "accuracy"}, ValueError, "Received instead: metrics=accuracy"),
    "no steps": (
        {"accumulation_steps": 0},
        ValueError,
        "`accumulation_steps` must be an integer of at least 1. Received: accumulation_steps=0",
    ),
    "part steps": ({"accumulation_steps": 1.5}, ValueError, "accumulation_steps=1.5"),
    "true steps": ({"accumulation_steps": True}, ValueError, "accumulation_steps=True"),
    "accumulated twice": (
        {
            "accumulation_steps": 2,
            "optimizer": keras.optimizers.SGD(gradient_accumulation_steps=3),
        },
        ValueError,
        r"accumulated twice\. .* Received: gradient_accumulation_steps=3",
    ),
    "summed loss": (
        {"accumulation_steps": 2, "loss": keras.losses.MeanSquaredError(reduction="sum")},
        ValueError,
        "averages over the examples of a batch: .* Received: .* with reduction='sum'",
    ),
}


@pytest.mark.parametrize("kind", BAD_LOOPS)
def test_bad_arguments_of_the_loop_raise_and_leave_the_model_unchanged(kind):
    arguments, error, text = BAD_LOOPS[kind]
    arguments = {"model": network(4), **arguments}
    with pytest.raises(error, match=text):
        make(**arguments)
    assert getattr(arguments["model"], "optimizer", None) is None


BAD_FITS = {
    "epochs": ({"epochs": 0}, "`epochs` must be an integer of at least 1. Received: epochs=0"),
    "steps": ({"steps_per_epoch": 0}, "`steps_per_epoch` must be .* Received: steps_per_epoch=0"),
    "validation_steps": ({"validation_steps": -1}, "Received: validation_steps=-1"),
    "validation_freq": ({"validation_freq": 0}, "Received: validation_freq=0"),
    "initial_epoch": ({"initial_epoch": -1}, "at least 0. Received: initial_epoch=-1"),
    "batch_size": ({"batch_size": 0}, "`batch_size` must be .* at least 1. Received: batch_size=0"),
    "batch_size as text": ({"batch_size": "8"}, "Received: batch_size='8'"),
    "class_weight": ({"class_weight": {0: 1.0}}, "one class per example, .* Received: y=Ten"),
}


@pytest.mark.parametrize("kind", BAD_FITS)
def test_bad_arguments_of_fit_raise_and_change_nothing(kind):
    arguments, text = BAD_FITS[kind]
    x, _ = data()
    loop = make()
    before = loop.model.get_weights()
    with pytest.raises(ValueError, match=text):
        loop.fit((x[:, None], x[:, None]) if kind == "class_weight" else (x, x), **arguments)
    for weight, same in zip(loop.model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(weight, same)


@pytest.mark.parametrize("size", [0, -1, "8"])
def test_bad_batch_sizes_raise_in_evaluation(size):
    x, _ = data()
    with pytest.raises(ValueError, match=rf"`batch_size` .* Received: batch_size={size!r}\."):
        make().evaluate((x, x), batch_size=size, verbose=0)


@pytest.mark.parametrize("kind", ["dataset", "generator", "weights without targets"])
def test_targets_that_do_not_belong_to_arrays_raise(kind):
    x, _ = data()
    given = {
        "dataset": (tf.data.Dataset.from_tensor_slices((x, x)).batch(8), x),
        "generator": (iter([(x, x)]), x),
        "weights without targets": (x, None),
    }[kind]
    weights = {"sample_weight": x[:, 0]} if given[1] is None else {}
    loop = make()
    for use in (loop.fit, loop.evaluate):
        with pytest.raises(
            ValueError, match=r"`y` and `sample_weight` belong to arrays.* Received: "
        ):
            use(*given, **weights, verbose=0)


def test_counts_may_be_numpy_integers():
    x, _ = data()
    loop = make(accumulation_steps=np.int32(2))
    number = np.int32(2)
    history = loop.fit((x, x), epochs=number, steps_per_epoch=number, batch_size=number, verbose=0)
    assert history.epoch == [0, 1]


def test_callbacks_of_another_type_raise():
    x, _ = data()
    with pytest.raises(TypeError, match=r"must be Keras callbacks\. Received: 'early' of type str"):
        make().fit((x, x), callbacks=["early"])


def test_accumulation_refuses_outputs_with_different_masks():
    inputs = keras.Input((5, 2))
    x = LAYERS.Masking()(inputs)
    model = keras.Model(inputs, [LAYERS.Dense(1)(x), LAYERS.Dense(1)(x)])
    x = np.ones((4, 5, 2))
    loop = TrainingLoop(model, "sgd", ["mse", "mse"], accumulation_steps=2)
    with pytest.raises(ValueError, match=r"different masks\. .* Received: 2 outputs"):
        loop.fit((x, (x[..., :1], x[..., :1])), verbose=0)


def test_a_loop_whose_model_was_compiled_again_raises():
    x, _ = data()
    loop = make()
    loop.model.compile("adam", "mse")
    for use in (loop.fit, loop.evaluate):
        with pytest.raises(
            RuntimeError, match=r"compiled again .* new TrainingLoop\. Received: a m"
        ):
            use((x, x), verbose=0)
