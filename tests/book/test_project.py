"""The project keeps its promises: README, light import, documented API, layout, nothing that ties it to a machine."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
from dataclasses import is_dataclass
from pathlib import Path

import pytest
import yaml
from numpydoc.validate import validate

import algokit
from tools.notebooks import ROOT, chapters
from tools.set_repository import repository_url

CORE = {"arrays", "checks", "claims", "data", "plotting", "races", "nn", "cluster"}
NUMPYDOC = {"GL01", "GL06", "GL07", "GL08", "SS01", "PR01", "PR02", "PR04", "PR10", "RT01", "YD01"}


def tracked() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return [ROOT / name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]


def texts() -> list[tuple[Path, str]]:
    known = {".md", ".py", ".yml", ".toml", ".txt", ".cff", ".ipynb", ".css", ".js", ".html", ".bib", ".json", ""}
    return [(p, p.read_text(errors="replace")) for p in tracked() if p.suffix in known]


def public_objects() -> list[str]:
    """Dotted names of all public functions, classes and methods."""
    names = []
    for module in pkgutil.walk_packages(algokit.__path__, "algokit."):
        if module.ispkg or any(part.startswith("_") for part in module.name.split(".")):
            continue
        loaded = importlib.import_module(module.name)
        for name in loaded.__all__:
            thing = getattr(loaded, name)
            if getattr(thing, "__module__", "") != module.name:
                continue  # a type alias or a constant
            if inspect.isfunction(thing) or inspect.isclass(thing):
                names.append(f"{module.name}.{name}")
            if inspect.isclass(thing):
                names += [
                    f"{module.name}.{name}.{m}"
                    for m, f in vars(thing).items()
                    if inspect.isfunction(f) and not m.startswith("_")
                ]
    return names


@pytest.mark.parametrize("name", public_objects())
def test_public_object_is_documented(name):
    owner = name.rpartition(".")[0]
    thing = (
        getattr(importlib.import_module(owner), name.rpartition(".")[2])
        if owner.count(".") < 3 and owner in sys.modules
        else None
    )
    record = inspect.isclass(thing) and (issubclass(thing, tuple) or is_dataclass(thing))
    wanted = NUMPYDOC - ({"PR01", "PR02"} if record else set())  # a record lists attributes, not parameters
    problems = [f"{code}: {text}" for code, text in validate(name)["errors"] if code in wanted]
    if record and "Attributes" not in (thing.__doc__ or ""):
        problems.append("a record needs a section Attributes")
    assert not problems, f"{name}: complete its numpydoc docstring: {problems}"


def test_undocumented_parameter_is_noticed():
    """The check above can fail."""

    def bare(x: int) -> int:
        """Do something."""
        return x

    globals()["_bare"] = bare  # numpydoc looks a name up
    assert "PR01" in [code for code, _ in validate(f"{__name__}._bare")["errors"]]


def test_public_functions_have_an_example_that_runs():
    missing = [
        name
        for name in public_objects()
        if name.count(".") == 3
        and name.split(".")[1] not in CORE
        and inspect.isfunction(
            thing := getattr(importlib.import_module(name.rpartition(".")[0]), name.rpartition(".")[2])
        )
        and ">>>" not in (thing.__doc__ or "")
    ]
    assert not missing, f"add a doctest example to {missing}"


def test_import_is_light():
    code = (
        "import numpy, sys, time; t = time.perf_counter(); import algokit; s = time.perf_counter() - t;"
        "heavy = {'jax', 'cupy', 'matplotlib', 'torch', 'numba', 'sklearn', 'scipy'} & set(sys.modules);"
        "print(s < 0.2, sorted(heavy))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out == "True []\n"


def test_no_part_needs_jax_cupy_or_matplotlib_to_be_imported():
    parts = [m.name for m in pkgutil.iter_modules(algokit.__path__) if m.ispkg and m.name not in ("nn", "cluster")]
    modules = [
        f"algokit.{p}.{m.name}"
        for p in parts
        for m in pkgutil.iter_modules(importlib.import_module(f"algokit.{p}").__path__)
    ] + ["algokit.plotting", "algokit.data", "algokit.races", "algokit.claims"]
    code = (
        f"import importlib, sys\nfor m in {modules}: importlib.import_module(m)\n"
        "print(sorted({'jax', 'cupy', 'matplotlib', 'torch', 'IPython'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_the_three_trees_have_the_same_rooms():
    for path in chapters():
        part, slug = path.parent.name, path.stem
        if part == "foundations":  # chapters of our own, over the core
            continue
        about = [ROOT / "algokit" / part / f"{slug}.py", ROOT / "tests" / part / f"test_{slug}.py"]
        assert all(p.exists() for p in about), f"{part}/{slug} lacks one of {about}"
    for module in pkgutil.iter_modules(algokit.__path__):
        assert module.ispkg or module.name in CORE or module.name.startswith("_"), f"{module.name} is not of the core"


def test_architecture_contract_names_every_part():
    contract = (ROOT / "pyproject.toml").read_text()
    for module in pkgutil.iter_modules(algokit.__path__):
        if module.ispkg and module.name not in ("nn", "cluster"):
            assert contract.count(f'"algokit.{module.name}"') >= 2, f"add algokit.{module.name} to both contracts"


def test_api_pages_list_every_public_module():
    pages = "".join(p.read_text() for p in (ROOT / "book" / "api").glob("*.md"))
    for module in pkgutil.walk_packages(algokit.__path__, "algokit."):
        if not module.ispkg and "._" not in module.name:
            assert f"{{api-of}} {module.name}\n" in pages, f"add an {{api-of}} {module.name} block under book/api/"


def test_nobody_is_sent_to_the_stranger_on_the_package_index():
    """The bare name on the package index is someone else's program."""
    bare = re.compile(r"pip3? install (?:-\S+ )*[\"']?algokit(?![-\w]*book)\b")
    found = [str(p) for p, text in texts() if p != Path(__file__) and bare.search(text)]
    assert not found


