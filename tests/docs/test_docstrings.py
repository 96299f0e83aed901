"""The examples in public docstrings run, in a namespace with a trained model, images and labels."""

import doctest

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfbn

FINDER = doctest.DocTestFinder(recurse=False)


def examples() -> dict[str, doctest.DocTest]:
    """The examples of each public name that has some."""
    found = {}
    for name in tfbn.__all__:
        for test in FINDER.find(getattr(tfbn, name), name, globs={}):
            if test.examples:
                found[name] = test
    return found


EXAMPLES = examples()


class Checker(doctest.OutputChecker):
    """An example without an expected output may print anything."""

    def check_output(self, want: str, got: str, optionflags: int) -> bool:
        return not want or super().check_output(want, got, optionflags)


def network(**arguments) -> keras.Model:
    return keras.Sequential(
        [
            keras.Input((8, 8, 1), name="image"),
            keras.layers.Conv2D(4, 3, use_bias=False),
            keras.layers.BatchNormalization(**arguments),
            keras.layers.ReLU(),
            keras.layers.GlobalAveragePooling2D(),
            keras.layers.Dense(3, name="logits"),
        ]
    )


@pytest.fixture
def namespace(tmp_path, monkeypatch) -> dict[str, object]:
    """What the examples take for granted, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    # Pretrained weights would have to be downloaded.
    monkeypatch.setattr(keras.applications, "ResNet50", lambda **arguments: network())
    images = np.random.default_rng(0).normal(2, 3, (96, 8, 8, 1)).astype("float32")
    labels = np.arange(96) % 3
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model = network()
    model.compile("sgd", loss)
    model.fit(images, labels, epochs=3, verbose=0)
    model.save_weights("averaged.weights.h5")
    return {
        "keras": keras,
        "tf": tf,
        "tfbn": tfbn,
        "model": model,
        "loss": loss,
        "images": images,
        "train_images": images,
        "labels": labels,
        "x": images,
        "y": labels,
        "perturbation": 0.1,
    }


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_example_runs(name, namespace):
    if name == "TrainingLoop":  # of a model for rows of four numbers
        rows, values = np.ones((32, 4), np.float32), np.ones((32, 1), np.float32)
        namespace |= {f"x{part}": rows for part in ("", "_val", "_test")}
        namespace |= {f"y{part}": values for part in ("", "_val", "_test")}
    # An error has its public name in an example, and that of its module in a traceback.
    flags = doctest.ELLIPSIS | doctest.IGNORE_EXCEPTION_DETAIL
    runner = doctest.DocTestRunner(Checker(), optionflags=flags)
    test = EXAMPLES[name]
    test.globs = namespace
    output: list[str] = []
    assert runner.run(test, out=output.append).failed == 0, "".join(output)


def test_every_public_name_has_an_example():
    assert set(tfbn.__all__) - set(EXAMPLES) == set()
