"""Recalibration from data of every kind; and what is refused, or goes wrong, changes nothing."""

import itertools
import json

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import tfbn

X = np.random.default_rng(0).normal(4.0, 2.0, (20, 2)).astype("float32")
Y = np.zeros((20, 1), "float32")


def chain(depth: int = 2) -> keras.Model:
    return keras.Sequential(
        [keras.Input((2,)), *(tfbn.BatchNormalization(name=f"bn{i}") for i in range(depth))],
        name="chain",
    )


class Batches(keras.utils.PyDataset):
    def __len__(self):
        return 3

    def __getitem__(self, index):
        return X[7 * index : 7 * (index + 1)], Y[7 * index : 7 * (index + 1)]


def dataset() -> tf.data.Dataset:
    return tf.data.Dataset.from_tensor_slices(X).batch(7)


WAYS = {
    "array": lambda: X,
    "pair": lambda: (X, Y),
    "triple": lambda: (X, Y, Y[:, 0]),
    "tensor": lambda: tf.constant(X),
    "tf.data": dataset,
    "tf.data of pairs": lambda: dataset().map(lambda x: (x, x)),
    "PyDataset": Batches,
    "generator function": lambda: lambda: (X[i : i + 3] for i in range(0, 20, 3)),
    "function of a data set": lambda: dataset,
}


@pytest.mark.parametrize("way", WAYS)
def test_data_of_every_kind(way):
    model = chain()
    result = tfbn.recalibrate(model, WAYS[way]())
    assert (result.examples, result.levels, result.passes) == (20, 2, 1)
    np.testing.assert_allclose(model.layers[0].moving_mean, X.mean(0), rtol=1e-5)
    np.testing.assert_allclose(model.layers[1].moving_mean, [0, 0], atol=1e-5)


def test_an_endless_data_set_is_used_for_as_many_steps():
    result = tfbn.recalibrate(chain(), dataset().repeat(), steps=5)
    assert (result.batches, result.examples) == (5, 7 + 7 + 6 + 7 + 7)


# Models with several inputs


def two_inputs() -> keras.Model:
    a, b = keras.Input((2,), name="a"), keras.Input((2,), name="b")
    joined = layers.Concatenate()([tfbn.BatchNormalization()(a), tfbn.BatchNormalization()(b)])
    return keras.Model([a, b], tfbn.BatchNormalization()(joined))


@pytest.mark.parametrize(
    "batch",
    [(X, -X), ((X, -X), Y), ((X, -X),), {"a": X, "b": -X}, ({"a": X, "b": -X}, Y)],
    ids=["tuple", "tuple and labels", "tuple alone", "dict", "dict and labels"],
)
@pytest.mark.parametrize(
    "wrap", [lambda batch: batch, tf.data.Dataset.from_tensors], ids=["arrays", "tf.data"]
)
def test_several_inputs(batch, wrap):
    model = two_inputs()
    result = tfbn.recalibrate(model, wrap(batch))
    assert result.levels == 2  # The two layers beside each other share one.
    assert result.examples == 20
    first, second, _ = [layer for layer in model.layers if layer.weights]
    np.testing.assert_allclose(first.moving_mean, X.mean(0), rtol=1e-5)
    np.testing.assert_allclose(second.moving_mean, -X.mean(0), rtol=1e-5)


@pytest.mark.parametrize("data", [(([X, -X], Y),), ([X, -X],), ([X, -X], Y), ((X, -X), Y)])
def test_several_inputs_in_a_list_as_fit_takes_them(data):
    model = two_inputs()
    assert tfbn.recalibrate(model, *data).examples == 20
    first, second, _ = [layer for layer in model.layers if layer.weights]
    np.testing.assert_allclose(first.moving_mean, X.mean(0), rtol=1e-5)
    np.testing.assert_allclose(second.moving_mean, -X.mean(0), rtol=1e-5)


@pytest.mark.parametrize("data", [(X, Y), ([X], Y), ([X],)], ids=["x, y", "list, y", "list"])
def test_x_and_y_as_fit_takes_them(data):
    model = chain(1)
    assert tfbn.recalibrate(model, *data).examples == 20
    np.testing.assert_allclose(model.layers[0].moving_mean, X.mean(0), rtol=1e-5)


def test_a_model_with_a_call_of_its_own():
    class Encoder(keras.Model):
        def __init__(self):
            super().__init__()
            self.bn = tfbn.BatchNormalization()
            self.dropout = layers.Dropout(0.9)

        def encode(self, x, *, scale, training=False):
            return self.dropout(self.bn(scale * x, training=training), training=training)

    model = Encoder()
    tfbn.recalibrate(
        model,
        tf.data.Dataset.from_tensor_slices(
            {"values": X, "scale": np.full((20, 1), 3.0, "float32")}
        ).batch(6),
        forward=lambda model, batch: model.encode(batch["values"], scale=batch["scale"]),
    )
    np.testing.assert_allclose(model.bn.moving_mean, 3 * X.mean(0), rtol=1e-5)


