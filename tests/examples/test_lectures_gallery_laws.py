"""What the experiments of the lectures must find whatever the data: L2, L5, L7 and the slope of L13."""

import numpy as np
import pytest

from examples.lectures import __main__ as command
from examples.lectures import bias, covariate_shift, moving_average, noise, parameters
from examples.lectures.networks import Networks
from examples.lectures.result import Result
from examples.lectures.setting import Setting
from examples.models import Hidden

QUICK = Setting(seeds=2, quick=True)
SIGMOID = Hidden(activation="sigmoid")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Runs an experiment as the command does with `--quick`, once; what it found."""
    folder = tmp_path_factory.mktemp("lectures")

    def run(name, seeds=2):
        picture = folder / "gallery" / f"{name}.png"
        if not picture.exists():
            command.main([name, "--quick", "--seeds", str(seeds), "--out", str(folder)])
            assert picture.read_bytes().startswith(b"\x89PNG")
        result = Result.load(picture.with_suffix(".json"))
        assert result.seen in (folder / "README.md").read_text()
        return result

    return run


@pytest.mark.parametrize(
    ("name", "seeds", "lecture"),
    [
        ("covariate_shift", 2, "L12"),
        ("shifted_input", 1, "L12"),  # a training of a convolutional network for each
        ("regularization", 2, "L13"),
        ("moving_average", 2, "L7"),
        ("placement", 2, "L4"),
    ],
)
def test_an_experiment_without_a_law_runs(found, name, seeds, lecture):
    result = found(name, seeds)
    assert {claim.lecture for claim in result.claims} == {lecture}
    assert all(np.isfinite(claim.values).all() for claim in result.claims)
    assert all(len(claim.values) == seeds for claim in result.claims)


# L13: the noise of a mini-batch falls as the square root of its size


def slope_of(spreads):
    """Rise over run between the averages of the smaller and of the larger sizes."""
    x, y, half = np.log(noise.SIZES), np.log(spreads), len(noise.SIZES) // 2
    return (y[half:].mean() - y[:half].mean()) / (x[half:].mean() - x[:half].mean())


def test_L13_the_spread_of_the_experiment_has_slope_one_half(found):
    result = found("noise")
    for spreads in result.numbers["independent"]:
        assert slope_of(spreads) == pytest.approx(-0.5, rel=0.1)
    (claim,) = result.claims
    assert max(claim.values) <= 10


@pytest.mark.parametrize("draw", ["normal", "exponential", "uniform"])
def test_L13_the_slope_does_not_depend_on_the_data(draw):
    rng = np.random.default_rng(0)
    z = getattr(rng, draw)(size=(5000, 50)).astype("float32")
    spreads = [noise.spread(z, size, 200, True, rng) for size in noise.SIZES]
    assert noise.slope(noise.SIZES, spreads) == pytest.approx(-0.5, rel=0.1)
    # Where the mini-batches run out of examples, the noise falls faster: the measurement shows it.
    spreads = [noise.spread(z[:520], size, 200, False, rng) for size in noise.SIZES]
    assert noise.slope(noise.SIZES, spreads) < -0.6


@pytest.mark.parametrize("again", [True, False])
def test_L13_the_spread_is_that_of_the_formula(again):
    z = np.random.default_rng(0).normal(3.0, 2.0, (100, 4)).astype("float32")
    rng, scattered = np.random.default_rng(1), []
    for _ in range(30):
        batch = z[[0, *(1 + rng.choice(99, 15, replace=again))]].astype("float64")
        scattered.append((batch[0] - batch.mean(0)) / np.sqrt(batch.var(0) + 1e-3))
    expected = np.std(scattered, axis=0).mean()
    measured = noise.spread(z, 16, 30, again, np.random.default_rng(1))
    assert measured == pytest.approx(expected, rel=1e-4)


# L7: at test time a prediction depends on the example alone


def test_L7_in_inference_mode_an_example_has_one_score_in_every_batch(found):
    scores = found("test_time").numbers["scores"]
    for fixed, by_batch in zip(scores["fixed"], scores["batch"], strict=True):
        assert len(set(fixed)) == 1
        assert len(set(by_batch)) == len(by_batch)  # so it could have been seen to scatter


def test_L7_spread_is_exactly_zero_by_fixed_statistics_only(found):
    scatters, stands, _ = found("test_time").claims
    assert stands.values == [0, 0]
    assert min(scatters.values) > 0


def test_L7_alone_in_training_mode_every_image_is_the_same_digit(found):
    accuracy = np.array(found("test_time").numbers["accuracy"]["batch"])[:, 0]
    shares = 100 * np.bincount(QUICK.test.labels) / len(QUICK.test.labels)
    for value in accuracy:
        assert np.abs(shares - value).min() < 1e-3


def test_L7_recalibrating_on_the_way_does_not_disturb_the_training():
    watched = moving_average.follow(QUICK, 0.9, [1, 3, 5])
    left_alone = moving_average.follow(QUICK, 0.9, [5])
    for name, values in left_alone.items():
        np.testing.assert_array_equal(watched[name][:, -1], values[:, -1])


# L5: a bias before batch norm cancels


def test_L5_its_gradient_is_zero_to_rounding_and_descent_leaves_it(found):
    result = found("bias")
    gradient, descent, _ = result.claims
    assert max(gradient.values) <= bias.ROUNDING
    assert max(descent.values) <= bias.ROUNDING
    # Without batch norm, the same measurements find a gradient and a way.
    one = result.numbers["found"]["sgd"]
    for key in ("gradient", "moved"):
        before_norm, alone = (np.array(one[kind][key]["b"]) for kind in ("with", "without"))
        assert np.all(alone > 1000 * before_norm)


@pytest.mark.parametrize(("kind", "cancels"), [("with", True), ("without", False)])
def test_L5_whatever_the_bias_is_the_answers_are_the_same(kind, cancels):
    networks = Networks(QUICK, bias.HIDDEN[kind])
    networks.begin(learning_rate=0.1)
    read = networks.probe([networks.model])
    images = QUICK.train.images[:60]
    (without,) = read(images, True)
    for layer in networks.kernels()[:-1]:
        layer.bias.assign(np.random.default_rng(0).normal(size=layer.bias.shape))
    (biased,) = read(images, True)
    assert (np.abs(biased - without).max() < 1e-4) == cancels


# L2: batch norm can undo itself


def test_L2_every_layer_is_the_identity_to_rounding(found):
    error = found("parameters").claims[0]
    assert error.lecture == "L2"
    assert max(error.values) <= parameters.ROUNDING


def test_L2_what_comes_out_is_the_product_that_went_in():
    networks = Networks(QUICK, SIGMOID)
    networks.begin(learning_rate=0.1)
    parameters.error_of_identity(networks)
    images = QUICK.train.images[:2000]
    first = networks.normalizations()[0]
    look = networks.probe([first])
    kernels = networks.kernels()[0].kernel.numpy().astype("float64")
    (out,) = look(images, True)
    np.testing.assert_allclose(out, images @ kernels, atol=1e-5 * np.abs(out).max())
    # Without ε under the root it would not be.
    first.gamma.assign(np.sqrt(np.square(first.gamma) - first.epsilon))
    (out,) = look(images, True)
    assert np.abs(out - images @ kernels).max() > 1e-4 * np.abs(out).max()


# What the measurements stand on


def test_gradients_are_those_of_each_networks_own_loss():
    networks = Networks(QUICK, SIGMOID, widths=())
    networks.begin(learning_rate=0.1)
    rows = np.arange(60)
    (layer,) = networks.kernels()
    (gradients,) = networks.gradients([layer.kernel], rows)
    images, labels = (part[rows] for part in QUICK.train)
    for kernel, gradient in zip(layer.kernel.numpy(), gradients, strict=True):
        scores = np.exp((images @ kernel).astype("float64"))
        errors = scores / scores.sum(axis=1, keepdims=True) - np.eye(10)[labels]
        expected = images.T @ errors / len(rows)
        np.testing.assert_allclose(gradient.reshape(expected.shape), expected, atol=1e-6)


def test_L12_the_steps_that_are_measured_are_taken_back():
    networks = Networks(QUICK, SIGMOID)
    networks.begin(covariate_shift.RATE)
    before = networks.model.get_weights()
    moved = covariate_shift.moves(networks, 0)
    for value, old in zip(networks.model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(value, old)
    assert all(np.all(values > 0) for values in moved.values())
