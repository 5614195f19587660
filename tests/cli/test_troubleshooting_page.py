"""The error lines that docs/troubleshooting.md lists are those that the program says."""

import json
import re
from pathlib import Path

PAGE = (Path(__file__).parents[2] / "docs" / "troubleshooting.md").read_text()


def _write(path: str, *messages: tuple[str, str]) -> str:
    Path(path).write_text(json.dumps({"messages": [{"role": role, "content": content} for role, content in messages]}) + "\n")
    return path


def test_each_line_is_raised(tiny, tune, monkeypatch):
    monkeypatch.delenv("TREETUNE_VLLM_PYTHON", raising=False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    start = PAGE.split("## It does not start")[1].split("## It runs")[0]
    lines = re.findall(r"^\| `([^`]+)` \|", start, re.M)
    asked, bot = _write("asked.jsonl", ("user", "a")), _write("bot.jsonl", ("user", "a"), ("bot", "b"))
    Path("faq.csv").write_text("question,reply\na,b\n")
    Path("taken").mkdir()
    Path("taken/notes.txt").write_text("mine")
    short = ("--sequence-len", 96)
    calls = [
        ("sft", "--model", "nowhere", "--data", tiny.chat),
        ("sft", "--model", tiny.model, "--data", "none.jsonl", *short),
        ("sft", "--lerning-rate", 1),
        ("preprocess", "--model", tiny.model, "--data", "faq.csv", *short),
        ("preprocess", "--model", tiny.model, "--data", bot, *short),
        ("preprocess", "--model", tiny.model, "--data", asked, *short),
        ("sft", "--model", tiny.model, "--data", tiny.chat, "--sequence-len", 999),
        ("preprocess", "--model", tiny.bare, "--data", tiny.chat, *short),
        ("sft", "--model", tiny.model, "--data", tiny.chat, *short, "--device", "cuda"),
        ("serve", "--model", tiny.model),
        ("sft", "--model", tiny.model, "--data", tiny.chat, *short, "--output-dir", "taken"),
    ]
    assert len(lines) == len(calls)
    for line, call in zip(lines, calls, strict=True):
        done = tune(*call)
        assert done.code == 2 and line in done.err, (line, done.err)


def test_a_merge_that_rounds_too_much_says_the_line(run, tune):
    done = tune("merge", "r", "merged", "--save-dtype", "bfloat16", "--max-logit-diff", 1e-9)
    assert done.code != 0 and "the merged logits differ by up to" in PAGE and "the merged logits differ by up to" in done.err
