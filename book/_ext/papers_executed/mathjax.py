"""MathJax comes from a Python package and is copied into the site, which therefore needs no network."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

from sphinx.application import Sphinx
from sphinx.errors import ExtensionError

#: What a page may ask for: the program, its fonts, and the TeX extensions that are loaded on demand.
NEEDED = ("tex-chtml.js", "output/chtml/fonts/woff-v2", "input/tex/extensions")


def copy_mathjax(app: Sphinx, exception: Exception | None) -> None:
    target = Path(app.outdir, "_static", "mathjax")
    if exception is not None or app.builder.format != "html" or (target / NEEDED[0]).exists():
        return
    for name in NEEDED:
        source = mathjax_source() / name
        copy = shutil.copytree if source.is_dir() else shutil.copy
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        copy(source, target / name)


def mathjax_source() -> Path:
    """Folder of MathJax in the package django-static-mathjax, which needs no Django for this."""
    spec = importlib.util.find_spec("mathjax")
    if spec is None or not spec.submodule_search_locations:
        raise ExtensionError("MathJax is missing: pip install django-static-mathjax (extra 'book')")
    return Path(spec.submodule_search_locations[0], "static/mathjax/es5")


def setup(app: Sphinx) -> None:
    app.connect("build-finished", copy_mathjax)
