"""Every chapter keeps every rule, and every rule can be broken: a mutated copy is reported, with what to do."""

from __future__ import annotations

import copy
import functools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import pytest

from tools import check
from tools import notebooks as nbs

CHAPTERS = nbs.chapters()
SAMPLE = nbs.NOTEBOOKS / "optimization" / "bradley_terry.ipynb"  # the chapter that is damaged in copies


@pytest.mark.parametrize("rule", check.RULES, ids=lambda r: r.__name__)
@pytest.mark.parametrize("path", CHAPTERS, ids=lambda p: p.stem)
def test_chapter_keeps_the_rule(path: Path, rule: check.Rule) -> None:
    assert list(rule(nbs.read(path), path)) == []


def first(nb: Any, has: Callable[[Any], bool]) -> Any:
    return next(c for c in nbs.code_cells(nb) if has(c))


def shows_figure(cell: Any) -> bool:
    return any("data" in o and "image/png" in o.data for o in cell.outputs)


def has_claim(cell: Any) -> bool:
    return any("data" in o and nbs.CLAIM in o.data for o in cell.outputs)


def drop_metadata(nb: Any) -> None:
    del nb.metadata["algokit"]["promise"]


def drop_licence(nb: Any) -> None:
    del nb.metadata["algokit"]["papers"][0]["code_license"]


def edit_code(nb: Any) -> None:
    first(nb, has_claim).source += "\nx = 1"


def forget_to_run(nb: Any) -> None:
    first(nb, shows_figure).execution_count = None


def fail(nb: Any) -> None:
    first(nb, shows_figure).outputs.append(nbformat.v4.new_output("error", ename="E", evalue="no", traceback=[]))


def warn(nb: Any) -> None:
    first(nb, shows_figure).outputs.append(nbformat.v4.new_output("stream", name="stderr", text="Warning"))


def lose_a_row(nb: Any) -> None:
    first(nb, has_claim).outputs.clear()


def repeat_a_claim(nb: Any) -> None:
    again = copy.deepcopy(first(nb, has_claim))
    again["id"] = "again"
    nb.cells.append(again)


def time_something(nb: Any) -> None:
    cell = nbformat.v4.new_code_cell("def clock():\n    return time.perf_counter()")
    shown = nbformat.v4.new_code_cell(
        "print(clock())", outputs=[nbformat.v4.new_output("stream", name="stdout", text="1.234")], execution_count=1
    )
    nb.cells += [cell, shown]


def blind_a_figure(nb: Any) -> None:
    del first(nb, shows_figure).metadata["mystnb"]["image"]


def mute_a_figure(nb: Any) -> None:
    del first(nb, shows_figure).metadata["mystnb"]["figure"]


def lose_the_thumbnail(nb: Any) -> None:
    first(nb, lambda c: "thumbnail" in nbs.tags(c)).metadata["tags"].remove("thumbnail")


def install_a_stranger(nb: Any) -> None:
    cell = first(nb, lambda c: "setup" in nbs.tags(c))
    cell.source = cell.source.replace("algokit-book @ git+https://", "algokit @ git+ssh://")


def use_jax_without_its_extra(nb: Any) -> None:
    first(nb, lambda c: "setup" in nbs.tags(c)).source += "\nimport jax"


def name_a_path(nb: Any) -> None:
    nb.cells[2].source += " /home/someone/data.csv"


def stamp_times(nb: Any) -> None:
    first(nb, shows_figure).metadata["execution"] = {"iopub.execute_input": "2024-01-01"}


def shuffle_ids(nb: Any) -> None:
    nb.cells[0]["id"] = "abcdef"


def cite_the_unknown(nb: Any) -> None:
    nb.cells[2].source += " {cite:p}`nobody1900nothing`"


