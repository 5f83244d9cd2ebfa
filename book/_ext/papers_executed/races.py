"""`{races}` and `{execution-times}`: what the benchmark runs and the last execution of the notebooks measured."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

from .chapters import chapters_of
from .generated import Page, generated_directive

RESULTS = "benchmarks/results"
SCALE = (0.1, 1000.0)  # ratios at the two ends of the bars' logarithmic axis


def render_races(page: Page, _: str) -> str:
    files = sorted(Path(page.app.srcdir, RESULTS).glob("*/*.json"))
    results = {_anchor(file): json.loads(file.read_text(encoding="utf-8")) for file in files}
    chapters = {(chapter.part, chapter.slug): chapter for chapter in chapters_of(page.app).values()}
    return page.render("races.html", results=results, chapters=chapters, position=position)


def _anchor(file: Path) -> str:
    """A chapter has one file for each device it raced on."""
    return f"{file.parent.name}-{file.stem}".replace(".", "-")


def position(ratio: float) -> float:
    """Place of a ratio on the axis of the bars, in per cent."""
    low, high = (math.log(end) for end in SCALE)
    return round(100 * min(1.0, max(0.0, (math.log(ratio) - low) / (high - low))), 2)


def render_times(page: Page, _: str) -> str:
    file = Path(page.app.srcdir, RESULTS, "notebooks.json")
    measured: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    rows = [(chapter, measured.get(f"{chapter.docname}.ipynb")) for chapter in chapters_of(page.app).values()]
    return page.render("execution_times.html", rows=rows, any_measured=any(times for _, times in rows))


def setup(app: Sphinx) -> None:
    generated_directive(app, "races", render_races)
    generated_directive(app, "execution-times", render_times)
