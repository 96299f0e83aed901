"""Runs Keras's own tests of models with batch normalization, with tfbn's layer in the place of Keras's.

    python tests/harness/keras_suite.py                       # or: make test-keras
    python tests/harness/keras_suite.py trainers/trainer_test  # one file

Keras's package contains its tests. Keras's layer is replaced before they are imported.
"""

import os
import sys
import types
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

os.environ["KERAS_BACKEND"] = "tensorflow"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
sys.path[:0] = [str(Path(__file__).parents[2])]

import pytest  # noqa: E402

import tfbn  # noqa: E402

FILES = (
    "layers/normalization/batch_normalization_test",
    "layers/core/wrapper_test",
    "dtype_policies/dtype_policy_map_test",
    "export/saved_model_test",
    "legacy/saving/legacy_h5_format_test",
    "models/functional_test",
    "trainers/trainer_test",
)
"""The files that name batch normalization, or build a model that has it."""
NOT_INSTALLED = "not jax and not torch and not grain"
"""Leaves out the tests that need packages which tfbn does not install."""
DIFFERENT = {"BatchNormalizationTest::test_renorm_invalid_clipping_keys": "the words of an error"}
"""The tests in which tfbn differs on purpose, and in what."""


class Plugin:
    """Counts what failed, and knows the marks of Keras's own configuration."""

    def __init__(self) -> None:
        self.failed: list[str] = []

    def pytest_configure(self, config: pytest.Config) -> None:
        for mark in ("requires_trainable_backend", "openvino_backend"):
            config.addinivalue_line("markers", mark)

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            self.failed.append(report.nodeid.split("::", 1)[-1])


def main(files: Sequence[str]) -> int:
    folder = Path(import_module("keras.src").__file__ or "").parent
    for module in ("keras.layers", "keras.src.layers"):
        import_module(module).BatchNormalization = tfbn.BatchNormalization  # type: ignore[attr-defined]
    sys.modules.setdefault("jax", types.ModuleType("jax"))  # Imported on every backend.
    plugin = Plugin()
    paths = [str(folder / f"{file}.py") for file in files]
    options = ["-q", "--tb=short", "-p", "no:cacheprovider", "-c", os.devnull, "-k", NOT_INSTALLED]
    pytest.main([*options, f"--rootdir={folder}", *paths], plugins=[plugin])
    for name in plugin.failed:
        print(f"{name}: {DIFFERENT.get(name, 'not on purpose')}")
    return int(not DIFFERENT.keys() >= set(plugin.failed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or FILES))
