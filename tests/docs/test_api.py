"""The API pages show every public name, and nothing else."""

import re
from pathlib import Path

import tfbn

PAGE = (Path(__file__).parents[2] / "docs/api.md").read_text()
LISTING = re.compile(r"^\.\. autosummary::\n(?:   :.*\n)*\n((?:   \S+\n)+)", re.MULTILINE)


def test_every_public_name_has_an_api_page():
    listed = [name for names in LISTING.findall(PAGE) for name in names.split()]
    assert sorted(listed) == sorted(tfbn.__all__)
