"""What the site's own Sphinx extensions do to its pages. None of it needs Sphinx."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
GUIDE = """\
---
jupytext:
  text_representation:
    extension: .md
    format_name: myst
kernelspec:
  name: python3
---

# A guide

Text.

```{code-cell}
print(1)
```
"""


def extension(name: str) -> ModuleType:
    path = ROOT / "docs/_extensions" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# Guides as notebooks


@pytest.fixture
def notebooks() -> ModuleType:
    return extension("notebooks")


def test_a_guide_is_a_page_with_the_head_of_a_text_notebook(notebooks):
    assert notebooks.is_guide(GUIDE)
    assert not notebooks.is_guide("# A page\n")
    assert not notebooks.is_guide("# A page\n\n---\njupytext:\n---\n")


def test_the_links_stand_under_the_title(notebooks):
    text = notebooks.with_links("name", GUIDE, None)
    before, after = text.split("# A guide\n")
    assert before == GUIDE.split("# A guide")[0]
    assert after.startswith('\n<p class="notebook-links"><a href="name.ipynb" download>')


def test_colab_opens_the_notebook_of_a_repository_that_is_known(notebooks):
    place = "https://colab.research.google.com/github/us/tfbn/blob/gh-pages/guides/name.ipynb"
    assert f'href="{place}"' in notebooks.links("name", "us/tfbn")
    assert 'href="https://colab.research.google.com/"' in notebooks.links("name", None)


def test_a_guide_without_a_title_is_refused(notebooks):
    with pytest.raises(ValueError, match=r"A guide needs a title.* Received: name"):
        notebooks.with_links("name", "---\njupytext:\n---\nText", None)


def test_the_notebook_installs_tfbn_where_the_repository_is_known(notebooks):
    pytest.importorskip("jupytext", reason="needs jupytext, which the extra `docs` brings")
    cells = [cell.source for cell in notebooks.notebook(GUIDE, None).cells]
    assert cells == ["# A guide\n\nText.", "print(1)"]
    install = notebooks.notebook(GUIDE, "us/tfbn").cells[1]
    assert install.cell_type == "code"
    assert "git+https://github.com/us/tfbn" in install.source


# Files of the repository as pages


@pytest.fixture
def files(tmp_path) -> Path:
    """A repository with a page, and a file elsewhere that links to others."""
    (tmp_path / "docs/guides").mkdir(parents=True)
    (tmp_path / "examples").mkdir()
    (tmp_path / "examples/code.py").touch()
    (tmp_path / "examples/a.png").touch()
    return tmp_path


def test_links_of_a_file_are_found_from_the_page(files):
    text = "[code](code.py) ![picture](a.png) [site](https://keras.io) [here](#there)\n"
    page = extension("repository_files").as_page(text, files / "examples", files / "docs/guides")
    assert page == (
        "[code](../../examples/code.py) ![picture](../../examples/a.png) "
        "[site](https://keras.io) [here](#there)\n"
    )


def test_a_link_that_leads_nowhere_is_an_error(files):
    with pytest.raises(FileNotFoundError, match=r"Received: lost\.py"):
        extension("repository_files").as_page("[a](lost.py)", files / "examples", files / "docs")


def test_an_anchor_in_a_heading_becomes_a_target_of_myst(files):
    text = '## <a id="depth"></a>Depth\n'
    page = extension("repository_files").as_page(text, files / "examples", files / "docs")
    assert page == "(depth)=\n## Depth\n"


# Docstrings


def test_a_sentence_with_a_colon_is_no_type():
    before = "First line.\n\nReturns:\n    A model: with\n    two lines.\n\nRaises:\n    TypeError: if.\n"
    after = (
        "First line.\n\n:returns: A model: with\n    two lines.\n\nRaises:\n    TypeError: if.\n"
    )
    assert extension("docstrings").returns_as_field(before) == after


def test_a_class_shows_the_arguments_of_its_own_constructor():
    class Layer:
        def __init__(self, axis: int = -1, *, size: int | None = None, **kwargs: str) -> None: ...

    assert extension("docstrings").arguments(Layer) == "(axis=-1, *, size=None, **kwargs)"


# Links of the site


def test_broken_links_and_parts_from_the_network_are_found(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/index.html").write_text(
        '<h1 id="top">Top</h1><a href="../a.html#here">a</a>'
    )
    (tmp_path / "a.html").write_text(
        '<p id="here"><a href="folder/#top">fine</a> <a href="#here">fine</a> <a href="https://keras.io">fine</a>'
        '<a href="lost.html">lost</a> <a href="folder/#lost">lost</a>'
        '<script src="https://example.org/a.js"></script> <link rel="canonical" href="https://example.org">'
    )
    assert extension("check_links").problems(tmp_path) == {
        "a.html": [
            "lost.html: no such file",
            "folder/#lost: no such anchor",
            "https://example.org/a.js: fetched from the network",
        ]
    }
