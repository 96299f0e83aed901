"""The graph of a model, cut at its layers: levels, what crosses the cuts, and parts that run alone."""

import keras
import numpy as np
import tensorflow as tf
from keras import layers

import tfbn
from tfbn._statistics.cut_graph import DATA, CutGraph

X = np.random.default_rng(0).normal(size=(5, 4)).astype("float32")


def cut(model: keras.Model) -> CutGraph:
    norms = [layer for layer in model.layers if isinstance(layer, tfbn.BatchNormalization)]
    spec = tf.TensorSpec([None, *model.input_shape[1:]], tf.float32)
    return CutGraph(norms, lambda x: model(x, training=False), spec)


def residual() -> keras.Model:
    """A block whose shortcut passes two layers by, then a last layer."""
    image = keras.Input((4,))
    shortcut = layers.Dense(4, name="stem")(image)
    a = tfbn.BatchNormalization(name="a")(layers.Dense(6)(shortcut))
    b = tfbn.BatchNormalization(name="b")(layers.Dense(4)(layers.ReLU()(a)))
    c = tfbn.BatchNormalization(name="c")(layers.Add()([b, shortcut]))
    return keras.Model(image, layers.Dense(2)(c))


def test_calls_are_sorted_by_how_many_others_feed_them():
    graph = cut(residual())
    assert [c.layer.name for c in graph.cuts] == ["a", "b", "c"]
    assert graph.levels == [0, 1, 2]


def test_layers_beside_each_other_share_a_level():
    image = keras.Input((4,))
    branches = [tfbn.BatchNormalization()(layers.Dense(3)(image)) for _ in range(3)]
    deeper = tfbn.BatchNormalization()(branches[0])
    joined = tfbn.BatchNormalization()(layers.Concatenate()([deeper, *branches]))
    assert sorted(cut(keras.Model(image, joined)).levels) == [0, 0, 0, 1, 2]


def test_a_shared_layer_has_a_cut_for_each_call():
    image = keras.Input((4,))
    norm = tfbn.BatchNormalization()
    assert cut(keras.Model(image, norm(norm(image)))).levels == [0, 1]


def test_what_crosses_a_cut_is_the_inputs_and_what_passes_them_by():
    graph = cut(residual())
    (batch,) = graph.crossing(DATA)
    assert graph.spec(batch).shape == [None, 4]
    widths = [[graph.spec(t).shape[1] for t in graph.crossing(level)] for level in range(3)]
    # Beside the inputs of the layer, the shortcut. Nothing is needed behind the last one.
    assert [sorted(shapes) for shapes in widths] == [[4, 6], [4, 4], []]


def test_parts_that_run_one_after_the_other_give_what_the_whole_gives():
    model = residual()
    for layer in model.layers:
        for weight in layer.weights:
            weight.assign(np.random.default_rng(1).uniform(0.5, 2, weight.shape))
    graph = cut(model)

    def normalize(number, x, mask):
        return graph.cuts[number].layer(x, training=False)

    def part(start: int, targets: list[str], *tensors: tf.Tensor) -> list[tf.Tensor]:
        def run(*tensors):
            known = dict(zip(graph.crossing(start), tensors, strict=True))
            values = graph.run(known, targets, normalize)
            return [values[name] for name in targets]

        return tf.function(run, autograph=False)(*tensors)

    tensors = part(DATA, graph.crossing(0), X)
    tensors = part(0, graph.crossing(1), *tensors)
    (last,) = part(1, [graph.cuts[2].inputs], *tensors)
    expected = keras.Model(model.inputs, model.get_layer("c").input)([X], training=False)
    np.testing.assert_allclose(last, expected, rtol=1e-5)
    (whole,) = part(DATA, [graph.cuts[2].inputs], X)
    np.testing.assert_allclose(whole, expected, rtol=1e-5)


def test_one_half_of_a_split_can_pass_a_cut_by():
    class Halves(layers.Layer):
        def __init__(self):
            super().__init__()
            self.first, self.second = tfbn.BatchNormalization(), tfbn.BatchNormalization()

        def build(self, shape):
            self.first.build((None, 2))
            self.second.build((None, 4))

        def call(self, x):
            one, other = tf.split(x, 2, axis=-1)
            return self.second(tf.concat([self.first(one), other], -1))

    halves = Halves()
    model = keras.Sequential([keras.Input((4,)), halves])
    graph = CutGraph([halves.first, halves.second], model, tf.TensorSpec([None, 4], tf.float32))
    assert graph.levels == [0, 1]
    tfbn.recalibrate(model, X, batch_size=2)
    one = (X[:, :2] - X[:, :2].mean(0)) / np.sqrt(X[:, :2].var(0) + 1e-3)
    seen = np.concatenate([one, X[:, 2:]], -1)
    np.testing.assert_allclose(halves.second.moving_mean, seen.mean(0), atol=1e-6)
    np.testing.assert_allclose(halves.second.moving_variance, seen.var(0), rtol=1e-5)


def test_nothing_of_the_model_is_changed_by_tracing():
    model = residual()
    before = [w.numpy() for w in model.weights]
    cut(model)
    assert not any("call" in vars(layer) for layer in model.layers)
    for weight, value in zip(model.weights, before, strict=True):
        np.testing.assert_array_equal(weight.numpy(), value)
