"""The package as a whole: what it needs, what it shows, and what must not lie about in it."""

import inspect
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import keras
import pytest
import tensorflow as tf

import tfbn
from tfbn._support import backend

ROOT = Path(__file__).parents[1]
EXTRAS = ["importlib_resources", "matplotlib", "rich", "sklearn", "tensorflow_datasets", "tf_keras"]


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs Python code in a process of its own, without the backend that the tests chose."""
    env = {name: value for name, value in os.environ.items() if name != "KERAS_BACKEND"}
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**env, **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


# What it needs


def test_imports_with_tensorflow_and_keras_alone():
    # TensorFlow and Keras come first: what they import on their own account is theirs to need.
    done = run(f"""
import keras, sys, tensorflow
for extra in {EXTRAS}:
    for module in [name for name in sys.modules if name.split(".")[0] == extra]:
        del sys.modules[module]
    sys.modules[extra] = None  # from now on, importing it raises
import tfbn
""")
    assert done.returncode == 0, done.stderr


def refusal(backend: str, source: str) -> str:
    return (
        "ImportError: tfbn works on Keras's TensorFlow backend only. "
        f"Received: backend {backend!r}, {source}. "
        "Choose TensorFlow before Keras is first imported: set the environment variable "
        'KERAS_BACKEND=tensorflow, or "backend": "tensorflow" in keras.json.'
    )


# None of the first two needs to be installed for the answer to be ours.
@pytest.mark.parametrize("backend", ["jax", "torch", "numpy"])
def test_another_backend_in_the_environment_is_refused_with_the_cure(backend):
    done = run("import tfbn", KERAS_BACKEND=backend)
    assert done.stderr.strip().endswith(
        refusal(backend, "from the environment variable KERAS_BACKEND")
    )


def test_another_backend_is_refused_before_keras_and_tensorflow_are_imported():
    done = run(
        """
import sys
try:
    import tfbn
except ImportError:
    print([name for name in ("keras", "tensorflow") if name in sys.modules])
