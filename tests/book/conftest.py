"""The built site, served on this machine, and one browser for all tests of it."""

from __future__ import annotations

import functools
import os
import shutil
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NoReturn

import pytest

SITE = Path(__file__).parents[2] / "_build" / "html"


def missing(what: str) -> NoReturn:
    """Skip on a reader's machine; fail in CI, where nothing may be missing."""
    if os.environ.get("CI"):
        pytest.fail(what)
    pytest.skip(what)


@pytest.fixture(scope="session")
def site_url() -> Iterator[str]:
    """Address of the site, with a slash at its end."""
    if not SITE.exists():
        missing("the site is not built: run `make book`")
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_QuietHandler, directory=str(SITE)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()


@pytest.fixture(scope="session")
def browser():  # type: ignore[no-untyped-def]  # Playwright may be absent
    """A headless Chromium of the system: `CHROMIUM` in the environment, or the first one on the path."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="install the extra 'test' for the tests of the site")
    names = ("chromium", "chromium-browser", "google-chrome")
    path = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    if path is None:
        missing("no Chromium found: install it, or set CHROMIUM to its path")
    flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=flags)
        yield browser
        browser.close()


class _QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass
