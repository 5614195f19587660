"""The Python of docs/python.md runs as it stands, and docs/templates.md names the templates that there are."""

import re
from pathlib import Path

from treetune.core.data import chat_templates

ROOT = Path(__file__).parents[2]


def test_the_code_runs(tiny, here):
    Path("chats.jsonl").write_text(tiny.chat.read_text())
    code = "\n".join(re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "python.md").read_text(), re.S))
    names = {}
    exec(code.replace("MODEL", str(tiny.long)), names)
    assert int(names["state"].step) == 3 and names["metrics"]["grad_norm"] > 0 and names["result"].folder.name == "sums"
    assert all(
        (here / name / "adapter_model.safetensors").is_file()
        for name in ("untrained", "trained", "run/adapter", "watched/adapter", "sums/adapter")
    )
    assert [record["step"] for record in names["result"].history if "train/loss" in record] == [1, 2] and len(names["samples"].lens) == 2


def test_the_templates_are_those_of_the_package():
    text = re.search(r"<!-- names: begin -->(.*?)<!-- names: end -->", (ROOT / "docs" / "templates.md").read_text(), re.S)[1]
    assert set(re.findall(r"`(\w+)`", text.partition("`inst` takes")[0])) == set(chat_templates.builtin_names())


class Marked:
    """A tokenizer whose own tokens can be told from text."""

    special_tokens_map = {"bos_token": "BOS", "eos_token": "the tokenizer's EOS"}


TALK = [{"role": role, "content": text} for role, text in (("user", "Q1"), ("assistant", "A1"), ("user", "Q2"), ("assistant", "A2"))]


def test_answers_end_with_the_token_that_the_page_says():
    lines = [line.replace("\\|", "\0") for line in (ROOT / "docs" / "templates.md").read_text().splitlines() if line.startswith("| ")]
    rows = [[cell.replace("\0", "|").strip() for cell in line.strip("|").split("|")] for line in lines]
    ends = {name: row[0].strip("`") for row in rows if len(row) == 3 for name in re.findall(r"`(\w+)`", row[1])}
    silent = {name for row in rows if len(row) == 3 and "no BOS is" in row[2] for name in re.findall(r"`(\w+)`", row[1])} | {"zephyr"}
    assert ends.keys() == set(chat_templates.builtin_names())
    for name, end in ends.items():
        text = chat_templates.renderer(Marked(), name, None, {})(TALK, tools=None)
        assert text.partition("A1")[2].startswith(end) and text.partition("A2")[2].startswith(end), (name, text)
        assert text.startswith("BOS") != (name in silent), name
