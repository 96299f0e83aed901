"""README.md and the pages of the site tell the truth: Python runs, commands and files exist."""

import importlib.util
import re
import runpy
import shlex
import tomllib
from pathlib import Path

import pytest

from benchmarks import page
from tfbn._command_line import main as commands

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *(ROOT / "docs/guides").glob("*.md"),
]
BLOCK = re.compile(r"^```(\w+|\{[\w-]+\})\n(.*?)^```$", re.MULTILINE | re.DOTALL)
ELSEWHERE = {"onnxruntime", "tf2onnx", "tf2onnx.convert"}
"""What others publish, and our tests do not install."""
COMMANDS = ("make", "pip", "python", "srun", "tfbn")


def shell_commands() -> list[str]:
    """Each line of a shell block, and each command in backticks, on any page."""
    found = []
    for path in PAGES:
        text = path.read_text()
        blocks = [code for language, code in BLOCK.findall(text) if language == "bash"]
        found += [line for block in blocks for line in block.splitlines() if line.strip()]
        spans = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", BLOCK.sub("", text))]
        found += [span for span in spans if span.split()[0] in COMMANDS and " " in span]
    return sorted(set(found))


def words(text: str) -> int:
    """How many words stand beside code and tables."""
    prose = re.sub(r"<!--.*?-->", "", BLOCK.sub("", text))
    lines = [line for line in prose.splitlines() if not line.startswith("|")]
    prose = re.sub(r"\]\([^)]*\)", "", "\n".join(lines))  # of a link, its text
    return len(re.findall(r"\w[\w.'/-]*", prose))


def test_the_readme_has_at_most_700_words_beside_code_and_tables():
    assert words(README) <= 700


def test_words_are_counted_beside_code_and_tables():
    text = "One two.\n```python\nno = 1\n```\n| no | no |\n\n<!-- no -->\n![three](no/no.png) [four](no)\n"
    assert words(text) == 4


def test_the_figures_of_the_readme_are_those_of_the_committed_results():
    assert page.rendered(README, show=page.figures) == README, "Run: python -m benchmarks.page"
    [(_, name, shown, _)] = page.MARKED.findall(README)
    assert name == "benchmarks/results/cpu.json"
    assert len(re.findall(r"\*\*\d+\.\d times\*\*", shown)) == 3


def test_the_links_of_the_readme_lead_somewhere():
    links = re.findall(r"\]\((?!\w+:)([^)#]+)", README)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


@pytest.fixture
def long_description():
    """The function in hatch_build.py, which is no module of a package."""
    pytest.importorskip("hatchling")
    return runpy.run_path(str(ROOT / "hatch_build.py"))["long_description"]


def test_the_package_index_shows_links_and_pictures_by_their_addresses(long_description):
    text = long_description(README, "owner/name")
    targets = re.findall(r"\]\(([^)]+)\)", text)
    assert len(targets) == len(re.findall(r"\]\(", README))
    for target in targets:
        address = re.fullmatch(
            r"https://(?:github\.com/owner/name/blob|raw\.githubusercontent\.com/owner/name)/HEAD/(.+)",
            target,
        )
        assert address is not None, target
        assert (ROOT / address[1].partition("#")[0]).is_file()
    assert "![Test accuracy during training" in text


def test_the_package_index_shows_neither_links_nor_pictures_where_the_address_is_unknown(
    long_description,
):
    text = long_description(README, None)
    assert "](" not in text
    assert "Test accuracy during training" not in text
    assert "All results, and the shapes on which it is slower, are on the page of numbers." in text


def test_the_python_of_the_readme_runs(tmp_path, monkeypatch):
    # In the order of the file and in one namespace, as somebody who reads on would run it.
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    blocks = [code for language, code in BLOCK.findall(README) if language == "python"]
    assert blocks
    for code in blocks:
        exec(compile(code, "README.md", "exec"), namespace)


@pytest.mark.parametrize("command", shell_commands())
def test_the_commands_of_the_pages_exist(command):
    assert missing(command) == ""


def missing(command: str) -> str:
    """What a command names that is not there; empty when all is."""
    program, *words = shlex.split(command, comments=True)
    if program == "srun":
        program, *words = words
    arguments = [word for word in words if "=" not in word]
    if program == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        return " ".join(target for target in arguments if target not in targets)
    if program == "tfbn":
        helped = commands.parser("tfbn").format_help()
        known = re.findall(r"^ +(\S+)", helped, re.MULTILINE)
        return "" if arguments[0] in {*known, "--help"} else arguments[0]
    if program == "python" and arguments[0] == "-m":
        return (
            ""
            if arguments[1] in ELSEWHERE or importlib.util.find_spec(arguments[1])
            else arguments[1]
        )
    if program == "python":
        return "" if (ROOT / arguments[0]).is_file() else arguments[0]
    if program == "pip" and arguments[0] == "install":
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        if set(arguments[1:]) <= ELSEWHERE:
            return ""
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
        ("tfbn dinner model.keras", "dinner"),
        ("pip install '.[gpu,dinner]'", "dinner"),
        ("dinner", "dinner"),
    ],
)
def test_a_command_that_does_not_exist_is_found(command, what):
    assert missing(command) == what
