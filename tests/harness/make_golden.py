"""Writes a golden model: python tests/harness/make_golden.py NAME, where saved_models/README.md asks for one.

It makes saved_models/NAME/, a SavedModel; saved_models/NAME.keras; and saved_models/NAME.npz with `inputs`
and the `outputs` that the model has for them in inference mode.
"""

import sys
from pathlib import Path

import keras
import numpy as np
from keras import layers

import tfbn

SAVED_MODELS = Path(__file__).parents[2] / "saved_models"


def build(seed: int = 0) -> keras.Model:
    """A small model with each kind of batch normalization that has weights or a config of its own.

    Its γ and β are random and its moving statistics those of random batches: a file that loses any of
    them gives other outputs.
    """
    keras.utils.set_random_seed(seed)
    learned = {
        "gamma_initializer": keras.initializers.RandomUniform(0.5, 2.0),
        "beta_initializer": keras.initializers.RandomUniform(-1.0, 1.0),
    }
    image = keras.Input((6, 6, 2), name="image")
    a = layers.Conv2D(4, 3, use_bias=False)(image)
    a = tfbn.BatchNormalization(momentum=0.5, **learned)(a)
    a = layers.Activation("relu")(a)
    a = layers.Conv2D(4, 3, padding="same", use_bias=False)(a)
    clipping = {"rmin": 0.5, "rmax": 2.0, "dmax": 1.0}
    a = tfbn.BatchNormalization(
        momentum=0.5, renorm=True, renorm_clipping=clipping, renorm_momentum=0.5, **learned
    )(a)
    a = tfbn.BatchNormalization(axis=[1, 3], momentum=0.5, epsilon=1e-2, **learned)(a)
    a = layers.GlobalAveragePooling2D()(a)
    a = layers.Dense(6, use_bias=False)(a)
    a = tfbn.BatchNormalization(momentum=None, **learned)(a)
    a = layers.Activation("sigmoid")(a)
    a = layers.Dense(5, use_bias=False)(a)
    a = tfbn.BatchNormalization(momentum=0.5, virtual_batch_size=4, **learned)(a)
    a = tfbn.BatchNormalization(momentum=0.5, center=False, scale=False)(a)
    model = keras.Model(image, layers.Dense(3, name="outputs")(a), name="golden")
    for batch in range(3):
        model(draw(8, seed=batch), training=True)
    return model


def draw(count: int, seed: int = 0) -> np.ndarray:
    """That many inputs, with a mean and a spread other than 0 and 1."""
    random = np.random.default_rng(seed)
    return random.normal(2.0, 3.0, (count, 6, 6, 2)).astype("float32")


def main() -> None:
    """Writes the three, and refuses to write over any."""
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    name = sys.argv[1]
    saved_model, keras_file, examples = (
        SAVED_MODELS / f"{name}{end}" for end in ("", ".keras", ".npz")
    )
    if found := [path.name for path in (saved_model, keras_file, examples) if path.exists()]:
        sys.exit(f"error: golden files are not written over. Received: {found}. Take another name.")
    model, inputs = build(), draw(7)
    model.export(saved_model, verbose=False)
    model.save(keras_file)
    np.savez(examples, inputs=inputs, outputs=model.predict(inputs, verbose=0))


if __name__ == "__main__":
    main()
