"""The documentation site: `make docs` builds it. Nothing here needs a network."""

import importlib.util
import os
import sys
import zlib
from pathlib import Path

DOCS = Path(__file__).parent
BUILD = DOCS / "_build"
sys.path[:0] = [str(DOCS / "_extensions"), str(DOCS.parent)]

# The guides run in kernels that inherit this environment.
os.environ["KERAS_BACKEND"] = "tensorflow"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")
# The kernel imports tfbn from this checkout, wherever the build was started.
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(DOCS.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
)

import tfbn

project = "tfbn"
author = "the tfbn contributors"
copyright = f"2026, {author}"
version = release = tfbn.__version__
language = "en"

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.intersphinx",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "check_links",
    "docstrings",
    "notebooks",
    "repository_files",
]
exclude_patterns = ["_build", "_extensions", "_static", "_templates"]
# Code in single backticks, as Keras writes it, is a link where it names something. Names that begin like these
# must be found.
default_role = "py:obj"
nitpicky = True
nitpick_ignore_regex = [("py:obj", r"(?!tfbn\.|keras\.|tf\.).*")]

# The API pages
templates_path = ["_templates"]
autodoc_typehints = "none"  # the docstrings say it in words
autodoc_member_order = "bysource"
python_maximum_signature_line_length = 80
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_attr_annotations = False
autodoc_inherit_docstrings = False
autodoc_preserve_defaults = True  # a default that is a class has the name that users know
napoleon_use_admonition_for_examples = False
napoleon_custom_sections = [
    ("Call arguments", "params_style"),
    "Input shape",
    "Output shape",
    "Weights",
    ("Reference", "References"),
]

# The guides
myst_enable_extensions = ["amsmath", "colon_fence", "deflist", "dollarmath", "smartquotes"]
myst_heading_anchors = 3
nb_execution_mode = "force"
nb_execution_in_temp = True
nb_execution_raise_on_error = True
nb_execution_timeout = 300
nb_merge_streams = True
nb_output_stderr = "remove"  # what TensorFlow logs
nb_render_markdown_format = "gfm"  # with tables
copybutton_exclude = ".linenos, .gp, .go"

# MathJax, in one file that comes with a package: a page fetches nothing from the network.
_mathjax = importlib.util.find_spec("sphinx-mathjax-offline")
assert _mathjax is not None
assert _mathjax.origin is not None
_mathjax_file = Path(_mathjax.origin).parent / "static/mathjax/tex-svg.js"
mathjax_path = _mathjax_file.name

html_theme = "furo"
html_title = "tfbn"
html_favicon = "_static/favicon.svg"
html_static_path = ["_static", str(_mathjax_file)]
html_css_files = ["tfbn.css"]
html_theme_options = {"navigation_with_keys": True}
html_copy_source = False
html_show_sourcelink = False


def _inventory(name: str) -> str:
    """Packs `inventories/NAME.txt` as Sphinx reads inventories, and returns its path."""
    entries = (DOCS / "inventories" / f"{name}.txt").read_bytes()
    head = f"# Sphinx inventory version 2\n# Project: {name}\n# Version: \n"
    head += "# The remainder of this file is compressed using zlib.\n"
    BUILD.mkdir(exist_ok=True)
    path = BUILD / f"{name}.inv"
    path.write_bytes(head.encode() + zlib.compress(entries))
    return str(path)


# Keras and TensorFlow publish no inventory, and a build must not need the network: the names that our pages
# mention are listed in `inventories/`.
intersphinx_mapping = {
    "keras": ("https://keras.io/", _inventory("keras")),
    "tensorflow": ("https://www.tensorflow.org/api_docs/python/", _inventory("tensorflow")),
    "python": ("https://docs.python.org/3/", _inventory("python")),
}
