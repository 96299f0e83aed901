"""What a user does first, where nothing but tfbn and what it needs is installed: `make dist` runs it.

    python -I tests/harness/smoke.py

Python's -I leaves out this checkout, so that the installed package is the one that is tried.
"""

import importlib.metadata
import subprocess
import sys
import tempfile
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

import tfbn


def train(x: np.ndarray, y: np.ndarray) -> keras.Model:
    model = keras.Sequential(
        [
            keras.Input((8,)),
            keras.layers.Dense(16, use_bias=False),
            tfbn.BatchNormalization(),
            keras.layers.ReLU(),
            keras.layers.Dense(1),
        ]
    )
    model.compile("adam", keras.losses.BinaryCrossentropy(from_logits=True))
    history = model.fit(x, y, epochs=3, verbose=0).history["loss"]
    assert history[-1] < history[0], history
    return model


def main() -> None:
    package = Path(tfbn.__file__)
    assert package.is_relative_to(sys.prefix), f"not the installed one: {package}"
    assert tfbn.__version__ == importlib.metadata.version("tfbn"), tfbn.__version__
    assert (package.parent / "py.typed").is_file()

    keras.utils.set_random_seed(0)
    x = np.random.default_rng(0).normal(3, 2, (256, 8)).astype("float32")
    model = train(x, (x.sum(1) > 24).astype("float32"))
    expected = model.predict(x, verbose=0)
    with tempfile.TemporaryDirectory() as folder:
        model.save(f"{folder}/model.keras")
        loaded = keras.models.load_model(f"{folder}/model.keras")
        np.testing.assert_array_equal(loaded.predict(x, verbose=0), expected)

        tfbn.export(model, f"{folder}/served")
        (served,) = tf.saved_model.load(f"{folder}/served").serve(x).values()
        np.testing.assert_allclose(served, expected, rtol=1e-4, atol=1e-5)

        command = str(Path(sys.executable).with_name("tfbn"))
        for arguments in (["--help"], ["inspect", f"{folder}/model.keras"]):
            subprocess.run([command, *arguments], check=True, timeout=120, capture_output=True)
    print(f"tfbn {tfbn.__version__} imports, trains, saves, loads, exports and runs its command.")


if __name__ == "__main__":
    main()
