"""Private names of Keras and TensorFlow: each test fails on the day that one is gone, or tries its fallback."""

import types
from concurrent.futures import ThreadPoolExecutor

import keras
import pytest
import tensorflow as tf

from tfbn._support import keras_internals


def test_compiling_is_seen():
    """Fails when TensorFlow takes away the private method that tells."""
    seen = {}

    @tf.function(jit_compile=True)
    def compiled(x):
        seen["compiled"] = keras_internals.compiling_with_xla()
        return x

    @tf.function
    def plain(x):
        seen["plain"] = keras_internals.compiling_with_xla()
        return x

    compiled(tf.constant(1.0))
    plain(tf.constant(1.0))
    assert seen == {"compiled": True, "plain": False}
    assert not keras_internals.compiling_with_xla()


def test_without_the_private_attribute_xla_is_not_assumed(monkeypatch):
    monkeypatch.delattr(tf.Graph, "_get_control_flow_context")

    graph = tf.Graph()
    with graph.as_default():
        assert not keras_internals.compiling_with_xla()


def test_keras_still_sums_gradients_by_the_name_we_know():
    assert keras_internals.sums_gradients_over_replicas(keras.optimizers.SGD())


def test_keras_still_tracks_the_layers_of_a_layer_by_the_names_we_know():
    wrapper = keras.layers.TimeDistributed(keras.layers.Dense(2))
    assert hasattr(wrapper, "_layers")
    assert hasattr(wrapper, "_tracker")


def test_without_the_list_of_tracked_layers_the_attributes_tell():
    class Block(keras.layers.Layer):
        def __init__(self):
            super().__init__()
            self.first = keras.layers.Dense(1)
            self.others = {"a": [keras.layers.ReLU()], "b": (keras.layers.Softmax(),)}

    block = Block()
    expected = list(keras_internals.tracked_layers(block))
    assert len(expected) == 3
    del block._layers
    assert list(keras_internals.tracked_layers(block)) == expected


def test_keras_still_attaches_masks_by_the_name_we_know():
    masked = keras.layers.Masking()(tf.zeros([1, 2, 3]))
    assert keras_internals.mask_of(masked).numpy().tolist() == [[False, False]]
    assert keras_internals.mask_of(tf.zeros([1])) is None


def test_keras_still_scales_losses_by_the_functions_we_know():
    with keras_internals.losses_unscaled() as unscaled:
        assert unscaled


def test_without_those_functions_losses_stay_scaled(monkeypatch):
    monkeypatch.setattr(keras_internals, "_SCALINGS", ("a_name_that_is_gone",))
    keras_internals._scaling_is_ours.cache_clear()
    try:
        with keras_internals.losses_unscaled() as unscaled:
            assert not unscaled
    finally:
        keras_internals._scaling_is_ours.cache_clear()


class AddAndMeet(keras.layers.Layer):
    """Adds a loss before and after another call of the model, as another replica's thread would."""

    def __init__(self, meet):
        super().__init__()
        self.meet = meet

    def call(self, x):
        self.add_loss(x)
        with keras_internals.added_losses_kept(self):
            self.meet()
        self.add_loss(2 * x)
        return x


def test_losses_survive_a_call_of_the_same_model_in_between(monkeypatch):
    """Fails when Keras keeps its call context or the losses of a layer by other names."""
    two = types.SimpleNamespace(num_replicas_in_sync=2)
    monkeypatch.setattr(tf.distribute, "get_replica_context", lambda: two)
    others = []

    def meet():
        if not others:
            others.append(1)
            with ThreadPoolExecutor(1) as pool:
                pool.submit(lambda: model(tf.constant([[7.0]]))).result()

    layer = AddAndMeet(meet)
    model = keras.Sequential([layer])
    model(tf.constant([[1.0]]))
    assert [float(loss[0, 0]) for loss in model.losses] == [1.0, 2.0]


def test_without_the_call_context_nothing_is_kept_and_nothing_breaks():
    layer = keras.layers.ReLU()
    with keras_internals.added_losses_kept(layer):
        pass


def test_asking_for_the_call_context_begins_no_call():
    """It did: whatever ran next in training mode left all later calls in training mode."""
    seen = []

    class Probe(keras.layers.Layer):
        def call(self, x, training=None):
            seen.append(training)
            return x

    with keras_internals.added_losses_kept(keras.layers.ReLU()):
        pass
    probe = Probe()
    probe(tf.constant(1.0), training=True)
    probe(tf.constant(1.0))
    assert seen == [True, None]


def test_symbolic_calls_are_forgotten():
    """Fails when Keras records symbolic calls elsewhere."""
    called, other = keras.layers.Dense(2), keras.layers.ReLU()
    x = keras.Input((3,))
    first = called(x)
    with keras_internals.calls_forgotten([called, other]):
        other(called(keras.Input((3,))))
        assert other.output.shape == (None, 2)
    assert called.output is first
    with pytest.raises(AttributeError, match="no defined output"):
        _ = other.output
    assert keras.Model(x, other(first)).layers[-1] is other


def test_without_the_lists_of_calls_nothing_is_forgotten():
    layer = keras.layers.ReLU()
    vars(layer)["_inbound_nodes"] = vars(layer)["_outbound_nodes"] = None
    with keras_internals.calls_forgotten([layer]):
        pass


def test_keras_still_keeps_graphs_where_we_know():
    inputs = keras.Input((3,))
    old, new = keras.layers.ReLU(name="old"), keras.layers.Softmax(name="new")
    outputs = keras.layers.Dense(2)(old(inputs) + old(2.0 * inputs))
    model = keras.Model(inputs, outputs)
    keras_internals.replace_in_graph(model, [(old, new)])
    assert new in model.layers
    assert old not in model.layers
    calls = keras.Model(inputs, outputs).get_config()["layers"]
    assert [len(call["inbound_nodes"]) for call in calls if call["config"]["name"] == "new"] == [2]
    x = tf.constant([[1.0, 2.0, 3.0]])
    expected = model.layers[-1](tf.nn.softmax(x) + tf.nn.softmax(2.0 * x))
    tf.debugging.assert_near(model(x), expected)


def test_a_graph_that_keras_keeps_elsewhere_is_refused():
    layer = keras.layers.ReLU()
    model = keras.Sequential([keras.Input((3,)), layer], name="chain")
    with pytest.raises(ValueError, match=r"graph of Keras .* Received: model 'chain' of class Seq"):
        keras_internals.replace_in_graph(model, [(layer, keras.layers.ReLU())])


def test_keras_still_keeps_paths_where_we_know():
    old, new = keras.layers.Dense(2, name="old"), keras.layers.Dense(2, name="new")
    for layer in (old, new):
        layer.build((None, 3))
    keras_internals.copy_path(old, new)
    keras_internals.copy_path(old.kernel, new.kernel)
    assert (new.path, new.kernel.path, new.bias.path) == ("old", "old/kernel", "new/bias")
    keras_internals.copy_path(object(), new)
    assert new.path == "old"
