"""Scaffold a chapter: notebook, module, tests and race, from a template that already passes the checks.

    python -m tools.chapter PART SLUG

The part's rooms, its page, and the lines in _toc.yml, the API pages and the architecture contract are made where they
are missing. Nothing is overwritten.
"""

from __future__ import annotations

import argparse
import csv
import re
from pathlib import Path
from typing import Any

import jupytext

from tools import notebooks as nbs
from tools.execute import execute
from tools.set_repository import repository_url

PARTS = (
    "foundations", "sketching", "matrices", "optimization", "bilevel", "bandits", "inference", "representation",
    "learning_rules", "training", "adapters", "compression", "decoding", "applications", "multimodal",
)  # fmt: skip
TEMPLATE = Path(__file__).parent / "template"


def main() -> None:
    """Make the files, then execute the notebook."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("slug", help="lower case, words joined by _")
    chosen = parser.parse_args()
    if not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", chosen.slug):
        parser.error(f"SLUG must be lower-case words joined by _, got {chosen.slug!r}")
    part, slug, root = chosen.part, chosen.slug, nbs.ROOT
    files = {
        root / "algokit" / part / f"{slug}.py": "module.py",
        root / "tests" / part / f"test_{slug}.py": "test.py",
        root / "benchmarks" / part / f"{slug}.py": "race.py",
    }
    notebook = root / "notebooks" / part / f"{slug}.ipynb"
    for path in (*files, notebook):
        if path.exists():
            parser.error(f"{path.relative_to(root)} exists: nothing was changed")
    _make_part(part, slug)
    for path, template in files.items():
        _write(path, _fill(template, part, slug))
    nb = jupytext.reads(_fill("chapter.py", part, slug), fmt="py:percent")
    nb.metadata["algokit"]["papers"] = _papers(part, slug)
    _write(notebook, nbs.dump(nb))
    _add_to_toc(part, slug)
    _add_to_api(part, slug)
    outcome = execute(notebook)
    if outcome.error:
        raise SystemExit(outcome.error)
    print("\n".join(str(p.relative_to(root)) for p in (notebook, *files)))
    print("Now read book/writing_a_chapter.md, and fill in the paper's metadata.")


def _papers(part: str, slug: str) -> list[dict[str, Any]]:
    """The chapter's papers as book/papers.csv has them; a line to be filled in where it has none."""
    path = nbs.ROOT / "book" / "papers.csv"
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        columns, rows = list(reader.fieldnames or ()), list(reader)
    mine = [row for row in rows if (row["part"], row["slug"]) == (part, slug)]
    if not mine and part != "foundations":  # chapters there are our own
        mine = [dict.fromkeys(columns, "") | {"part": part, "slug": slug, "title": "Title of the paper"}]
        with path.open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, columns, lineterminator="\n").writerow(mine[0])
    known = ("title", "authors", "year", "venue", "arxiv")
    papers = [{key: row.get(key) or None for key in known} | {"code": None, "code_license": None} for row in mine]
    for paper in papers:
        paper["year"] = int(paper["year"]) if paper["year"] else None
    return papers


def _title(name: str) -> str:
    return name.replace("_", " ").capitalize()


def _fill(template: str, part: str, slug: str) -> str:
    text = (TEMPLATE / template).read_text()
    values = {"PART_TITLE": _title(part), "PART": part, "SLUG": slug, "TITLE": _title(slug), "URL": repository_url()}
    for key, value in values.items():
        text = text.replace(f"__{key}__", value)
    return text


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def _make_part(part: str, slug: str) -> None:
    """The rooms of a new part: package, page, contract of the architecture."""
    package = nbs.ROOT / "algokit" / part / "__init__.py"
    if not package.exists():
        _write(
            package,
            f'"""{_title(part)}."""\n\nfrom algokit._lazy import lazy_submodules\n\n'
            "__getattr__, __dir__, __all__ = lazy_submodules(__name__, __path__)\n",
        )
        settings = nbs.ROOT / "pyproject.toml"
        text = settings.read_text()
        for key in ("modules", "forbidden_modules"):
            text = re.sub(rf'(?m)^({key} = \["algokit\.[^\]]*)\]', rf'\1, "algokit.{part}"]', text)
        settings.write_text(text)
    page = nbs.ROOT / "book" / "parts" / f"{part}.md"
    if not page.exists():
        _write(page, _fill("part.md", part, slug))


def _add_to_toc(part: str, slug: str) -> None:
    """A line under the part, in the order of PARTS where the part is new."""
    path = nbs.ROOT / "_toc.yml"
    lines = path.read_text().splitlines()
    entry = f"      - file: notebooks/{part}/{slug}"
    about = f"      - file: book/parts/{part}"
    if about in lines:
        at = lines.index(about) + 1
        while at < len(lines) and lines[at].startswith("      "):
            at += 1
        lines.insert(at, entry)
    else:
        later = [f"      - file: book/parts/{p}" for p in PARTS[PARTS.index(part) + 1 :]] + [
            "      - file: book/ledger"
        ]
        at = min(lines.index(line) for line in later if line in lines) - 2
        lines[at:at] = [
            f"  - caption: {_title(part)}", "    chapters:", about, "        title: About this part", entry,
        ]  # fmt: skip
    path.write_text("\n".join(lines) + "\n")


def _add_to_api(part: str, slug: str) -> None:
    page = nbs.ROOT / "book" / "api" / f"{part}.md"
    if not page.exists():
        _write(page, f"# {_title(part)}\n\nThe part is introduced in [](/book/parts/{part}.md).\n")
        toc = nbs.ROOT / "_toc.yml"
        toc.write_text(toc.read_text().replace(
            "          - file: book/api/core\n", f"          - file: book/api/core\n          - file: book/api/{part}\n"
        ))  # fmt: skip
    page.write_text(page.read_text() + f"\n## {_title(slug)}\n```{{api-of}} algokit.{part}.{slug}\n```\n")


if __name__ == "__main__":
    main()
