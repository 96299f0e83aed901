"""Whole models on two virtual devices, in a process of its own, which writes down what it saw.

    python tests/harness/replica_models.py OUT.npz

As in `replicas.py`, the tests judge.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np

from replicas import Observed, local, started

STEPS = 50
SIZES = (7, 4, 5)  # uneven, of as many replicas as there are
RNG = np.random.default_rng(0)
X = RNG.normal(3, 2, (STEPS, sum(SIZES), 4)).astype("float32")
Y = np.sum(X**2, axis=-1, keepdims=True) / 50


def main() -> None:
    (strategy,) = started(devices=2).values()
    observed: Observed = {}
    for scenario in (
        trained,
        fitted,
        added_losses,
        collectives,
        second_order,
        called,
        refused,
        converted,
        fused,
    ):
        for name, value in scenario(strategy).items():
            observed[f"{scenario.__name__}/{name}"] = value
    np.savez(sys.argv[1], **observed)


def trained(strategy: Any) -> Observed:
    """The weights after 50 steps of a loop of one's own, on each replica."""
    import keras
    import tensorflow as tf

    import tfbn

    replicas = strategy.num_replicas_in_sync
    ends = np.cumsum((0, *SIZES[: replicas - 1], sum(SIZES[replicas - 1 :])))
    keras.utils.set_random_seed(0)
    with strategy.scope():
        model = keras.Sequential(
            [
                keras.Input((4,)),
                keras.layers.Dense(6),
                tfbn.BatchNormalization(momentum=0.9, synchronized=True),
                keras.layers.ReLU(),
                keras.layers.Dense(1),
            ]
        )
        optimizer = keras.optimizers.SGD(0.05, momentum=0.9)
        optimizer.build(model.trainable_variables)

    def step(x: Any, y: Any) -> None:
        with tf.GradientTape() as tape:
            # The share of this replica in the mean over the global batch: optimizers add the gradients.
            loss = tf.reduce_sum((model(x, training=True) - y) ** 2) / sum(SIZES)
        variables = model.trainable_variables
        gradients = tape.gradient(loss, [v.value for v in variables])
        optimizer.apply_gradients(zip(gradients, variables, strict=True))

    run = tf.function(lambda x, y: strategy.run(step, (x, y)), reduce_retracing=True)
    for x, y in zip(X, Y, strict=True):
        run(*(shared_out(strategy, np.split(values, ends[1:-1])) for values in (x, y)))
    return {
        f"{replica}/{index}": part.numpy()
        for index, weight in enumerate(model.weights)
        for replica, part in local(strategy, weight.value).items()
    }


def assert_trained(seen: Observed, replicas: int) -> None:
    """In the process of the tests: `trained` saw what one device sees with the whole batch, to 1e-4."""
    import tensorflow as tf

    expected = trained(tf.distribute.get_strategy())
    for index in range(len(expected)):
        first, *others = (seen[f"trained/{replica}/{index}"] for replica in range(replicas))
        np.testing.assert_allclose(first, expected[f"0/{index}"], rtol=1e-4, atol=1e-4)
        for other in others:
            np.testing.assert_array_equal(other, first)


def shared_out(strategy: Any, parts: list[np.ndarray]) -> Any:
    import tensorflow as tf

    return strategy.experimental_distribute_values_from_function(
        lambda context: tf.constant(parts[context.replica_id_in_sync_group])
    )


def fitted(strategy: Any) -> Observed:
    """Weights after `fit`, those that are saved in each way, and those that are given back."""
    import keras
    import tensorflow as tf

    import tfbn

    observed: Observed = {}
    for name, arguments in {
        "apart": {},
        "synchronized": {"synchronized": True},
        "renorm": {"renorm": True, "momentum": None},
    }.items():
        keras.utils.set_random_seed(0)
        with strategy.scope():
            model = keras.Sequential(
                [keras.Input((4,)), tfbn.BatchNormalization(**arguments), keras.layers.Dense(1)]
            )
            model.compile("sgd", "mse")
        model.fit(X[0], Y[0], batch_size=6, epochs=2, verbose=0)

        def see(what: str, values: Any, name: str = name) -> None:
            observed.update({f"{name}/{what}/{i}": np.asarray(v) for i, v in enumerate(values)})

        for replica in range(2):
            see(f"replica-{replica}", [w.value.values[replica].numpy() for w in model.weights])
        with tempfile.TemporaryDirectory() as folder:
            model.save(f"{folder}/model.keras")
            see("file", keras.models.load_model(f"{folder}/model.keras").get_weights())
            model.save_weights(f"{folder}/model.weights.h5")
            model.export(f"{folder}/served", verbose=False)
            served = tf.saved_model.load(f"{folder}/served")
            observed[f"{name}/served"] = served.serve(X[1]).numpy()
            observed[f"{name}/predicted"] = model.predict(X[1], verbose=0)
            model.set_weights([w + 1 for w in model.get_weights()])
            for replica in range(2):
                see(f"set-{replica}", [w.value.values[replica].numpy() for w in model.weights])
            model.load_weights(f"{folder}/model.weights.h5")
            for replica in range(2):
                see(f"loaded-{replica}", [w.value.values[replica].numpy() for w in model.weights])
    return observed