def test_images_of_several_sizes():
    sizes = [(4, 6), (8, 2), (4, 6), (3, 3)]
    images = [
        np.random.default_rng(i).normal(i, 1, (5, *s, 3)).astype("float32")
        for i, s in enumerate(sizes)
    ]
    model = keras.Sequential([keras.Input((None, None, 3)), tfbn.BatchNormalization()])
    tfbn.recalibrate(model, lambda: iter(images))
    pixels = np.concatenate([image.reshape(-1, 3) for image in images])
    np.testing.assert_allclose(model.layers[0].moving_mean, pixels.mean(0), rtol=1e-5)
    np.testing.assert_allclose(model.layers[0].moving_variance, pixels.var(0), rtol=1e-5)


def test_empty_batches_are_passed_over():
    model = chain()
    result = tfbn.recalibrate(model, lambda: iter([X[:0], X[:6], X[:0], X[6:]]))
    assert (result.batches, result.examples) == (4, 20)
    np.testing.assert_allclose(model.layers[0].moving_variance, X.var(0), rtol=1e-5)


# What it tells


def test_the_result_tells_what_changed(capsys):
    model = chain()
    model.layers[1].trainable = False
    result = tfbn.recalibrate(model, X, batch_size=8)
    change, frozen = result.layers
    assert (change.layer, change.outcome, change.calls, change.values) == (
        "chain/bn0",
        "recalibrated",
        1,
        20,
    )
    shift = X.mean(0) / np.sqrt(X.var(0) + 1e-3)
    assert change.mean_shift == pytest.approx(np.sqrt(np.mean(shift**2)), rel=1e-5)
    ratio = (X.var(0) + 1e-3) / 1.001
    assert change.variance_ratio == pytest.approx(np.sqrt(np.prod(ratio)), rel=1e-5)
    assert frozen.outcome == "frozen"
    assert json.loads(json.dumps(result.to_dict()))["layers"][0]["layer"] == "chain/bn0"
    assert capsys.readouterr().out == ""
    again = tfbn.recalibrate(model, X, batch_size=8, verbose=True)
    printed = capsys.readouterr().out
    assert str(again) in printed
    assert "3/3" in printed  # The progress bar.
    for word in (
        "20 examples in 3 batches, 1 pass",
        "chain/bn0",
        "recalibrated",
        "mean moved by",
        "frozen",
    ):
        assert word in str(again)


def test_without_rich_it_prints_a_plain_table(monkeypatch):
    result = tfbn.recalibrate(chain(), X)
    pretty = str(result).split()
    monkeypatch.setitem(__import__("sys").modules, "rich", None)
    monkeypatch.setitem(__import__("sys").modules, "rich.box", None)
    plain = str(result)
    assert [word for word in plain.split() if set(word) != {"-"}] == [
        word for word in pretty if set(word) != {"─"}
    ]
    assert len({len(line.rstrip()) for line in plain.splitlines()[1:]}) == 1


# What is refused, or goes wrong


def refused(data=X, model=None, error=ValueError, match="", **arguments):
    """Recalibration raises, and the model is as it was, to the bit."""
    model = chain() if model is None else model
    if isinstance(model, keras.layers.Layer):
        for weight in model.weights:
            weight.assign(np.random.default_rng(1).uniform(1, 2, weight.shape))
    weights = [w.numpy() for w in getattr(model, "weights", [])]
    with pytest.raises(error, match=match):
        tfbn.recalibrate(model, data, **arguments)
    for weight, before in zip(getattr(model, "weights", []), weights, strict=True):
        np.testing.assert_array_equal(weight.numpy(), before)
    for layer in getattr(model, "layers", []):
        assert "call" not in vars(layer)
    assert not tf.config.functions_run_eagerly()


def failing(after: int, error: BaseException):
    """Data that raises in the second pass."""
    turns = itertools.count()

    def batches():
        for i in range(3):
            if next(turns) == after:
                raise error
            yield X[7 * i : 7 * (i + 1)]

    return batches


@pytest.mark.parametrize("after", [0, 2, 4])
@pytest.mark.parametrize(
    "error", [KeyboardInterrupt("Ctrl-C"), RuntimeError("the disk is full")], ids=str
)
def test_whatever_the_data_raises_the_model_is_as_it_was(after, error):
    refused(failing(after, error), error=type(error), match=str(error), cache="none")


