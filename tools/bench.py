"""Run the races: all of them, those of one part, or one chapter's.

    python -m tools.bench [PART [SLUG]]

Each race is a program of its own, run in its own process; results go to ``benchmarks/results/``.
"""

from __future__ import annotations

import argparse
import subprocess
import sys

from tools.notebooks import ROOT


def main() -> int:
    """Run the chosen races one after the other; 1 if one failed or none matched."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", default="*")
    parser.add_argument("slug", nargs="?", default="*")
    chosen = parser.parse_args()
    races = sorted((ROOT / "benchmarks").glob(f"{chosen.part}/{chosen.slug}.py"))
    if not races:
        parser.error(f"no race matches benchmarks/{chosen.part}/{chosen.slug}.py")
    failed = []
    for number, path in enumerate(races, start=1):
        print(f"[{number}/{len(races)}] {path.relative_to(ROOT)}", flush=True)
        if subprocess.run([sys.executable, str(path)], cwd=ROOT, check=False).returncode:
            failed.append(path.stem)
    if failed:
        print(f"failed: {', '.join(failed)}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
