"""The book's own Sphinx extension.

What a chapter says about itself (its metadata, its claims, its thumbnail) is read once from the notebook
(`chapters`), and shown where a reader looks for it: in the card under the title (`card`), in the galleries
(`gallery`), in the list of all papers (`papers`), in the ledger of claims (`ledger`). Results of benchmark runs
are shown by `races`, the package by `api`. `mathjax` makes the site complete without a network, `numbers`
numbers figures within their chapter, `page` adjusts the theme.
"""

from __future__ import annotations

from sphinx.application import Sphinx
from sphinx.util.typing import ExtensionMetadata

from . import api, card, chapters, gallery, generated, ledger, mathjax, numbers, page, papers, races


def setup(app: Sphinx) -> ExtensionMetadata:
    for module in (generated, chapters, card, gallery, papers, ledger, races, api, mathjax, numbers, page):
        module.setup(app)
    return {"version": "1", "parallel_read_safe": False, "parallel_write_safe": True}
