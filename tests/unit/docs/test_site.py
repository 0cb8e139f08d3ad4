"""The site of docs/ is built without a warning, is up to date, and needs nothing from elsewhere."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from docs.generate import DOCS, EXAMPLES, PAGES, brought_up_to_date

ROOT = Path(__file__).parents[3]
FETCHED = re.compile(r"<(?:link|script|img|iframe|source)\b[^>]*?\b(?:href|src)=\"?((?:https?:)?//[^\">\s]+)")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    directory = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(directory)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    run = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert run.returncode == 0, run.stderr
    return directory


def test_it_is_built_with_every_page_and_the_sources_they_link_to(site):
    for page in DOCS.glob("*.md"):
        assert (site / page.with_suffix(".html").name).is_file()
    listing = (site / "source" / "afd_server" / "llm.py.html").read_text()
    assert "class" in listing
    assert "LocalWorkers" in listing
    assert not [*site.rglob("*.py"), *site.rglob("*.md")]


def test_its_pages_fetch_nothing_from_elsewhere(site):
    pages = list(site.rglob("*.html"))
    assert len(pages) > 20
    for page in pages:
        fetched = [url for url in FETCHED.findall(page.read_text()) if 'rel="canonical"' not in url]
        assert not fetched, page
    for style in site.rglob("*.css"):
        assert not re.search(r"url\([\"']?(?:https?:)?//|@import", style.read_text()), style


@pytest.mark.parametrize("page", PAGES)
def test_generated_parts_are_up_to_date(page):
    text = (DOCS / f"{page}.md").read_text(encoding="utf-8")
    assert "<!-- generated: " in text
    assert brought_up_to_date(text) == text, "run .venv/bin/python -m docs.generate, and commit what it writes"


def test_every_example_is_shown():
    page = (DOCS / "examples.md").read_text(encoding="utf-8")
    for path in EXAMPLES.iterdir():
        if path.suffix in (".py", ".sh"):
            assert f"<!-- generated: example:{path.name} -->" in page


def texts_of_the_code():
    """Every text and template in the code, with … for whatever is filled in."""
    for path in (ROOT / "afd_server").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                yield "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value.replace("%s", "…")


def test_troubleshooting_quotes_what_the_code_says():
    page = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    quoted = [row.group(1) for row in re.finditer(r"^\| `([^`]+)` \|", page, re.M)]
    assert len(quoted) > 15
    said = list(texts_of_the_code())
    for quote in quoted:
        pieces = [piece for piece in quote.split("…") if piece.strip()]
        pattern = re.compile(".*".join(map(re.escape, pieces)), re.S)
        assert any(pattern.search(text) for text in said), f"the code says nothing like {quote!r}"
