"""What the chapters say about themselves: read from the notebooks that `_toc.yml` lists, in its order."""

from __future__ import annotations

import base64
import functools
import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util import logging

CLAIM_MIME = "application/vnd.algokit.claim+json"
CHAPTER_KEYS = ("part", "slug", "promise", "papers", "api")
PAPER_KEYS = ("title", "authors", "year", "venue", "arxiv", "code", "code_license")

#: The parts of the book in their order, with the title that a reader sees.
PARTS = {
    "foundations": "Foundations",
    "sketching": "Sketching",
    "matrices": "Matrices",
    "optimization": "Optimization",
    "bilevel": "Bilevel optimization",
    "bandits": "Bandits and search",
    "inference": "Inference",
    "representation": "Representation",
    "learning_rules": "Learning rules",
    "training": "Training",
    "adapters": "Adapters",
    "compression": "Compression",
    "decoding": "Decoding",
    "applications": "Applications",
    "multimodal": "Multimodal",
}

Json = dict[str, Any]
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Thumbnail:
    """The first PNG of the cell tagged `thumbnail`."""

    png: bytes
    alt: str

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels, from the header of the PNG."""
        width, height = struct.unpack(">II", self.png[16:24])
        return width, height


@dataclass(frozen=True)
class Chapter:
    """One notebook of the book; `docname` is its path without the suffix."""

    docname: str
    title: str
    part: str
    slug: str
    promise: str
    papers: list[Json]
    api: list[str]
    claims: list[Json]
    thumbnail: Thumbnail | None
    problems: list[str] = field(default_factory=list)

    def count(self, status: str) -> int:
        return sum(claim["status"] == status for claim in self.claims)


@functools.cache
def chapters_of(app: Sphinx) -> dict[str, Chapter]:
    """The chapters of the book by docname, in the order of the table of contents."""
    notebooks = (Path(app.srcdir, f"{docname}.ipynb") for docname in _toc_docnames(app.config.external_site_map))
    chapters = (read_chapter(path, Path(app.srcdir)) for path in notebooks if path.exists())
    return {chapter.docname: chapter for chapter in chapters}


def read_chapter(path: Path, root: Path) -> Chapter:
    """Read a notebook; what is missing is listed in `problems`, each with what to do about it."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    meta = notebook["metadata"].get("algokit")
    if meta is None:
        problems, meta = ["notebook metadata has no key 'algokit': add it (see book/writing_a_chapter.md)"], {}
    else:
        problems = _missing_keys(meta)
    thumbnail = _thumbnail(notebook["cells"])
    if thumbnail is None:
        problems.append("no thumbnail: tag the cell whose figure stands for the chapter 'thumbnail', and execute it")
    docname = path.relative_to(root).with_suffix("").as_posix()
    papers = [{key: paper.get(key) for key in PAPER_KEYS} for paper in meta.get("papers", [])]
    return Chapter(
        docname,
        _title(notebook["cells"]) or docname,
        meta.get("part", ""),
        meta.get("slug", ""),
        meta.get("promise", ""),
        papers,
        meta.get("api", []),
        list(_claims(notebook["cells"])),
        thumbnail,
        problems,
    )


def _toc_docnames(site_map: Any) -> Iterator[str]:
    """Docnames of the table of contents, depth first."""

    def walk(document: Any) -> Iterator[str]:
        yield document.docname
        for subtree in document.subtrees:
            for item in subtree.items:
                if item in site_map:
                    yield from walk(site_map[item])

    return walk(site_map.root)


def _missing_keys(meta: Json) -> list[str]:
    wanted = [(f"algokit.{key}", meta, key) for key in CHAPTER_KEYS]
    wanted += [
        (f"algokit.papers[{i}].{key}", paper, key)
        for i, paper in enumerate(meta.get("papers", []))
        for key in PAPER_KEYS
    ]
    return [
        f"notebook metadata lacks '{name}': add it (null where there is none; see book/writing_a_chapter.md)"
        for name, holder, key in wanted
        if key not in holder
    ]


def _title(cells: list[Json]) -> str | None:
    lines = (line for cell in cells if cell["cell_type"] == "markdown" for line in _text(cell["source"]).splitlines())
    return next((line[2:].strip() for line in lines if line.startswith("# ")), None)


def _thumbnail(cells: list[Json]) -> Thumbnail | None:
    for cell in cells:
        if "thumbnail" in cell["metadata"].get("tags", []):
            for output in cell.get("outputs", []):
                if "image/png" in output.get("data", {}):
                    alt = cell["metadata"].get("mystnb", {}).get("image", {}).get("alt", "")
                    return Thumbnail(base64.b64decode(_text(output["data"]["image/png"])), alt)
    return None


def _claims(cells: list[Json]) -> Iterator[Json]:
    for cell in cells:
        for output in cell.get("outputs", []):
            claim = output.get("data", {}).get(CLAIM_MIME)
            if claim is not None:
                yield claim if isinstance(claim, dict) else json.loads(_text(claim))


def _text(source: str | list[str]) -> str:
    return source if isinstance(source, str) else "".join(source)


def report_problems(app: Sphinx, env: BuildEnvironment, docnames: list[str]) -> None:
    """Warn about incomplete chapters, and about notebooks that the table of contents forgets."""
    chapters = chapters_of(app)
    for chapter in chapters.values():
        for problem in chapter.problems:
            logger.warning(problem, location=chapter.docname)
    for path in sorted(Path(app.srcdir, "notebooks").glob("*/*.ipynb")):
        docname = path.relative_to(app.srcdir).with_suffix("").as_posix()
        if docname not in chapters:
            logger.warning("%s.ipynb is not in the book: add '- file: %s' under its part in _toc.yml", docname, docname)


def setup(app: Sphinx) -> None:
    app.connect("env-before-read-docs", report_problems)
