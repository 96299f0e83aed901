"""The experiments of the lectures: that they run, that their page says what they found, and no more."""

import json
import math
import re

import numpy as np
import pytest

from examples import models
from examples.lectures import __main__ as command
from examples.lectures import page
from examples.lectures.networks import Networks
from examples.lectures.result import Claim, Result, bands, first_step, ratio
from examples.lectures.setting import Setting


@pytest.fixture(scope="module")
def gallery(tmp_path_factory):
    """Where every experiment of the first half has left what it found, after `--quick`."""
    return tmp_path_factory.mktemp("lectures")


@pytest.mark.parametrize("name", ["one_line", "original", "hyperparameters", "depth", "contours"])
def test_an_experiment_leaves_a_picture_numbers_and_its_part_of_the_page(name, gallery, capsys):
    command.main([name, "--quick", "--seeds", "2", "--out", str(gallery)])
    picture = gallery / "gallery" / f"{name}.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    content = json.loads(picture.with_suffix(".json").read_text())
    assert content["setting"] == {"dataset": "digits", "seeds": 2, "quick": True}
    written = (gallery / "README.md").read_text()
    assert f"![{content['title']}](gallery/{name}.png)" in written
    assert content["seen"] in written
    printed = capsys.readouterr().out
    for claim in content["claims"]:
        assert len(claim["values"]) == 2
        assert claim["claim"] in written
        assert re.search(rf"^  {claim['lecture']} .*{claim['verdict']}", printed, re.MULTILINE)


def claim(values, **wanted):
    return Claim("L9", "It works", "a number", values, **wanted)


@pytest.mark.parametrize(
    ("values", "wanted", "verdict"),
    [
        ([1, 2, 3, 4, 5], {"above": 0}, "borne out"),
        ([-9, 2, 3, 4, 5], {"above": 0}, "borne out"),  # the quartiles are 2, 3 and 4
        ([-9, -1, 3, 4, 5], {"above": 0}, "undecided"),
        ([-9, -1, -1, 4, 5], {"above": 0}, "undecided"),
        ([-9, -1, -1, -1, 5], {"above": 0}, "not borne out"),
        ([0, 0, 0, 0, 0], {"above": 0}, "not borne out"),
        ([0, 0, 0, 0, 0], {"at_most": 0}, "borne out"),
        ([-0.5] * 5, {"above": -0.55, "at_most": -0.45}, "borne out"),
        ([-0.6] * 5, {"above": -0.55, "at_most": -0.45}, "not borne out"),
        ([math.inf] * 5, {"above": 1}, "borne out"),
        ([math.nan] * 5, {"above": 0}, "not borne out"),
    ],
)
def test_the_verdict_follows_from_median_and_quartiles(values, wanted, verdict):
    assert claim(values, **wanted).verdict == verdict


def test_a_claim_that_no_number_could_contradict_is_refused():
    with pytest.raises(ValueError, match="neither `above` nor `at_most`"):
        claim([1, 2, 3])


def test_a_false_claim_is_called_so_on_the_page(tmp_path):
    result = Result("Falling up", [claim([-1] * 5, above=0)], "It fell.", {}, Setting().to_dict())
    (tmp_path / "gallery").mkdir()
    result.save(tmp_path / "gallery" / "up.json")
    written = page.write(tmp_path, ["up", "never run"]).read_text()
    assert "| −1 (−1 to −1) | above 0 | **not borne out** |" in written
    assert "| 0 of 1 ([falling up](#up)) |" in written
    assert "never run" not in written


def test_a_verdict_in_a_file_is_not_believed(tmp_path):
    path = tmp_path / "up.json"
    Result("Up", [claim([-1] * 5, above=0)], "", {}, Setting().to_dict()).save(path)
    path.write_text(path.read_text().replace("not borne out", "borne out"))
    assert Result.load(path).claims[0].verdict == "not borne out"


def test_results_survive_their_file_infinities_and_all(tmp_path):
    numbers = {"steps": [1, 2], "found": {"with": [[math.inf, 0.5]], "name": "x"}}
    saved = Result("Up", [claim([1, math.inf], above=0)], "It rose.", numbers, {"quick": False})
    saved.save(tmp_path / "up.json")
    assert Result.load(tmp_path / "up.json") == saved


def test_steps_to_a_goal_that_some_never_reach():
    accuracy = [[0.1, 0.9, 0.8], [0.1, 0.2, 0.3]]
    np.testing.assert_array_equal(first_step([10, 20, 30], accuracy, 0.9), [20, math.inf])
    np.testing.assert_array_equal(
        ratio([30, math.inf, 30, math.inf], [10, 10, math.inf, math.inf]), [3, math.inf, 0, 1]
    )
    low, median, high = bands([1, 2, math.inf, math.inf, math.inf])
    assert (low, median, high) == (2, math.inf, math.inf)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (12.34, "12.3"), (-0.5, "−0.500"), (3e-7, "3.0·10^−7"), (math.inf, "∞")],
)
def test_numbers_on_the_page_have_three_digits(value, text):
    assert page.number(value) == text


@pytest.mark.parametrize("norm", ["tfbn", "none"])
def test_networks_side_by_side_learn_what_each_learns_alone(norm):
    def trained(seeds):
        networks = Networks(Setting(seeds=seeds), models.Hidden(norm=norm), (8, 8), "sgd")
        networks.begin(learning_rate=0.1)
        networks.train(steps=6, batch_size=20)
        look = networks.probe([networks.model.layers[-1]])
        return look(networks.setting.test.images[:50])[0]

    # Seed 0 among three, seed 0 alone.
    together, alone = trained(3), trained(1)
    np.testing.assert_allclose(together[0], alone[0], rtol=1e-4, atol=1e-4)
    assert np.abs(together[1] - together[0]).max() > 0.1


def test_a_network_that_diverges_does_not_disturb_its_neighbours():
    networks = Networks(Setting(seeds=2), models.Hidden(), (8,), copies=2)
    networks.begin(learning_rate=0.1, gain=np.array([1, 1, 1e30, 1e30]))
    networks.train(steps=100)
    accuracy = networks.accuracy()
    assert accuracy[:2].min() > 0.5
    assert accuracy[2:].max() < 0.3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["original", "nothing"], "there is no experiment 'nothing'"),
        (["--seeds", "0"], "--seeds must be at least 1. Received: 0"),
    ],
)
def test_mistakes_are_answered_at_once(arguments, message, capsys):
    with pytest.raises(SystemExit):
        command.parse(arguments)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "here"),
    [([], True), (["--quick"], False), (["--dataset", "mnist"], False), (["--seeds", "2"], False)],
)
def test_only_a_run_in_earnest_replaces_the_gallery(arguments, here):
    assert (command.parse(arguments).out == command.HERE) == here
