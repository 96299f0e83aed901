"""The rooms of the package: imports run one way, from the upper floors to the lower ones."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "tfbn"
# From the ground up. A room may import from itself and from the rooms before it.
ROOMS = [
    "_support",
    "_moments",
    "_normalize",
    "_layer",
    "_models",
    "_data",
    "_statistics",
    "_shipping",
    "_training",
    "_command_line",
]
LONGEST = 400  # lines of a file


def modules() -> list[Path]:
    return [p for p in sorted(PACKAGE.rglob("*.py")) if p.parent != PACKAGE]


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0]


def imported_rooms(source: str) -> set[str]:
    """The rooms of tfbn that a module imports from, inside of functions too."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module:
            parts = node.module.split(".")
            names |= {".".join([*parts, alias.name]) for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {name.split(".")[1] for name in names if name.startswith("tfbn._")}


def upward(source: str, room: str) -> set[str]:
    above = ROOMS[ROOMS.index(room) + 1 :]
    return imported_rooms(source) & set(above)


def test_every_folder_is_a_room_and_says_what_lives_there():
    folders = {p.name for p in PACKAGE.iterdir() if p.is_dir() and p.name != "__pycache__"}
    assert folders == set(ROOMS)
    for init in PACKAGE.glob("_*/**/__init__.py"):
        tree = ast.parse(init.read_text())
        assert ast.get_docstring(tree), f"{init} has no docstring"
        assert len(tree.body) == 1, f"{init} has code"


def test_only_the_entry_points_stand_outside_of_the_rooms():
    assert {p.name for p in PACKAGE.glob("*.py")} == {"__init__.py", "__main__.py"}


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_room_imports_only_from_itself_and_from_rooms_below(path):
    assert upward(path.read_text(), room_of(path)) == set()


def test_the_search_for_upward_imports_can_fail():
    assert upward("from tfbn._layer import renorm", "_moments") == {"_layer"}
    assert upward("def f():\n    from tfbn._shipping.fold.fold import fold", "_data") == {
        "_shipping"
    }
    assert upward("import tfbn._training.loop", "_layer") == {"_training"}
    assert upward("from tfbn._moments.moments import merge", "_layer") == set()


def test_no_file_is_too_long():
    lengths = {str(p.relative_to(PACKAGE)): len(p.read_text().splitlines()) for p in modules()}
    assert {name: n for name, n in lengths.items() if n > LONGEST} == {}
