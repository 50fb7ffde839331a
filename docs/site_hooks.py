"""For mkdocs: pages that show the files of the repository which other pages link to.

A page says `../../conf/annotate/demo.yaml`, which leads somewhere in a checkout too. On the site
such a link leads to a page with that file's content; links to a folder, to a list of its files.
"""

from __future__ import annotations

import json
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

_LINK = re.compile(r"(?<=\]\()([^)\s:#]+)(?=[)#])")
_ROOT = Path(__file__).resolve().parents[1]
_LANGUAGES = {".yaml": "yaml", ".yml": "yaml", ".json": "json", ".sh": "bash", ".py": "python"}


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add a page for each file or folder outside docs/ that a page, or such a page, links to."""
    waiting = [
        target
        for file in files.documentation_pages()
        for target in _outside(file.content_string, f"docs/{file.src_uri}")
    ]
    while waiting:
        target = waiting.pop()
        if files.get_file_from_path(_page_of(target)) is None:
            text = _render(target)
            files.append(File.generated(config, _page_of(target), content=text))
            waiting += _outside(text, target)
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Lead links out of docs/ to the pages that stand for what they name."""
    here = page.file.src_uri
    origin = here.removeprefix("files/").removesuffix(".md")
    place = f"docs/{here}" if origin == here.removesuffix(".md") else origin

    def lead(match: re.Match[str]) -> str:
        target = _resolve(match[1], place)
        inside = target.removeprefix("docs/") if target.startswith("docs/") else _page_of(target)
        return posixpath.relpath(inside, posixpath.dirname(here))

    return _LINK.sub(lead, markdown)


def _outside(markdown: str, place: str) -> list[str]:
    targets = {_resolve(link, place) for link in _LINK.findall(markdown)}
    return sorted(target for target in targets if not target.startswith("docs/"))


def _resolve(link: str, place: str) -> str:
    """Give what a link in a file means, as a path from the repository's root."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(place), link))


def _page_of(target: str) -> str:
    return f"files/{target}.md"


def _render(target: str) -> str:
    path = _ROOT / target
    if path.is_dir():
        names = sorted(entry.name for entry in path.iterdir() if entry.is_file())
        return f"# `{target}/`\n\n" + "\n".join(f"- [{name}]({path.name}/{name})" for name in names)
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        return text
    if path.suffix == ".ipynb":
        return "\n\n".join(_render_cell(cell) for cell in json.loads(text)["cells"])
    return f"# `{target}`\n\n````{_LANGUAGES.get(path.suffix, 'text')}\n{text}````\n"


def _render_cell(cell: dict[str, Any]) -> str:
    """Write a notebook's cell; notebooks are kept without outputs."""
    source = "".join(cell["source"])
    return source if cell["cell_type"] == "markdown" else f"````python\n{source}\n````"