""",
        KERAS_BACKEND="jax",
    )
    assert done.stdout.strip() == "[]", done.stderr


def test_another_backend_in_keras_json_is_refused_with_the_cure(tmp_path):
    config = tmp_path / "keras.json"
    config.write_text(json.dumps({"backend": "jax"}))
    done = run("import tfbn", KERAS_HOME=str(tmp_path))
    assert done.stderr.strip().endswith(refusal("jax", f"from {config}"))


@pytest.fixture
def keras_not_imported(monkeypatch, tmp_path):
    """As in a process that has not imported Keras yet, in a home of its own."""
    monkeypatch.delitem(sys.modules, "keras")
    monkeypatch.delenv("KERAS_BACKEND")
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    return tmp_path / "keras.json"


def test_the_environment_wins_over_keras_json(keras_not_imported, monkeypatch):
    keras_not_imported.write_text(json.dumps({"backend": "torch"}))
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    with pytest.raises(ImportError, match="backend 'jax', from the environment variable"):
        backend.require_tensorflow()


def test_an_empty_variable_leaves_the_choice_to_keras_json(keras_not_imported, monkeypatch):
    keras_not_imported.write_text(json.dumps({"backend": "torch"}))
    monkeypatch.setenv("KERAS_BACKEND", "")
    with pytest.raises(ImportError, match=r"backend 'torch', from .*keras\.json"):
        backend.require_tensorflow()


@pytest.mark.parametrize("content", [None, "not JSON", "{}"])
def test_without_a_backend_named_anywhere_it_is_tensorflow(keras_not_imported, content):
    if content is not None:
        keras_not_imported.write_text(content)
    assert backend._configured_backend() == ("tensorflow", f"from {keras_not_imported}")


@pytest.mark.parametrize("writable", [True, False])
def test_keras_json_is_looked_for_where_keras_does(keras_not_imported, monkeypatch, writable):
    # Without KERAS_HOME: the user's home, or the system's temporary folder if that is read-only.
    home = keras_not_imported.parent
    monkeypatch.delenv("KERAS_HOME")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setattr(os, "access", lambda path, mode: writable)
    assert backend._keras_home() == (home if writable else Path("/tmp")) / ".keras"


def test_keras_already_imported_on_another_backend_is_refused(monkeypatch):
    monkeypatch.setattr(keras.config, "backend", lambda: "jax")
    with pytest.raises(ImportError, match="backend 'jax', as Keras was imported"):
        backend.require_tensorflow()


@pytest.mark.parametrize(
    ("package", "name", "version", "oldest"),
    [
        (keras, "Keras", "3.13.2", "3.14"),
        (keras, "Keras", "2.15.0", "3.14"),
        (tf, "TensorFlow", "2.17.1", "2.18"),
    ],
)
def test_versions_that_are_too_old_are_refused_with_the_cure(
    monkeypatch, package, name, version, oldest
):
    monkeypatch.setattr(package, "__version__", version)
    with pytest.raises(ImportError) as raised:
        backend.require_tensorflow()
    assert str(raised.value) == (
        f"tfbn needs {name} {oldest} or newer. Received: {name} {version}. "
        f"Upgrade it: pip install --upgrade '{name.lower()}>={oldest}'."
    )


@pytest.mark.parametrize("version", ["3.14.0", "3.16.0.dev2026112103", "4.0.0rc1"])
def test_newer_versions_are_taken_and_those_before_a_release_too(monkeypatch, version):
    monkeypatch.setattr(keras, "__version__", version)
    backend.require_tensorflow()


def test_the_oldest_versions_are_the_same_wherever_they_are_said():
    keras_oldest, tensorflow_oldest = (
        ".".join(map(str, backend.OLDEST[name])) for name in ("Keras", "TensorFlow")
    )
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["dependencies"] == [
        f"tensorflow>={tensorflow_oldest}",
        f"keras>={keras_oldest}",
    ]
    pins = (ROOT / "tests/oldest.txt").read_text()
    assert f"tensorflow=={tensorflow_oldest}.0\n" in pins
    assert f"keras=={keras_oldest}.0\n" in pins
    for page in ("README.md", "docs/index.md"):
        text = " ".join((ROOT / page).read_text().split())
        assert f"TensorFlow {tensorflow_oldest} or newer and Keras {keras_oldest} or newer" in text


# What it shows


def test_a_citation_names_this_version():
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {tfbn.__version__}\n" in citation


def public_callables() -> list[tuple[str, object]]:
    """Every public name, and every public method that a class of ours does not owe to a base."""
    found = []
    for name in tfbn.__all__:
        value = getattr(tfbn, name)
        found.append((name, value))
        if inspect.isclass(value):
            found += [
                (f"{name}.{member}", method)
                for member, method in vars(value).items()
                if not member.startswith("_") and callable(method)
                if not any(hasattr(base, member) for base in value.__bases__)
            ]
    return found


def test_all_lists_what_the_package_hands_on():
    shown = {
        n for n in vars(tfbn) if not n.startswith("_") and not inspect.ismodule(getattr(tfbn, n))
    }
    assert sorted(tfbn.__all__) == sorted(shown)


@pytest.mark.parametrize(("name", "value"), [pytest.param(*c, id=c[0]) for c in public_callables()])
def test_every_public_name_has_a_docstring(name, value):
    assert value.__doc__, f"tfbn.{name} has no docstring"


@pytest.mark.parametrize("name", tfbn.__all__)
def test_every_public_name_is_in_a_test(name):
    used = re.compile(rf"\btfbn\.{name}\b|^from tfbn[\w.]* import .*\b{name}\b", re.MULTILINE)
    tests = [path for path in sorted((ROOT / "tests").rglob("*.py")) if path != Path(__file__)]
    assert any(used.search(path.read_text()) for path in tests), f"no test covers tfbn.{name}"


def test_every_serialized_class_is_registered_under_the_package():
    for name in tfbn.__all__:
        value = getattr(tfbn, name)
        if inspect.isclass(value) and hasattr(value, "get_config"):
            assert keras.saving.get_registered_name(value) == f"tfbn>{name}"


def test_the_changelog_knows_the_version():
    assert f"## [{tfbn.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


# What must not lie about in it


def tracked_files() -> list[Path]:
    """What git knows of, or would take; in a copy without git, what was not generated."""
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listing.returncode == 0:
        return [path for line in listing.stdout.splitlines() if (path := ROOT / line).is_file()]
    return [path for path in ROOT.rglob("*.*") if path.is_file() and ".venv" not in str(path)]


MACHINE_PATH = re.compile(rb"/(?:home|root|Users|work|tmp|opt)/\w")
REGISTRY_HOST = re.compile(
    rb"pypi\.org/simple|pythonhosted\.org|download\.pytorch\.org|--(?:extra-)?index-url|--find[-]links"
)


@pytest.mark.parametrize("forbidden", [MACHINE_PATH, REGISTRY_HOST], ids=["path", "host"])
def test_no_file_names_this_machine_or_a_registry(forbidden):
    found = {
        str(path.relative_to(ROOT)): match.group()
        for path in tracked_files()
        if (match := forbidden.search(path.read_bytes()))
    }
    assert found == {}


@pytest.mark.parametrize(
    ("forbidden", "text"),
    [
        (MACHINE_PATH, b"see /" + b"home/me/notes"),
        (REGISTRY_HOST, b"pip install --" + b"index-url x"),
    ],
)
def test_the_search_for_them_can_fail(forbidden, text):
    assert forbidden.search(text)
