"""The data that the loop takes: every kind gives the same batches, and bad data is refused."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from tfbn._data.sources import as_source
from tfbn._training.loop import TrainingLoop
from tfbn._training.stream import Stream

N, BATCH = 10, 4
X, Y, W = np.arange(N * 2.0).reshape(N, 2), np.arange(N)[:, None] / 2, np.linspace(1, 2, N)


class Sequence(keras.utils.PyDataset):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.ended = 0
        self.begun = 0

    def __len__(self):
        return -(-N // BATCH)

    def __getitem__(self, index):
        rows = slice(index * BATCH, (index + 1) * BATCH)
        return X[rows], Y[rows], W[rows]

    def on_epoch_begin(self):
        assert self.begun == self.ended
        self.begun += 1

    def on_epoch_end(self):
        self.ended += 1


def dataset() -> tf.data.Dataset:
    return tf.data.Dataset.from_tensor_slices((X, Y, W)).batch(BATCH)


class Iterable:
    def __iter__(self):
        return (tuple(np.asarray(part) for part in batch) for batch in dataset())


def stream(data: object, steps: int | None = None, shuffle: bool = False, seed: int = 0) -> Stream:
    opened = Stream("data", as_source("data", data, BATCH, shuffle, seed), steps)
    opened.open()
    return opened


def rows(opened: Stream) -> list[list[int]]:
    """Which examples the batches of the next epoch have."""
    return [[int(x) // 2 for x in batch[0][:, 0]] for batch in opened.epoch()]


def test_a_pass_over_arrays_starts_no_thread_that_its_end_would_wait_for(monkeypatch):
    seen = []
    iterate = tf.data.Dataset.__iter__
    monkeypatch.setattr(
        tf.data.Dataset, "__iter__", lambda data: seen.append(data) or iterate(data)
    )
    as_source("data", (X, Y, W), BATCH, False, 0).start(0)
    assert [data.options().autotune.enabled for data in seen] == [False]


def test_many_sources_of_arrays_draw_no_warning_of_retracing(monkeypatch):
    warned = []
    monkeypatch.setattr(tf.get_logger(), "warning", lambda text, *rest: warned.append(text))
    for _ in range(12):  # TensorFlow warns from the fifth on.
        for _ in as_source("data", (X, Y, W), BATCH, False, 0).start(0):
            pass
    assert not warned


@pytest.mark.parametrize(
    "array",
    [
        np.array([[1, "a"], [2, "b"]], object),
        np.array([[1.0, 2.0]], object),
        np.array(["2020-01-01"], "M8[D]"),
    ],
)
def test_an_array_that_no_tensor_holds_is_described(array):
    with pytest.raises(
        TypeError, match=rf"Convert it.*Received: .*dtype {array.dtype}".replace("[", r"\[")
    ):
        as_source("data", array, BATCH, False, 0)


IN_ORDER = [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
KINDS = {
    "arrays": lambda: (X, Y, W),
    "list": lambda: [X, Y, W],
    "tensors": lambda: tuple(map(tf.constant, (X, Y, W))),
    "dataset": dataset,
    "unknown length": lambda: dataset().filter(lambda *batch: True),
    "PyDataset": Sequence,
    "PyDataset with threads": lambda: Sequence(workers=3, max_queue_size=2),
    "iterable": Iterable,
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_data_gives_the_same_batches_in_every_epoch(kind):
    opened = stream(KINDS[kind]())
    for index in range(3):
        assert opened.position == (index, 0)
        assert rows(opened) == IN_ORDER
    assert opened.steps == (None if kind in ("unknown length", "iterable") else 3)


@pytest.mark.parametrize("kind", KINDS)
def test_an_epoch_of_so_many_steps_goes_on_where_the_last_one_ended(kind):
    opened = stream(KINDS[kind](), steps=5)
    assert rows(opened) == [*IN_ORDER, *IN_ORDER[:2]]
    assert opened.position == (1, 2)
    assert rows(opened) == [IN_ORDER[2], *IN_ORDER, IN_ORDER[0]]
    opened.restart()
    assert rows(opened)[0] == IN_ORDER[0]


def test_a_generator_has_one_pass():
    opened = stream(iter(Iterable()), steps=2)
    assert rows(opened) == IN_ORDER[:2]
    opened.restart()
    assert rows(opened) == IN_ORDER[2:]
    assert rows(opened) == []


def test_endless_data_needs_a_number_of_steps():
    class Endless(Sequence):
        num_batches = None

        def __getitem__(self, index):
            return super().__getitem__(index % 3)

    for data in (dataset().repeat(), Endless()):
        with pytest.raises(
            ValueError, match=r"`data` is endless.* steps_per_epoch .*Received: None"
        ):
            stream(data)
        assert rows(stream(data, steps=4)) == [*IN_ORDER, IN_ORDER[0]]


@pytest.mark.parametrize("kind", ["arrays", "PyDataset"])
def test_each_pass_is_shuffled_by_the_seed_and_its_number(kind):
    one, same, other = (stream(KINDS[kind](), shuffle=True, seed=s) for s in (1, 1, 2))
    seen = [rows(one) for _ in range(6)]
    assert seen == [rows(same) for _ in range(6)]
    assert seen != [rows(other) for _ in range(6)]
    assert len({str(epoch) for epoch in seen}) > 2
    for epoch in seen:
        assert sorted(sum(epoch, [])) == list(range(N))  # noqa: RUF017
        if kind == "PyDataset":
            assert sorted(epoch) == IN_ORDER


def test_a_PyDataset_is_told_of_the_beginning_and_the_end_of_each_pass():
    data = Sequence()
    opened = stream(data)
    for passes in (1, 2):
        rows(opened)
        assert data.begun == data.ended == passes
    later = Sequence()
    opened = Stream("data", as_source("data", later, BATCH, True, 0))
    opened.open((4, 1))
    assert (later.begun, later.ended) == (5, 4)


def test_arrays_may_be_nested_and_keep_their_dtypes():
    data = ({"a": X, "b": (Y, X.astype("int8"))}, None, W.astype("float16"))
    ((x, y, w), *_) = stream(data).epoch()
    assert (x["a"].dtype, x["b"][1].dtype, w.dtype) == ("float32", "int8", "float16")
    assert y is None
    np.testing.assert_array_equal(x["b"][0], Y[:BATCH])


def test_arrays_of_other_libraries_are_arrays():
    class Frame:
        """What pandas and torch have in common."""

        shape = X.shape

        def __len__(self):
            return len(X)

        def __array__(self, dtype=None, copy=None):
            return X

    for index, (x,) in enumerate(stream((Frame(),)).epoch()):
        np.testing.assert_array_equal(x, X[index * BATCH :][:BATCH])


def loop(shape: tuple[int | None, ...] = (2,)) -> TrainingLoop:
    inputs = keras.Input(shape)
    x = keras.layers.GlobalAveragePooling1D()(inputs) if len(shape) == 2 else inputs
    return TrainingLoop(keras.Model(inputs, keras.layers.Dense(1)(x)), "sgd", "mse")


@pytest.mark.parametrize("kind", KINDS)
def test_training_on_every_kind_of_data_gives_the_same_weights(kind):
    trained = []
    fit = {"batch_size": BATCH} if kind in ("arrays", "list", "tensors") else {}
    for data, arguments in ((KINDS[kind](), fit), (dataset(), {})):
        keras.utils.set_random_seed(1)
        one = loop()
        one.fit(data, epochs=2, shuffle=False, verbose=0, **arguments)
        trained.append(one.model.get_weights())
    for weight, same in zip(*trained, strict=True):
        np.testing.assert_array_equal(weight, same)


def test_batches_of_a_generator_may_differ_in_any_size():
    def batches():
        for size, length in ((3, 5), (2, 7), (4, 5)):
            yield np.ones((size, length, 2)), np.ones((size, 1))

    one = loop((None, 2))
    history = one.fit(batches(), verbose=0)
    assert len(history.history["loss"]) == 1
    assert int(one.model.optimizer.iterations) == 3


def test_ragged_tensors_come_in_a_dataset():
    ragged = tf.ragged.constant([[1.0], [1.0, 2.0], [3.0, 4.0, 5.0]])
    data = tf.data.Dataset.from_tensor_slices((ragged, [[0.0], [1.0], [2.0]])).batch(2)
    inputs = keras.layers.Input((None,), dtype="float32", ragged=True)
    dense = keras.layers.Lambda(lambda x: tf.reduce_sum(x, axis=1, keepdims=True))
    model = keras.Model(inputs, keras.layers.Dense(1)(dense(inputs)))
    TrainingLoop(model, "sgd", "mse").fit(data, verbose=0)


NO_DATA = {
    "arrays": ((X[:0], Y[:0]), "must have the same number of examples"),
    "dataset": (dataset().take(0), "`data` has no batches"),
    "unknown length": (dataset().filter(lambda *batch: False), "`data` has no batches"),
    "generator": (iter(()), "create a new one. Received: data with 0 batches"),
}
BAD_DATA = {
    "lengths": ((X, Y[:-1]), ValueError, r"same number.* Received: data=\(ndarray\(10, 2\), nd"),
    "numbers": ([1, 2], TypeError, r"`data` must be a tf.data.Dataset; .* Received: data=\[int, "),
    "scalar": (np.float32(1), TypeError, r"Received: data=float32\(\)"),
    "nothing": (None, TypeError, "Received: data=NoneType"),
    "text": ("train", TypeError, "Received: data=str"),
    "number": (3, TypeError, "Received: data=int"),
    "empty": ((), TypeError, r"Received: data=\(\)"),
    "ragged": (
        tf.ragged.constant([[1.0]]),
        TypeError,
        "Put ragged and sparse tensors into a tf.dat",
    ),
    "sparse": (tf.sparse.eye(2), TypeError, "Received: data=SparseTensor"),
    "datasets": ((dataset(), dataset()), TypeError, "BatchDataset"),
}


@pytest.mark.parametrize("kind", NO_DATA)
def test_data_without_a_batch_is_an_error_and_changes_nothing(kind):
    data, text = NO_DATA[kind]
    called = []
    callback = keras.callbacks.LambdaCallback(on_train_begin=called.append)
    one = loop()
    before = one.model.get_weights()
    with pytest.raises(ValueError, match=text):
        one.fit(data, callbacks=callback, verbose=0)
    with pytest.raises(ValueError, match=text):
        one.evaluate(data, callbacks=callback, verbose=0)
    with pytest.raises(ValueError, match=text.replace("`data`", "`validation_data`")[:20]):
        one.fit((X, Y), validation_data=data, callbacks=callback, verbose=0)
    assert called == []
    for weight, same in zip(one.model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(weight, same)


@pytest.mark.parametrize("kind", BAD_DATA)
def test_data_of_no_known_kind_is_refused_by_name(kind):
    data, error, text = BAD_DATA[kind]
    with pytest.raises(error, match=text):
        loop().fit(data, verbose=0)


def test_data_that_runs_out_ends_the_training_with_a_warning():
    one = loop()
    with pytest.warns(UserWarning, match="ran out after 0 batches of epoch 2 of 3"):
        history = one.fit(iter(Iterable()), epochs=3, verbose=0)
    assert history.epoch == [0]
    with pytest.warns(UserWarning, match="ran out after 1 batches of epoch 2 of 3") as warned:
        history = one.fit(iter(Iterable()), epochs=3, steps_per_epoch=2, verbose=0)
    assert history.epoch == [0, 1]
    assert warned[0].filename == __file__  # It points at the call of `fit`.


def test_validation_data_that_can_be_read_once_serves_one_epoch():
    one = loop()
    one.fit((X, Y), validation_data=iter(Iterable()), verbose=0)
    with pytest.raises(ValueError, match=r"read only once.*Received: validation_data of type gene"):
        one.fit((X, Y), validation_data=iter(Iterable()), epochs=2, verbose=0)
    once = {"epochs": 3, "validation_freq": 2, "verbose": 0}
    for initial in (0, 1):
        history = one.fit((X, Y), validation_data=iter(Iterable()), initial_epoch=initial, **once)
        assert len(history.history["val_loss"]) == 1
    one.fit((X, Y), validation_data=iter(Iterable()), validation_steps=1, epochs=2, verbose=0)


def test_a_batch_size_needs_arrays():
    with pytest.raises(ValueError, match=r"`batch_size` is for arrays.* Received: batch_size=4\."):
        loop().fit(dataset(), batch_size=4, verbose=0)
    loop().fit(dataset(), validation_data=(X, Y), batch_size=4, verbose=0)
