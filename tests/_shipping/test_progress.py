"""fold, fuse and export show their stages, all of them, where `verbose` asks for it."""

import keras
import pytest
import tensorflow as tf

import tfbn

layers = keras.layers


def network() -> keras.Model:
    norm = tfbn.BatchNormalization(name="norm")
    return keras.Sequential([keras.Input((3,)), layers.Dense(2), norm])


@keras.saving.register_keras_serializable("test_progress")
class Untraceable(keras.Model):
    """Its `call` does not work on symbolic tensors."""

    def __init__(self):
        super().__init__()
        self.norm = tfbn.BatchNormalization(name="norm")

    def call(self, x, training=None):
        return self.norm(tf.nn.relu(x), training=training)


def untraceable() -> keras.Model:
    model = Untraceable()
    model(keras.ops.ones((2, 3)))
    return model


TOOLS = {
    "fold": (4, "preceding layer", lambda model, path, **how: tfbn.fold(model, **how)),
    "fuse": (4, "preceding layer", lambda model, path, **how: tfbn.fuse(model, **how)),
    "export": (6, "written: ", lambda model, path, **how: tfbn.export(model, path, **how)),
    "export unfolded": (
        2,
        "written: ",
        lambda model, path, **how: tfbn.export(model, path, False, **how),
    ),
}


@pytest.mark.parametrize("tool", TOOLS)
def test_a_bar_counts_all_stages_and_the_report_follows(tool, tmp_path, capsys):
    stages, report, run = TOOLS[tool]
    run(network(), tmp_path / "served", verbose=1)
    out = capsys.readouterr().out
    bar, _, rest = out.partition("\n")
    assert f"{stages}/{stages}" in bar  # Keras leaves out what follows within 50 ms.
    assert "/stage" in bar
    assert report in rest


@pytest.mark.parametrize("tool", TOOLS)
def test_it_is_silent_where_output_is_no_terminal(tool, tmp_path, capsys):
    TOOLS[tool][-1](network(), tmp_path / "served")
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("tool", TOOLS)
def test_another_verbose_is_refused_before_anything_is_done(tool, tmp_path):
    with pytest.raises(ValueError, match="`verbose` must be"):
        TOOLS[tool][-1](network(), tmp_path / "served", verbose=3)
    assert not (tmp_path / "served").exists()


@pytest.mark.filterwarnings("ignore:The model is exported unfolded")
def test_the_stages_of_a_fold_that_is_left_out_count(tmp_path, capsys):
    tfbn.export(untraceable(), tmp_path / "served", verbose=2)
    assert capsys.readouterr().out.startswith("6/6 - ")
