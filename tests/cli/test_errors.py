"""What nobody foresaw while input is read is one line that names it; elsewhere a traceback stays a traceback."""

import pytest
import torch

from treetune.cli import main
from treetune.core import fields
from treetune.core.run import cadence, errors

RAISED = (TypeError, KeyError, AttributeError, IndexError, OverflowError, RecursionError, ZeroDivisionError, RuntimeError, MemoryError)


@pytest.mark.parametrize("kind", RAISED)
def test_an_error_that_nobody_foresaw_names_what_was_read(kind):
    with pytest.raises(errors.BadInput, match=rf"^rows.jsonl cannot be read: {kind.__name__}: .*why.*TREETUNE_TRACEBACK=1") as caught:
        with errors.checking_input(), fields.reading("rows.jsonl"):
            raise kind("why")
    assert isinstance(caught.value.__cause__, ValueError) and isinstance(caught.value.__cause__.__cause__, kind)


@pytest.mark.parametrize("kind", [kind for kind in RAISED if kind is not MemoryError])
def test_without_a_name_it_is_still_one_line(kind):
    with pytest.raises(errors.BadInput, match=f"^an option or an input cannot be read: {kind.__name__}"), errors.checking_input():
        raise kind("why\nand more")


def test_memory_that_is_full_while_reading_is_no_bad_input():
    with pytest.raises(errors.RunFailed, match="^out of memory: take a smaller model"), errors.checking_input():
        raise MemoryError


@pytest.mark.parametrize("kind", [errors.RunFailed, KeyboardInterrupt, BrokenPipeError, SystemExit])
def test_what_is_no_fault_of_the_input_passes(kind):
    with pytest.raises(kind), errors.checking_input(), fields.reading("x"):
        raise kind


def test_bytes_that_are_no_text_are_named():
    with pytest.raises(errors.BadInput, match="c.txt cannot be read: UnicodeDecodeError"), errors.checking_input(), fields.reading("c.txt"):
        b"\xff".decode()


@pytest.mark.parametrize("name", ["models.hf.load", "models.hf.tokenizer", "core.data.workers.encode_rows", "core.data.sources.read"])
def test_a_fault_in_a_reader_is_one_line_and_writes_nothing(name, kit, tiny, here, sft, monkeypatch):
    """Whatever a reader of files does not foresee."""
    import importlib

    module, _, function = name.rpartition(".")

    def broken(*args, **options):
        return {}["surprise"]

    monkeypatch.setattr(importlib.import_module(f"treetune.{module}"), function, broken)
    kit.refused(sft("--output-dir", "run"), "surprise", "cannot be read")
    assert kit.listing(here) == set()


def test_a_fault_in_training_is_a_traceback(sft, monkeypatch):
    """It is ours, and developers need to see where."""
    monkeypatch.setattr(cadence, "warnings", lambda *args, **named: {}["surprise"])
    with pytest.raises(KeyError, match="surprise"):
        sft("--output-dir", "run")


def test_the_traceback_is_there_for_who_asks(capsys, monkeypatch):
    monkeypatch.setenv(fields.TRACEBACK, "1")
    assert main.main(["sft", "--lora-r", "x"]) == 2
    assert "Traceback" in capsys.readouterr().err


def larger(kit, tiny, folder):
    """A model whose tokenizer has more tokens than it has rows."""
    path, tokenizer = kit.write_model(folder / "larger"), kit.tokenizer()
    tokenizer.add_tokens(["<near>", "<far>"])
    tokenizer.save_pretrained(path)
    return path


@pytest.mark.parametrize("command", [["generate", "x <far>"], ["generate", "x <far>", "--raw"], ["generate", "hi", "--system", "<far>"],
                                     ["chat", "--system", "<far>"]])  # fmt: skip
def test_ids_past_the_rows_are_refused_before_sampling(command, kit, tiny, tmp_path_factory, tune, here):
    path = larger(kit, tiny, tmp_path_factory.mktemp("models"))
    kit.refused(tune(*command, "--model", path), "token id 260", "up to 259", "another model")


def test_a_line_of_a_chat_with_ids_past_the_rows(kit, tiny, tmp_path_factory, tune, monkeypatch):
    import io
    import sys

    monkeypatch.setattr(sys, "stdin", io.StringIO("well <far>\n"))
    done = tune("chat", "--model", larger(kit, tiny, tmp_path_factory.mktemp("models")))
    assert done.code == 2 and "token id 260" in done.err and done.err.count("\n") == 1


def test_a_sample_prompt_with_ids_past_the_rows(kit, tiny, tmp_path_factory, sft, here):
    path = larger(kit, tiny, tmp_path_factory.mktemp("models"))
    kit.refused(sft("--model", path, "--sample-prompt", "<far>", "--output-dir", "run"), "sample prompt has the token id 260")
    assert kit.listing(here) == set()


@pytest.mark.parametrize("content", ["[1]", "{", '{"eos_token_id": "x"}', '{"eos_token_id": {}}'])
def test_a_generation_config_is_read_before_the_run_folder_exists(content, kit, tiny, tmp_path_factory, sft, here):
    """A full fine-tune saves it at its end; it must not first be looked at there."""
    path = kit.write_model(tmp_path_factory.mktemp("models") / "model")
    (path / "generation_config.json").write_text(content)
    for sample in ("", "2 + 2"):
        args = ("--model", path, "--adapter", "none", f"--sample-prompt={sample}", "--output-dir", "run")
        kit.refused(sft(*args, without=("--lora-r", *(["--sample-tokens"] if not sample else []))), "generation_config.json")
        assert kit.listing(here) == set()


def test_memory_that_is_full_while_training_is_no_fault_of_the_input():
    from pathlib import Path

    with pytest.raises(errors.RunFailed, match="out of memory"), errors.running(Path("run")):
        raise torch.OutOfMemoryError("no more")


@pytest.mark.parametrize(
    "words", ["[pair.cc:553] Connection closed by peer [127.0.0.1]:2283. GLHF!", "Gloo connectFullMesh failed with [...]"]
)
def test_a_rank_that_is_lost_is_no_bad_input(words, tmp_path):
    for block in (errors.checking_input(), errors.running(tmp_path)):
        with (
            pytest.raises(
                errors.RunFailed, match="^another rank has ended or hangs .*: (start the run again|continue with --resume auto)$"
            ),
            block,
        ):
            raise RuntimeError(words)
