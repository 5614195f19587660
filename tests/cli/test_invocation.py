"""Commands to paste: they hold all that was given, and they work."""

import os
import shlex
import signal
from pathlib import Path

import pytest

from treetune.cli import invocation, main
from treetune.core.run import recorder


def words(argv, *, overwrite=False, root="runs/sft-001"):
    invocation.remember("sft", argv)
    return shlex.split(invocation.continuation(Path(root), overwrite=overwrite))


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], ["--output-dir", "runs/sft-001", "--resume", "auto"]),
        (["--data", "my rows.jsonl", "b.jsonl", "--overwrite", "--max-steps", "9"],
         ["--data", "my rows.jsonl", "b.jsonl", "--max-steps", "9", "--output-dir", "runs/sft-001", "--resume", "auto"]),
        (["--output-dir=a b", "--resume", "a b/checkpoints/step_000001", "--sample-prompt", "what's $HOME?"],
         ["--output-dir=a b", "--sample-prompt", "what's $HOME?", "--resume", "auto"]),
        (["--resume=auto", "--output_dir", "x"], ["--output_dir", "x", "--resume", "auto"]),
    ],
)  # fmt: skip
def test_a_continuation_has_every_option_and_no_other_start(argv, expected):
    assert words(argv) == ["treetune", "sft", *expected]


def test_a_config_file_that_says_overwrite_is_outvoted():
    assert words(["--config", "run.yaml"], overwrite=True)[-3:] == ["--no-overwrite", "--resume", "auto"]


def pasted(done, name):
    """The command behind a name of the ending, as a shell reads it; it must stand in one line."""
    [line] = [line for line in done.out.splitlines() if line.startswith(name)]
    return shlex.split(line.removeprefix(name))


def test_an_interrupted_run_goes_on_with_the_printed_command(kit, tiny, sft, tune, here, monkeypatch):
    rows = kit.write_rows(here / "my own rows.jsonl", kit.chats(12))
    push = recorder.Recorder.push

    def patched(self, index, metrics):
        if index == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return push(self, index, metrics)

    monkeypatch.setattr(recorder.Recorder, "push", patched)
    done = sft("--data", rows.name, "--max-steps", 4, "--learning-rate", 0.01)
    assert done.code == 130, done
    monkeypatch.setattr(recorder.Recorder, "push", push)
    program, *rest = pasted(done, "continue with")
    assert program == "treetune" and "my own rows.jsonl" in rest
    done = tune(*rest)
    assert done.code == 0 and "step 4 of 4" in done.out, done
    assert sorted(path.name for path in (here / "runs").iterdir()) == ["sft-001"]


def tried(tune, done, monkeypatch):
    program, *rest = pasted(done, "try it")
    assert program == "treetune"
    if rest[0] == "chat":
        monkeypatch.setattr("sys.stdin", open(os.devnull))
    trial = tune(
        *rest,
        *(
            ["--max-new-tokens", 3]
            if rest[0] == "generate"
            else ["--sequence-len", 128]
            if rest[0] == "score" and "--sequence-len" not in rest
            else []
        ),
    )
    assert trial.code == 0, trial
    return rest


@pytest.mark.parametrize(("args", "words"), [((), ["chat", "--adapter"]), (("--adapter", "none"), ["chat", "--model"])])
def test_chats_are_tried_with_a_chat(sft, tune, monkeypatch, args, words):
    rest = tried(tune, sft(*args), monkeypatch)
    assert rest[:2] == words


def test_texts_are_tried_with_a_text_and_scores_with_rows(tune, tiny, kit, here, monkeypatch):
    done = tune("pretrain", "--model", tiny.model, "--data", tiny.text, "--sequence-len", 64, "--max-steps", 1, "--sample-prompt", "")
    assert tried(tune, done, monkeypatch)[:3] == ["generate", "Once upon a time", "--raw"]
    rows = [{"prompt": f"{i} + 1 = ", "chosen": f"{i + 1}", "rejected": f"{i + 5}"} for i in range(8)]
    data = kit.write_rows(here / "pairs of mine.jsonl", rows)
    done = tune("reward", "--model", tiny.model, "--data", data.name, "--sequence-len", 64, "--max-steps", 1)
    assert tried(tune, done, monkeypatch)[:4] == ["score", "runs/reward-001", "--data", "pairs of mine.jsonl"]


def test_the_command_line_is_known_to_every_run(monkeypatch):
    monkeypatch.setattr(main.importlib, "import_module", lambda _: (_ for _ in ()).throw(main.BadInput("far enough")))
    assert main.main(["info"]) == 2 and invocation._COMMAND_LINE.get() == ("info",)
