"""What folding makes of whole models, and what it says about it."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfbn
from graphs import randomize
from tfbn._models.walk import batch_norm_layers

layers = keras.layers
Norm = keras.layers.BatchNormalization


@keras.saving.register_keras_serializable("test_fold")
class Residual(layers.Layer):
    """A block as users write them, with layers and operations of Keras."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.conv = layers.Conv2D(4, 3, padding="same", name="conv")
        self.norm = Norm(name="norm")

    def call(self, x: Any, training: Any = None) -> Any:
        return keras.ops.relu(self.norm(self.conv(x), training=training)) + x


@keras.saving.register_keras_serializable("test_fold")
class Closed(Residual):
    """One that calls TensorFlow, which no symbolic tensor gets through."""

    def call(self, x: Any, training: Any = None) -> Any:
        return tf.nn.relu(super().call(x, training=training))


def image(channels: int = 4) -> Any:
    return keras.Input((8, 8, channels), name="image")


def folded(model: keras.Model, **arguments: Any) -> keras.Model:
    """Folds random weights, and compares on inputs that folding did not see."""
    randomize(model)
    new = tfbn.fold(model, **arguments)
    x = [tf.random.stateless_normal((3, *t.shape[1:]), (7, i)) for i, t in enumerate(new.inputs)]
    x = keras.tree.pack_sequence_as(new.input, x)
    for a, b in zip(*(keras.tree.flatten(m(x, training=False)) for m in (model, new)), strict=True):
        np.testing.assert_allclose(b, a, rtol=0, atol=1e-5 * np.abs(a).max())
    return new


def reasons(model: keras.Model) -> list[str | None]:
    return [row.reason for row in model.report.rows]


def into(model: keras.Model) -> list[str | None]:
    return [row.into for row in model.report.rows]


# Through layers in between

THROUGH_TO_DENSE = {
    "dropout": [layers.Dropout(0.5)],
    "spatial dropout": [layers.SpatialDropout2D(0.5)],
    "noise": [layers.GaussianNoise(1.0)],
    "identity": [layers.Identity(), layers.Activation("linear")],
    "average": [layers.GlobalAveragePooling2D()],
    "average, kept": [layers.GlobalAveragePooling2D(keepdims=True), layers.Flatten()],
    "windows": [layers.AveragePooling2D(3, 2, padding="same")],
    "crop": [layers.Cropping2D(1)],
    "upsample": [layers.UpSampling2D(2, interpolation="bilinear")],
    "flatten": [layers.Flatten()],
    "reshape": [layers.Reshape((64, 4)), layers.GlobalAveragePooling1D()],
    "reshape channels": [layers.Reshape((4, 64))],
    "permute": [layers.Permute((2, 1, 3)), layers.Flatten()],
    "many": [
        layers.AveragePooling2D(2),
        layers.Dropout(0.1),
        layers.Permute((2, 1, 3)),
        layers.Flatten(),
    ],
}


def chain(x: Any, *parts: Any) -> Any:
    for part in parts:
        x = type(part).from_config(part.get_config())(x)
    return x


@pytest.mark.parametrize("between", THROUGH_TO_DENSE.values(), ids=THROUGH_TO_DENSE)
def test_it_folds_into_the_dense_layer_behind(between):
    x = image()
    model = keras.Model(x, layers.Dense(3, name="dense")(chain(Norm()(x), *between)))
    assert into(folded(model)) == ["dense"]


THROUGH_TO_CONV = {
    "dropout": [layers.Dropout(0.5)],
    "average": [layers.GlobalAveragePooling2D()],
    "windows": [layers.AveragePooling2D(2)],
    "crop": [layers.Cropping2D(1)],
    "permute": [layers.Permute((2, 1, 3))],
    "permute channels": [layers.Permute((3, 1, 2)), layers.Permute((2, 3, 1))],
    "reshape": [layers.Reshape((16, 4, 4))],
    "upsample": [layers.UpSampling2D(2)],
}


@pytest.mark.parametrize("between", THROUGH_TO_CONV.values(), ids=THROUGH_TO_CONV)
def test_it_folds_into_the_convolution_in_front(between):
    x = image()
    h = layers.Conv2D(4, 1, name="conv")(x)
    assert into(folded(keras.Model(x, Norm()(chain(h, *between))))) == ["conv"]


