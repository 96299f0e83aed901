"""Shows Markdown files of the repository as pages of the site, without a copy of them.

A page says where one goes, by its path from the root of the repository::

    {repository-file}`examples/lectures/README.md`

Links and pictures beside the file are found; links to other files of the repository become downloads. The file's
title is left out where the page has its own.
"""

import os
import re
from pathlib import Path
from typing import Any

PLACE = re.compile(r"^\{repository-file\}`([^`]+)`$", re.MULTILINE)
LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)#\s]+)")
TITLE = re.compile(r"^# .*\n+", re.MULTILINE)
ANCHORED_HEADING = re.compile(r'^(#+) <a id="([\w-]+)"></a>', re.MULTILINE)


def setup(app: Any) -> dict[str, bool]:
    app.connect("source-read", show_files)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def show_files(app: Any, docname: str, source: list[str]) -> None:
    page = Path(app.srcdir) / f"{docname}.md"

    def shown(match: re.Match[str]) -> str:
        file = Path(app.srcdir).parent / match[1]
        app.env.note_dependency(str(file))
        text = file.read_text(encoding="utf-8")
        if TITLE.search(source[0]):
            text = TITLE.sub("", text, count=1)
        return as_page(text, file.parent, page.parent)

    source[0] = PLACE.sub(shown, source[0])


def as_page(text: str, folder: Path, page_folder: Path) -> str:
    """The text of a file in `folder`, for a page in `page_folder`."""

    def moved(link: re.Match[str]) -> str:
        target = folder / link[1]
        if not target.exists():
            raise FileNotFoundError(f"A link leads nowhere. Received: {link[1]} in {folder}")
        return Path(os.path.relpath(target, page_folder)).as_posix()

    # MyST finds its own targets, not HTML's.
    return ANCHORED_HEADING.sub(r"(\2)=\n\1 ", LINK.sub(moved, text))
