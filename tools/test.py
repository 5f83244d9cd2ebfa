"""Everything that `make test` checks, one step after the other, and one summary at the end.

    python -m tools.test [STEP ...]

A step that fails does not stop the others. Steps: lint, format, types, architecture, package, bounds, notebooks, site.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from typing import NamedTuple

from tools.notebooks import ROOT

JAX_CACHE = {  # what one process compiled, the others load
    "JAX_COMPILATION_CACHE_DIR": str(ROOT / "_build" / "jax-cache"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
}
PYTEST = (sys.executable, "-m", "pytest", "-q", "-n", "auto")


class Step(NamedTuple):
    """One command."""

    name: str
    command: tuple[str, ...]
    environment: tuple[tuple[str, str], ...] = ()


STEPS = (
    Step("lint", (sys.executable, "-m", "ruff", "check", ".")),
    Step("format", (sys.executable, "-m", "ruff", "format", "--check", ".")),
    Step("types", (sys.executable, "-m", "mypy")),
    Step("architecture", (os.path.join(os.path.dirname(sys.executable), "lint-imports"),)),
    Step("package", (*PYTEST, "--dist", "loadgroup", "--ignore=tests/book/test_site.py")),
    Step(
        "bounds",  # every index of every kernel checked
        (
            *PYTEST,
            "-m",
            "not slow and not network",
            "--ignore=tests/book",
            "--ignore=tests/nn",
            "tests",
            "-o",
            "addopts=--import-mode=importlib",
        ),
        (("NUMBA_BOUNDSCHECK", "1"), ("NUMBA_CACHE_DIR", str(ROOT / "_build" / "numba-boundscheck"))),
    ),
    Step(
        "notebooks",  # every stored output is what the code gives
        (*PYTEST, "--nbval", "--nbval-current-env", "--dist", "loadfile", "-o", "addopts=-ra", "notebooks"),
    ),
    Step("site", (*PYTEST, "--dist", "load", "tests/book/test_site.py")),
)


def main() -> int:
    """Run the steps; 0 when all passed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("steps", nargs="*", choices=[[], *(s.name for s in STEPS)])
    wanted = parser.parse_args().steps
    rows, passed, failed, skipped = [], 0, 0, 0
    for step in STEPS:
        if wanted and step.name not in wanted:
            continue
        print(f"\n=== {step.name}", flush=True)
        ok, seconds, tail = _run(step)
        good, bad, left = (_count(tail, w) for w in ("passed", "failed|error|errors", "skipped"))
        if not good + bad:  # not a test runner: the step is one check
            good, bad = int(ok), int(not ok)
        passed, failed, skipped = passed + good, failed + max(bad, int(not ok)), skipped + left
        rows.append((step.name, "passed" if ok else "FAILED", seconds, tail.strip().splitlines()[-1:] or [""]))
    print("\n=== summary")
    for name, verdict, seconds, last in rows:
        print(f"{name:13s} {verdict:7s} {seconds:6.1f} s   {re.sub(r'=+', '', last[0]).strip()[:90]}")
    print(f"{passed} passed, {failed} failed, {skipped} skipped")
    return int(failed > 0)


def _run(step: Step) -> tuple[bool, float, str]:
    """Whether the command succeeded, its seconds, and the end of what it printed (also shown as it comes)."""
    start = time.perf_counter()
    process = subprocess.Popen(
        step.command,
        cwd=ROOT,
        env={**JAX_CACHE, **os.environ, **dict(step.environment)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        print(line, end="", flush=True)
        lines.append(line)
    return process.wait() == 0, time.perf_counter() - start, "".join(lines[-3:])


def _count(text: str, words: str) -> int:
    return sum(int(n) for n in re.findall(rf"(\d+) (?:{words})\b", text))


if __name__ == "__main__":
    sys.exit(main())