@pytest.mark.parametrize("first", [layers.MaxPooling2D(2), layers.GlobalMaxPooling2D()])
def test_it_gets_through_a_maximum_where_gamma_is_not_negative(first):
    x = image()
    norm = Norm(name="norm")
    model = keras.Model(x, norm(chain(layers.Conv2D(4, 1, name="conv")(x), first)))
    randomize(model)
    norm.gamma.assign(np.ones(4))
    assert into(tfbn.fold(model)) == ["conv"]
    norm.gamma.assign([1, 1, 1, -1])
    (reason,) = reasons(tfbn.fold(model))
    assert "γ is negative" in reason


def test_it_gets_through_padding_only_without_a_shift():
    x = image()
    norm = Norm(name="norm", center=False)
    model = keras.Model(x, norm(layers.ZeroPadding2D(1)(layers.Conv2D(4, 1, name="conv")(x))))
    (reason,) = reasons(folded(model))
    assert "pads with zeros" in reason
    norm.moving_mean.assign(np.zeros(4))
    assert into(tfbn.fold(model)) == ["conv"]


def test_it_folds_into_all_that_is_joined_or_added():
    x = image()
    a, b, c = (layers.Conv2D(4, 1, name=name)(x) for name in "abc")
    joined = Norm()(layers.Concatenate()([a, layers.Add()([b, c])]))
    assert into(folded(keras.Model(x, joined))) == ["a, b, c"]


def test_an_average_takes_the_shift_in_each_input():
    x = image()
    a, b = (layers.Conv2D(4, 1, name=name)(x) for name in "ab")
    assert into(folded(keras.Model(x, Norm()(layers.Average()([a, b]))))) == ["a, b"]


def test_nothing_folds_into_an_input_of_a_sum_that_is_spread_out():
    x = image()
    rows = layers.AveragePooling2D((8, 1))(layers.Conv2D(4, 1)(x))
    summed = layers.Add()([layers.Conv2D(4, 1)(x), rows])
    model = keras.Model(x, tfbn.BatchNormalization([1, 3])(summed))
    assert "different shapes" in reasons(folded(model))[0]


def test_batch_normalization_after_batch_normalization_is_one():
    x = image()
    h = Norm(name="c")(tfbn.BatchNormalization(name="b")(Norm(name="a")(layers.ReLU()(x))))
    model = folded(keras.Model(x, layers.ReLU()(h)))
    assert into(model) == ["b", "c", None]
    assert [layer.name for layer in model.layers if type(layer) is layers.Rescaling] == ["c"]


# Several consumers, several calls


def test_it_folds_into_all_branches_behind_or_into_none():
    x = image()
    h = Norm()(x)
    model = keras.Model(x, [layers.Dense(3, name="a")(h), layers.Conv2D(3, 2, name="b")(h)])
    assert into(folded(model)) in (["a, b"], ["b, a"])
    x = image()
    h = Norm()(x)
    model = folded(keras.Model(x, [layers.Dense(3)(h), layers.ReLU(name="relu")(h)]))
    assert reasons(model) == ["its input is an input of the model; 'relu' (ReLU) is no linear map"]


def test_what_somebody_else_uses_stays_as_it_is():
    x = image()
    h = layers.Conv2D(4, 1, name="conv")(x)
    model = keras.Model(x, layers.ReLU()(Norm()(h)) + h)
    assert "'conv' (Conv2D) feeds 2 layers" in reasons(folded(model))[0]
    x = image()
    h = layers.Conv2D(4, 1, name="conv")(x)
    model = keras.Model(x, [layers.ReLU()(Norm()(h)), h])
    assert "the model outputs 'conv' (Conv2D), too" in reasons(folded(model))[0]


def test_a_shared_layer_stays_one_where_the_same_folds_into_each_call():
    x, y = image(), keras.Input((8, 8, 4), name="other")
    conv, norm = layers.Conv2D(4, 1, name="conv"), Norm()
    model = folded(keras.Model([x, y], [norm(conv(x)), norm(conv(y))]))
    assert into(model) == ["conv", "conv"]
    assert [type(layer).__name__ for layer in model.layers].count("Conv2D") == 1


def test_a_shared_layer_gets_copies_where_it_has_to_differ():
    x, y = image(), keras.Input((8, 8, 4), name="other")
    conv = layers.Conv2D(4, 1, name="conv")
    outputs = [Norm()(conv(x)), Norm()(conv(y)), layers.ReLU()(conv(x))]
    model = folded(keras.Model([x, y], outputs))
    assert into(model) == ["conv", "conv"]
    assert len({layer.name for layer in model.layers if isinstance(layer, layers.Conv2D)}) == 3


