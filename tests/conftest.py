"""What every test stands on: TensorFlow quiet, the same seed, each device there is."""

import concurrent.futures
import gc
import multiprocessing
import os
import random
import subprocess
from pathlib import Path

os.environ["KERAS_BACKEND"] = "tensorflow"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
# Some tests start processes: they and this one share the GPU's memory.
os.environ.setdefault("TF_FORCE_GPU_ALLOW_GROWTH", "true")
os.environ["MPLBACKEND"] = "agg"
# Processes that tests start, start faster.
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(Path(__file__).parent / "harness" / "startup"), os.environ.get("PYTHONPATH", "")]
).rstrip(os.pathsep)

import quick_start  # noqa: F401

# isort: split
from collections.abc import Callable, Generator, Iterator

import hypothesis
import keras
import numpy as np
import pytest
import tensorflow as tf

import serving

# Tracing makes the first example slow, and the fixtures here are safe to share between examples.
# The same examples every time: a failure on one machine is a failure on all.
hypothesis.settings.register_profile(
    "tfbn",
    deadline=None,
    derandomize=True,
    max_examples=25,
    suppress_health_check=[
        hypothesis.HealthCheck.function_scoped_fixture,
        hypothesis.HealthCheck.too_slow,
    ],
)
hypothesis.settings.load_profile("tfbn")


def _devices() -> list[str]:
    """As "CPU:0". Only listed, not started: a test may still ask for virtual devices."""
    return [d.name.removeprefix("/physical_device:") for d in tf.config.list_physical_devices()]


GPUS = [name for name in _devices() if name.startswith("GPU")]
CPUS = [name for name in _devices() if name.startswith("CPU")]


# The files that take longest. They go first, or in the end one process would wait for the other.
LONG = [
    "_statistics/diagnose/test_findings",
    "_layer/test_replicas",
    "_training/test_replicas",
    "examples/test_train_digits",
    "benchmarks/test_benchmarks",
    "examples/test_lectures_gallery_laws",
    "_statistics/test_recalibrate",
    "_layer/test_parity",
    "_layer/test_gradients",
    "_layer/test_robustness",
    "examples/test_lectures_gallery",
    "_layer/test_replicas_models",
    "_training/test_resume",
    "examples/test_train_workers",
    "_statistics/monitor/test_warnings",
    "_shipping/fuse/test_fuse",
    "_training/test_workers",
    "_statistics/test_recalibrate_workers",
]
# To count lines makes tests take a third longer. What these files reach of tfbn, others reach too;
# so it is with the single tests that are marked `no_cover`.
UNCOUNTED = (
    "benchmarks/",
    "docs/",
    "examples/",
    "_layer/test_parity",
    "_training/test_formulas",
)
# TensorFlow rewrites graphs before they first run, which takes a quarter of the time of a test. These files run
# as users do, with it: what is computed, and what is exported. So do all processes that tests start.
REWRITTEN = ("_layer/test_parity", "_layer/test_laws", "_normalize/", "_shipping/", "benchmarks/")


def _name(item: pytest.Item | pytest.Module) -> str:
    """The test's file, as in `LONG`."""
    return item.path.relative_to(Path(__file__).parent).with_suffix("").as_posix()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    rank = {name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: rank.get(_name(item), len(LONG)))
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    on_devices = [item for item in items if "device" in getattr(item, "fixturenames", ())]
    config.files_for_a_gpu = {item.path for item in [*on_gpu, *on_devices]}
    if not GPUS:
        config.hook.pytest_deselected(items=on_gpu)
        items[:] = [item for item in items if not item.get_closest_marker("gpu")]
    for item in items:
        if _name(item).startswith(UNCOUNTED):
            item.add_marker(pytest.mark.no_cover)


def pytest_sessionfinish() -> None:
    """Collects garbage once: pytest would do it five times from here on, and Python once more."""
    gc.collect()
    gc.freeze()


def pytest_report_header() -> str:
    listed = ", ".join(GPUS) or "none, so tests of GPUs are left out"
    return f"GPUs that TensorFlow lists: {listed}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """What is not to count coverage starts no process that does."""
    with pytest.MonkeyPatch.context() as patch:
        if item.get_closest_marker("no_cover"):
            patch.delenv("COVERAGE_PROCESS_CONFIG", raising=False)
        return (yield)


@pytest.fixture(scope="module", autouse=True)
def graphs_rewritten_or_not(request: pytest.FixtureRequest) -> None:
    """As `REWRITTEN` says."""
    off = not _name(request.node).startswith(REWRITTEN)
    tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": off})


@pytest.fixture(scope="module", autouse=True)
def seed_of_the_file() -> None:
    """TensorFlow and Keras draw the same numbers in every run of a file.

    Not of a test: setting TensorFlow's seed clears its cache of kernels, and making them anew
    took a quarter of the time of the tests.
    """
    keras.utils.set_random_seed(0)


@pytest.fixture(autouse=True)
def seed() -> None:
    """Python and NumPy, from which Keras seeds its layers, draw the same numbers in every test."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 (the generator that shuffles where nothing else is said)


@pytest.fixture(params=[*CPUS, *(pytest.param(name, marks=pytest.mark.gpu) for name in GPUS)])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """The test runs once on each device that TensorFlow lists, placed there by default."""
    with tf.device(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def no_tensor_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The small tensors of the tests take the kernels that large ones take in earnest.

    `test_kernels.py` tests where the line is, and the formula beyond it.
    """
    monkeypatch.setattr("tfbn._normalize.dispatch.SMALL", 0)


@pytest.fixture(scope="session")
def serve_alone() -> Iterator[Callable[..., subprocess.CompletedProcess[str]]]:
    """Runs examples/serve.py, each time in the same process, which has neither Keras nor tfbn."""
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as process:
        yield lambda *arguments: process.submit(serving.run, [*map(str, arguments)]).result(120)
