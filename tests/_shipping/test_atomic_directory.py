"""A directory is replaced as a whole or not at all, whatever interrupts it."""

import errno
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tfbn._shipping import atomic_directory as module
from tfbn._shipping.atomic_directory import atomic_directory


def replacing(path):
    return atomic_directory(path, overwrite=True, is_ours=lambda _: True)


def write(path, name):
    with replacing(path) as folder:
        (folder / name).touch()


def content(path):
    """All names below the parent of a path, hidden ones included."""
    return sorted(str(entry.relative_to(path.parent)) for entry in path.parent.rglob("*"))


@pytest.fixture
def path(tmp_path):
    """A directory that holds a file named `old`."""
    write(tmp_path / "served", "old")
    return tmp_path / "served"


def test_a_directory_is_replaced_with_everything_in_it(path):
    write(path, "new")
    assert content(path) == ["served", "served/new"]


def test_an_empty_directory_counts_as_free(tmp_path):
    (tmp_path / "served").mkdir()
    with atomic_directory(tmp_path / "served", False, lambda _: False) as folder:
        (folder / "new").touch()
    assert content(tmp_path / "served") == ["served", "served/new"]


def test_a_link_is_replaced_and_what_it_points_to_stays(path):
    link = path.parent / "latest"
    link.symlink_to(path)
    write(link, "new")
    assert content(path) == ["latest", "latest/new", "served", "served/old"]
    assert not link.is_symlink()


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_in_the_block_leaves_the_old_directory(path, error):
    def interrupted():
        with replacing(path) as folder:
            (folder / "new").touch()
            raise error

    with pytest.raises(error):
        interrupted()
    assert content(path) == ["served", "served/old"]


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), KeyboardInterrupt()])
@pytest.mark.parametrize("done", [True, False], ids=["after", "instead of"])
@pytest.mark.parametrize("name", ["served", "new"])
def test_an_error_at_a_rename_leaves_one_of_the_two_whole(path, monkeypatch, name, done, error):
    """Ctrl-C between the two renames lost the old directory."""
    rename, raised = Path.rename, []

    def interrupted(self, target):
        if self.name != name or raised:
            return rename(self, target)
        raised.append(error)
        if done:
            rename(self, target)
        raise error

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(type(error)), replacing(path) as folder:
        (folder / "new").touch()
    assert raised
    survivor = "new" if (name, done) == ("new", True) else "old"
    assert content(path) == ["served", f"served/{survivor}"]


def test_what_a_second_interrupt_leaves_hidden_is_recovered(path, monkeypatch):
    rename = Path.rename

    def interrupted(self, target):
        if self.name in ("new", "old"):
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt), replacing(path):
        pass
    monkeypatch.undo()
    assert not path.exists()
    with pytest.raises(FileExistsError), atomic_directory(path, False, lambda _: True):
        pass
    assert content(path) == ["served", "served/old"]


# Each moment at which a process is killed, as the name of a function and of the path it is called for.
# The child loads the module by its file: importing TensorFlow would take seconds.
MOMENTS = {
    "while writing": "Path.touch",
    "before the first rename": "Path.rename served",
    "between the renames": "Path.rename new",
    "before cleaning up": "shutil.rmtree",
}
KILLED = """
import importlib.util, os, shutil, signal, sys
from pathlib import Path

file, path, moment = sys.argv[1:]
spec = importlib.util.spec_from_file_location("atomic_directory", file)
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
function, _, name = moment.partition(" ")
owner, attribute = {"Path": Path, "shutil": shutil}[function.split(".")[0]], function.split(".")[1]
original = getattr(owner, attribute)

def killed(where, *args, **kwargs):
    if name in ("", Path(where).name):
        os.kill(os.getpid(), signal.SIGKILL)
    return original(where, *args, **kwargs)

with module.atomic_directory(Path(path), True, lambda _: True) as folder:
    (folder / "first").write_text("1")
    setattr(owner, attribute, killed)
    (folder / "new").touch()
"""


@pytest.mark.parametrize("moment", MOMENTS)
def test_the_next_call_recovers_what_a_killed_process_left(path, moment):
    command = [sys.executable, "-c", KILLED, module.__file__, str(path), MOMENTS[moment]]
    done = subprocess.run(command, check=False, timeout=60, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert len([entry for entry in path.parent.iterdir() if entry.name.startswith(".served.")]) == 1
    assert path.exists() == (moment != "between the renames")
    with pytest.raises(FileExistsError), atomic_directory(path, False, lambda _: True):
        pass
    expected = ["served/first", "served/new"] if moment == "before cleaning up" else ["served/old"]
    assert content(path) == ["served", *expected]


def test_a_directory_that_is_being_written_is_left_alone(tmp_path):
    with atomic_directory(tmp_path / "x", False, lambda _: False) as first:
        (first / "a").write_text("first")
        with atomic_directory(tmp_path / "y", False, lambda _: False) as other:
            (other / "b").write_text("other")
        with atomic_directory(tmp_path / "x", False, lambda _: False) as second:
            (second / "a").write_text("second")
        assert (first / "a").read_text() == "first"
        (tmp_path / "x" / "a").unlink()
    assert (tmp_path / "x" / "a").read_text() == "first"


def test_what_another_name_left_behind_is_left_alone(tmp_path):
    old = tmp_path / ".x.more.abcd.tmp" / "old"
    old.mkdir(parents=True)
    (old.parent / "lock").touch()
    with atomic_directory(tmp_path / "x", False, lambda _: False):
        assert not (tmp_path / "x").exists()
    assert old.exists()


def test_it_works_where_there_is_no_lock(path, monkeypatch):
    monkeypatch.setattr(module, "fcntl", None)
    abandoned = path.parent / ".served.abcd.tmp"
    abandoned.mkdir()
    write(path, "new")
    assert content(path) == [".served.abcd.tmp", "served", "served/new"]


def test_the_module_is_imported_where_there_is_no_fcntl():
    code = "import sys; sys.modules['fcntl'] = None; exec(open(sys.argv[1]).read())"
    command = [sys.executable, "-c", code, module.__file__]
    done = subprocess.run(command, check=False, timeout=60, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
