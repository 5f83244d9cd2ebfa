"""The public address in the text, and small corrections to what the theme and other extensions put on every page."""

from __future__ import annotations

from html import escape
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx

from .chapters import chapters_of


def insert_address(app: Sphinx, docname: str, source: list[str]) -> None:
    """Pages write REPOSITORY_URL for the public address, which stands in `_config.yml` alone."""
    source[0] = source[0].replace("REPOSITORY_URL", app.config.html_theme_options["repository_url"])


def correct(
    app: Sphinx, pagename: str, templatename: str, context: dict[str, Any], doctree: nodes.document | None
) -> None:
    context["script_files"] = _without_repetition(context["script_files"])
    if "body" in context:  # a list of entries is not a list in the sense of ARIA, as docutils has it
        context["body"] = context["body"].replace('<div role="list" class="citation-list">', "<div>")
    chapter = chapters_of(app).get(pagename)
    if chapter:
        context["metatags"] = context.get("metatags", "") + _description(chapter.promise)


def _without_repetition(scripts: list[Any]) -> list[Any]:
    """Drop inline scripts that are there twice, as those of sphinx-thebe: a constant declared twice is an error."""
    seen: set[str] = set()
    kept = []
    for script in scripts:
        body = getattr(script, "attributes", {}).get("body")
        if body is None or body not in seen:
            kept.append(script)
            seen.add(body or "")
    return kept


def _description(promise: str) -> str:
    """Describe a chapter to search engines by its promise."""
    return f'<meta name="description" content="{escape(promise, quote=True)}" />'


def setup(app: Sphinx) -> None:
    app.connect("source-read", insert_address)
    app.connect("html-page-context", correct, priority=900)
