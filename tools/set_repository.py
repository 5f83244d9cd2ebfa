"""Write the repository's address everywhere it stands; the one place that decides is ``repository.url`` in _config.yml.

python -m tools.set_repository https://github.com/name/repository
"""

from __future__ import annotations

import argparse
import re
import subprocess

import yaml

from tools.notebooks import ROOT

SUFFIXES = {".md", ".yml", ".yaml", ".toml", ".ipynb", ".py", ".cff", ".html"}


def repository_url() -> str:
    """The address that _config.yml names."""
    return yaml.safe_load((ROOT / "_config.yml").read_text())["repository"]["url"]


def main() -> None:
    """Replace the old address by the new one in every file that git knows or would know."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", help="such as https://github.com/name/repository")
    new = parser.parse_args().url.rstrip("/").removesuffix(".git")
    if not re.fullmatch(r"https://[\w.-]+/[\w.-]+/[\w.-]+", new):
        parser.error(f"URL must look like https://github.com/name/repository, got {new!r}")
    old = repository_url()
    old_name, new_name = (re.sub(r"https://[^/]+/", "", u) for u in (old, new))  # owner/repository, in badge links
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split("\n")
    changed = []
    for path in (ROOT / name for name in listed if name):
        if path.suffix not in SUFFIXES or not path.is_file():
            continue
        text = path.read_text()
        fresh = text.replace(old, new).replace(f"/{old_name}/", f"/{new_name}/")
        if fresh != text:
            path.write_text(fresh)
            changed.append(path)
    _renew_fingerprints(changed)
    print(f"{old} -> {new} in {len(changed)} file(s)")


def _renew_fingerprints(changed: list) -> None:
    """The address in a set-up cell is part of the code that a fingerprint covers, and changes no output."""
    from tools import notebooks as nbs

    for path in changed:
        if path.suffix == ".ipynb":
            nb = nbs.read(path)
            nb.metadata["algokit"]["fingerprint"] = nbs.fingerprint(nb)
            path.write_text(nbs.dump(nb))


if __name__ == "__main__":
    main()
