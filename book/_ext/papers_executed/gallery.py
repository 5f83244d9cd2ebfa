"""`{chapter-gallery} [part]`: the chapters as cards with picture, title and promise."""

from __future__ import annotations

from pathlib import Path

from sphinx.application import Sphinx
from sphinx.util import logging

from .chapters import Chapter, chapters_of
from .generated import Page, generated_directive

THUMBNAILS = "_images/thumbnails"
logger = logging.getLogger(__name__)


def render_gallery(page: Page, part: str) -> str:
    chapters = [chapter for chapter in chapters_of(page.app).values() if part in ("", chapter.part)]
    if not chapters:
        logger.warning(
            "{chapter-gallery} %s: no chapter has this part; write the part as in the notebooks' metadata",
            part,
            location=page.docname,
        )
    return page.render("gallery.html", chapters=chapters, thumbnail=thumbnail_path)


def thumbnail_path(chapter: Chapter) -> str:
    return f"{THUMBNAILS}/{chapter.part}-{chapter.slug}.png"


def write_thumbnails(app: Sphinx, exception: Exception | None) -> None:
    if exception is None and app.builder.format == "html":
        Path(app.outdir, THUMBNAILS).mkdir(parents=True, exist_ok=True)
        for chapter in chapters_of(app).values():
            if chapter.thumbnail:
                Path(app.outdir, thumbnail_path(chapter)).write_bytes(chapter.thumbnail.png)


def setup(app: Sphinx) -> None:
    generated_directive(app, "chapter-gallery", render_gallery)
    app.connect("build-finished", write_thumbnails)
