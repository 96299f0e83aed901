"""The main job, examples/train_digits.py, and its parts."""

import concurrent.futures
import json
import os
import re
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import keras
import numpy as np
import pytest
import sklearn.datasets
import tensorflow as tf
import tensorflow_datasets as tfds

import examples
import tfbn
from examples import curves, datasets, models, optimizers, train_digits

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("tfds")


@pytest.fixture(scope="module")
def twins(tmp_path_factory, data_dir):
    """Two runs of the command with the same options, at the same time, both the first to want the data.

    The second one ends where it would export the network.
    """
    folders = [tmp_path_factory.mktemp(name) / "new" for name in ("one", "other")]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        runs = pool.map(
            lambda run: command(
                "--quick", "--seed", "3", output=run[0], data=data_dir, code=run[1]
            ),
            zip(folders, (WHOLE, TRAINING_ALONE), strict=True),
        )
    return list(zip(folders, runs, strict=True))


WHOLE = ["-m", "examples.train_digits"]
TRAINING_ALONE = [
    "-c",
    """
import numpy as np, sys
from examples import curves, train_digits
import tfbn

def only_written(saved_models, inputs, outputs):
    np.savez(saved_models[0].with_name("served_examples.npz"), inputs=inputs, outputs=outputs)
    sys.exit()

curves.plot = tfbn.export = lambda *arguments, **options: None
train_digits.serve = only_written
train_digits.main()
""",
]