def test_an_error_in_the_middle_of_the_assignments_is_undone(monkeypatch):
    model = chain()
    last = model.layers[1].moving_variance
    assign = type(last).assign

    def failing_assign(variable, value):
        if variable is last and np.any(np.asarray(value) != last.numpy()):
            raise KeyboardInterrupt
        return assign(variable, value)

    for weight in model.weights:
        weight.assign(np.random.default_rng(1).uniform(1, 2, weight.shape))
    before = [w.numpy() for w in model.weights]
    monkeypatch.setattr(type(last), "assign", failing_assign)
    with pytest.raises(KeyboardInterrupt):
        tfbn.recalibrate(model, X)
    for weight, value in zip(model.weights, before, strict=True):
        np.testing.assert_array_equal(weight.numpy(), value)


def test_a_model_without_batch_normalization():
    model = keras.Sequential([keras.Input((2,)), layers.Dense(1)], name="plain")
    refused(model=model, match=r"no batch normalization layers.*'plain' of type Sequential")


def test_a_model_that_calls_none_of_its_layers():
    refused(
        match=r"called none.*`forward`.*'chain/bn0', 'chain/bn1'",
        forward=lambda model, batch: batch,
    )


def test_a_model_that_is_frozen_altogether():
    model = chain()
    tfbn.freeze(model)
    refused(
        model=model, match=r"All .* frozen\. Pass include_frozen=True.*'chain', 2 frozen layers"
    )


def test_what_is_no_model():
    refused(model="a name", error=TypeError, match="Received: model='a name'")


def test_a_layer_with_a_call_of_its_own():
    class Odd(tfbn.BatchNormalization):
        def call(self, inputs, training=None, mask=None):
            return -super().call(inputs, training=training, mask=mask)

    refused(
        model=keras.Sequential([keras.Input((2,)), Odd(name="odd")]),
        match=r"overrides `call`.*'[^']*odd' of type Odd",
    )


def test_an_unknown_upstream():
    refused(upstream="both", match=r"'population', 'batch'.*upstream='both'")


@pytest.mark.parametrize("number", [0, -1, 2.5, True, "8"])
@pytest.mark.parametrize("name", ["steps", "batch_size"])
def test_numbers_that_count_nothing(name, number):
    text = rf"`{name}` must be an integer of at least 1\. Received: {name}={number!r}\."
    refused(match=text, **{name: number})


def test_numpy_counts_too():
    result = tfbn.recalibrate(chain(), X, batch_size=np.int32(6), steps=np.int64(2))
    assert (result.batches, result.examples) == (2, 12)


def test_data_of_an_unknown_kind():
    refused(7, error=TypeError, match=r"`data` must be .*Received: data=int")


@pytest.mark.parametrize("number", [2, 3, 4])
def test_a_list_of_batches_is_not_read_as_x_and_y(number):
    refused(
        [X] * number,
        match=rf"list is read as the inputs.*`lambda: iter\(batches\)`.*list of {number} items for a model "
        "with 1 input",
    )


def test_one_example_has_no_variance():
    model = chain()
    refused(X[:1], model, match=r"a single value for each channel.*Received: layer")
    assert tfbn.recalibrate(model, X[:1], prior=100)


def test_a_frame_may_mix_numbers():
    class Frame:
        """As a pandas.DataFrame with a column of truth values."""

        columns = ("a", "b", "c")
        shape = X.shape

        def __len__(self):
            return len(X)

        def __array__(self, *args, **kwargs):
            mixed = X.astype(object)
            mixed[:, 0] = X[:, 0] > 0
            return mixed

    numbers = np.array(Frame()).astype("float32")
    one, two = chain(), chain()
    tfbn.recalibrate(one, Frame())
    tfbn.recalibrate(two, numbers)
    for a, b in zip(one.weights, two.weights, strict=True):
        np.testing.assert_array_equal(a, b)


def test_model_and_data_exchanged():
    with pytest.raises(TypeError, match="`model` must be a Keras model or layer"):
        tfbn.recalibrate(X, chain())


def test_a_stateful_model_and_a_smaller_last_batch():
    lstm = keras.layers.LSTM(2, stateful=True)
    model = keras.Sequential([keras.Input(batch_shape=(8, 5, 3)), lstm, tfbn.BatchNormalization()])
    with pytest.raises(ValueError, match=r"drop_remainder=True.*Incompatible shapes"):
        tfbn.recalibrate(model, np.zeros((20, 5, 3), "float32"), batch_size=8)


def test_labels_beside_data_that_has_its_own():
    refused(
        dataset(), y=Y, match=r"`y` can be passed with arrays only.*_BatchDataset.*ndarray\(20, 1\)"
    )


