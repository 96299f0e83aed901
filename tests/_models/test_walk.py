"""Finding the batch normalization layers of a model."""

import keras
import numpy as np
import pytest

from tfbn._layer.batch_normalization import BatchNormalization
from tfbn._models.walk import batch_norm_layers, has_initial_statistics

LAYERS = keras.layers
KINDS = [LAYERS.BatchNormalization, BatchNormalization]


def names(model: keras.layers.Layer) -> list[str]:
    return [layer.name for layer in batch_norm_layers(model)]


@keras.saving.register_keras_serializable(package="tests")
class Cell(LAYERS.Layer):
    """A recurrent cell that normalizes."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.state_size = 3
        self.norm = BatchNormalization()

    def call(self, x, states):
        return self.norm(x), states


class Block(LAYERS.Layer):
    """A plain layer with layers as attributes, in a list, in a dict, and nested."""

    def __init__(self, kind: type, prefix: str):
        super().__init__()
        self.first = kind(name=f"{prefix}_first")
        self.listed = [LAYERS.Dense(4), kind(name=f"{prefix}_listed")]
        self.named = {"z": kind(name=f"{prefix}_z"), "a": [kind(name=f"{prefix}_a")]}
        self.inner = keras.Sequential([LAYERS.Dense(4), kind(name=f"{prefix}_sequential")])
        self.last = kind(name=f"{prefix}_last")

    def call(self, x):
        named = (self.named["z"], *self.named["a"])
        for layer in (self.first, *self.listed, *named, self.inner, self.last):
            x = layer(x)
        return x


def block_names(prefix: str) -> list[str]:
    return [f"{prefix}_{part}" for part in ("first", "listed", "z", "a", "sequential", "last")]


@pytest.mark.parametrize("kind", KINDS)
def test_layers_come_once_each_in_order_of_definition(kind):
    shared = kind(name="shared")
    inputs = keras.Input((4,))
    nested = keras.Sequential([keras.Input((4,)), kind(name="nested"), LAYERS.Dense(4), shared])
    x = kind(name="outer")(inputs)
    x = shared(nested(x))
    x = Block(kind, "block")(x)
    x = kind(name="end")(shared(x))
    model = keras.Model(inputs, x)
    found = names(model)
    assert len(found) == len(set(found))
    assert found == ["outer", "nested", "shared", *block_names("block"), "end"]
    assert all(type(layer) is kind for layer in batch_norm_layers(model))


def test_both_kinds_and_their_subclasses_are_found_together():
    class Mine(BatchNormalization):
        pass

    stock, ours, mine = LAYERS.BatchNormalization(), BatchNormalization(), Mine()
    model = keras.Sequential([stock, LAYERS.Dense(3), ours, LAYERS.LayerNormalization(), mine])
    assert batch_norm_layers(model) == [stock, ours, mine]


def test_a_subclassed_model_shows_what_it_tracks_in_order_of_definition():
    class Model(keras.Model):
        def __init__(self):
            super().__init__()
            self.blocks = [Block(BatchNormalization, "one"), Block(BatchNormalization, "two")]
            self.end = LAYERS.BatchNormalization(name="end")

    assert names(Model()) == [*block_names("one"), *block_names("two"), "end"]


def test_wrappers_are_looked_into():
    distributed = LAYERS.TimeDistributed(BatchNormalization(name="distributed"))
    assert names(keras.Sequential([distributed])) == ["distributed"]
    bidirectional = LAYERS.Bidirectional(LAYERS.RNN(Cell(), return_sequences=True))
    assert len(names(keras.Sequential([bidirectional]))) == 2


def test_a_layer_is_found_in_itself_and_a_model_may_have_none():
    layer = BatchNormalization()
    assert batch_norm_layers(layer) == [layer]
    assert batch_norm_layers(keras.Sequential([LAYERS.Dense(3)])) == []


def test_a_layer_that_holds_its_model_ends_the_search():
    block = Block(BatchNormalization, "block")
    block.inner.add(block)
    assert names(block) == block_names("block")


def test_what_is_no_layer_is_refused():
    with pytest.raises(
        TypeError, match=r"must be a Keras model or layer\. Received: model='model' of"
    ):
        batch_norm_layers("model")


def test_keras_still_tracks_layers_where_we_look():
    """When this fails, Keras has renamed `_layers`, and `children` falls back on the attributes."""
    block = Block(BatchNormalization, "b")
    assert {block.first, *block.listed, block.inner, block.last} < set(block._layers)


def test_without_keras_tracking_the_attributes_are_looked_through(monkeypatch):
    block = Block(BatchNormalization, "block")
    monkeypatch.delattr(block, "_layers")
    assert names(block) == block_names("block")


@pytest.mark.parametrize("kind", KINDS)
def test_statistics_are_initial_while_they_are_what_their_initializers_give(kind):
    layer = kind(moving_mean_initializer=keras.initializers.RandomNormal(seed=1))
    layer.build((None, 3))
    assert has_initial_statistics(layer)
    layer(np.ones((2, 3)), training=True)
    assert not has_initial_statistics(layer)
    layer.moving_mean.assign([0, 0, 0])
    layer.moving_variance.assign([1, 1, 1])
    assert not has_initial_statistics(layer)
