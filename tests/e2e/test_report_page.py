"""The report pages in a real browser: what is seen, and that nothing of it runs or goes out."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from cdr.report.annotation_page import render_annotation
from cdr.report.evaluation_page import render_evaluation
from tests.browser import Browser, find_browser, run_browser
from tests.report_data import SCRIPT, make_evaluation, make_report

# The relative luminance and contrast of WCAG 2, of every element that holds text of its own.
FAINTEST = """(() => {
  const channel = v => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const parse = c => c.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
  const behind = e => {
    for (; e; e = e.parentElement) {
      const c = parse(getComputedStyle(e).backgroundColor);
      if (c.length < 4 || c[3] > 0) return c;
    }
    return [255, 255, 255];
  };
  let worst = [99, ''];
  for (const e of document.querySelectorAll('body *')) {
    const own = [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim());
    if (!own || !e.getClientRects().length) continue;
    const style = getComputedStyle(e), svg = e instanceof SVGElement;
    const [a, b] = [light(parse(svg ? style.fill : style.color)), light(behind(e))];
    const contrast = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (contrast < worst[0]) worst = [contrast, e.outerHTML.slice(0, 80)];
  }
  return worst;
})()"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    program = find_browser()
    if program is None:
        pytest.skip("no Chromium here; install one (apt-get install chromium) or set CDR_BROWSER")
    with run_browser(program, tmp_path_factory.mktemp("browser")) as found:
        yield found


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The page of an annotate run and that of an evaluation."""
    folder = tmp_path_factory.mktemp("report")
    written = {
        "annotation": render_annotation(make_report()),
        "evaluation": render_evaluation(make_evaluation()),
    }
    for name, text in written.items():
        (folder / f"{name}.html").write_text(text, encoding="utf-8")
    return {name: folder / f"{name}.html" for name in written}


@pytest.fixture(params=["annotation", "evaluation"])
def page(pages: dict[str, Path], request: pytest.FixtureRequest) -> Path:
    """Each page in turn."""
    return pages[request.param]


def test_a_page_stays_alone(browser: Browser, page: Path) -> None:
    browser.look(width=1200)
    browser.open(page)
    assert browser.complaints() == []
    assert [url for url in browser.requests() if not url.startswith("data:")] == [page.as_uri()]
    ids = browser.evaluate("[...document.querySelectorAll('[id]')].map(e => e.id)")
    assert len(ids) == len(set(ids))


PLOTS = """[...document.querySelectorAll('svg')].map(s => [s.getAttribute('aria-label'),
  s.getBoundingClientRect().height, s.querySelectorAll('path').length])"""


def test_an_annotate_runs_page_shows_its_parts(browser: Browser, pages: dict[str, Path]) -> None:
    browser.look(width=1200)
    browser.open(pages["annotation"])
    seen = browser.evaluate("document.body.innerText")
    for text in ("Nothing looks wrong", "math_code", "Asked", "Least sure pairs", "300 tokens/s"):
        assert text in seen
    headings = browser.evaluate("[...document.querySelectorAll('h2')].map(h => h.innerText)")
    assert headings[1:] == [
        "What was asked, and what came",
        "Domains",
        "Pairs to read",
        "Least sure pairs",
        "What next",
    ]
    # Four plots for each of three domains, each drawn and described.
    plots = browser.evaluate(PLOTS)
    assert len(plots) == 12
    assert all(label and height > 80 and paths > 5 for label, height, paths in plots)


def test_an_evaluations_page_shows_its_parts(browser: Browser, pages: dict[str, Path]) -> None:
    browser.look(width=1200)
    browser.open(pages["evaluation"])
    seen = browser.evaluate("document.body.innerText")
    for text in ("Below chance", "may be length", "too_long", "McNemar", "Chat: surest losses"):
        assert text in seen
    headings = browser.evaluate("[...document.querySelectorAll('h2')].map(h => h.innerText)")
    assert headings[1:] == [
        "What was asked, and what came",
        "Rows side by side",
        "Differences from the first row",
        "plain ratio",
        "CDR <i>router</i>",
        "What next",
    ]
    # Three sections: rows against each other, and of each row accuracy, lengths, three of margins.
    plots = browser.evaluate(PLOTS)
    assert len(plots) == 3 + 2 * 5
    assert all(label and height > 60 and paths > 5 for label, height, paths in plots)


def test_a_script_in_a_completion_is_text(browser: Browser, page: Path) -> None:
    browser.look(width=1200)
    browser.open(page)
    browser.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert SCRIPT in browser.evaluate("document.body.innerText")
    titles = ("Annotation of toy by toy-reward", "Evaluation on bench")
    assert browser.evaluate("document.title") in titles
    assert browser.evaluate("document.querySelectorAll('script, img, iframe, object').length") == 0


def test_the_policy_refuses_what_a_page_might_ask_for(browser: Browser, page: Path) -> None:
    browser.open(page)
    refused = browser.evaluate(
        "new Promise(done => {"
        " addEventListener('securitypolicyviolation', e => done(e.effectiveDirective));"
        " const image = new Image(); image.src = 'https://example.com/pixel.png';"
        " document.body.append(image); })"
    )
    assert refused == "img-src"
    assert browser.evaluate("fetch('https://example.com/').then(() => 'sent', () => 'no')") == "no"


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_texts_stand_out_from_what_is_behind_them(browser: Browser, page: Path, dark: bool) -> None:
    browser.look(width=1200, dark=dark)
    browser.open(page)
    browser.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    contrast, where = browser.evaluate(FAINTEST)
    assert contrast >= 4.5, where


@pytest.mark.parametrize("width", [360, 1400])
def test_nothing_is_wider_than_the_window(browser: Browser, page: Path, width: int) -> None:
    browser.look(width=width)
    browser.open(page)
    browser.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    assert browser.evaluate("getComputedStyle(document.body).fontSize") == "16px"
