"""Images of ten classes, through TensorFlow Datasets: scikit-learn's digits, and larger sets to download."""

import contextlib
import fcntl
import os
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from examples.extras import from_extra

with from_extra("examples"):
    import importlib_resources  # noqa: F401  (TensorFlow Datasets needs it, but does not declare it)
    import sklearn.datasets
    import tensorflow_datasets as tfds

DATASETS = ("digits", "mnist", "fashion_mnist", "cifar10")
BRIGHTEST = {"digits": 16}  # largest value of a pixel; 255 in the other datasets
NETWORK_PATIENCE = 10  # seconds


class Digits(tfds.core.GeneratorBasedBuilder):
    """The 1,797 scanned handwritten digits that come with scikit-learn: no download.

    The split is fixed and stratified. Images are sorted by digit, and within a digit by
    scikit-learn's order; every fifth is held out. That gives 360 images for the test, 35 to 37 of each
    digit, and 1,437 for training. Both parts contain digits by the same writers.
    """

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.__doc__,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Tensor(shape=(8, 8, 1), dtype=np.uint8),
                    "label": tfds.features.ClassLabel(num_classes=10),
                }
            ),
            supervised_keys=("image", "label"),
            homepage="https://scikit-learn.org/stable/datasets/toy_dataset.html",
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        digits = sklearn.datasets.load_digits()
        by_digit = np.argsort(digits.target, kind="stable")
        held_out = np.arange(len(by_digit)) % 5 == 0
        return {
            "train": self._generate_examples(digits, by_digit[~held_out]),
            "test": self._generate_examples(digits, by_digit[held_out]),
        }

    def _generate_examples(self, digits: Any, indices: np.ndarray) -> Iterator[tuple[int, Any]]:
        for index in indices.tolist():
            image = digits.images[index, :, :, np.newaxis].astype(np.uint8)
            yield index, {"image": image, "label": int(digits.target[index])}


class Data(NamedTuple):
    """Two datasets of pairs: an image, float32 in [0, 1], and its label, int64."""

    train: tf.data.Dataset
    test: tf.data.Dataset
    image_shape: tuple[int, int, int]
    """Height, width, channels."""
    classes: int


def default_data_dir() -> Path:
    """Where prepared data is stored: `TFDS_DATA_DIR`, or a folder of the checkout that git ignores."""
    here = Path(__file__).parents[1] / "saved_models" / "tfds"
    return Path(os.environ.get("TFDS_DATA_DIR") or here)


def load(name: str, data_dir: Path | None = None) -> Data:
    """Prepares a dataset the first time, and reads it afterwards. Several processes may call it at once.

    Args:
        name: One of `DATASETS`. All except the digits are downloaded the first time.
        data_dir: Where to store it; by default `default_data_dir()`.

    Raises:
        ValueError: if the name is unknown.
        ConnectionError: if a download is needed and its server cannot be reached.
    """
    if name not in DATASETS:
        raise ValueError(
            f"There is no such dataset here. Received: {name!r}. Choose of {DATASETS}."
        )
    data_dir = default_data_dir() if data_dir is None else data_dir
    data_dir.mkdir(parents=True, exist_ok=True)
    if not sys.stderr.isatty():
        tfds.disable_progress_bar()
    # If two processes prepare the same data, the second one waits and then finds it prepared.
    with _locked(data_dir / f"{name}.lock"):
        builder = tfds.builder(name, data_dir=data_dir)
        if builder.url_infos and not builder.is_prepared():
            _check_sources(builder.name, list(builder.url_infos))
        builder.download_and_prepare()  # `tfds.load` would warn that it is not prepared yet.
        train, test = builder.as_dataset(split=["train", "test"], as_supervised=True)

    def scaled(image: tf.Tensor, label: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        return tf.cast(image, tf.float32) / BRIGHTEST.get(name, 255), label

    return Data(
        train.map(scaled),
        test.map(scaled),
        builder.info.features["image"].shape,
        builder.info.features["label"].num_classes,
    )


def _check_sources(name: str, urls: Sequence[str]) -> None:
    """Fails at once where TensorFlow Datasets would retry for minutes."""
    for url in urls:
        request = urllib.request.Request(url, method="HEAD")
        try:
            urllib.request.urlopen(request, timeout=NETWORK_PATIENCE).close()
        except urllib.error.HTTPError:
            pass  # The server answers, if only to reject this request: leave the rest to TensorFlow Datasets.
        except OSError as error:
            raise ConnectionError(
                f"The dataset {name!r} has to be downloaded once, and its server does not answer. "
                f"Received: {error}, from {url}. Connect to a network, set TFDS_DATA_DIR to a folder "
                "that has it, or take the digits, which need no download."
            ) from error


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
