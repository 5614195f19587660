"""A working directory with rewards, groups to score, and a look at which processes are there."""

import json
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest

from treetune.core.data.prompts import Prompt
from treetune.core.rollout import reward_pool
from treetune.core.rollout.group import Completion, Group


@pytest.fixture
def here(tmp_path, monkeypatch):
    shutil.copy(Path(__file__).with_name("reward_functions.py"), tmp_path / "rewards.py")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def group(*texts, columns=None, chat=True, row=0):
    messages = [{"role": "user", "content": "2+2?"}] if chat else None
    prompt = Prompt(np.arange(3, dtype=np.int32), "2+2?", messages, columns or {}, row)
    tokens = [np.arange(len(text), dtype=np.int32) for text in texts]
    made = (
        Completion(ids, np.zeros(len(ids), np.float32), np.ones(len(ids), bool), True, text)
        for ids, text in zip(tokens, texts, strict=True)
    )
    return Group(prompt, row, tuple(made), 0)


def score(names, groups, **options):
    with reward_pool.Pool(names if isinstance(names, list) else [names], **options) as pool:
        return pool.score(groups), pool.report()


def values(name, *texts, **options):
    """Rewards of a function for one prompt, as a list."""
    return score(name, [group(*texts)], **options)[0][0, :, 0].tolist()


def gone(pid, within_s=5.0):
    """Whether a process is no more (or a zombie that init has yet to take away)."""
    end = time.monotonic() + within_s
    while True:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        if time.monotonic() > end:
            return False
        time.sleep(0.02)


def seen(here):
    return [json.loads(line) for line in (here / "seen.jsonl").read_text().splitlines()]


def children():
    return Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
