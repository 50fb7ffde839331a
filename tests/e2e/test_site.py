"""The documentation as a site: strictly built, loads nothing from elsewhere, can be searched."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.browser import find_browser, run_browser

ROOT = Path(__file__).resolve().parents[2]
LOADED = re.compile(
    r"<(?:script|link|img|iframe|source|object)\b[^>]*?\b(?:src|href|data)=\"(\S+?)\""
)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return folder


def test_every_page_is_there_and_loads_nothing_from_elsewhere(site: Path) -> None:
    pages = sorted(site.rglob("*.html"))
    written = {path.relative_to(ROOT / "docs").with_suffix(".html") for path in
               (ROOT / "docs").rglob("*.md")}  # fmt: skip
    assert written <= {page.relative_to(site) for page in pages}
    foreign = {
        f"{page.name}: {address}"
        for page in pages
        for address in LOADED.findall(page.read_text(encoding="utf-8"))
        if "//" in address and not address.startswith("data:")
    }
    assert foreign == set()
    # What a page links to outside docs/ is shown on a page of its own.
    config = (site / "files" / "conf" / "annotate" / "demo.yaml.html").read_text(encoding="utf-8")
    assert "warehouse: ../../warehouse/demo" in re.sub("<[^>]+>", "", config)
    notebook = (site / "files" / "notebooks" / "first_look.ipynb.html").read_text(encoding="utf-8")
    assert "First look at an annotation</h1>" in re.sub("<a .*?</a>", "", notebook)
    assert "cell_type" not in notebook


def test_pages_opened_as_files_are_quiet_and_searchable(site: Path, tmp_path: Path) -> None:
    program = find_browser()
    if program is None:
        pytest.skip("no Chromium: make setup-browser, or name its program in CDR_BROWSER")
    with run_browser(program, tmp_path) as browser:
        browser.look(width=1200)
        browser.open(site / "index.html")
        assert browser.complaints() == []
        browser.evaluate(
            "const field = document.querySelector('.md-search__input');"
            "field.focus(); field.value = 'outside_vocabulary';"
            "field.dispatchEvent(new KeyboardEvent('keyup', {bubbles: true}))"
        )
        found = browser.evaluate(
            "new Promise(done => { const end = Date.now() + 20000; (function look() {"
            "const links = [...document.querySelectorAll('.md-search-result__link')];"
            "if (links.length || Date.now() > end) done(links.map(link => link.href));"
            "else setTimeout(look, 200) })() })"
        )
        assert any("reference/errors.html" in link for link in found), found
        assert [url for url in browser.requests() if not url.startswith(("file:", "data:"))] == []
