"""Figures, algorithms, theorems and exercises count from 1 in every chapter, as equations do.

Sphinx counts through the whole book, so that a new chapter would renumber all later ones.
"""

from __future__ import annotations

from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment


def number_within_pages(app: Sphinx, env: BuildEnvironment) -> list[str]:
    for kinds in env.toc_fignumbers.values():
        for kind, numbers in kinds.items():
            in_order = sorted(numbers, key=lambda name: numbers[name])
            kinds[kind] = {name: (position,) for position, name in enumerate(in_order, start=1)}
    return []


def setup(app: Sphinx) -> None:
    app.connect("env-get-updated", number_within_pages, priority=900)  # after Sphinx has numbered
