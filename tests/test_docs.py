"""The pages tell of what is there: paths, links, modules with their functions, and options."""

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("core", "ops", "models", "losses", "cli", "tests", "examples", "docs", "benchmarks")
PAGES = [*(ROOT / name for name in ("README.md", "AGENTS.md", "CONTRIBUTING.md")), *sorted((ROOT / "docs").glob("*.md"))]
FILES = ("py", "json", "jsonl", "md", "yaml", "html")
OF_USERS = ("rewards",)  # modules that the pages let users write
MODULES: dict[str, str] = {}  # name of a module -> the text of all modules of that name
for _path in (path for folder in FOLDERS[:5] for path in (ROOT / folder).rglob("*.py")):
    MODULES[_path.stem] = MODULES.get(_path.stem, "") + _path.read_text()


def prose(page: Path) -> str:
    """The text without its code blocks."""
    return re.sub(r"```.*?```", "", page.read_text(), flags=re.S)


def exists(path: str) -> bool:
    return (ROOT / path).exists() or (ROOT / f"{path}.py").exists()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_paths_exist(page):
    named = {text.partition("::")[0].partition(":")[0] for text in re.findall(r"`([^`\s]+)`", prose(page))}
    paths = {text for text in named if text.split("/")[0] in FOLDERS and "/" in text and not re.search(r"[*{<(]|\.\.\.", text)}
    assert sorted(path for path in paths if not exists(path)) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\((?!https?:)([^)#\s]+)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_functions_of_modules_exist(page):
    dotted = re.findall(r"`(\w+)\.([a-zA-Z_]\w*)(?:\(|`)", prose(page))
    known = [(module, name) for module, name in dotted if module in MODULES and module not in OF_USERS and name not in FILES]
    missing = [f"{module}.{name}" for module, name in known if not re.search(rf"\b{name}\b", MODULES[module])]
    assert missing == []


def test_every_extra_is_named_where_one_installs():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    table = (ROOT / "docs/install.md").read_text().partition("## Extras")[2].partition("## ")[0]
    assert sorted(name for name in extras if f"`{name}`" not in table) == []
