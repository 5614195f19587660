"""docs/ builds as a site without a warning; its pages load nothing from elsewhere and lead to nothing that is not there."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.more
pytest.importorskip("material", reason="mkdocs-material is not installed: pip install -e '.[docs]'")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr
    return folder


def test_every_page_is_there_and_in_the_navigation(site):
    pages = {path.relative_to(ROOT / "docs").with_suffix(".html").as_posix() for path in (ROOT / "docs").rglob("*.md")} | {"index.html"}
    start = (site / "index.html").read_text()
    assert [page for page in pages if not (site / page).is_file() or f'href="{page}"' not in start] == []


def test_pages_load_nothing_from_elsewhere(site):
    tags = [tag for page in site.rglob("*.html") for tag in re.findall(r"<(?:script|link|img|iframe)\b[^>]*>", page.read_text())]
    assert tags and [tag for tag in tags if re.search(r"(?:src|href)=[\"']?(?:https?:)?//", tag)] == []


def test_links_to_files_outside_are_words(site):
    said = (site / "memory.html").read_text()
    assert "benchmarks/RESULTS.md" in said and "../benchmarks" not in said
    assert 'href="training.html"' in (site / "index.html").read_text()


def test_code_in_tables_has_pipes_as_they_are_typed(site):
    assert "<code>'layers.(0|1).self_attn.(q|k)_proj'</code>" in (site / "training.html").read_text()


def test_names_of_options_stay_on_one_line(site):
    page = (site / "reference/sft.html").read_text()
    assert '<td><code class="short">--sequence-len</code></td>' in page and "<pre><code class" not in page


def test_notebooks_are_pages_with_what_they_printed(site):
    page, other = ((site / f"notebooks/{name}.html").read_text() for name in ("replace_a_function", "fine_tune"))
    assert 'href="../extending.html"' in page and "step 8:" in page and 'href="replace_a_function.html"' in other
    assert 'href="notebooks/fine_tune.html"' in (site / "python.html").read_text()
