"""Builds the documentation with Sphinx: ``make docs`` writes it to build/docs.

Sphinx with furo and MyST was chosen over MkDocs, whose last feature release is years old and whose Material theme takes
critical fixes only: Sphinx is maintained, reads Markdown through MyST, and turns every broken link into an error.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import pages

project = "lightning-idkd"
copyright = "2026, the lightning-idkd authors"
extensions = ["myst_parser"]
nitpicky = True
myst_heading_anchors = 4
myst_enable_extensions = ["colon_fence"]
html_theme = "furo"
html_title = "lightning-idkd"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False
html_theme_options = {"navigation_with_keys": True}
pygments_style = "friendly"
pygments_dark_style = "monokai"


def setup(app):
    """Fill pages before they are parsed, whatever changed in the code that they describe."""

    def fill(app, page, source):
        source[0] = pages.fill(source[0], page)

    app.connect("source-read", fill)
    app.connect("env-get-outdated", lambda app, env, added, changed, removed: sorted(env.found_docs - added))