def command(*options, output, data, code):
    """What the command prints, run in a process of its own."""
    done = subprocess.run(
        [sys.executable, *code, *options, "--output", str(output)],
        cwd=ROOT,
        env={**os.environ, "TFDS_DATA_DIR": str(data)},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def served_examples(folder):
    with np.load(folder / "served_examples.npz") as file:
        return dict(file)


# The command


def test_the_command_shows_progress_and_says_what_came_of_it(twins):
    folder, printed = twins[0]
    assert "8/8" in printed  # batches of 32 out of 256 examples
    assert re.search(r"^Test accuracy  0\.\d{4} \(\d+ of 256\)$", printed, re.MULTILINE)
    assert f"Curves         {folder / 'curves.png'}" in printed
    assert f"SavedModel     {folder / 'saved_model'}" in printed
    assert "256 predictions by a process without tfbn and Keras agree" in printed
    assert re.search(
        r"^One image      \d+\.\d\d ms as it is, \d+\.\d\d ms folded", printed, re.MULTILINE
    )


def test_the_command_writes_curves_and_a_saved_model(twins):
    folder, _ = twins[0]
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    for name, folded in (("saved_model", True), ("saved_model_unfolded", False)):
        assert tf.saved_model.contains_saved_model(folder / name)
        card = (folder / name / "MODEL_CARD.md").read_text()
        assert ("folded into the preceding layer" in card) == folded


def test_two_runs_with_the_same_seed_give_the_same_network(twins):
    one, other = (served_examples(folder) for folder, _ in twins)
    np.testing.assert_array_equal(one["inputs"], other["inputs"])
    np.testing.assert_array_equal(one["outputs"], other["outputs"])


def test_predictions_that_disagree_end_the_command(twins):
    folder, _ = twins[0]
    served = served_examples(folder)
    with pytest.raises(SystemExit) as error:
        train_digits.serve([folder / "saved_model"], served["inputs"], served["outputs"] + 0.1)
    message = str(error.value)
    assert "does not serve the predictions of the model that was exported" in message
    (report,) = json.loads(re.search(r"{.*}", message)[0]).values()
    assert report["agree"] is False
    assert report["largest_difference"] == pytest.approx(0.1, rel=1e-2)


def test_the_default_reads_digits_it_never_saw(tmp_path, data_dir):
    command(output=tmp_path, data=data_dir, code=TRAINING_ALONE)
    outputs = served_examples(tmp_path)["outputs"]
    test = datasets.load("digits", data_dir).test
    labels = np.array([label for _, label in test.as_numpy_iterator()])
    assert len(outputs) == len(labels) == 360
    assert np.mean(np.argmax(outputs, axis=1) == labels) >= 0.98


def test_help_names_every_option_without_tensorflow():
    code = (
        "import sys; sys.modules['tensorflow'] = None;"
        "from examples import train_digits; train_digits.main(['--help'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    wanted = (
        "dataset model norm placement optimizer learning-rate epochs batch-size seed output quick"
    )
    assert [o for o in wanted.split() if f"--{o}" not in done.stdout] == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--epochs 0", "argument --epochs: must be a whole number from 1. Received: '0'"),
        ("--epochs 1.5", "argument --epochs: must be a whole number from 1. Received: '1.5'"),
        ("--batch-size -4", "argument --batch-size: must be a whole number from 1. Received: '-4'"),
        (
            "--seed -1",
            "argument --seed: must be a whole number from 0 to 4294967295. Received: '-1'",
        ),
        ("--seed 4294967296", "Received: '4294967296'"),
        ("--learning-rate 0", "argument --learning-rate: must be a number over 0. Received: '0'"),
        (
            "--learning-rate nan",
            "argument --learning-rate: must be a number over 0. Received: 'nan'",
        ),
        (
            "--learning-rate fast",
            "argument --learning-rate: must be a number over 0. Received: 'fast'",
        ),
        ("--model tree", "argument --model: invalid choice: 'tree'"),
        ("--dataset letters", "argument --dataset: invalid choice: 'letters'"),
        ("--norm layer", "argument --norm: invalid choice: 'layer'"),
        ("--placement between", "argument --placement: invalid choice: 'between'"),
        ("--optimizer newton", "argument --optimizer: invalid choice: 'newton'"),
        ("--norm none --placement after", "Received: --placement after. Leave one of the two out."),
        ("--output README.md", "--output must be a folder. Received: README.md, which is a file."),
    ],
)
def test_a_bad_option_is_refused_by_name(arguments, message, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as error:
        train_digits.main(arguments.split())
    assert error.value.code == 2
    assert message in capsys.readouterr().err


def test_what_is_not_said_has_a_default():
    options = train_digits.parse([])
    assert options.output == ROOT / "saved_models" / "digits-cnn-tfbn"
    assert (options.placement, options.epochs) == ("before", 15)
    assert train_digits.parse(["--quick"]).epochs == 1
    assert train_digits.parse(["--quick", "--epochs", "3"]).epochs == 3


@pytest.mark.parametrize(
    ("option", "names"),
    [
        ("dataset", datasets.DATASETS),
        ("model", models.MODELS),
        ("norm", models.NORMS),
        ("placement", models.PLACEMENTS),
        ("optimizer", optimizers.DEFAULT_RATES),
    ],
)
def test_the_command_offers_what_its_parts_have(option, names, capsys):
    with pytest.raises(SystemExit):
        train_digits.parse(["--help"])
    assert f"--{option} {{{','.join(names)}}}" in capsys.readouterr().out


# The data


def test_the_digits_are_those_of_scikit_learn_split_evenly(twins, data_dir):
    train, test, shape, classes = datasets.load("digits", data_dir)
    assert (shape, classes, len(train), len(test)) == ((8, 8, 1), 10, 1437, 360)
    pairs = [
        [(image.tobytes(), int(label)) for image, label in part.as_numpy_iterator()]
        for part in (train, test)
    ]
    package = sklearn.datasets.load_digits()
    scaled = (package.images / 16).astype("float32")  # the scans have 17 shades
    assert sorted(pairs[0] + pairs[1]) == sorted(
        (image.tobytes(), int(label)) for image, label in zip(scaled, package.target, strict=True)
    )
    everywhere, held_out = (
        np.bincount(package.target),
        np.bincount([label for _, label in pairs[1]]),
    )
    assert np.abs(held_out - everywhere / 5).max() < 1


def test_prepared_data_is_read_and_not_made_again(twins, data_dir, monkeypatch):
    monkeypatch.setattr(sklearn.datasets, "load_digits", None)
    assert len(datasets.load("digits", data_dir).train) == 1437


def test_the_data_lies_where_tfds_data_dir_says(monkeypatch, tmp_path):
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    assert datasets.default_data_dir() == ROOT / "saved_models" / "tfds"
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    assert datasets.default_data_dir() == tmp_path


def test_an_unknown_dataset_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"Received: 'letters'\. Choose of \('digits', 'mnist'"):
        datasets.load("letters", tmp_path)