# Models in models, layers of layers


def test_nested_models_are_laid_out_flat_and_fold_across_their_borders():
    inner = keras.Sequential(
        [image(), layers.Conv2D(4, 1, name="conv"), Norm(), layers.ReLU(), Norm()], name="inner"
    )
    x = image()
    outer = keras.Model(
        x, layers.Dense(2, name="dense")(inner(layers.Conv2D(4, 1, name="between")(inner(x))))
    )
    model = folded(outer)
    assert into(model) == ["conv", "between", "conv", "dense"]
    assert all(not isinstance(layer, keras.Model) for layer in model.layers)
    assert [row.within for row in model.report.rows] == [("inner",)] * 4


def test_names_that_meet_are_told_apart_by_the_model_that_they_are_from():
    def inner(name: str) -> keras.Model:
        return keras.Sequential([image(), layers.Conv2D(4, 1, name="conv"), Norm()], name=name)

    x = image()
    model = folded(keras.Model(x, inner("second")(inner("first")(x))))
    assert [layer.name for layer in model.layers if "conv" in layer.name] == ["conv", "second_conv"]


def test_a_layer_of_the_users_own_is_opened():
    x = image()
    block = Residual(name="block")
    model = folded(keras.Model(x, block(block(x))))
    assert into(model) == ["conv", "conv"]
    assert [row.path for row in model.report.rows] == ["block/norm"] * 2
    assert [type(layer).__name__ for layer in model.layers].count("Conv2D") == 1


def test_a_layer_that_cannot_be_opened_stays_whole_and_the_report_says_so():
    x = image()
    model = randomize(keras.Model(x, Norm()(layers.Dense(4)(Closed(name="closed")(x)))))
    new = tfbn.fold(model)
    kept, gone = new.report.rows
    assert (kept.outcome, kept.path) == ("unchanged", "closed/norm")
    assert kept.reason == "it is inside of 'closed' (Closed), which stays whole"
    assert gone.outcome == "folded into what it follows"
    assert len(batch_norm_layers(new)) == 1


