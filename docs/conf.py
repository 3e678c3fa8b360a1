"""Sphinx configuration of the documentation site, which `make docs` builds."""

import warnings

from exaone_bridge import __version__

warnings.filterwarnings("ignore")  # the API reference imports Megatron-Bridge, which warns a lot

project = "exaone-bridge"
copyright = "the exaone-bridge authors"
release = version = __version__
html_title = f"{project} {release}"
html_theme = "furo"
exclude_patterns = ["_build"]
templates_path = ["_templates"]
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
myst_heading_anchors = 3

# Docstrings are in Google style. A name in single backquotes is code, as in Markdown.
default_role = "code"
napoleon_numpy_docstring = False
napoleon_use_ivar = True
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "show-inheritance": True}

# A reference to a name of exaone_bridge must resolve; names of other projects are not looked up.
nitpicky = True
nitpick_ignore_regex = [("py:.*", r"(?!exaone_bridge).*"), ("py:.*", r".*\._[^.]*")]
# A public name that a package imports is documented on both pages: a link may lead to either.
suppress_warnings = ["ref.python"]
