"""Offers each guide as a notebook: to download, and to open in Colab.

A guide is a text notebook, `guides/NAME.md`. The site gets `guides/NAME.ipynb` beside its page, and the page gets
a line under its title that links to it. Colab opens notebooks from GitHub: where the environment variable
GITHUB_REPOSITORY names the repository (GitHub's own builds set it) and the site is published on its branch
`gh-pages`, the link opens the notebook itself, which then begins by installing tfbn.
"""

import os
import re
from pathlib import Path
from typing import Any

COLAB = "https://colab.research.google.com/"
FOLDER = "guides/"
TITLE = re.compile(r"^# .+\n", re.MULTILINE)


def setup(app: Any) -> dict[str, bool]:
    app.connect("source-read", add_links)
    app.connect("build-finished", write_notebooks)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def is_guide(text: str) -> bool:
    """Whether a page is a text notebook."""
    return text.startswith("---\n") and "\njupytext:\n" in text.partition("\n---\n")[0] + "\n"


def links(name: str, repository: str | None) -> str:
    """The line under the title of the guide `name`."""
    download = f'<a href="{name}.ipynb" download>Download the notebook</a>'
    if repository:
        url = f"{COLAB}github/{repository}/blob/gh-pages/{FOLDER}{name}.ipynb"
        colab = f'<a href="{url}">Open in Colab</a>'
    else:
        colab = f'<a href="{COLAB}">Open Colab</a> to upload it there'
    return f'<p class="notebook-links">{download} · {colab}</p>'


def with_links(name: str, text: str, repository: str | None) -> str:
    """The text of a guide with its links under the title."""
    title = TITLE.search(text)
    if title is None:
        raise ValueError(f"A guide needs a title, a line that begins with '# '. Received: {name}")
    return f"{text[: title.end()]}\n{links(name, repository)}\n{text[title.end() :]}"


def notebook(text: str, repository: str | None) -> Any:
    """The guide as a notebook without outputs, of class `nbformat.NotebookNode`."""
    import jupytext
    import nbformat

    result = jupytext.reads(text, fmt="md:myst")
    if repository:
        install = f'%pip install --quiet "tfbn[examples] @ git+https://github.com/{repository}"'
        result.cells.insert(1, nbformat.v4.new_code_cell(install))
    return result


def add_links(app: Any, docname: str, source: list[str]) -> None:
    if docname.startswith(FOLDER) and is_guide(source[0]):
        name = docname.removeprefix(FOLDER)
        source[0] = with_links(name, source[0], os.environ.get("GITHUB_REPOSITORY"))


def write_notebooks(app: Any, exception: Exception | None) -> None:
    if exception is not None or app.builder.format != "html":
        return
    import nbformat

    for path in sorted((Path(app.srcdir) / FOLDER).glob("*.md")):
        text = path.read_text(encoding="utf-8")
        if is_guide(text):
            target = Path(app.outdir) / FOLDER / f"{path.stem}.ipynb"
            repository = os.environ.get("GITHUB_REPOSITORY")
            nbformat.write(notebook(text, repository), target)
