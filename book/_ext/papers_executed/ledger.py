"""`{claims-ledger}`: every claim that the chapters put to the test, and what came of it; also as `ledger.json`."""

from __future__ import annotations

import json
from pathlib import Path

from sphinx.application import Sphinx
from sphinx.util import logging

from .chapters import chapters_of
from .generated import Page, generated_directive

STATUSES = ("reproduced", "in part", "not reproduced")
LEDGER = "ledger.json"
logger = logging.getLogger(__name__)


def render_ledger(page: Page, _: str) -> str:
    chapters = [chapter for chapter in chapters_of(page.app).values() if chapter.claims]
    seen: set[str] = set()
    for chapter in chapters:
        for claim in chapter.claims:
            if claim["status"] not in STATUSES:
                logger.warning(
                    "claim '%s' has the status '%s': use one of %s",
                    claim["id"],
                    claim["status"],
                    ", ".join(STATUSES),
                    location=chapter.docname,
                )
            if claim["id"] in seen:
                logger.warning(
                    "claim '%s' is made twice: give each claim an id of its own",
                    claim["id"],
                    location=chapter.docname,
                )
            seen.add(claim["id"])
    counts = {status: sum(chapter.count(status) for chapter in chapters) for status in STATUSES}
    return page.render("ledger.html", chapters=chapters, counts=counts, total=sum(counts.values()), file=LEDGER)


def write_ledger(app: Sphinx, exception: Exception | None) -> None:
    """Write the ledger as data: one object a claim, with its chapter."""
    if exception is None and app.builder.format == "html":
        claims = [
            {"chapter": chapter.docname, **claim} for chapter in chapters_of(app).values() for claim in chapter.claims
        ]
        Path(app.outdir, LEDGER).write_text(json.dumps(claims, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def setup(app: Sphinx) -> None:
    generated_directive(app, "claims-ledger", render_ledger)
    app.connect("build-finished", write_ledger)