def test_nothing_names_a_machine():
    path = re.compile(r"(?<![\w.:/])/(?:home/\w|root/|work/\w|Users/\w)")
    found = [
        str(p)
        for p, text in texts()
        if p.parent.name != "book" and path.search(re.sub(r'"image/png": "[^"]*"', "", text))
    ]
    assert not found


def test_constraints_hold_versions_only():
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        assert line.startswith("#") or re.fullmatch(r"[A-Za-z0-9._-]+==[\w.+!-]+", line), line


def test_dependencies_have_no_upper_pins():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    loose = [*project["dependencies"], *project["optional-dependencies"]["neural"]]
    assert all("<" not in d and "==" not in d and "~=" not in d for d in loose)
    assert {re.split(r"[<>=\[]", d)[0] for d in project["dependencies"]} == {
        "numpy", "scipy", "numba", "array-api-compat", "scikit-learn", "threadpoolctl",
    }  # fmt: skip


class TestReadme:
    text = (ROOT / "README.md").read_text()
    shell = tuple(line for block in re.findall(r"```bash\n(.*?)```", text, re.S) for line in block.splitlines() if line)

    def test_its_two_commands_are_what_ci_runs(self):
        ci = (ROOT / ".ci" / "run").read_text()
        assert {"make book", "make test"} <= set(self.shell)
        assert "make book" in ci
        assert "make test" in ci

    def test_every_shell_command_is_known_here(self):
        """A new command in the README needs a test: `make` targets exist, the rest is run by test_install.py."""
        targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
        elsewhere = {f"git clone {repository_url()}", "cd papers-executed", "pip install ."}
        for line in self.shell:
            assert line in elsewhere or (line.startswith("make ") and line.split()[1] in targets), line

    def test_its_python_runs(self):
        for block in re.findall(r"```python\n(.*?)```", self.text, re.S):
            run = subprocess.run([sys.executable, "-c", block], capture_output=True, text=True, check=False)
            assert run.returncode == 0, run.stderr
            assert len(run.stdout.splitlines()) == 3

    def test_its_files_and_chapters_exist(self):
        for name in re.findall(r"\]\((?!https?:)([^)]+)\)", self.text) + re.findall(
            r"notebooks/\w+/\w+\.ipynb", self.text
        ):
            assert (ROOT / name).exists(), name


def test_help_names_every_target():
    makefile = (ROOT / "Makefile").read_text()
    out = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for target in re.findall(r"^([a-z-]+):.*##", makefile, re.M):
        assert f"make {target} " in out


def test_one_address_everywhere():
    old = yaml.safe_load((ROOT / "_config.yml").read_text())["repository"]["url"]
    owner = re.escape(re.sub(r"https://[^/]+/", "", old).split("/")[1])
    for path, text in texts():
        for found in re.findall(rf"https://github\.com/[\w.-]+/{owner}\b", text):
            assert found == old, f"{path} names {found}: run `make set-repository URL={old}`"


def test_gpu_tests_are_marked():
    for path in (ROOT / "tests").rglob("test_*.py"):
        text = path.read_text()
        for function in re.findall(r"((?:@.*\n)*)def (test_\w*gpu\w*)\(", text):
            if path.parent.name != "book" and "no_gpu" not in function[1] and "without_gpu" not in function[1]:
                assert "pytest.mark.gpu" in function[0], f"{path.name}: mark {function[1]} with pytest.mark.gpu"
