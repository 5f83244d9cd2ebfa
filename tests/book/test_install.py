"""The package and a notebook where nothing of ours is: an empty folder and a fresh environment, as in Colab."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tools.notebooks import NOTEBOOKS, ROOT
from tools.set_repository import repository_url

pytestmark = [pytest.mark.slow, pytest.mark.network, pytest.mark.xdist_group("install")]

COLAB = ("ipykernel", "nbclient", "numpy", "scipy", "numba", "matplotlib", "scikit-learn")


def run(*command: str | Path, cwd: Path | None = None) -> str:
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        [str(c) for c in command], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository that holds the files as they are now, committed or not."""
    here = tmp_path_factory.mktemp("clone") / "papers-executed"
    for name in run("git", "ls-files", "-co", "--exclude-standard", cwd=ROOT).splitlines():
        if (ROOT / name).is_file():
            (here / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, here / name)
    identity = ("-c", "user.name=test", "-c", "user.email=test@example.org")
    run("git", "init", "-q", cwd=here)
    run("git", "add", "-A", cwd=here)
    run("git", *identity, "commit", "-qm", "All", cwd=here)
    return here


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python of an environment that has what Colab has and nothing of ours."""
    home = tmp_path_factory.mktemp("fresh")
    run(sys.executable, "-m", "venv", home / "venv")
    python = home / "venv" / "bin" / "python"
    install = subprocess.run(
        [python, "-m", "pip", "install", "-q", "--disable-pip-version-check", *COLAB],
        capture_output=True,
        text=True,
        check=False,
    )
    if install.returncode:
        reason = f"the package index cannot be reached: {install.stderr[-300:]}"
        pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)
    return python


def versions(python: Path) -> dict[str, str]:
    listed = json.loads(run(python, "-m", "pip", "list", "--format", "json", "--disable-pip-version-check"))
    return {p["name"].lower(): p["version"] for p in listed}


def test_notebook_installs_its_package_and_runs(clone: Path, fresh: Path, tmp_path: Path) -> None:
    before = versions(fresh)
    assert "algokit-book" not in before
    text = (NOTEBOOKS / "optimization" / "bradley_terry.ipynb").read_text()
    assert f"git+{repository_url()}" in text
    (tmp_path / "chapter.ipynb").write_text(text.replace(f"git+{repository_url()}", f"git+file://localhost{clone}"))
    script = (
        "import nbformat; from nbclient import NotebookClient;"
        "nb = nbformat.read('chapter.ipynb', 4); NotebookClient(nb, timeout=600, kernel_name='python3').execute();"
        "nbformat.write(nb, 'done.ipynb')"
    )
    run(fresh, "-m", "ipykernel", "install", "--prefix", fresh.parent.parent, "--name", "python3")
    run(fresh, "-c", script, cwd=tmp_path)
    done = json.loads((tmp_path / "done.ipynb").read_text())
    claims = [o for c in done["cells"] for o in c.get("outputs", []) if "algokit.claim" in json.dumps(o)]
    assert len(claims) >= 5
    after = versions(fresh)
    assert after.pop("algokit-book")
    assert {k: after[k] for k in before} == before  # nothing was down- or upgraded
    assert set(after) - set(before) <= {"array-api-compat"}


def test_package_alone_imports_and_computes(clone: Path, fresh: Path, tmp_path: Path) -> None:
    """`pip install .`, as the README says, then a call from elsewhere; without JAX, CuPy or matplotlib in the way."""
    run(fresh, "-m", "pip", "install", "-q", "--disable-pip-version-check", ".", cwd=clone)
    code = (
        "import algokit, pathlib, numpy as np;"
        "from algokit.optimization.bradley_terry import bradley_terry;"
        "print(bradley_terry(np.array([[0, 3], [1, 0]])).strengths.round(3), 'site-packages' in algokit.__file__)"
    )
    assert run(fresh, "-c", code, cwd=tmp_path) == "[1.732 0.577] True\n"
    code = (
        "from algokit.nn.ngram import fit_ngram\n"
        "from algokit.nn.text import language_reference\n"
        "fit_ngram(language_reference().train)\n"
        "try:\n    import algokit.nn.tiny_lm\nexcept ModuleNotFoundError as error:\n    print(error)"
    )
    assert run(fresh, "-c", code, cwd=tmp_path) == (
        "this needs jax, which comes with the extra 'neural' of algokit-book: install algokit-book[neural]\n"
    )


def test_distributions_are_built_and_complete(clone: Path, tmp_path: Path) -> None:
    run(sys.executable, "-m", "build", "--outdir", tmp_path, cwd=clone)
    names = sorted(p.name for p in tmp_path.iterdir())
    assert [n.split("-")[0] for n in names] == ["algokit_book", "algokit_book"]
    wheel = next(p for p in tmp_path.iterdir() if p.suffix == ".whl")
    import zipfile

    inside = set(zipfile.ZipFile(wheel).namelist())
    assert {"algokit/py.typed", "algokit/nn/tiny_lm.npz", "algokit/optimization/bradley_terry.py"} <= inside
    assert not [n for n in inside if n.startswith(("tests", "tools", "book", "notebooks"))]


def test_scaffolded_chapter_in_a_new_part_passes_every_check(clone: Path, tmp_path: Path) -> None:
    """`make chapter` in a copy of the project, in a part that has no chapter yet; then the checks and the site."""
    here = tmp_path / "project"
    shutil.copytree(clone, here)

    def tool(*command: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", *command],
            cwd=here,
            env={**os.environ, "PYTHONPATH": str(here)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    part = next(p for p in ("multimodal", "bandits", "decoding") if not (ROOT / "algokit" / p).exists())
    tool("tools.chapter", part, "summation")
    tool("tools.check")
    tool("ruff", "check", ".")
    tool("ruff", "format", "--check", ".")
    tool("pytest", "-q", f"tests/{part}", f"algokit/{part}")
    tool("pytest", "-q", "tests/test_bad_input.py", "-k", "summation or declares")
    tool("pytest", "-q", "--nbval", "--nbval-current-env", "-o", "addopts=", f"notebooks/{part}/summation.ipynb")
    tool("pytest", "-q", "tests/book/test_project.py", "-k", "rooms or contract or api_pages or documented")
    run(Path(sys.executable).with_name("jupyter-book"), "build", ".", "-n", "-W", "--keep-going", "-q", cwd=here)
    assert (here / "_build" / "html" / "notebooks" / part / "summation.html").exists()
    again = subprocess.run(
        [sys.executable, "-m", "tools.chapter", part, "summation"], cwd=here, capture_output=True, check=False
    )
    assert again.returncode == 2
    tool("tools.set_repository", "https://git.example.org/someone/fork")
    tool("tools.check")
    assert "OWNER" not in (here / "README.md").read_text() + (here / "_config.yml").read_text()