def added_losses(strategy: Any) -> Observed:
    """The loss of a `fit` step and the weights after it, with losses that layers add, here and on one device.

    The kinds of norm meet in the forward pass for their statistics, before other layers add losses and after.
    """
    import keras
    import tensorflow as tf

    import tfbn

    class Penalty(keras.layers.Layer):
        def call(self, x: Any) -> Any:
            self.add_loss(0.1 * tf.reduce_mean(x**2))
            return x

    def step(where: Any, arguments: dict[str, Any]) -> list[Any]:
        keras.utils.set_random_seed(0)
        with where.scope():
            inputs = keras.Input((4,))
            x = keras.layers.Dense(3, activity_regularizer="l2")(inputs)
            for _ in range(2):
                x = tfbn.BatchNormalization(**arguments)(Penalty()(x))
            outputs = keras.layers.Dense(1, activity_regularizer="l1")(Penalty()(x))
            model = keras.Model(inputs, outputs)
            model.compile(keras.optimizers.SGD(0.1), "mse")
        # The same examples for each replica: every mean is then that of one device.
        x = np.tile(X[0][:4], (2, 1))
        y = np.tile(Y[0][:4], (2, 1))
        history = model.fit(x, y, batch_size=8, shuffle=False, verbose=0)
        return [np.asarray(history.history["loss"][0]), *model.get_weights()]

    observed = {}
    for name, arguments in {"apart": {}, "synchronized": {"synchronized": True}}.items():
        for where, device in (("two", strategy), ("one", tf.distribute.get_strategy())):
            for number, value in enumerate(step(device, arguments)):
                observed[f"{name}/{where}/{number}"] = value
    return observed


def collectives(strategy: Any) -> Observed:
    """How many collectives a step with two layers has for each replica, and how many inference has."""
    import keras
    import tensorflow as tf

    import tfbn

    def count(kind: Any, training: bool, **arguments: Any) -> int:
        with strategy.scope():
            model = keras.Sequential([keras.Input((4,)), *(kind(**arguments) for _ in range(2))])

        def step(x: Any) -> Any:
            with tf.GradientTape() as tape:
                tape.watch(x)
                y = tf.reduce_sum(model(x, training=training) ** 3)
            return tape.gradient(y, [x, *[v.value for v in model.trainable_variables]])

        x = shared_out(strategy, [X[0, :3], X[0, 3:5]])
        graph = tf.function(lambda x: strategy.run(step, (x,))).get_concrete_function(x).graph
        total = sum(op.type.startswith("Collective") for op in graph.get_operations())
        assert total % 2 == 0, "two replicas"
        return total // 2

    ours, stock = tfbn.BatchNormalization, keras.layers.BatchNormalization
    together = {"synchronized": True}
    return {
        "apart": np.array(count(ours, True)),
        "synchronized": np.array(count(ours, True, **together)),
        "renorm": np.array(count(ours, True, **together, renorm=True)),
        "inference": np.array(count(ours, False, **together)),
        "frozen": np.array(count(ours, True, **together, freeze_statistics=True)),
        "not trainable": np.array(count(ours, True, **together, trainable=False)),
        "keras apart": np.array(count(stock, True)),
        "keras synchronized": np.array(count(stock, True, **together)),
    }


def second_order(strategy: Any) -> Observed:
    """The gradients of a penalty on gradients."""
    import tensorflow as tf

    import tfbn

    with strategy.scope():
        layer = tfbn.BatchNormalization(synchronized=True, dtype="float64")
        layer.build((None, 4))

    def step(x: Any) -> Any:
        with tf.GradientTape() as outer:
            outer.watch(x)
            penalty = gradient_penalty(layer, x)
        return outer.gradient(penalty, [x, *[v.value for v in layer.trainable_variables]])

    x = shared_out(strategy, [X[0, :3].astype("float64"), X[0, 3:8].astype("float64")])
    dx, dgamma, dbeta = strategy.run(tf.function(step, reduce_retracing=True), (x,))

    def values(distributed: Any) -> list[np.ndarray]:
        return [part.numpy() for part in strategy.experimental_local_results(distributed)]

    return {"dx": np.concatenate(values(dx))} | {
        name: np.sum(values(v), 0) for name, v in (("dgamma", dgamma), ("dbeta", dbeta))
    }


