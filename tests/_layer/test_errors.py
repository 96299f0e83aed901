"""Bad input: an error says what was wrong, what was received and what to do, and nothing changes."""

from __future__ import annotations

import re

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfbn
from layer_runs import weights

X = np.ones((6, 4, 3), "float32")


def check_text(error: BaseException, wrong: str) -> None:
    """What was wrong, matched by the pattern; what was received; and more than that: what to do."""
    text = str(error)
    assert re.search(wrong, text, re.DOTALL), text
    assert "Received: " in text, text


# At construction


@pytest.mark.parametrize(
    ("arguments", "kind", "wrong"),
    [
        ({"axis": 1.5}, TypeError, r"`axis` must be an integer.*list.*axis=1.5"),
        ({"axis": "last"}, TypeError, r"`axis` must be an integer.*axis='last'"),
        ({"axis": None}, TypeError, r"`axis` must be an integer.*axis=None"),
        ({"axis": True}, TypeError, r"`axis` must be an integer.*axis=True"),
        ({"axis": []}, TypeError, r"`axis` must be.*non-empty.*axis=\[\]"),
        ({"axis": [1, 2.0]}, TypeError, r"`axis` must be an integer.*axis=\[1, 2.0\]"),
        ({"axis": [1, 1]}, ValueError, r"axis twice.*pass each axis once.*axis=\[1, 1\]"),
        ({"momentum": 1.01}, ValueError, r"`momentum` must be in \[0, 1\].*momentum=1.01"),
        ({"momentum": -0.1}, ValueError, r"`momentum` must be in \[0, 1\].*momentum=-0.1"),
        ({"momentum": float("nan")}, ValueError, r"`momentum` must be in \[0, 1\].*momentum=nan"),
        ({"momentum": "0.9"}, TypeError, r"`momentum` must be a number.*momentum='0.9'"),
        ({"momentum": True}, TypeError, r"`momentum` must be a number.*momentum=True"),
        (
            {"renorm": True, "renorm_momentum": 2},
            ValueError,
            r"`renorm_momentum` must be in \[0, 1\].*renorm_momentum=2",
        ),
        ({"renorm": True, "renorm_momentum": None}, TypeError, r"`renorm_momentum` must be a num"),
        ({"epsilon": 0.0}, ValueError, r"`epsilon` must be positive.*epsilon=0.0"),
        ({"epsilon": -1e-3}, ValueError, r"`epsilon` must be positive.*epsilon=-0.001"),
        ({"epsilon": float("nan")}, ValueError, r"`epsilon` must be positive.*epsilon=nan"),
        ({"epsilon": float("inf")}, ValueError, r"`epsilon` must be positive.*epsilon=inf"),
        ({"epsilon": "small"}, TypeError, r"`epsilon` must be a positive number.*'small'"),
        ({"virtual_batch_size": 0}, ValueError, r"`virtual_batch_size` must be at least 1.*=0"),
        ({"virtual_batch_size": -4}, ValueError, r"`virtual_batch_size` must be at least 1.*=-4"),
        ({"virtual_batch_size": 2.5}, TypeError, r"`virtual_batch_size` must be an integer.*=2.5"),
        (
            {"virtual_batch_size": 2, "synchronized": True},
            ValueError,
            r"`virtual_batch_size` and `synchronized=True` contradict each other.*Use one"
            r".*virtual_batch_size=2, synchronized=True",
        ),
        (
            {"virtual_batch_size": 2, "renorm": True},
            ValueError,
            r"`virtual_batch_size` and `renorm=True` contradict each other.*Use one"
            r".*virtual_batch_size=2, renorm=True",
        ),
        (
            {"renorm_clipping": {"rmax": 2.0}},
            ValueError,
            r"`renorm_clipping`.*needs `renorm=True`.*leave `renorm_clipping` out.*renorm=False",
        ),
        (
            {"renorm": True, "renorm_clipping": {"rmaximum": 2.0}},
            ValueError,
            r"`renorm_clipping`.*keys.*'rmax', 'rmin', 'dmax'.*'rmaximum'",
        ),
        (
            {"renorm": True, "renorm_clipping": [1.0, 2.0]},
            (TypeError, ValueError),
            r"`renorm_clipping` must be a dict.*\[1.0, 2.0\]",
        ),
        (
            {"renorm": True, "renorm_clipping": {"rmin": 2.0, "rmax": 1.0}},
            ValueError,
            r"rmax must not be smaller than rmin.*rmax=1.0, rmin=2.0",
        ),
        (
            {"renorm": True, "renorm_clipping": {"dmax": -1.0}},
            ValueError,
            r"d to \[-dmax, dmax\], so no limit may be negative.*dmax=-1.0",
        ),
        (
            {"renorm": True, "renorm_clipping": {"rmax": -1.0}},
            ValueError,
            r"r to \[rmin, rmax\].*no limit may be negative.*rmax=-1.0",
        ),
        (
            {"renorm": True, "renorm_clipping": {"dmax": float("nan")}},
            ValueError,
            r"no limit may be negative.*dmax=nan",
        ),
        (
            {"renorm": True, "renorm_clipping": {"rmax": "2"}},
            TypeError,
            r"limits in `renorm_clipping` must be numbers.*rmax='2'",
        ),
    ],
    ids=str,
)
def test_bad_arguments(arguments, kind, wrong):
    with pytest.raises(kind) as info:
        tfbn.BatchNormalization(**arguments)
    check_text(info.value, wrong)


