"""`{api-of} algokit.part.slug`: the public names of a module with their docstrings, and a link to its chapter."""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from .chapters import chapters_of
from .generated import Page, Placeholder, add_renderer


class ApiOf(SphinxDirective):
    """Document everything that a module lists in `__all__`."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        name = self.arguments[0]
        try:
            module = importlib.import_module(name)
        except ImportError as problem:
            raise self.error(f"cannot import '{name}' ({problem}): correct the name or install what it needs") from None
        if not hasattr(module, "__all__"):
            raise self.error(f"'{name}' has no __all__: list its public names there")
        self.env.note_dependency(str(module.__file__))
        return [Placeholder(kind="api-chapter", argument=name), *self._parse(_rst(module))]

    def _parse(self, rst: list[str]) -> list[nodes.Node]:
        """Parse reStructuredText on a Markdown page."""
        holder = nodes.container(classes=["api"])
        text = StringList(["``````{eval-rst}", *rst, "``````"], source=self.env.doc2path(self.env.docname))
        self.state.nested_parse(text, self.content_offset, holder)
        return [holder]


def _rst(module: ModuleType) -> list[str]:
    lines = [f".. py:module:: {module.__name__}", "", *_summary(module), ""]
    for name in module.__all__:
        lines += [*_autodoc(module, name), ""]
    return lines


def _summary(module: ModuleType) -> list[str]:
    """First paragraph of the module's docstring."""
    return (inspect.getdoc(module) or "").split("\n\n")[0].splitlines()


def _autodoc(module: ModuleType, name: str) -> list[str]:
    value: Any = getattr(module, name)
    if inspect.isclass(value):
        kind = "exception" if issubclass(value, BaseException) else "class"
    else:
        kind = "function" if callable(value) and hasattr(value, "__name__") else "data"
    members = kind == "class" and not hasattr(value, "_fields")  # a NamedTuple describes its fields in its docstring
    return [f".. auto{kind}:: {module.__name__}.{name}", *(["   :members:"] if members else [])]


def render_chapter_link(page: Page, module: str) -> str:
    docname = "notebooks/" + "/".join(module.split(".")[1:])
    return page.render("api_chapter.html", module=module, chapter=chapters_of(page.app).get(docname))


def skip_member(app: Sphinx, what: str, name: str, obj: object, skip: bool, options: Any) -> bool | None:
    """Leave out the methods `set_..._request` that scikit-learn adds to every estimator."""
    return True if re.fullmatch(r"set_\w+_request", name) else None


def import_from_source(app: Sphinx) -> None:
    """Document the package of this tree, whatever else is installed."""
    sys.path.insert(0, str(Path(app.srcdir)))


def setup(app: Sphinx) -> None:
    add_renderer("api-chapter", render_chapter_link)
    app.add_directive("api-of", ApiOf)
    app.connect("builder-inited", import_from_source)
    app.connect("autodoc-skip-member", skip_member)