def gradient_penalty(layer: Any, x: Any) -> Any:
    import tensorflow as tf

    with tf.GradientTape() as tape:
        tape.watch(x)
        loss = tf.reduce_sum(layer(x, training=True) ** 3)
    dx, dgamma, dbeta = tape.gradient(loss, [x, *[v.value for v in layer.trainable_variables]])
    return tf.reduce_sum(dx**2) + tf.reduce_sum(dgamma) + 0.5 * tf.reduce_sum(dbeta)


def fused(strategy: Any) -> Observed:
    """The weights of a fused model after 5 steps of `fit`, on two replicas and on one."""
    import contextlib

    import keras

    import tfbn

    seen = {}
    for where, scope in (("two", strategy.scope()), ("one", contextlib.nullcontext())):
        keras.utils.set_random_seed(0)
        with scope:
            x = keras.Input((4,))
            h = keras.layers.Dense(6)(x)
            h = keras.layers.ReLU()(keras.layers.BatchNormalization()(h))
            model = keras.Model(x, keras.layers.Dense(1)(keras.layers.BatchNormalization()(h)))
            model = tfbn.fuse(model)
            model.compile(keras.optimizers.SGD(0.05), "mse")
        model.fit(X[:5].reshape(-1, 4), Y[:5].reshape(-1, 1), batch_size=16, verbose=0)
        for index, weight in enumerate(model.weights):
            parts = local(strategy, weight.value) if where == "two" else {0: weight.value}
            for replica, value in parts.items():
                seen[f"{where}/{index}/{replica}"] = value.numpy()
    return seen


def called(strategy: Any) -> Observed:
    """Layers in the ways that models call them: twice, over time, with their moments handed on."""
    import keras
    import tensorflow as tf

    import tfbn
    from tfbn._layer import collect_moments

    observed: Observed = {}
    x = shared_out(strategy, [X[0, :3], X[0, 3:8]])

    def run(name: str, call: Callable[[Any, Any], Any], **arguments: Any) -> None:
        with strategy.scope():
            layer = tfbn.BatchNormalization(momentum=0.9, **arguments)
            layer.build((None, 4))
        strategy.run(tf.function(lambda x: call(layer, x), reduce_retracing=True), (x,))
        for replica in range(2):
            for weight in layer.non_trainable_weights:
                value = weight.value.values[replica].numpy()
                observed[f"{name}/{replica}/{weight.name}"] = value

    def over_time(layer: Any, x: Any) -> Any:
        return keras.layers.TimeDistributed(layer)(tf.stack([x, x + 1], 1), training=True)

    def handed_on(layer: Any, x: Any) -> None:
        with collect_moments.redirect(lambda layer, moments: layer.update_statistics(moments)):
            layer(x, training=True)

    for together in (False, True):
        kind = "synchronized" if together else "apart"
        run(f"{kind}-twice", lambda layer, x: layer(layer(x, training=True), training=True),
            synchronized=together)  # fmt: skip
        run(f"{kind}-over-time", over_time, synchronized=together)
        run(f"{kind}-once", lambda layer, x: layer(x, training=True), synchronized=together)
    run("handed-on", handed_on)
    run("handed-on-together", handed_on, synchronized=True)
    return observed


def refused(strategy: Any) -> Observed:
    """The texts of errors, and the statistics after them."""
    import tensorflow as tf

    import tfbn

    with strategy.scope():
        layer = tfbn.BatchNormalization()
        layer.build((None, 4))

    def branch(training: bool) -> Any:
        x = tf.constant(X[0])
        return tf.cond(x[0, 0] > 0, lambda: layer(x, training=training), lambda: x)

    def nested(training: bool) -> Any:
        return tf.function(lambda: layer(X[0], training=training), autograph=False)()

    observed: Observed = {}
    for function in (branch, nested):
        strategy.run(tf.function(lambda f=function: f(False), autograph=False))  # nobody to meet
        try:
            strategy.run(tf.function(lambda f=function: f(True), autograph=False))
        except RuntimeError as error:
            observed[function.__name__] = np.array(str(error))
    return observed | {"moving_mean": layer.moving_mean.numpy()}


def converted(strategy: Any) -> Observed:
    """A stock model, made synchronized by `convert` in the scope of the strategy."""
    import keras
    import tensorflow as tf

    import tfbn

    with strategy.scope():
        stock = keras.Sequential(
            [keras.Input((4,)), keras.layers.BatchNormalization(), keras.layers.Dense(2)]
        )
        model = tfbn.convert(stock, synchronized=True)
    x = shared_out(strategy, [X[0, :3], X[0, 3:8]])
    strategy.run(tf.function(lambda x: model(x, training=True), reduce_retracing=True), (x,))
    layer = model.layers[0]
    return {
        f"{replica}/{weight.name}": weight.value.values[replica].numpy()
        for weight in layer.weights
        for replica in range(2)
    }


if __name__ == "__main__":
    main()