def test_an_argument_that_nobody_knows_is_named():
    with pytest.raises((TypeError, ValueError), match="momentun"):
        tfbn.BatchNormalization(momentun=0.9)


@pytest.mark.parametrize("name", ["virtual_batch_size"])
def test_our_own_arguments_are_not_taken_by_position(name):
    stock_arguments = 17
    with pytest.raises(TypeError, match="positional"):
        tfbn.BatchNormalization(*[-1, 0.99, 1e-3, *[None] * (stock_arguments - 3), 4])


# At build


@pytest.mark.parametrize(
    ("axis", "shape", "wrong"),
    [
        (3, (None, 4, 3), r"Axis 3 is out of range.*axes -3 to 2.*axis=3.*\(None, 4, 3\)"),
        (-4, (None, 4, 3), r"Axis -4 is out of range.*axes -3 to 2.*axis=-4"),
        ([1, 5], (None, 4, 3), r"Axis 5 is out of range.*axis=\[1, 5\]"),
        (0, (None, 4, 3), r"Axis 0 is the batch.*Pass the axis of the channels.*axis=0"),
        (-3, (None, 4, 3), r"Axis 0 is the batch.*Pass the axis of the channels.*axis=-3"),
        ([1, -2], (None, 4, 3), r"axis twice.*pass each axis once.*axis=\[1, -2\]"),
        (-1, (None, 4, None), r"number of channels must be known.*Input.*\(None, 4, None\)"),
        ([1, 2], (None, None, 3), r"number of channels must be known.*\(None, None, 3\)"),
        (-1, (None,), r"at least 2 dimensions.*\(None,\)"),
    ],
    ids=str,
)
@pytest.mark.parametrize("how", ["build", "symbolic call", "compute_output_shape"])
def test_bad_shapes(axis, shape, wrong, how):
    if how == "compute_output_shape" and "known" in wrong:
        pytest.skip("the output of an unknown number of channels has a shape: the same")
    layer = tfbn.BatchNormalization(axis=axis)
    use = {
        "build": layer.build,
        "symbolic call": lambda shape: layer(keras.Input(shape[1:])),
        "compute_output_shape": layer.compute_output_shape,
    }[how]
    with pytest.raises(ValueError, match="Received: ") as info:
        use(shape)
    check_text(info.value, wrong)
    assert layer.weights == []
    assert not layer.built


# At the call


