"""What the tools and tests need to know about the book's notebooks: where they are, what they hold, what varies."""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = ROOT / "notebooks"
CLAIM = "application/vnd.algokit.claim+json"
IGNORED = "nbval-ignore-output"


def chapters() -> list[Path]:
    """Every chapter, in a stable order."""
    return sorted(p for p in NOTEBOOKS.glob("*/*.ipynb") if not p.name.startswith("."))


def read(path: Path) -> Any:
    """A notebook as nbformat reads it."""
    return nbformat.read(path, as_version=4)


def dump(nb: Any) -> str:
    """A notebook as the text that is committed."""
    return nbformat.writes(nb, version=4) + "\n"


def tags(cell: Any) -> list[str]:
    """The tags of a cell."""
    return list(cell.metadata.get("tags", []))


def code_cells(nb: Any) -> Iterator[Any]:
    """The code cells that hold code."""
    return (c for c in nb.cells if c.cell_type == "code" and c.source.strip())


def clean(nb: Any, path: Path) -> None:
    """Remove what differs from run to run and from machine to machine, and renumber cells and ids, in place."""
    if "algokit" not in nb.metadata:
        raise SystemExit(f"{path}: the notebook has no 'algokit' metadata; see book/writing_a_chapter.md")
    nb.metadata = nbformat.from_dict(
        {
            "algokit": nb.metadata["algokit"],
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        }
    )
    nb.nbformat_minor = 5
    for i, cell in enumerate(nb.cells):
        cell["id"] = f"{path.stem.replace('_', '-')[:40]}-{i:03d}"
        for key in [k for k in cell.metadata if k not in ("tags", "mystnb")]:
            del cell.metadata[key]
    for count, cell in enumerate((c for c in nb.cells if c.cell_type == "code"), start=1):
        cell.execution_count = count
        cell.outputs = _joined(cell.outputs)
        for output in cell.outputs:
            if output.output_type == "execute_result":
                output.execution_count = count
            output.get("metadata", {}).pop("needs_background", None)


def _joined(outputs: list[Any]) -> list[Any]:
    """Outputs with neighbouring pieces of one stream put together: where a kernel cuts them is a matter of timing."""
    joined: list[Any] = []
    for output in outputs:
        last = joined[-1] if joined else None
        if last is not None and output.output_type == "stream" and last.get("name") == output.name:
            last.text += output.text
        else:
            joined.append(output)
    return joined


def fingerprint(nb: Any) -> str:
    """Hash of what a chapter's outputs come from: its code cells, its algokit module, and what that shares in its part.

    Comments, formatting and docstrings of the modules do not count.
    """
    digest = hashlib.sha256()
    for cell in code_cells(nb):
        digest.update(cell.source.encode() + b"\0")
    about = nb.metadata["algokit"]
    for module in _with_shared(ROOT / "algokit" / about["part"] / f"{about['slug']}.py"):
        digest.update(_code_of(module).encode())
    return digest.hexdigest()[:16]


def _with_shared(module: Path) -> list[Path]:
    """The module and the modules of its part that it imports, directly or not, in the order in which they are met."""
    found: list[Path] = []
    ahead = [module] if module.exists() else []
    while ahead:
        path = ahead.pop(0)
        found.append(path)
        part = f"algokit.{module.parent.name}"
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(part):
                source = node.module or ""
                names = [source.removeprefix(part + ".")] if source != part else [a.name for a in node.names]
                shared = (path.with_name(f"{name}.py") for name in names)
                ahead += [p for p in shared if p.exists() and p not in found + ahead]
    return found


def _code_of(module: Path) -> str:
    tree = ast.parse(module.read_text())
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
    return ast.dump(tree)


def claims_of(nb: Any) -> list[dict[str, Any]]:
    """Every claim that the notebook's outputs hold."""
    return [dict(o.data[CLAIM]) for c in code_cells(nb) for o in c.outputs if "data" in o and CLAIM in o.data]


def volatile_outputs_only(old: Any, new: Any) -> bool:
    """Whether two executions differ in nothing but the outputs of cells tagged as varying."""

    def stable(nb: Any) -> list[Any]:
        return [
            (c.cell_type, c.source, c.metadata, None if c.cell_type != "code" or IGNORED in tags(c) else c.outputs)
            for c in nb.cells
        ]

    return old.metadata == new.metadata and stable(old) == stable(new)