class TwoArguments(keras.Model):
    def __init__(self):
        super().__init__()
        self.bn = tfbn.BatchNormalization()

    def call(self, x, z):
        return self.bn(x) + z


def test_a_model_that_cannot_run_on_the_batches():
    explanation = r"\(\(x1, x2\),\).*`forward`.*Received: batches "
    model = TwoArguments()
    model(X, X)
    refused((X, X), model, match=rf"{explanation}\(Tensor\(None, 2\), .* which raised .*z")
    dense = keras.Sequential([keras.Input((2,)), layers.Dense(2), tfbn.BatchNormalization()])
    refused(X[:, :1], dense, match=rf"{explanation}Tensor\(None, 1\), which raised ValueError")


def test_data_of_other_channels():
    refused(
        X[:, :1],
        match=r"other channels.*'chain/bn0' with statistics of shape \(2,\), inputs of shape \(None, 1\)",
    )


def test_a_model_that_preprocesses_only_in_predict():
    """As the tasks of KerasHub."""

    class Task(keras.Sequential):
        preprocessor = staticmethod(lambda x: x / 255)

        def predict(self, x):
            return super().predict(self.preprocessor(x))

    model = Task([keras.Input((2,)), tfbn.BatchNormalization()], name="task")
    refused(model=model, match=r"preprocesses its inputs.*model\.preprocessor.*`forward`.*'task'")
    tfbn.recalibrate(model, X, forward=lambda model, batch: model(batch / 2, training=False))
    np.testing.assert_allclose(model.layers[0].moving_mean, X.mean(0) / 2, rtol=1e-5)


def test_data_without_batches():
    refused(lambda: iter([]), match=r"no batches.*generator function.*Received: data=<function")
    refused(dataset().take(0), match=r"no batches")


def test_data_without_examples():
    refused(lambda: iter([X[:0], X[:0]]), match=r"no examples.*Received: 2 batches of 0 examples")


def test_data_without_end():
    refused(dataset().repeat(), match=r"endless.*`steps`.*steps=None")


def test_data_that_ends_too_early():
    refused(dataset(), steps=4, match=r"ended after 3 of 4 batches\..*steps=4")


def test_data_that_can_be_read_only_once():
    def generator():
        yield X

    refused(
        generator(),
        match=r"only once.*generator function.*an iterator, 2 passes",
        cache="none",
    )
    refused(generator(), match="only once", cache="memory", cache_limit=100)
    assert tfbn.recalibrate(chain(1), generator(), cache="none").passes == 1
    assert tfbn.recalibrate(chain(2), generator()).passes == 1
    assert tfbn.recalibrate(chain(2), generator(), upstream="batch").passes == 1


def test_data_that_changes_between_two_passes():
    sizes = iter([20, 19])

    def batches():
        yield X[: next(sizes)]

    refused(
        batches,
        match=r"changed between two passes.*20 examples in 1 batch, then 19 in 1",
        cache="none",
    )


def reshuffled() -> tf.data.Dataset:
    examples = tf.data.Dataset.from_tensor_slices(X)
    return examples.shuffle(20, seed=1, reshuffle_each_iteration=True).batch(5)


def test_a_part_of_data_that_is_reshuffled_for_each_pass():
    # Every pass would see other examples.
    refused(
        reshuffled(),
        steps=2,
        match=r"changed between two passes.*reshuffled.*in 2 batches, then 10 in 2, others than before",
        cache="none",
    )
    model = chain()
    seen = np.concatenate(list(reshuffled().take(2).as_numpy_iterator()))
    tfbn.recalibrate(model, reshuffled(), steps=2)  # It reads them once.
    np.testing.assert_allclose(model.layers[0].moving_mean, seen.mean(0), rtol=1e-5)
    # All of it is the same in any order.
    assert tfbn.recalibrate(chain(), reshuffled(), cache="none").passes == 2


def test_a_batch_size_for_data_in_batches():
    refused(dataset(), batch_size=4, match=r"comes in batches.*`batch_size`.*batch_size=4")


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_data_that_is_not_finite(bad):
    x = X.copy()
    x[13, 1] = bad
    refused(x, match=r"NaN or infinite.*`tf.debugging.*Received: layer 'chain/bn0'")


def test_a_model_that_runs_otherwise_on_other_batches():
    model = chain()

    def forward(model, batch):
        return model.layers[len(batch.shape) - 2](tf.reshape(batch, [-1, 2]))

    refused(
        lambda: iter([X, X[:, None]]),
        model,
        match=r"different batch normalization layers.*of \['chain/bn1'\] instead of \['chain/bn0'\]",
        forward=forward,
    )