def built(**arguments) -> tfbn.BatchNormalization:
    layer = tfbn.BatchNormalization(**arguments)
    layer(tf.random.normal((6, 4, 3)), training=True)
    return layer


CALLS = [
    (
        "integers",
        lambda layer, **k: layer(tf.ones((6, 4, 3), "int32"), **k),
        (TypeError, ValueError),
        r"floating-point.*cast.*int32",
    ),
    (
        "booleans",
        lambda layer, **k: layer(tf.ones((6, 4, 3), "bool"), **k),
        (TypeError, ValueError),
        r"floating-point.*cast.*bool",
    ),
    (
        "numpy integers",
        lambda layer, **k: layer(np.ones((6, 4, 3), "int64"), **k),
        (TypeError, ValueError),
        r"floating-point.*cast.*int64",
    ),
    (
        "complex numbers",
        lambda layer, **k: layer(tf.ones((6, 4, 3), "complex64"), **k),
        (TypeError, ValueError),
        r"floating-point.*complex64",
    ),
    (
        "strings",
        lambda layer, **k: layer(tf.constant([[["a", "b", "c"]] * 4]), **k),
        (TypeError, ValueError),
        r"floating-point.*string",
    ),
    (
        "ragged",
        lambda layer, **k: layer(tf.RaggedTensor.from_row_lengths(tf.ones((5, 3)), [2, 3]), **k),
        (TypeError, ValueError),
        r"dense tensors.*to_tensor\(\).*mask.*ragged",
    ),
    (
        "sparse",
        lambda layer, **k: layer(tf.sparse.from_dense(tf.ones((6, 4, 3))), **k),
        (TypeError, ValueError),
        r"dense tensors.*tf.sparse.to_dense.*sparse",
    ),
    (
        "channels",
        lambda layer, **k: layer(tf.ones((6, 4, 5)), **k),
        ValueError,
        r"[Cc]hannels|axis -1.*value 3",
    ),
    ("lower rank", lambda layer, **k: layer(tf.ones((6, 3)), **k), ValueError, r"rank 3|ndim=3"),
    (
        "higher rank",
        lambda layer, **k: layer(tf.ones((6, 4, 4, 3)), **k),
        ValueError,
        r"rank 3|ndim=3",
    ),
    (
        "mask of other size",
        lambda layer, **k: layer(X, mask=tf.ones((6, 5), bool), **k),
        ValueError,
        r"mask does not broadcast.*\(6, 5\).*\(6, 4, 3\)",
    ),
    (
        "mask of higher rank",
        lambda layer, **k: layer(X, mask=tf.ones((6, 4, 3, 1), bool), **k),
        ValueError,
        r"mask does not broadcast.*\(6, 4, 3, 1\).*\(6, 4, 3\)",
    ),
    (
        "mask aligned to the last axes",
        lambda layer, **k: layer(X, mask=tf.ones((3,), bool), **k),
        ValueError,
        r"mask does not broadcast.*leading axes.*\(3,\).*\(6, 4, 3\)",
    ),
]


@pytest.mark.parametrize(
    ("bad_call", "kind", "wrong"), [call[1:] for call in CALLS], ids=[call[0] for call in CALLS]
)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("mode", ["eager", "graph"])
def test_bad_calls_change_nothing(bad_call, kind, wrong, training, mode):
    layer = built()
    before = weights(layer)

    def call():
        return bad_call(layer, training=training)

    with pytest.raises(kind) as info:
        (tf.function(call) if mode == "graph" else call)()
    assert re.search(wrong, str(info.value), re.DOTALL), str(info.value)
    # Keras's own check of the number of channels and the rank words it otherwise.
    assert re.search("received", str(info.value), re.IGNORECASE)
    for name, value in weights(layer).items():
        np.testing.assert_array_equal(value, before[name], err_msg=name)
    assert np.all(np.isfinite(layer(X, training=True)))


