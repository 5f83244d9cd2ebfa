"""`{all-papers}`: every paper of the book by part, from `book/papers.csv`, with a link to its chapter if it has one."""

from __future__ import annotations

import csv
from pathlib import Path

from sphinx.application import Sphinx
from sphinx.util import logging

from .chapters import PARTS, chapters_of
from .generated import Page, generated_directive

logger = logging.getLogger(__name__)


def render_papers(page: Page, _: str) -> str:
    chapters = {(chapter.part, chapter.slug): chapter for chapter in chapters_of(page.app).values()}
    with Path(page.app.srcdir, "book/papers.csv").open(encoding="utf-8", newline="") as file:
        papers = list(csv.DictReader(file))
    known = {(paper["part"], paper["slug"]) for paper in papers}
    for key, chapter in chapters.items():
        if chapter.papers and key not in known:
            logger.warning(
                "no line in book/papers.csv for part '%s', slug '%s': add its papers",
                *key,
                location=chapter.docname,
            )
    by_part = {part: [paper for paper in papers if paper["part"] == part] for part in PARTS}
    return page.render(
        "all_papers.html",
        titles=PARTS,
        chapters=chapters,
        total=len(papers),
        by_part={part: rows for part, rows in by_part.items() if rows},
    )


def setup(app: Sphinx) -> None:
    generated_directive(app, "all-papers", render_papers)