@pytest.fixture
def sources_answer(monkeypatch):
    monkeypatch.setattr(datasets, "_check_sources", lambda name, urls: None)


@pytest.mark.parametrize(
    ("name", "shape"),
    [("mnist", (28, 28, 1)), ("fashion_mnist", (28, 28, 1)), ("cifar10", (32, 32, 3))],
)
def test_larger_sets_come_through_tensorflow_datasets(name, shape, sources_answer, tmp_path):
    with tfds.testing.mock_data(num_examples=3, data_dir=str(tmp_path / "none")):
        data = datasets.load(name, tmp_path)
        image, label = next(data.test.as_numpy_iterator())
    assert (data.image_shape, data.classes, len(data.train)) == (shape, 10, 3)
    assert (image.shape, image.dtype, label.dtype) == (shape, np.float32, np.int64)
    assert 0.9 < image.max() <= 1  # of 784 bytes or more at random


@pytest.mark.slow
def test_the_command_trains_on_a_larger_set(sources_answer, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "data"))
    # It holds for the whole process, which has other tests to run.
    monkeypatch.setattr(tf.config.experimental, "enable_op_determinism", lambda: None)
    with tfds.testing.mock_data(num_examples=20, data_dir=str(tmp_path / "none")):
        train_digits.main(
            f"--dataset mnist --model mlp --batch-size 10 --epochs 2 --output {tmp_path}".split()
        )
    printed = capsys.readouterr().out
    assert "of 20)" in printed
    assert "20 predictions by a process without tfbn and Keras agree" in printed


def test_without_a_network_a_download_fails_at_once_with_the_cure(tmp_path, monkeypatch):
    def no_network(request, timeout):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    monkeypatch.setattr(tf.config.experimental, "enable_op_determinism", lambda: None)
    monkeypatch.setattr(urllib.request, "urlopen", no_network)
    with pytest.raises(SystemExit) as error:
        train_digits.main(["--dataset", "mnist"])
    assert re.fullmatch(
        r"error: The dataset 'mnist' has to be downloaded once, and its server does not answer\. "
        r"Received: <urlopen error no route to host>, from https?://\S+\. Connect to a network, "
        r"set TFDS_DATA_DIR to a folder that has it, or take the digits, which need no download\.",
        str(error.value),
    )


def test_a_server_that_answers_anything_is_there(monkeypatch):
    def refusal(request, timeout):
        raise urllib.error.HTTPError(request.full_url, 405, "no HEAD here", {}, None)

    monkeypatch.setattr(urllib.request, "urlopen", refusal)
    datasets._check_sources("mnist", ["http://example.org/data"])


@pytest.mark.parametrize(
    ("module", "package", "extra"),
    [
        ("datasets", "tensorflow_datasets", "examples"),
        ("datasets", "sklearn.datasets", "examples"),
        ("datasets", "importlib_resources", "examples"),
        ("curves", "matplotlib.figure", "plots"),
    ],
)
def test_a_missing_package_is_answered_with_the_extra_that_has_it(
    module, package, extra, monkeypatch
):
    monkeypatch.delitem(sys.modules, f"examples.{module}")
    monkeypatch.delattr(examples, module)
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(tf.config.experimental, "enable_op_determinism", lambda: None)
    with pytest.raises(SystemExit) as error:
        train_digits.main([])
    message = str(error.value)
    assert message.startswith(
        "error: This needs a package that tfbn alone does not bring. Received: "
    )
    assert package in message
    assert message.endswith(
        f"Install it: pip install tfbn[{extra}] (in a checkout: pip install '.[{extra}]')."
    )


# The networks


def kinds(model):
    """The hidden layers in order: W where there is no bias, Wb where there is one, BN, g."""
    names = []
    for layer in model.layers:
        if isinstance(layer, keras.layers.Dense | keras.layers.Conv2D):
            names.append("Wb" if layer.use_bias else "W")
        elif isinstance(layer, tfbn.BatchNormalization | keras.layers.BatchNormalization):
            names.append("BN")
        elif isinstance(layer, keras.layers.Activation):
            names.append("g")
    return names