MUTATIONS = {
    drop_metadata: "lacks ['promise']",
    drop_licence: "lacks ['code_license']",
    edit_code: "outputs are from other code",
    forget_to_run: "not every cell was executed",
    fail: "stored output is an error",
    warn: "writes to stderr",
    lose_a_row: "stores 0 row(s)",
    repeat_a_claim: "is used 2 times",
    time_something: "without the tag",
    blind_a_figure: "no alt",
    mute_a_figure: "no caption",
    lose_the_thumbnail: "0 figures are tagged 'thumbnail'",
    install_a_stranger: "set-up cell must install from",
    use_jax_without_its_extra: "must try `import optax` (or jax)",
    name_a_path: "absolute path: '/home/someone/data.csv'",
    stamp_times: "execution times",
    shuffle_ids: "cell ids",
    cite_the_unknown: "nobody1900nothing",
}


@pytest.mark.parametrize("mutate", MUTATIONS, ids=lambda m: m.__name__)
def test_broken_rule_is_reported_with_what_to_do(mutate: Callable[[Any], None], tmp_path: Path) -> None:
    path = tmp_path / SAMPLE.parent.name / SAMPLE.name
    path.parent.mkdir()
    nb = nbs.read(SAMPLE)
    mutate(nb)
    path.write_text(nbs.dump(nb))
    assert any(MUTATIONS[mutate] in message for message in check.problems(path)), check.problems(path)


def test_chapter_outside_the_table_of_contents_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "optimization" / "not_there.ipynb"
    messages = list(check.it_is_in_the_table_of_contents(nbs.read(SAMPLE), path))
    assert len(messages) == 1
    assert "_toc.yml" in messages[0]


@pytest.mark.parametrize(
    ("source", "output", "verdict"),
    [("print(1 + 1)", "2\n", "1 passed"), ("print(1 + 1)", "3\n", "1 failed"), ("1 / 0", "", "1 failed")],
)
def test_strict_nbval_accepts_what_the_code_gives_and_nothing_else(source, output, verdict, tmp_path) -> None:
    """A changed output and a notebook that fails each make the notebooks' step fail."""
    stored = [nbformat.v4.new_output("stream", name="stdout", text=output)] if output else []
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source, outputs=stored, execution_count=1)])
    nb.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(nb, tmp_path / "tiny.ipynb")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "--nbval", "--nbval-current-env", "-p", "no:cacheprovider", "tiny.ipynb"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert verdict in run.stdout


def test_only_what_varies_may_change_without_a_rewrite() -> None:
    old, new = nbs.read(SAMPLE), nbs.read(SAMPLE)
    varying = first(new, lambda c: nbs.IGNORED in nbs.tags(c) and c.outputs)
    varying.outputs[0] = nbformat.v4.new_output("stream", name="stdout", text="other seconds")
    assert nbs.volatile_outputs_only(old, new)
    first(new, lambda c: has_claim(c) and nbs.IGNORED not in nbs.tags(c)).outputs.clear()
    assert not nbs.volatile_outputs_only(old, new)


def test_pieces_of_one_stream_are_joined() -> None:
    """Where a kernel cuts its output is a matter of timing, and must not make a notebook differ."""
    piece = functools.partial(nbformat.v4.new_output, "stream")
    pieces = [piece(name="stdout", text="a\n"), piece(name="stdout", text="b\n"), piece(name="stderr", text="c\n")]
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("x", outputs=pieces)], metadata={"algokit": {}})
    nbs.clean(nb, SAMPLE)
    assert [o.text for o in nb.cells[0].outputs] == ["a\nb\n", "c\n"]


def test_docstrings_and_comments_do_not_age_a_notebook(tmp_path, monkeypatch) -> None:
    nb = nbs.read(SAMPLE)
    about = nb.metadata["algokit"]
    module = tmp_path / "algokit" / about["part"] / f"{about['slug']}.py"
    module.parent.mkdir(parents=True)
    monkeypatch.setattr(nbs, "ROOT", tmp_path)
    prints = []
    for code in (
        '"""A."""\ndef f():\n    """B."""\n    return 1\n',
        '"""C."""\n# D\ndef f():\n    return 1\n',
        "def f():\n    return 2\n",
    ):
        module.write_text(code)
        prints.append(nbs.fingerprint(nb))
    assert prints[0] == prints[1] != prints[2]
