"""Cheap checks of the stored notebooks: that they belong to the code and keep the house rules.

    python -m tools.check [NOTEBOOK ...]

Prints one line per broken rule, with what to do, and exits with status 1 if there is any. Takes a second or two:
nothing is executed (``make test`` does that).
"""

from __future__ import annotations

import ast
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

from tools import notebooks as nbs
from tools.set_repository import repository_url

MAX_BYTES = 600_000
NEURAL = re.compile(r"(?m)^\s*(?:import|from) (?:jax|optax|algokit\.nn\.(?:models|training|generation|tiny_lm))\b")
METADATA = {"part", "slug", "promise", "papers", "api", "fingerprint"}
PAPER = {"title", "authors", "year", "venue", "arxiv", "code", "code_license"}

Rule = Callable[[Any, Path], Iterator[str]]


def metadata_is_complete(nb: Any, path: Path) -> Iterator[str]:
    """The chapter's card needs its metadata."""
    about = nb.metadata.get("algokit", {})
    if missing := METADATA - set(about):
        yield f"metadata 'algokit' lacks {sorted(missing)}: add them (see book/writing_a_chapter.md) and `make execute`"
        return
    if (about["part"], about["slug"]) != (path.parent.name, path.stem):
        yield f"metadata says {about['part']}/{about['slug']}, the file is {_name(path)}: make them equal"
    for paper in about["papers"]:
        if missing := PAPER - set(paper):
            yield f"paper {paper.get('title', '?')!r} lacks {sorted(missing)} in the metadata: add them"


def outputs_belong_to_the_code(nb: Any, path: Path) -> Iterator[str]:
    """Stored outputs come from this code."""
    if nb.metadata.get("algokit", {}).get("fingerprint") != nbs.fingerprint(nb):
        yield f"its outputs are from other code (cells or algokit module changed): run `make execute NB={_name(path)}`"


def it_ran_without_errors(nb: Any, path: Path) -> Iterator[str]:
    """Every code cell ran, in order, and none failed."""
    counts = [c.execution_count for c in nbs.code_cells(nb)]
    if None in counts or counts != sorted(counts):
        yield f"not every cell was executed, or not in order: run `make execute NB={_name(path)}`"
    for cell in nbs.code_cells(nb):
        for output in cell.outputs:
            if output.output_type == "error":
                yield f"a stored output is an error ({output.ename}: {output.evalue}): mend the cell and execute again"
            if output.output_type == "stream" and output.name == "stderr":
                yield f"a cell writes to stderr: {output.text.strip()[:80]!r}; mend the cause or silence it in the cell"


def it_is_in_the_table_of_contents(nb: Any, path: Path) -> Iterator[str]:
    """Only chapters in _toc.yml are in the book."""
    toc = yaml.safe_load((nbs.ROOT / "_toc.yml").read_text())
    entry = _name(path).removesuffix(".ipynb")
    if entry not in _files(toc):
        yield f"missing from _toc.yml: add `- file: {entry}` under its part"


def every_claim_has_a_row(nb: Any, path: Path) -> Iterator[str]:
    """Each call of claim() left its row, ids are unique and carry the slug."""
    for cell in nbs.code_cells(nb):
        calls = sum(
            isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "claim"
            for node in ast.walk(_parse(cell))
        )
        rows = sum("data" in o and nbs.CLAIM in o.data for o in cell.outputs)
        if calls > rows:
            yield f"a cell calls claim() {calls} time(s) but stores {rows} row(s): execute the notebook again"
    ids = [c["id"] for c in nbs.claims_of(nb)]
    for name, count in Counter(ids).items():
        if count > 1:
            yield f"claim id {name!r} is used {count} times: ids are unique"
        if not name.startswith(path.stem + "/"):
            yield f"claim id {name!r} must begin with {path.stem}/"


def timings_are_tagged(nb: Any, path: Path) -> Iterator[str]:
    """What varies from run to run is shown only in cells tagged for it."""
    timers = {"perf_counter", "perf_counter_ns", "process_time", "timeit", "copy_bandwidth", "matmul_rate", "machine"}
    for cell in nbs.code_cells(nb):
        tree = _parse(cell)
        used = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
        used |= {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
        if used & timers and cell.outputs and nbs.IGNORED not in nbs.tags(cell):
            yield (
                f"a cell shows what it timed ({', '.join(sorted(used & timers))}) without the tag {nbs.IGNORED!r}: "
                f"add the tag, or show a verdict instead: {cell.source.splitlines()[0][:60]!r}"
            )
        for node in ast.walk(tree):  # a function that times makes its callers timers
            if isinstance(node, ast.FunctionDef):
                inner = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
                inner |= {n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute)}
                if inner & timers:
                    timers.add(node.name)


