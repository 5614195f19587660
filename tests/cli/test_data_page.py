"""What docs/data.md shows of `treetune preprocess` is what it prints."""

import re
from pathlib import Path

PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text().partition("## Inspecting data before training")[2]


def test_preprocess_prints_what_the_page_shows(tiny, tune, here, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)  # so that nothing is folded
    row, shown = (re.search(rf"```{kind}\n(.*?)```", PAGE, re.S)[1] for kind in ("json", "text"))
    Path("chats.jsonl").write_text(row)
    done = tune("preprocess", "--model", tiny.model, "--data", "chats.jsonl", "--debug", 1, "--sequence-len", 96)
    lines = [line.rstrip() for line in done.out.splitlines()]
    assert done.code == 0 and [line for line in shown.splitlines() if line not in lines] == []
    assert "\n".join(lines).partition("row 1\n")[2].strip() == shown.partition("row 1\n")[2].strip()
