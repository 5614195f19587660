"""What mkdocs calls while it builds the site: the start page of README.md, the whole navigation, and links to files outside docs/."""

import json
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
BOOKS = "examples/notebooks"
# Code, which stays as it is written, or a link to a file: its text, path and anchor.
LINK = re.compile(r"```.*?```|\[([^\]]+)\]\((?!\w+:|#)([^)\s#]+)(#[^)\s]*)?\)|`[^`\n]*`", re.S)
# In the code of a row of a table a pipe is escaped, which GitHub takes away and mkdocs needs not.
ROW, CODE = re.compile(r"^\|.*$", re.M), re.compile(r"`[^`\n]*`")
# Code that stays on one line: names of options and keys would be torn at their hyphens.
SHORT = re.compile(r"(?<!<pre>)<code>(?=(?:[^<\s]{1,32}|[^<]{1,24})</code>)")
ENTRY = re.compile(r"\[`?(?:treetune )?([^`\]]+)`?\]\(([\w-]+\.md)\)")


def on_config(config: Any) -> Any:
    """Add to the navigation the pages of commands, and those that it does not name."""
    index = DOCS / "reference/index.md"
    commands = ENTRY.findall(index.read_text(encoding="utf-8"))
    named = set(_pages(config.nav))
    more = sorted(path.name for path in DOCS.glob("*.md") if path.name not in named)
    config.nav += [{"More": more}] if more else []
    config.nav += [{"Reference": ["reference/index.md", *({label: f"reference/{name}"} for label, name in commands)]}]
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the start page, which is README.md unless docs/ has one."""
    if files.get_file_from_path("index.md") is None:
        files.append(File.generated(config, "index.md", content=(ROOT / "README.md").read_text(encoding="utf-8")))
    for path in sorted((ROOT / BOOKS).glob("*.ipynb")):
        files.append(File.generated(config, f"notebooks/{path.stem}.md", content=_notebook(path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """The text of a page, with links that lead within the site, into the repository if it has an address, or nowhere."""
    source = page.file.src_uri
    above = posixpath.dirname(f"docs/{source}") if not page.file.generated_by else BOOKS if source.startswith("notebooks/") else ""

    def replaced(match: re.Match[str]) -> str:
        text, target, anchor = match[1], match[2], match[3] or ""
        if target is None:
            return match[0]
        path = posixpath.normpath(posixpath.join(above, target))
        inside = _page(path)
        if inside is not None:
            return f"[{text}]({posixpath.relpath(inside, posixpath.dirname(source) or '.')}{anchor})"
        return f"[{text}]({config.repo_url.rstrip('/')}/blob/main/{path}{anchor})" if config.repo_url else _named(text, path)

    return LINK.sub(replaced, ROW.sub(lambda row: CODE.sub(lambda code: code[0].replace("\\|", "|"), row[0]), markdown))


def on_page_content(html: str, page: Any, config: Any, files: Any) -> str:
    """The page with a mark at code that is short."""
    return SHORT.sub('<code class="short">', html)


def _page(path: str) -> str | None:
    """The page of the site that a file of the repository is; None where it is none."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/") if (ROOT / path).is_file() else None
    return f"notebooks/{posixpath.basename(path)[:-6]}.md" if path.startswith(BOOKS) and path.endswith(".ipynb") else None


def _notebook(path: Path) -> str:
    """The cells of a notebook as a page: texts, code, and what it printed."""
    parts = []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        text = "".join(cell["source"])
        parts.append(f"```python\n{text}\n```" if cell["cell_type"] == "code" else text)
        said = "".join("".join(out.get("text") or out.get("data", {}).get("text/plain", "")) for out in cell.get("outputs", ()))
        parts += [f"```text\n{said.rstrip()}\n```"] if said.strip() else []
    return "\n\n".join(parts)


def _named(text: str, path: str) -> str:
    """The words of a link without one, and the path that it names if they do not say it."""
    words = text.strip("`").rstrip("/")
    return text if words == path else f"{text} (`{path}`)"


def _pages(entries: Any) -> list[str]:
    if isinstance(entries, str):
        return [entries]
    parts = entries.values() if isinstance(entries, dict) else entries
    return [page for part in parts for page in _pages(part)]