def figures_say_what_they_show(nb: Any, path: Path) -> Iterator[str]:
    """Each figure has a caption and a text for those who cannot see it; one is the thumbnail."""
    thumbnails = 0
    for cell in nbs.code_cells(nb):
        if not any("data" in o and "image/png" in o.data for o in cell.outputs):
            continue
        thumbnails += "thumbnail" in nbs.tags(cell)
        shown = cell.metadata.get("mystnb", {})
        for key, kind in (("caption", "figure"), ("alt", "image")):
            if len(str(shown.get(kind, {}).get(key, ""))) < 20:
                yield f"a figure has no {key}: give its cell the metadata mystnb.{kind}.{key}: {cell.source[:50]!r}"
    if thumbnails != 1:
        yield f"{thumbnails} figures are tagged 'thumbnail': tag exactly one, near the top"


def set_up_installs_from_the_repository(nb: Any, path: Path) -> Iterator[str]:
    """The set-up cell installs this book's package from its address, and never a stranger's by its bare name."""
    cells = [c for c in nbs.code_cells(nb) if "setup" in nbs.tags(c)]
    if len(cells) != 1:
        yield f"{len(cells)} cells are tagged 'setup': exactly one is needed"
    elif f"@ git+{repository_url()}" not in cells[0].source:
        yield f"the set-up cell must install from {repository_url()}: run `make set-repository URL={repository_url()}`"
    elif NEURAL.search("\n".join(c.source for c in nbs.code_cells(nb))) and not (
        "algokit-book[neural] @" in cells[0].source and re.search(r"try:[^:]*import (?:optax|jax)\b", cells[0].source)
    ):
        yield "it uses JAX: the set-up cell must try `import optax` (or jax) and install algokit-book[neural]"


def nothing_ties_it_to_a_machine(nb: Any, path: Path) -> Iterator[str]:
    """No absolute path, no execution time, no widget state, stable ids, not too large."""
    text = path.read_text()
    outputs = "\n".join(str(o) for c in nbs.code_cells(nb) for o in c.outputs if "image/png" not in o.get("data", {}))
    for cell in nb.cells:
        outputs += "\n" + cell.source
    if found := re.search(r"(?<![\w.:/])/(?:home|root|Users|tmp|work|usr|opt|mnt)/[\w./-]+", outputs):
        yield f"it holds an absolute path: {found.group()!r}"
    if any("execution" in c.metadata for c in nb.cells) or "widgets" in nb.metadata:
        yield f"it holds execution times or widget state: run `make execute NB={_name(path)}`, which cleans them"
    if [c.get("id") for c in nb.cells] != [f"{path.stem.replace('_', '-')[:40]}-{i:03d}" for i in range(len(nb.cells))]:
        yield f"cell ids are not the stable ones: run `make execute NB={_name(path)}`"
    if len(text.encode()) > MAX_BYTES:
        yield f"it is {len(text.encode()) // 1000} kB, more than {MAX_BYTES // 1000}: use fewer or simpler figures"


def citations_are_known(nb: Any, path: Path) -> Iterator[str]:
    """Every key that is cited stands in book/references.bib."""
    known = set(re.findall(r"@\w+\{([^,\s]+)", (nbs.ROOT / "book" / "references.bib").read_text()))
    for cell in nb.cells:
        if cell.cell_type == "markdown":
            for keys in re.findall(r"\{cite(?::\w+)?\}`([^`]+)`", cell.source):
                for key in map(str.strip, keys.split(",")):
                    if key not in known:
                        yield f"citation {key!r} is not in book/references.bib: add the entry"


RULES: tuple[Rule, ...] = (
    metadata_is_complete,
    outputs_belong_to_the_code,
    it_ran_without_errors,
    it_is_in_the_table_of_contents,
    every_claim_has_a_row,
    timings_are_tagged,
    figures_say_what_they_show,
    set_up_installs_from_the_repository,
    nothing_ties_it_to_a_machine,
    citations_are_known,
)


def problems(path: Path) -> list[str]:
    """What is wrong with one notebook, each with what to do."""
    nb = nbs.read(path)
    found = list(metadata_is_complete(nb, path))
    if found:
        return found  # the other rules read the metadata
    return [message for rule in RULES for message in rule(nb, path)]


def main() -> int:
    """Check the notebooks named, or all; 1 if a rule is broken."""
    paths = [Path(p).resolve() for p in sys.argv[1:]] or nbs.chapters()
    found = [(path, message) for path in paths for message in problems(path)]
    for path, message in found:
        print(f"{_name(path)}: {message}")
    print(f"{len(paths)} notebooks checked, {len(found)} problem(s)")
    return int(bool(found))


def _name(path: Path) -> str:
    return str(path.relative_to(nbs.ROOT)) if path.is_relative_to(nbs.ROOT) else str(path)


def _parse(cell: Any) -> ast.Module:
    """The cell's syntax tree; lines with IPython's magics become empty."""
    return ast.parse(re.sub(r"(?m)^(\s*)[%!].*$", r"\1pass", cell.source))


def _files(toc: Any) -> set[str]:
    if isinstance(toc, dict):
        return ({toc["file"]} if "file" in toc else set()).union(*(_files(v) for v in toc.values()))
    return set().union(*(_files(v) for v in toc)) if isinstance(toc, list) else set()


if __name__ == "__main__":
    sys.exit(main())
