"""The Python of docs/python.md runs as it stands, and docs/templates.md names the templates that there are."""

import re
from pathlib import Path

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
    assert set(re.findall(r"`(\w+)`", text)) == {path.stem for path in (ROOT / "core" / "data" / "jinja").glob("*.jinja")}
