"""Tensors in memory up to a limit, in files beyond it; and what recalibration does if neither has room."""

import json
import tempfile
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import tfbn
from tfbn._statistics.tensor_cache import CacheFullError, TensorCache, free_memory, in_bytes


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    """Where temporary files go."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


TENSORS = [
    tf.reshape(tf.range(6.0), [2, 3]),
    tf.constant([True, False]),
    tf.constant(3, tf.int64),
    tf.zeros([0, 4], tf.float16),
    tf.constant([1.5, -2.5], tf.bfloat16),
]
SIZE = 24 + 2 + 8 + 0 + 4


@pytest.mark.parametrize("kind", ["memory", "disk"])
def test_what_is_kept_comes_back_to_the_bit(kind, folder):
    with TensorCache(kind, limit=1000) as cache:
        entry = cache.put(TENSORS)
        assert any(folder.iterdir()) == (kind == "disk")
        for tensor, expected in zip(cache.get(entry), TENSORS, strict=True):
            assert tensor.dtype == expected.dtype
            np.testing.assert_array_equal(tensor.numpy(), expected.numpy())
        cache.free(entry)
        assert not [path for path in folder.rglob("*") if path.is_file()]
        peaks = {"memory": cache.peak_memory, "disk": cache.peak_disk}
        assert peaks == {"memory": 0, "disk": 0, kind: SIZE}


def test_beyond_the_memory_it_writes_files_and_deletes_them(folder):
    with TensorCache("auto", limit=SIZE) as cache:
        entries = [cache.put(TENSORS), cache.put(TENSORS)]
        assert [entry.path is None for entry in entries] == [True, False]
        cache.free(entries[0])
        assert cache.put(TENSORS).path is None  # There is room again.
        assert cache.peak_memory == cache.peak_disk == SIZE
    assert not any(folder.iterdir())


@pytest.mark.parametrize("kind", ["memory", "disk"])
def test_what_does_not_fit_is_refused_with_the_numbers(kind):
    with TensorCache(kind, limit=SIZE) as cache:
        cache.check([TENSORS], 1)
        with pytest.raises(CacheFullError, match=r"76 bytes needed, 38 bytes in"):
            cache.check([TENSORS], 2)
        cache.put(TENSORS)
        with pytest.raises(CacheFullError, match="76 bytes needed at once, 38 bytes allowed"):
            cache.put(TENSORS)


def test_strings_are_not_kept():
    with TensorCache("memory") as cache, pytest.raises(CacheFullError, match="dtype string"):
        cache.put([tf.constant("text")])


def test_a_file_that_cannot_be_written_is_a_full_cache(monkeypatch):
    def full(*arguments, **options):
        raise OSError("No space left on device")

    with TensorCache("disk") as cache:
        cache.put(TENSORS)
        monkeypatch.setattr(Path, "open", full)
        with pytest.raises(CacheFullError, match="No space left"):
            cache.put(TENSORS)


def test_bytes_for_people():
    numbers = (12, 4200, 412e6, 3.1e9, 2e15)
    assert list(map(in_bytes, numbers)) == ["12 bytes", "4.2 kB", "412 MB", "3.1 GB", "2e+03 TB"]
    assert free_memory() > 1e6


# What recalibration does with it

X = np.random.default_rng(0).normal(4.0, 2.0, (40, 3)).astype("float32")
LEVEL = X.nbytes


def deep() -> keras.Model:
    """Three layers, one after the other. Before the second, there is four times as much to keep."""
    return keras.Sequential(
        [
            keras.Input((3,)),
            tfbn.BatchNormalization(),
            layers.Dense(12, kernel_initializer=keras.initializers.RandomNormal(seed=1)),
            tfbn.BatchNormalization(),
            layers.Dense(3, kernel_initializer=keras.initializers.RandomNormal(seed=2)),
            tfbn.BatchNormalization(),
        ]
    )


def recalibrated(**arguments) -> tuple[tfbn._statistics.recalibration.Recalibration, list]:
    model = deep()
    result = tfbn.recalibrate(model, X, batch_size=7, **arguments)
    return result, [w.numpy() for w in model.weights]


@pytest.fixture(scope="module")
def expected() -> list:
    return recalibrated(cache="none")[1]


# The memory that is allowed, how often the data is read, and what is said about it.
LIMITS = {
    "everything fits": (5 * LEVEL, 1, 0),
    "the first level fits": (2 * LEVEL, 1, 1),
    "nothing fits": (10, 3, 2),
}


@pytest.mark.parametrize("limit", LIMITS)
def test_what_does_not_fit_in_memory_is_computed_again(limit, expected):
    size, passes, recomputed = LIMITS[limit]
    result, weights = recalibrated(cache="memory", cache_limit=size)
    assert (result.levels, result.passes, result.cache.recomputed) == (3, passes, recomputed)
    assert result.cache.memory <= size
    assert result.cache.disk == 0
    assert ("needed" in result.cache.reason) == (recomputed > 0)
    assert result.cache.reason in str(result)
    for weight, value in zip(weights, expected, strict=True):
        np.testing.assert_allclose(weight, value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("cache", "size"), [("auto", 2 * LEVEL), ("disk", None)])
def test_what_does_not_fit_in_memory_goes_into_files(cache, size, expected, folder):
    result, weights = recalibrated(cache=cache, cache_limit=size)
    assert (result.passes, result.cache.recomputed) == (1, 0)
    assert 0 < result.cache.disk <= 5 * LEVEL
    assert (result.cache.memory > 0) == (cache == "auto")
    assert "in files" in str(result)
    assert not any(folder.iterdir())
    for weight, value in zip(weights, expected, strict=True):
        np.testing.assert_allclose(weight, value, rtol=1e-5, atol=1e-6)


def test_it_finds_out_late_that_batches_of_unknown_number_do_not_fit(expected):
    """The number of batches of a generator is not known in its first pass."""
    model = deep()
    parts = [X[i : i + 7] for i in range(0, 40, 7)]
    result = tfbn.recalibrate(model, lambda: iter(parts), cache="memory", cache_limit=LEVEL // 2)
    assert (result.passes, result.cache.recomputed) == (3, 2)
    for weight, value in zip(model.weights, expected, strict=True):
        np.testing.assert_allclose(weight.numpy(), value, rtol=1e-5, atol=1e-6)


def test_a_level_that_turns_out_too_large_starts_the_next_one_from_the_data():
    """Images of several sizes: the first batch does not tell how much the others take."""
    model = keras.Sequential(
        [
            keras.Input((None, 2)),
            layers.GlobalAveragePooling1D(keepdims=True),
            tfbn.BatchNormalization(),
            layers.UpSampling1D(50),
            tfbn.BatchNormalization(),
            tfbn.BatchNormalization(),
        ]
    )
    parts = [np.random.default_rng(n).normal(size=(n, n, 2)).astype("float32") for n in (2, 9, 8)]
    whole = keras.models.clone_model(model)
    result = tfbn.recalibrate(model, lambda: iter(parts), cache="memory", cache_limit=4000)
    tfbn.recalibrate(whole, lambda: iter(parts), cache="none")
    assert result.cache.recomputed == 1
    for weight, value in zip(model.weights, whole.weights, strict=True):
        np.testing.assert_allclose(weight.numpy(), value.numpy(), rtol=1e-5, atol=1e-6)


def test_files_are_deleted_whatever_is_raised(folder):
    seen = []

    def batches():
        yield X[:20]
        seen.extend(path for path in folder.rglob("*") if path.is_file())
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tfbn.recalibrate(deep(), batches, cache="disk")
    assert seen
    assert not any(folder.iterdir())


def test_the_report_is_plain_data():
    result, _ = recalibrated()
    cache = json.loads(json.dumps(result.to_dict()))["cache"]
    assert cache == {"memory": cache["memory"], "disk": 0, "recomputed": 0, "reason": ""}
    assert 4 * LEVEL <= cache["memory"] <= 5 * LEVEL
    assert "in memory" in result.to_markdown()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"cache": "tape"}, r"`cache` must be one of .*'auto'.*Received: cache='tape'"),
        ({"cache_limit": 0}, r"`cache_limit` must be an integer of at least 1.*cache_limit=0"),
    ],
    ids=str,
)
def test_arguments_out_of_range(arguments, text):
    with pytest.raises(ValueError, match=text):
        recalibrated(**arguments)
