"""`python -m benchmarks compare` measures each commit's own layer."""

import subprocess

import pytest

from benchmarks import compare

LAYER = """
import keras

class BatchNormalization(keras.layers.BatchNormalization):
    def call(self, *arguments, **keywords):
        return {factor} * super().call(*arguments, **keywords)
"""
CASE = "layers --shapes 6x8 --modes eager --phases infer --precisions float32 --threads 1"


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """Two commits of a package tfbn, of which the second computes something else."""
    monkeypatch.chdir(tmp_path)
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b.c"]
    subprocess.run([*git, "init", "--quiet"], check=True)
    (tmp_path / "tfbn").mkdir()
    for factor in (1, 3):
        (tmp_path / "tfbn/__init__.py").write_text(LAYER.format(factor=factor))
        subprocess.run([*git, "add", "tfbn"], check=True)
        subprocess.run([*git, "commit", "--quiet", "-m", "a layer"], check=True)
    return tmp_path


def test_each_commit_runs_its_own_layer(repository, capsys, monkeypatch):
    found = []
    monkeypatch.setattr(compare, "summary", lambda results, *names: found.extend(results) or "")
    compare.main(["HEAD~1", "HEAD", *CASE.split()])
    ((before, after),) = (result["contenders"].values() for result in found)
    assert before["difference"]["y"] == 0
    assert after["difference"]["y"] > 1000  # 3 to the power of eight layers
    listed = subprocess.run(["git", "worktree", "list"], capture_output=True, text=True, check=True)
    assert len(listed.stdout.splitlines()) == 1  # The two are gone.


def test_the_slowest_change_comes_first():
    def result(subject, before, after):
        times = {"a": {"ms": before}, "b": {"ms": after}}
        kind = {"precision": "float32", "phase": "train", "mode": "graph"}
        return {"subject": subject, "contenders": times, **kind}

    lines = compare.summary(
        [result("2x3", 4.0, 2.0), result("4x5", 1.0, 2.0)], "a", "b"
    ).splitlines()
    assert lines[2] == "| 4x5 float32 train graph | 1 | 2 | 0.50 |"
    assert lines[-1] == "| geometric mean |  |  | 1.00 |"


def test_an_unknown_commit_is_refused(repository):
    with pytest.raises(SystemExit, match="no commit 'nowhere'"):
        compare.main(["nowhere", "HEAD"])
