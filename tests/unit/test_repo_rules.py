"""What no file of the repository may hold, and links of its pages that must lead somewhere."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
THIS_FILE = Path(__file__).resolve().relative_to(ROOT).as_posix()
# Sampled completions and other data may say anything; these are what people write.
WRITTEN = {
    *(".py", ".md", ".yaml", ".yml", ".toml", ".cfg", ".conf", ".sh", ".sql", ".txt", ".jinja"),
    *(".ipynb", ".xml", ".properties", ""),
}

RULES = {
    "a path of one machine": re.compile(
        r"(?<![\w.}$~*/-])/(?:work|root|home/\w+|Users/\w+)(?:/|\b(?![\w:-]))"
    ),
    "an address of a package registry": re.compile(
        r"(?i)https?://[^\s\"')>]*\b(?:pypi|pythonhosted|maven|npmjs|conda|artifactory|nexus"
        r"|mirrors?|registry|index)\b"
        r"|--(?:extra-)?index-url|\b(?:PIP|UV)_(?:EXTRA_|DEFAULT_)?INDEX(?:_URL)?\b"
    ),
    "a note to self": re.compile(r"\b(?:TODO|FIXME|XXX|HACK)\b"),
    "a secret": re.compile(r"\b(?:hf_[A-Za-z0-9]{30,}|AKIA[0-9A-Z]{16}|ghp_[A-Za-z0-9]{30,})\b"),
}


def written_files() -> list[str]:
    """Paths of everything that git tracks or would track, as far as people write it."""
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
        text=True,
    ).stdout
    paths = sorted({name for name in listing.split("\0") if name})
    return [p for p in paths if Path(p).suffix in WRITTEN and (ROOT / p).is_file()]


def findings(text: str, rule: str) -> list[str]:
    lines = text.splitlines()
    return [f"{n}: {line.strip()}" for n, line in enumerate(lines, 1) if RULES[rule].search(line)]


@pytest.mark.parametrize("rule", RULES)
def test_no_file_holds(rule: str) -> None:
    found = [
        f"{name}:{finding}"
        for name in written_files()
        if name != THIS_FILE
        for finding in findings((ROOT / name).read_text(encoding="utf-8"), rule)
    ]
    assert found == [], f"{rule} in the repository"


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        ("a path of one machine", "see /work/data for it"),
        ("a path of one machine", 'cache = "/home/someone/.cache"'),
        ("a path of one machine", "cd /root"),
        ("an address of a package registry", "from https://pypi.example.org/simple"),
        ("an address of a package registry", "http://artifactory.example.org/x"),
        ("an address of a package registry", "pip install --index-url x"),
        ("an address of a package registry", "export UV_INDEX_URL=x"),
        ("a note to self", "# TODO: later"),
        ("a secret", "token = 'hf_" + "a" * 34 + "'"),
    ],
)
def test_rule_finds_it(rule: str, text: str) -> None:
    assert findings(f"fine\n{text}", rule) == [f"2: {text}"]


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        ("a path of one machine", "~/work/x, s3://bucket/work/x, ./home/x, $HOME/work, /workspace"),
        (
            "an address of a package registry",
            "https://arxiv.org/abs/2411.02481 and package registries",
        ),
        ("a note to self", "todos are kept elsewhere; hackathon"),
        ("a secret", "hf_overrides"),
    ],
)
def test_rule_leaves_it_alone(rule: str, text: str) -> None:
    assert findings(text, rule) == []


LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")


def test_relative_links_of_pages_lead_to_files() -> None:
    pages = [name for name in written_files() if name.endswith(".md")]
    assert "README.md" in pages
    dead = [
        f"{page}: {target}"
        for page in pages
        for target in LINK.findall((ROOT / page).read_text(encoding="utf-8"))
        if "://" not in target
        and not target.startswith("#")
        and not (ROOT / page).parent.joinpath(target.split("#")[0]).exists()
    ]
    assert dead == []


def test_rules_are_applied_to_something() -> None:
    assert {"cdr/config.py", "pyproject.toml", "Makefile"} <= set(written_files())