@pytest.mark.parametrize(
    "bad_call", [call[1] for call in CALLS[:7]], ids=[call[0] for call in CALLS[:7]]
)
def test_bad_first_calls_do_not_build_the_layer(bad_call):
    layer = tfbn.BatchNormalization()
    with pytest.raises((TypeError, ValueError), match="Received: "):
        bad_call(layer)
    assert not layer.built
    assert layer(tf.ones((2, 7))).shape == (2, 7)  # it can still be built for what is right


@pytest.mark.parametrize(
    "make",
    [
        lambda: keras.Input((4, 3), dtype="int32"),
        lambda: keras.Input((4, 3), dtype="string"),
    ],
    ids=["integers", "strings"],
)
def test_bad_symbolic_inputs(make):
    with pytest.raises((TypeError, ValueError), match="Received: "):
        tfbn.BatchNormalization()(make())


def test_a_symbolic_tensor_that_keras_takes_for_sparse_is_none():
    """Keras marks the product of a number and a dense symbolic tensor as sparse."""
    x = keras.Input((3,))
    model = keras.Model(x, tfbn.BatchNormalization()(2 * x))
    assert model(tf.ones((4, 3))).shape == (4, 3)


def test_a_sparse_input_of_a_model_is_refused_when_it_comes():
    x = keras.Input((3,), sparse=True)
    model = keras.Model(x, tfbn.BatchNormalization()(x))
    with pytest.raises(TypeError, match=r"tf\.sparse\.to_dense.*Received: a sparse tensor"):
        model(tf.sparse.from_dense(tf.ones((4, 3))))


# Virtual batches


@pytest.mark.parametrize("mode", ["eager", "graph"])
def test_batch_that_virtual_batches_do_not_divide(mode):
    layer = built(virtual_batch_size=3)
    before = weights(layer)

    def call():
        return layer(tf.ones((7, 4, 3)), training=True)

    with pytest.raises(ValueError, match="multiple of `virtual_batch_size`") as info:
        (tf.function(call) if mode == "graph" else call)()
    check_text(info.value, r"drop_remainder=True.*virtual_batch_size=3, batch size 7")
    for name, value in weights(layer).items():
        np.testing.assert_array_equal(value, before[name], err_msg=name)


def test_batch_of_unknown_size_that_virtual_batches_do_not_divide():
    layer = built(virtual_batch_size=3)
    before = weights(layer)
    train = tf.function(
        lambda x: layer(x, training=True), input_signature=[tf.TensorSpec([None, 4, 3])]
    )
    assert train(tf.ones((9, 4, 3))).shape == (9, 4, 3)
    before = weights(layer)
    with pytest.raises(tf.errors.InvalidArgumentError) as info:
        train(tf.ones((7, 4, 3)))
    check_text(info.value, r"multiple of `virtual_batch_size`.*drop.*virtual_batch_size=3")
    for name, value in weights(layer).items():
        np.testing.assert_array_equal(value, before[name], err_msg=name)


def test_inference_takes_any_batch_size_with_virtual_batches():
    layer = built(virtual_batch_size=3)
    assert layer(tf.ones((7, 4, 3)), training=False).shape == (7, 4, 3)


# Configurations


def test_config_with_a_bad_value_is_refused_like_the_argument():
    config = tfbn.BatchNormalization().get_config()
    with pytest.raises((TypeError, ValueError), match=r"`momentum` must be in \[0, 1\]"):
        tfbn.BatchNormalization.from_config({**config, "momentum": 2.0})


@pytest.mark.parametrize("built", [False, True])
def test_an_input_of_unknown_rank_is_refused(built):
    layer = tfbn.BatchNormalization(name="norm")
    if built:
        layer.build((None, 3))
    function = tf.function(layer, input_signature=[tf.TensorSpec(None)])
    with pytest.raises(
        ValueError, match=r"known rank.*ensure_shape.*unknown rank for layer 'norm'"
    ):
        function(tf.zeros((2, 3)))
