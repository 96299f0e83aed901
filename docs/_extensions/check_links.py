"""Fails the build where a page links to nothing, or would fetch something from the network to be shown."""

from collections import defaultdict
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

SHOWN_BY = {"script": "src", "img": "src", "source": "src", "iframe": "src", "link": "href"}
"""Elements whose target the browser fetches by itself, and their attribute."""


class Page(HTMLParser):
    """The targets of a page: its anchors, what it links to, and what it is made of."""

    def __init__(self, text: str):
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.parts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.anchors.update(v for v in (values.get("id"), values.get("name")) if v)
        if tag == "a" and values.get("href"):
            self.links.append(values["href"])
        part = values.get(SHOWN_BY.get(tag, ""))
        if part and values.get("rel") not in ("canonical", "index", "next", "prev", "search"):
            self.parts.append(part)


def problems(folder: Path) -> dict[str, list[str]]:
    """What is wrong with each page of a built site."""
    pages = {path: Page(path.read_text(encoding="utf-8")) for path in folder.rglob("*.html")}
    found = defaultdict(list)
    for path, page in pages.items():
        name = path.relative_to(folder).as_posix()
        for link in [*page.links, *page.parts]:
            url = urlsplit(link)
            if url.scheme or url.netloc:
                if link in page.parts and url.scheme != "data":
                    found[name].append(f"{link}: fetched from the network")
                continue
            target = (path.parent / unquote(url.path)).resolve() if url.path else path
            if target.is_dir():
                target /= "index.html"
            anchors = pages[target].anchors if target in pages else {url.fragment}
            if not target.is_file():
                found[name].append(f"{link}: no such file")
            elif url.fragment and unquote(url.fragment) not in anchors:
                found[name].append(f"{link}: no such anchor")
    return dict(found)


def check(app: Any, exception: Exception | None) -> None:
    if exception is not None or app.builder.format != "html":
        return
    from sphinx.errors import ExtensionError

    lines = [
        f"{name}: {p}" for name, ps in problems(Path(app.outdir).resolve()).items() for p in ps
    ]
    if lines:
        raise ExtensionError("The site has broken links:\n" + "\n".join(sorted(set(lines))))


def setup(app: Any) -> dict[str, bool]:
    app.connect("build-finished", check, priority=900)  # after all files are written
    return {"parallel_read_safe": True, "parallel_write_safe": True}
