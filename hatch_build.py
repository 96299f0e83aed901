"""What the package index shows: the addresses of the project, and README.md with links that lead there.

The tree does not know where it is hosted. The environment variable GITHUB_REPOSITORY names the repository (GitHub's own
builds set it), and links and pictures get absolute addresses. Without it, links become text, and pictures are left out.
"""

import os
import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

PICTURE = re.compile(r"!\[([^\]]*)\]\((?!\w+:)([^)]+)\)\n*")
LINK = re.compile(r"(?<!!)\[([^\]]*)\]\((?!\w+:|#)([^)]+)\)")


class ProjectPage(MetadataHookInterface):
    """Fills in what pyproject.toml calls dynamic."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Adds the addresses and the long description."""
        repository = os.environ.get("GITHUB_REPOSITORY")
        text = Path(self.root, "README.md").read_text(encoding="utf-8")
        metadata["readme"] = {
            "content-type": "text/markdown",
            "text": long_description(text, repository),
        }
        metadata["urls"] = urls(repository)


def urls(repository: str | None) -> dict[str, str]:
    """The addresses of the project; none where the repository is not known."""
    if not repository:
        return {}
    source = f"https://github.com/{repository}"
    owner, _, name = repository.partition("/")
    return {
        "Source": source,
        "Documentation": f"https://{owner}.github.io/{name}/",
        "Changelog": f"{source}/blob/HEAD/CHANGELOG.md",
        "Issues": f"{source}/issues",
    }


def long_description(readme: str, repository: str | None) -> str:
    """README.md for a page outside of the repository."""
    if not repository:
        return LINK.sub(r"\1", PICTURE.sub("", readme))
    raw = f"https://raw.githubusercontent.com/{repository}/HEAD/"
    source = f"https://github.com/{repository}/blob/HEAD/"
    readme = PICTURE.sub(
        lambda found: found[0].replace(f"({found[2]})", f"({raw}{found[2]})"), readme
    )
    return LINK.sub(lambda found: f"[{found[1]}]({source}{found[2]})", readme)
