"""How a chapter begins: the paper card under its title, and the set-up folded, so that the problem comes into view."""

from __future__ import annotations

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util import logging

from .chapters import chapters_of
from .generated import Page, Placeholder, add_renderer

logger = logging.getLogger(__name__)


def insert_card(app: Sphinx, doctree: nodes.document) -> None:
    """Put the card's placeholder below the title of a chapter."""
    if app.env.docname in chapters_of(app):
        title = next(doctree.findall(nodes.title), None)
        if title is None:
            logger.warning("no title: begin the notebook with a markdown cell '# Title'", location=app.env.docname)
            return
        title.parent.insert(title.parent.index(title) + 1, Placeholder(kind="paper-card", argument=""))


def fold_setup(app: Sphinx, doctree: nodes.document) -> None:
    """Fold the cell tagged `setup`, as the tag `hide-input` would do."""
    for cell in doctree.findall(nodes.container):
        if "tag_setup" in cell["classes"]:
            cell["hide_mode"] = "input"
            cell["prompt_show"] = "Show the set-up"
            cell["prompt_hide"] = "Hide the set-up"


def render_card(page: Page, _: str) -> str:
    chapter = chapters_of(page.app)[page.docname]
    objects = [(name, _api_link(page, name)) for name in chapter.api]
    return page.render("paper_card.html", chapter=chapter, objects=objects)


def _api_link(page: Page, name: str) -> str | None:
    entry = page.app.env.domains["py"].objects.get(name)
    if entry is None:
        module = name.rpartition(".")[0]
        logger.warning(
            "algokit.api names '%s', which no API page describes: export it in __all__ of %s, "
            "or put the directive {api-of} %s on a page in book/api",
            name,
            module,
            module,
            location=page.docname,
        )
        return None
    return page.link(entry.docname, entry.node_id)


def setup(app: Sphinx) -> None:
    add_renderer("paper-card", render_card)
    app.connect("doctree-read", insert_card)
    app.connect("doctree-read", fold_setup)
