"""The API pages show every public name, and nothing else; a guide lists every finding."""

import re
from pathlib import Path

import tfbn
from tfbn._statistics.diagnose.causes import CAUSES

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "api.md").read_text()
LISTING = re.compile(r"^\.\. autosummary::\n(?:   :.*\n)*\n((?:   \S+\n)+)", re.MULTILINE)


def test_every_public_name_has_an_api_page():
    listed = [name for names in LISTING.findall(PAGE) for name in names.split()]
    assert sorted(listed) == sorted(tfbn.__all__)


def test_the_guide_to_bad_validation_lists_every_finding():
    table = (DOCS / "guides/validation.md").read_text().partition("## All findings")[2]
    first_cells = re.findall(r"^\| (`.*?) \|", table, re.MULTILINE)
    listed = re.findall(r"`(\w+)`", " ".join(first_cells))
    assert sorted(listed) == sorted({cause.kind for cause in CAUSES})
