"""Generated content: a directive leaves a placeholder, which becomes HTML once every page has been read.

Only then are all titles and API objects known. The markup itself is in `book/_templates`.
"""

from __future__ import annotations

import os.path
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util.docutils import SphinxDirective

TEMPLATES = Path(__file__).parents[2] / "_templates"


class Placeholder(nodes.General, nodes.Element):
    """Stands where generated HTML will be; its attribute `kind` names the renderer, `argument` is passed on."""


@dataclass(frozen=True)
class Page:
    """The page that is being written: it knows how to link from itself to the rest of the site."""

    app: Sphinx
    docname: str

    def link(self, docname: str, anchor: str = "") -> str:
        """Relative address of another page."""
        return self.app.builder.get_relative_uri(self.docname, docname) + (f"#{anchor}" if anchor else "")

    def asset(self, path: str) -> str:
        """Relative address of a file, given by its path in the output folder."""
        here = os.path.dirname(self.app.builder.get_target_uri(self.docname))
        return os.path.relpath(path, here or ".")

    def render(self, template: str, **values: Any) -> str:
        """HTML of a template in `book/_templates`."""
        environment = jinja2.Environment(
            loader=jinja2.FileSystemLoader(TEMPLATES),
            autoescape=True,
            undefined=jinja2.StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        return environment.get_template(template).render(page=self, **values)


Renderer = Callable[[Page, str], str]
_renderers: dict[str, Renderer] = {}


def generated_directive(app: Sphinx, name: str, renderer: Renderer) -> None:
    """Make a directive `{name}`, with one optional argument, that is replaced by what `renderer` returns."""

    class Generated(SphinxDirective):
        optional_arguments = 1

        def run(self) -> list[nodes.Node]:
            return [Placeholder(kind=name, argument=self.arguments[0] if self.arguments else "")]

    add_renderer(name, renderer)
    app.add_directive(name, Generated)


def add_renderer(kind: str, renderer: Renderer) -> None:
    _renderers[kind] = renderer


def _note_pages(app: Sphinx, doctree: nodes.document) -> None:
    """Remember which pages hold generated content: they are written anew in every build."""
    if next(doctree.findall(Placeholder), None) is not None:
        _generated_pages(app.env).add(app.env.docname)


def _outdated(app: Sphinx, env: BuildEnvironment, added: set[str], changed: set[str], removed: set[str]) -> list[str]:
    return sorted(_generated_pages(env) & env.found_docs)


def _generated_pages(env: BuildEnvironment) -> set[str]:
    if not hasattr(env, "papers_executed_generated"):
        env.papers_executed_generated = set()  # type: ignore[attr-defined]
    pages: set[str] = env.papers_executed_generated  # type: ignore[attr-defined]
    return pages


def _replace(app: Sphinx, doctree: nodes.document, docname: str) -> None:
    for placeholder in list(doctree.findall(Placeholder)):
        html = _renderers[placeholder["kind"]](Page(app, docname), placeholder["argument"])
        placeholder.replace_self(nodes.raw("", html, format="html"))


def setup(app: Sphinx) -> None:
    app.add_node(Placeholder)
    app.connect("doctree-read", _note_pages, priority=900)
    app.connect("env-get-outdated", _outdated)
    app.connect("doctree-resolved", _replace)
