"""The Python in the README runs as it stands, and its commands parse."""

import re
import shlex
from pathlib import Path

from treetune.cli import main, parse

README = (Path(__file__).parents[2] / "README.md").read_text()


def test_the_code_runs(tiny, here):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.S)
    names = {}
    exec(code.replace("path/to/model", str(tiny.model)).replace("chats.jsonl", str(tiny.chat)), names)
    assert names["metrics"]["loss"] > 0 and names["metrics"]["grad_norm"] > 0 and int(names["state"].step) == 1
    assert names["held_out"]["loss"] > 0 and (here / "adapter" / "adapter_config.json").is_file()


def test_the_commands_parse():
    lines = [line.split(" #")[0] for block in re.findall(r"```bash\n(.*?)```", README, re.S) for line in block.splitlines()]
    calls = [shlex.split(line)[1:] for line in lines if line.startswith("treetune ")]
    assert len(calls) >= 5
    for command, *args in calls:
        if command in ("train", "plan"):
            assert args[0] == "run.yaml"
            continue
        parse.parse(command, main.COMMANDS[command].config, args)