@pytest.mark.parametrize("network", ["mlp", "cnn"])
@pytest.mark.parametrize(
    ("norm", "placement", "hidden"),
    [
        ("tfbn", "before", ["W", "BN", "g"]),
        ("tfbn", "after", ["Wb", "g", "BN"]),
        ("keras", "before", ["W", "BN", "g"]),
        ("keras", "after", ["Wb", "g", "BN"]),
        ("none", "before", ["Wb", "g"]),
    ],
)
def test_l4_l5_l14_a_hidden_layer_is_w_then_bn_and_g_without_a_bias_that_bn_would_cancel(
    network, norm, placement, hidden
):
    model = models.MODELS[network]((8, 8, 1), 10, models.Hidden(norm=norm, placement=placement))
    assert kinds(model) == 3 * hidden + ["Wb"]
    of_norm = models.NORMS[norm]
    assert of_norm is None or sum(type(layer) is of_norm for layer in model.layers) == 3


@pytest.mark.parametrize("placement", models.PLACEMENTS)
@pytest.mark.parametrize("norm", models.NORMS)
@pytest.mark.parametrize("network", models.MODELS)
def test_every_network_builds_and_takes_a_step_in_all_of_its_weights(network, norm, placement):
    model = models.MODELS[network]((8, 8, 1), 10, models.Hidden(norm=norm, placement=placement))
    assert model.output_shape == (None, 10)
    before = step(model, keras.optimizers.SGD(0.1))
    assert all(np.isfinite(w).all() for w in model.get_weights())
    for weight, old in zip(model.weights, before, strict=True):
        assert not np.array_equal(weight.numpy(), old), weight.path


@pytest.mark.parametrize("name", optimizers.DEFAULT_RATES)
def test_l6_every_optimizer_trains_gamma_and_beta_as_it_trains_the_weights(name):
    model = models.mlp((8, 8, 1), 10, models.Hidden())
    optimizer = optimizers.optimizer(name)
    assert float(optimizer.learning_rate) == pytest.approx(optimizers.DEFAULT_RATES[name])
    before = step(model, optimizer)
    moved = {
        weight.name
        for weight, old in zip(model.weights, before, strict=True)
        if not np.array_equal(weight.numpy(), old)
    }
    assert moved >= {"kernel", "gamma", "beta"}


def step(model, optimizer):
    """One step on random images; returns what the weights were."""
    random = np.random.default_rng(0)
    images = random.random((16, *model.input_shape[1:]), "float32")
    labels = random.integers(0, 10, 16)
    before = model.get_weights()
    with tf.GradientTape() as tape:
        logits = model(images, training=True)
        loss = keras.losses.sparse_categorical_crossentropy(labels, logits, from_logits=True)
    optimizer.apply_gradients(
        zip(tape.gradient(loss, model.trainable_weights), model.trainable_weights, strict=True)
    )
    return before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"norm": "layer"}, "norm must be one of ('tfbn', 'keras', 'none'). Received: 'layer'."),
        ({"placement": "in"}, "placement must be one of ('before', 'after'). Received: 'in'."),
    ],
)
def test_a_hidden_layer_of_no_known_kind_is_refused(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        models.Hidden(**arguments)


# The picture


def test_the_curves_show_both_sets_in_labelled_axes(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(curves.Figure, "savefig", lambda figure, path: drawn.append(figure))
    history = {
        "loss": [1.0, 0.1],
        "val_loss": [0.5, 0.2],
        "accuracy": [0.8, 0.9],
        "val_accuracy": [0.7, 0.95],
    }
    curves.plot(history, tmp_path / "curves.png", "a title")
    loss, accuracy = drawn[0].axes
    assert [axes.get_xlabel() for axes in (loss, accuracy)] == ["epoch", "epoch"]
    assert (loss.get_ylabel(), accuracy.get_ylabel()) == ("cross-entropy (nats)", "accuracy (%)")
    for axes, expected in ((loss, [[1.0, 0.1], [0.5, 0.2]]), (accuracy, [[80, 90], [70, 95]])):
        np.testing.assert_allclose([line.get_ydata() for line in axes.lines], expected)
        assert [line.get_label() for line in axes.lines] == ["training set", "test set"]
        # Told apart by more than the colour.
        assert len({line.get_linestyle() for line in axes.lines}) == 2