def test_a_subclassed_model_is_folded_if_its_call_can_be_followed():
    class Net(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.block, self.dense, self.norm = Residual(), layers.Dense(3), Norm()

        def call(self, x: Any) -> Any:
            return self.norm(self.dense(self.block(x)))

    net = Net()
    net(np.zeros((1, 8, 8, 4), "float32"))
    assert folded(net).report.left == ()

    class Opaque(Net):
        def call(self, x: Any) -> Any:
            return tf.nn.relu(super().call(x))

    opaque = Opaque()
    opaque(np.zeros((1, 8, 8, 4), "float32"))
    with pytest.raises(ValueError, match=r"graph of the model .* of class Opaque cannot be seen"):
        tfbn.fold(opaque)


def test_time_distributed_layers_fold_as_the_layers_inside():
    x = keras.Input((5, 8, 8, 4))
    timed = layers.TimeDistributed
    h = timed(Norm())(timed(layers.Conv2D(4, 3, name="conv"), name="timed")(x))
    h = timed(Norm())(layers.ReLU()(h))
    h = timed(layers.Dense(3), name="last")(timed(layers.GlobalAveragePooling2D())(h))
    model = folded(keras.Model(x, h))
    assert into(model) == ["timed", "last"]


def test_masks_go_on_past_what_is_folded():
    x = keras.Input((6,), dtype="int32")
    h = Norm()(layers.Dense(4)(layers.Embedding(9, 4, mask_zero=True)(x)))
    model = randomize(keras.Model(x, layers.LSTM(3)(h)))
    new = tfbn.fold(model)
    words = tf.constant([[1, 2, 3, 0, 0, 0], [4, 5, 6, 7, 8, 1]])
    np.testing.assert_allclose(new(words), model(words), rtol=1e-5, atol=1e-6)
    assert new.report.left == ()


# What it leaves alone


def test_a_call_that_says_training_keeps_its_batch_statistics():
    x = image()
    model = randomize(keras.Model(x, Norm()(layers.Dense(4)(x), training=True)))
    new = tfbn.fold(model)
    assert reasons(new) == ["its call says training=True"]
    data = tf.random.stateless_normal((3, 8, 8, 4), (1, 2))
    np.testing.assert_array_equal(new(data), model(data))


def test_dropout_that_stays_on_is_not_moved_through():
    x = image()
    h = layers.Dropout(0.5)(Norm()(x), training=True)
    assert "says training=True" in reasons(folded(keras.Model(x, layers.Dense(3)(h))))[0]


def test_what_is_float32_for_good_reasons_does_not_become_float16():
    x, large = keras.Input((4,)), keras.Input((4,))
    behind = Norm(dtype="float32")(layers.Dense(3, dtype="mixed_float16", name="half")(x))
    norm = Norm(dtype="float32")
    before = layers.Dense(3, dtype="mixed_float16", name="after")(norm(large))
    model = randomize(keras.Model([x, large], [behind, before]))
    norm.moving_variance.assign([1e12] * 4)
    values = tf.random.stateless_normal((3, 4), (7, 7))
    new = tfbn.fold(model, [values, 1e6 * values])  # Beyond float16.
    assert [output.dtype for output in new.output] == ["float32", "float16"]
    assert new.report.difference < 2e-3
    why = " ".join(reason for reason in reasons(new) if reason)
    if keras.__version__.startswith("3.8."):  # Layers of their own cast there, and stand between.
        assert "'cast_2' (Cast) gives float16, and it gives float32" in why
        return
    for name in ("half", "after"):
        assert f"'{name}' (Dense) gives float16, and it gives float32" in why


def test_subclasses_are_not_taken_for_what_they_may_not_be():
    @keras.saving.register_keras_serializable("test_fold")
    class Standardized(layers.Dense):
        def call(self, x: Any) -> Any:
            return 2.0 * super().call(x)

    @keras.saving.register_keras_serializable("test_fold")
    class Own(Norm):
        def call(self, x: Any, training: Any = None, mask: Any = None) -> Any:
            return 3.0 * super().call(x, training, mask)

    x = image()
    model = folded(keras.Model(x, Own()(Norm()(Standardized(4, name="odd")(x)))))
    assert reasons(model) == [
        "'odd' (Standardized) is no linear map; 'own' (Own) is no linear map",
        "its class Own has a behaviour of its own",
    ]


def test_a_layer_with_weights_of_another_kind_stays():
    x = image()
    dense = layers.Dense(4, name="dense")
    model = keras.Model(x, Norm()(dense(x)))
    dense.enable_lora(2)
    assert "weights of another kind" in reasons(folded(model))[0]


def test_the_model_stays_as_it_is():
    x = image()
    model = randomize(keras.Model(x, layers.ReLU()(Norm()(layers.Conv2D(4, 3)(x)))))
    model.compile("sgd", "mse")
    before = [weight.numpy() for weight in model.weights]
    tfbn.fold(model)
    for weight, value in zip(model.weights, before, strict=True):
        np.testing.assert_array_equal(weight.numpy(), value)
    assert model.compiled
    assert keras.Model(model.input, model.layers[1].output).output_shape == (None, 6, 6, 4)


# What comes out


def test_the_result_is_an_inference_model_of_the_same_inputs_and_outputs():
    x = {"a": keras.Input((4,), name="a"), "b": keras.Input((4,), name="b")}
    y = Norm()(layers.Dense(3)(x["a"]))
    model = keras.Model(x, {"y": y, "z": [Norm()(x["b"]), x["a"]]}, name="two")
    new = folded(model)
    assert new.name == "two"
    assert not new.compiled
    assert {name: tensor.name for name, tensor in new.input.items()} == {"a": "a", "b": "b"}
    assert list(new.output) == ["y", "z"]


def test_a_file_of_the_folded_model_loads_without_tfbn(tmp_path):
    x = image()
    h = tfbn.BatchNormalization(axis=[1, 3])(x)
    model = keras.Model(x, tfbn.BatchNormalization()(layers.Dense(3)(layers.ReLU()(h))))
    new = folded(model)
    new.save(tmp_path / "folded.keras")
    np.save(tmp_path / "x.npy", np.ones((2, 8, 8, 4), "float32"))
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            f"""
import sys
sys.modules["tfbn"] = None
import keras, numpy as np
model = keras.models.load_model(r"{tmp_path}/folded.keras")
np.save(r"{tmp_path}/y.npy", model(np.load(r"{tmp_path}/x.npy")))
""",
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    np.testing.assert_array_equal(
        np.load(tmp_path / "y.npy"), new(np.ones((2, 8, 8, 4), "float32"))
    )


def test_a_model_without_batch_normalization_is_copied():
    x = image()
    report = folded(keras.Model(x, layers.Dense(3)(x))).report
    assert report.rows == ()
    assert "no batch normalization layers" in report.summary()


# The report


def mixed() -> keras.Model:
    x = image()
    h = Norm(name="first")(layers.Conv2D(4, 3, name="conv")(x))
    h = Norm(name="second")(layers.ReLU(name="relu")(h))
    return randomize(keras.Model(x, layers.Dense(2)(layers.ReLU(name="again")(h))))


def test_the_report_can_be_read_by_programs_and_by_people():
    report = tfbn.fold(mixed()).report
    data = json.loads(json.dumps(report.to_dict()))
    assert data["layers"] == [
        {
            "layer": "first",
            "within": [],
            "outcome": "folded into what it follows",
            "into": "conv",
            "reason": None,
        },
        {
            "layer": "second",
            "within": [],
            "outcome": "multiply-add",
            "into": None,
            "reason": "'relu' (ReLU) is no linear map; 'again' (ReLU) is no linear map",
        },
    ]
    assert data["difference"] <= data["tolerance"] == 1e-4
    assert [row.layer for row in report.left] == ["second"]
    assert "1 folded into what it follows, 1 multiply-add; largest difference" in report.summary()
    for shown in (str(report), report.to_markdown()):
        for word in ("first", "conv", "second", "multiply-add", "relu"):
            assert word in shown
    assert "| first | folded into what it follows | conv |" in report.to_markdown()


def test_the_report_needs_no_rich(monkeypatch):
    report = tfbn.fold(mixed()).report
    monkeypatch.setitem(sys.modules, "rich.table", None)
    monkeypatch.setitem(sys.modules, "rich.box", None)
    monkeypatch.setitem(sys.modules, "rich", None)
    assert "folded into what it follows" in str(report)


# Errors


def test_a_model_that_comes_out_different_is_not_returned():
    with pytest.raises(
        ValueError, match=r"gives other outputs .* Received: a difference of .*tolerance=1e-12"
    ):
        tfbn.fold(randomize(mixed()), tolerance=1e-12)


def test_a_model_of_random_outputs_is_told_from_one_that_comes_out_different():
    x = image()
    noisy = layers.Lambda(lambda t: t + keras.random.normal((8, 8, 4)))(Norm()(x))
    with pytest.raises(ValueError, match=r"are random: two calls .* differ by .*'inf'"):
        tfbn.fold(keras.Model(x, noisy))
    assert tfbn.fold(keras.Model(x, noisy), tolerance=float("inf")).report.rows


def test_outputs_that_are_not_finite_cannot_be_compared():
    model = mixed()
    with pytest.raises(ValueError, match="not finite"):
        tfbn.fold(model, inputs=np.full((1, 8, 8, 4), np.inf, "float32"))


@pytest.mark.parametrize("tolerance", [-1, float("nan"), "1e-4"])
def test_a_tolerance_that_is_none_is_refused(tolerance):
    model = keras.Model(x := keras.Input((4,)), Norm()(x))
    with pytest.raises(ValueError, match=rf"at least 0. Received: tolerance={tolerance!r}"):
        tfbn.fold(model, tolerance=tolerance)


def test_no_examples_cannot_be_compared():
    model = keras.Model(x := keras.Input((4,)), Norm()(x))
    with pytest.raises(ValueError, match=r"outputs are empty.*Received: .*\(0, 4\)"):
        tfbn.fold(model, np.zeros((0, 4), "float32"))


def test_given_inputs_are_what_is_compared():
    model = mixed()
    report = tfbn.fold(model, inputs=np.zeros((1, 8, 8, 4), "float32")).report
    assert report.difference <= 1e-6


def test_a_model_without_shapes_is_refused():
    with pytest.raises(
        ValueError, match=r"not built, .* Received: model 'plain' of class Sequential"
    ):
        tfbn.fold(keras.Sequential([layers.Dense(2), Norm()], name="plain"))


def test_what_is_no_model_is_refused():
    with pytest.raises(TypeError, match=r"Only a Keras model can be folded. Received: model='x'"):
        tfbn.fold("x")
