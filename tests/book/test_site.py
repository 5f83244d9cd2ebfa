"""The built site, as a reader meets it: every page in a browser, in light and dark, on a desk and on a phone."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit

import pytest

from .conftest import SITE

bs4 = pytest.importorskip("bs4", reason="install the extra 'test' for the tests of the site")
axe = pytest.importorskip(
    "axe_playwright_python.sync_playwright", reason="install the extra 'test' for the tests of the site"
)

DESK, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
FILES = sorted(path.relative_to(SITE).as_posix() for path in SITE.rglob("*.html") if "_static" not in path.parts)
PAGES = [file for file in FILES if file != "index.html"]  # the root only sends the reader on
CHAPTERS = [file for file in PAGES if file.startswith("notebooks/")]


@dataclass
class Visit:
    """One page, open in the browser, with what went wrong while it loaded."""

    file: str
    tab: object
    errors: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)


# The tests that take `visit` run in the order below for each page; those that change the width come last.
@pytest.fixture(scope="module", params=PAGES or ["no page"])
def visit(request, browser, site_url):
    """Each page is opened once; all tests of it look at the same tab."""
    context = browser.new_context(viewport=DESK, color_scheme="light", reduced_motion="reduce")
    visit = Visit(request.param, context.new_page())
    visit.tab.on("console", lambda message: message.type == "error" and visit.errors.append(message.text))
    visit.tab.on("pageerror", lambda error: visit.errors.append(str(error)))
    visit.tab.on("request", lambda request: visit.requests.append(request.url))
    visit.tab.on("requestfailed", lambda request: visit.errors.append(f"failed: {request.url}"))
    visit.tab.on("response", lambda response: response.ok or visit.errors.append(f"{response.status}: {response.url}"))
    open_page(visit.tab, site_url + visit.file)
    yield visit
    context.close()


@pytest.fixture
def tab(browser, site_url):
    """A fresh tab for tests that click and type."""
    context = browser.new_context(viewport=DESK, color_scheme="light", reduced_motion="reduce")
    yield context.new_page()
    context.close()


def open_page(tab, url):
    tab.goto(url, wait_until="load")
    tab.evaluate("window.MathJax?.startup?.promise")


def test_loads_without_errors(visit):
    assert visit.errors == []


def test_asks_no_other_host(visit, site_url):
    assert [url for url in visit.requests if not url.startswith((site_url, "data:", "blob:"))] == []


def test_mathematics_is_typeset(visit):
    raw = visit.tab.evaluate("""() => [...document.querySelectorAll('.math')].map(node =>
        node.querySelector('mjx-container') ? '' : node.textContent).filter(text => /\\\\[([]/.test(text))""")
    assert raw == []
    assert visit.tab.locator("mjx-merror, mjx-container [data-mml-node='merror']").all_text_contents() == []


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_accessible(visit, theme):
    visit.tab.evaluate("theme => { document.documentElement.dataset.theme = theme }", theme)
    options = {"resultTypes": ["violations"], "preload": False}
    if theme == "dark":  # in which nothing differs but the colours
        options["runOnly"] = ["color-contrast"]
    results = axe.Axe().run(visit.tab, options=options)
    found = [
        (rule["id"], rule["help"], [node["html"][:160] for node in rule["nodes"][:4]])
        for rule in results.response["violations"]
        if rule["impact"] in ("serious", "critical")
    ]
    assert found == []


def test_one_search_box(visit):
    for size in (DESK, PHONE):
        visit.tab.set_viewport_size(size)
        boxes = visit.tab.locator(".search-button, .search-button-field, form.bd-search")
        assert sum(box.is_visible() for box in boxes.all()) == 1, f"at {size['width']} px"


def test_pictures_have_alternative_text(visit):
    pictures = visit.tab.locator("article img, .bd-search-container img")
    assert [picture.get_attribute("src") for picture in pictures.all() if not picture.get_attribute("alt")] == []


def test_no_sideways_scrolling_on_a_phone(visit):
    visit.tab.set_viewport_size(PHONE)
    visit.tab.evaluate("window.scrollTo(10000, 0)")
    assert visit.tab.evaluate("window.scrollX") == 0, visit.tab.evaluate("""() =>
        [...document.querySelectorAll('article *')].filter(node => node.getBoundingClientRect().right > innerWidth + 1)
        .slice(0, 5).map(node => node.outerHTML.slice(0, 120))""")


def test_wide_formulas_can_be_scrolled_to_their_beginning(visit):
    visit.tab.set_viewport_size(PHONE)
    cut = visit.tab.evaluate("""() => [...document.querySelectorAll('div.math mjx-math')].filter(formula =>
        formula.getBoundingClientRect().left < formula.closest('div.math').getBoundingClientRect().left - 1).length""")
    assert cut == 0


def test_search_finds_a_chapter(tab, site_url):
    if not CHAPTERS:
        pytest.skip("the site has no chapters yet")
    title = read(CHAPTERS[0]).find("h1").contents[0].strip()
    tab.goto(f"{site_url}search.html?q={title}")
    slug = Path(CHAPTERS[0]).stem
    tab.locator(f"#search-results a[href*='{slug}']").first.wait_for(timeout=5000)


def test_search_opens_from_the_keyboard(tab, site_url):
    tab.goto(site_url + "book/index.html")
    tab.keyboard.press("Control+k")
    tab.keyboard.type("notation")
    tab.keyboard.press("Enter")
    tab.wait_for_url("**/search.html?q=notation*")
    tab.locator("#search-results a[href*='notation']").first.wait_for(timeout=5000)


def test_tab_reaches_skip_link_then_search(tab, site_url):
    tab.goto(site_url + "book/index.html")
    tab.keyboard.press("Tab")
    assert tab.evaluate("document.activeElement.getAttribute('href')") == "#main-content"
    reached = []
    for _ in range(6):
        tab.keyboard.press("Tab")
        reached.append(tab.evaluate("document.activeElement.className"))
    assert any("search-button-field" in name for name in reached), reached


def test_skip_link_leads_into_main(tab, site_url):
    tab.goto(site_url + "book/index.html")
    tab.keyboard.press("Tab")
    tab.keyboard.press("Enter")
    tab.keyboard.press("Tab")
    assert tab.evaluate("document.getElementById('main-content').contains(document.activeElement)")


def test_dark_mode_switches_and_stays(tab, site_url):
    def brightness():
        return tab.evaluate(
            "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).slice(0, 3).reduce((a, b) => a + +b, 0)"
        )

    tab.goto(site_url + "book/index.html")
    assert brightness() > 600
    for _ in range(3):
        if tab.evaluate("document.documentElement.dataset.theme") != "dark":
            tab.locator(".theme-switch-button:visible").first.click()
    assert brightness() < 200
    tab.goto(site_url + "book/notation.html")
    assert brightness() < 200


def test_filter_of_all_papers(tab, site_url):
    tab.goto(site_url + "book/papers.html")
    tab.get_by_label("Show papers").fill("newman rankings")
    assert tab.locator(".paper:visible").count() == 1
    assert tab.get_by_role("status").text_content() == "1 paper"


@functools.cache
def read(file):
    return bs4.BeautifulSoup((SITE / file).read_text(encoding="utf-8"), "html.parser")


@functools.cache
def anchors(file):
    return {tag["id"] for tag in read(file).find_all(id=True)} | {
        tag["name"] for tag in read(file).find_all("a", attrs={"name": True})
    }


@pytest.mark.parametrize("file", FILES)
def test_links_lead_somewhere(file):
    broken = []
    for tag in read(file).find_all(["a", "img", "link", "script"]):
        target = tag.get("href") or tag.get("src")
        if not target or urlsplit(target).scheme in ("http", "https", "mailto", "data"):
            continue
        url = urlsplit(urljoin(f"/{file}", target))
        path, anchor = unquote(url.path).lstrip("/"), unquote(url.fragment)
        if not (SITE / path).is_file() or (anchor and path.endswith(".html") and anchor not in anchors(path)):
            broken.append(target)
    assert broken == []


@pytest.mark.parametrize("file", FILES)
def test_nothing_comes_from_another_host(file):
    sources = [tag.get("src") for tag in read(file).find_all(["script", "img", "iframe", "source"])]
    sources += [tag.get("href") for tag in read(file).find_all("link")]
    assert [source for source in sources if source and source.startswith(("http:", "https:", "//"))] == []
