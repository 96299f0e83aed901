"""The guide for those who come from PyTorch: its cells run, and load a PyTorch network exactly."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs/guides/migration.md").read_text()
CELL = re.compile(r"^```\{code-cell\}\n(?::tags:[^\n]*\n)?(.*?)^```$", re.MULTILINE | re.DOTALL)
AFTERWARDS = """
layer, theirs = ours.get_layer("1"), theirs[1]
statistics = [layer.moving_mean.numpy(), layer.moving_variance.numpy()]
x = np.random.default_rng(1).normal(2, 3, (5, 4, 4, 8)).astype("float32")
theirs.train()(torch.from_numpy(x.transpose(0, 3, 1, 2)))
layer(x, training=True)

convolution = torch.nn.Conv2d(4, 8, 3, groups=4, bias=False)
images = torch.randn(2, 4, 6, 6)
depthwise = keras.layers.DepthwiseConv2D(3, depth_multiplier=2, use_bias=False)
depthwise.build((None, 6, 6, 4))
kernel = convolution.weight.detach().numpy().reshape(4, 2, 3, 3).transpose(2, 3, 0, 1)
depthwise.set_weights([kernel])

np.savez(
    "results.npz",
    outputs=outputs,
    expected=expected,
    loaded=statistics,
    means=[layer.moving_mean.numpy(), theirs.running_mean.numpy()],
    variances=[layer.moving_variance.numpy(), theirs.running_var.numpy()],
    depthwise=[
        depthwise(images.permute(0, 2, 3, 1).numpy()).numpy(),
        convolution(images).detach().permute(0, 2, 3, 1).numpy(),
    ],
)
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, np.ndarray]:
    """What the cells of the guide computed, in a process that imports PyTorch before TensorFlow."""
    if importlib.util.find_spec("torch") is None:
        pytest.skip("needs PyTorch, which the extra `bench` brings")
    folder = tmp_path_factory.mktemp("migration")
    code = "\n".join(
        [f"import sys; sys.path.insert(0, {str(ROOT)!r})", *CELL.findall(GUIDE), AFTERWARDS]
    )
    subprocess.run([sys.executable, "-c", code], cwd=folder, check=True, timeout=240)
    return dict(np.load(folder / "results.npz"))


def test_the_network_predicts_what_it_did_in_pytorch(results):
    np.testing.assert_allclose(results["outputs"], results["expected"], rtol=0, atol=2e-6)


def test_the_statistics_that_were_loaded_are_not_the_initial_ones(results):
    mean, variance = results["loaded"]
    assert np.abs(mean).min() > 1e-3
    assert np.abs(variance - 1).min() > 1e-3


def test_one_minus_momentum_moves_the_mean_as_in_pytorch(results):
    ours, theirs = results["means"]
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)


def test_only_pytorch_moves_the_variance_by_the_unbiased_one(results):
    before = results["loaded"][1]
    ours, theirs = (variance - 0.9 * before for variance in results["variances"])
    count = 5 * 4 * 4
    np.testing.assert_allclose(theirs / ours, count / (count - 1), rtol=1e-4)


def test_a_depthwise_kernel_is_reshaped_as_the_guide_says(results):
    ours, theirs = results["depthwise"]
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
