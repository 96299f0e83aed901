"""README.md tells the truth: its Python runs, and its commands exist."""

import importlib.util
import re
import shlex
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
COMMANDS = ("make", "pip", "python")


def shell_commands() -> list[str]:
    """Each line of a shell block, and each command in backticks."""
    blocks = [code for language, code in BLOCK.findall(README) if language == "bash"]
    lines = [line for block in blocks for line in block.splitlines() if line.strip()]
    spans = re.findall(r"`([^`\n]+)`", BLOCK.sub("", README))
    return lines + [span for span in spans if span.split()[0] in COMMANDS and " " in span]


def test_the_python_of_the_readme_runs(tmp_path, monkeypatch):
    # In the order of the file and in one namespace, as somebody who reads on would run it.
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    blocks = [code for language, code in BLOCK.findall(README) if language == "python"]
    assert blocks
    for code in blocks:
        exec(compile(code, "README.md", "exec"), namespace)


@pytest.mark.parametrize("command", shell_commands())
def test_the_commands_of_the_readme_exist(command):
    assert missing(command) == ""


def missing(command: str) -> str:
    """What a command of the README names that is not there; empty when all is."""
    program, *words = shlex.split(command, comments=True)
    arguments = [word for word in words if "=" not in word]
    if program == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        return " ".join(target for target in arguments if target not in targets)
    if program == "python" and arguments[0] == "-m":
        return "" if importlib.util.find_spec(arguments[1]) else arguments[1]
    if program == "python":
        return "" if (ROOT / arguments[0]).is_file() else arguments[0]
    if program == "pip" and arguments[0] == "install":
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        extras = re.findall(r"[\w-]+", arguments[1].removeprefix("."))
        return " ".join(e for e in extras if e not in project["optional-dependencies"])
    return program


@pytest.mark.parametrize(
    ("command", "what"),
    [
        ("make dinner", "dinner"),
        ("make test dinner PYTHON=python3.12", "dinner"),
        ("python examples/dinner.py", "examples/dinner.py"),
        ("python -m tfbn_dinner", "tfbn_dinner"),
        ("pip install '.[gpu,dinner]'", "dinner"),
        ("dinner", "dinner"),
    ],
)
def test_a_command_that_does_not_exist_is_found(command, what):
    assert missing(command) == what
