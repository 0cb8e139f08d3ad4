"""What mkdocs does to the pages of docs/ besides: links that leave the folder stay within the site, pictures take its colours.

A page links to whatever it speaks of by the path that a code host and an editor follow, as in ../afd_server/llm.py. On the
site that file is a page of its own below source/: Markdown as it is, other text as a listing, a folder as a table of what is
in it; anything else is copied. So the site belongs to one state of the repository and needs no other host. Called by mkdocs
(mkdocs.yml); what does not live here: any text of a page.
"""

import ast
import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
BELOW = "source"  # where files that are not pages of docs/ are on the site
LINK = re.compile(r"(\]\()([^)#\s:]+)(#[^)\s]*)?(\))")
FENCE = re.compile(r"^(```|~~~).*?^\1", re.M | re.S)
LANGUAGES = {
    ".py": "python", ".h": "cpp", ".cpp": "cpp", ".sh": "bash", ".yaml": "yaml", ".toml": "toml", ".json": "json",
    ".csv": "text", "": "text",
}  # fmt: skip


def on_files(files, config):
    """Adds a page for every file of the repository that a page links to, and for what those link to in turn."""
    waiting = [file.src_uri for file in files.documentation_pages()]
    waiting += [uri for uri in _uris(config["nav"]) if uri.startswith(f"{BELOW}/")]
    seen = set()  # pages link to one another
    while waiting:
        uri = waiting.pop()
        if uri in seen:
            continue
        seen.add(uri)
        path = _path_of(uri)
        if files.get_file_from_path(uri) is None:
            if not path.exists():
                continue  # mkdocs itself tells of the link
            files.append(_file(uri, path, config))
        if path.is_dir():
            waiting += [_uri_of(child) for child in _children(path)]
        elif path.suffix == ".md":
            text = path.read_text(encoding="utf-8")
            waiting += [_uri_of(target) for target in _targets(path, text) if target.is_relative_to(ROOT)]
    return files


def on_page_markdown(markdown, page, config, files):
    """Points the links of a page to where their targets are on the site."""
    path = _path_of(page.file.src_uri)
    if path.suffix != ".md":
        return markdown
    here = posixpath.dirname(page.file.src_uri)

    def moved(match):
        target = _resolved(path, match[2])
        if not target.is_relative_to(ROOT):
            return match[0]
        return f"{match[1]}{posixpath.relpath(_uri_of(target), here or '.')}{match[3] or ''}{match[4]}"

    return _outside_fences(markdown, lambda text: LINK.sub(moved, text))


def on_page_content(html, page, config, files):
    """Puts the SVG pictures of docs/images into the page itself, where its light and dark colours reach them, and marks code of a
    single word or flag, which is not to be cut at its hyphens."""

    def inlined(match):
        picture = _resolved(_path_of(page.file.src_uri), f"images/{match[1]}")
        return f'<div class="picture">{picture.read_text(encoding="utf-8")}</div>'

    html = re.sub(r"<code>([^<\s]{1,40}|--[^<]{1,38})</code>", r'<code class="word">\1</code>', html)
    return re.sub(r'<p><img [^>]*src="images/([^"/]+\.svg)"[^>]*/?></p>', inlined, html)


# --- paths of the repository and of the site -----------------------------------------------------------------------


def _uri_of(path):
    """Where a file or folder of the repository is among mkdocs' source files."""
    within = path.relative_to(ROOT).as_posix()
    if path.is_dir():
        return f"{BELOW}/{within}/{'README' if (path / 'README.md').exists() else 'index'}.md"
    if path.suffix in LANGUAGES:
        return f"{BELOW}/{within}.md"
    return within.removeprefix("docs/") if within.startswith("docs/") else f"{BELOW}/{within}"


def _path_of(uri):
    """The other way: the file or folder that is shown at a place."""
    if not uri.startswith(f"{BELOW}/"):
        return ROOT / "docs" / uri
    path = ROOT / uri.removeprefix(f"{BELOW}/")
    if path.exists():
        return path
    return path.parent if path.name == "index.md" else path.with_suffix("")


def _resolved(page, link):
    return Path(posixpath.normpath(page.parent / link))


def _targets(page, markdown):
    return [_resolved(page, match[2]) for match in LINK.finditer(FENCE.sub("", markdown))]


def _outside_fences(markdown, change):
    """The text with `change` made to all but its blocks of code."""
    parts, at = [], 0
    for fence in FENCE.finditer(markdown):
        parts += [change(markdown[at : fence.start()]), fence[0]]
        at = fence.end()
    return "".join([*parts, change(markdown[at:])])


def _uris(nav):
    for entry in nav:
        for value in entry.values():
            yield from [value] if isinstance(value, str) else _uris(value)


# --- what is shown of a file that is no page -----------------------------------------------------------------------


def _file(uri, path, config):
    if path.is_dir():
        return File.generated(config, uri, content=_without_search(_listing_of(path)))
    if path.suffix in LANGUAGES:
        fence = f"~~~~~~~~{LANGUAGES[path.suffix]}\n{path.read_text(encoding='utf-8')}\n~~~~~~~~"
        title = path.relative_to(ROOT).as_posix()
        return File.generated(config, uri, content=_without_search(f"# {title}\n\n{fence}\n", title))
    return File.generated(config, uri, abs_src_path=str(path))


def _without_search(markdown, title=""):
    """Search is for the pages that explain."""
    return f"---\n{f'title: {title}' if title else ''}\nsearch:\n  exclude: true\n---\n\n{markdown}"


def _children(path):
    return sorted(child for child in path.iterdir() if not child.name.startswith((".", "__pycache__")))


def _listing_of(path):
    here = posixpath.dirname(_uri_of(path))
    rows = [
        f"| [`{child.name}`]({posixpath.relpath(_uri_of(child), here)}) | {_first_sentence(child)} |"
        for child in _children(path)
    ]
    return "\n".join([f"# {path.relative_to(ROOT).as_posix()}/\n", "| | |", "| --- | --- |", *rows, ""])


def _first_sentence(path):
    module = path / "__init__.py" if path.is_dir() else path
    if module.suffix != ".py" or not module.exists():
        return ""
    return (
        (ast.get_docstring(ast.parse(module.read_text(encoding="utf-8"))) or "")
        .split("\n")[0]
        .replace("|", "\\|")
    )
