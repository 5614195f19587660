"""docs/start.md as a newcomer follows it: its files are written and its commands run in its order, with a tiny model."""

import io
import os
import re
import shlex
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from treetune.core.rollout import server as servers

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "start.md").read_text()
FAKE = ROOT / "tests" / "core" / "rollout" / "fake_vllm.py"
MODEL = "Qwen/Qwen3-0.6B"


def _write_files(model: Path):
    """The files that the page shows."""
    for name, kind in (("faq.csv", "csv"), ("chats.py", "python"), ("support.yaml", "yaml")):
        (text,) = re.findall(rf"```{kind}\n(.*?)```", PAGE, re.S)
        Path(name).write_text(text.replace(MODEL, str(model)))


def _serve(words: list[str]):
    """The server comes up, says where, and ends when it is told; a stand-in takes the place of vLLM."""
    program = Path("python").absolute()
    program.write_text(f'#!/bin/sh\nshift 2\nexec {sys.executable} {FAKE} "$@"\n')
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    command = [sys.executable, "-m", "treetune.cli.main", *words, "--port", str(servers.free_port()), "--python", str(program)]
    running = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | {"TREETUNE_HOME": "home"}
    )
    try:
        assert any("serving merged-model at http://127.0.0.1:" in line for line in running.stdout)
        running.send_signal(signal.SIGTERM)
        assert running.wait(40) == 0
    finally:
        running.kill()
        running.communicate()


@pytest.mark.more
def test_from_rows_to_a_server(tiny, tune, here, monkeypatch):
    _write_files(tiny.long)
    monkeypatch.setattr("sys.stdin", io.StringIO("Where is my invoice?\n"))
    said = {}
    for line in "".join(re.findall(r"```bash\n(.*?)```", PAGE, re.S)).splitlines():
        program, *words = shlex.split(line.replace(MODEL, str(tiny.long)))
        if program == "python":
            subprocess.run([sys.executable, *words], check=True)
        elif words[0] == "serve":
            _serve(words)
        else:
            done = tune(*words)
            assert done.code == 0, (line, done.err)
            said[" ".join(words)] = done.out
    outs = list(said.values())
    assert len(Path("chats.jsonl").read_text().splitlines()) == 6 and "6 documents" in outs[0] and "[[" in outs[0]
    assert (here / "runs" / "sft-001" / "adapter" / "adapter_model.safetensors").is_file()
    assert (here / "merged-model" / "tokenizer.json").is_file() and (here / "runs" / "sft-002" / "config.yaml").is_file()
