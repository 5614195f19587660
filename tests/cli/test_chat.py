"""`treetune chat`: answers come as they are drawn, in whole characters, and Ctrl-C ends an answer, not the talk."""

import io
import re
import sys

import pytest
import torch
from rich.console import Console

from treetune.cli import screen
from treetune.cli.commands import chat
from treetune.models import decode


def quiet():
    one = screen.Screen()
    one.console = Console(file=io.StringIO(), width=80, soft_wrap=True)
    return one


def drawn(text, kit, *, until=None):
    """(what was shown after each token, the answer) of a model that says this."""
    one, tokenizer, shown = quiet(), kit.tokenizer(), []

    def sample(tell):
        for i, token in enumerate(tokenizer(text)["input_ids"]):
            if i == until:
                raise KeyboardInterrupt
            tell(None, torch.tensor([token]))
            shown.append(one.console.file.getvalue())

    return shown, chat.print_answer(one, tokenizer, sample), one.console.file.getvalue()


def test_each_token_is_shown_at_once_and_characters_only_when_whole(kit):
    shown, answer, whole = drawn("ab 你👍", kit)
    assert shown == ["a", "ab", "ab"] + ["ab"] * 2 + ["ab 你"] * 4 + ["ab 你👍"]
    assert answer == "ab 你👍" and whole == "ab 你👍\n\n"


def test_blanks_at_the_ends_and_special_tokens_are_not_shown(kit):
    shown, answer, whole = drawn(" \n a\n\nb \n\n<|im_end|>", kit)
    assert whole == "a\n\nb\n\n" and answer == "a\n\nb" and shown[3] == "a"


def test_half_a_character_at_the_end_is_shown_as_broken(kit):
    one, tokenizer = quiet(), kit.tokenizer()
    ids = tokenizer("a👍")["input_ids"][:3]
    answer = chat.print_answer(one, tokenizer, lambda tell: [tell(None, torch.tensor([token])) for token in ids])
    assert one.console.file.getvalue() == "a\ufffd\n\n" and answer == "a\ufffd"


def test_escape_sequences_of_answers_are_written_out(kit):
    *_, whole = drawn("\x1b[31mred\x07", kit)
    assert whole == "\\x1b[31mred\\x07\n\n"


def test_ctrl_c_ends_the_answer_where_it_is(kit):
    _, answer, whole = drawn("abcdef", kit, until=3)
    assert answer == "abc" and whole == "abc ...\n\n"


@pytest.fixture
def talk(tiny, tune, monkeypatch):
    def run(lines, *args):
        monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
        return tune("chat", "--model", tiny.model, "--max-new-tokens", 6, "--temperature", 0, *args)

    return run


def test_the_talk_goes_on_after_ctrl_c(talk, monkeypatch):
    plain, calls = decode.sample, []

    def sample(*args, tell, **keywords):
        calls.append(args[1])
        if len(calls) == 1:
            tell(None, torch.tensor([65]))
            raise KeyboardInterrupt
        return plain(*args, tell=tell, **keywords)

    monkeypatch.setattr(chat.decode, "sample", sample)
    done = talk("hi\nand?\n")
    assert done.code == 0 and done.err == "" and done.out.count("> ") == 3 and " ..." in done.out
    assert len(calls) == 2 and len(calls[1][0]) > len(calls[0][0]), "what was said so far is part of the talk"


def test_one_ctrl_c_at_the_prompt_stays_and_two_leave(talk, monkeypatch):
    presses = iter([KeyboardInterrupt, "hi", KeyboardInterrupt, KeyboardInterrupt])

    def type_(*_, **__):
        if (press := next(presses)) is KeyboardInterrupt:
            raise press
        return press

    monkeypatch.setattr(Console, "input", type_)
    done = talk("")
    assert done.code == 0 and done.out.count("Ctrl-C again leaves") == 2


def test_the_streamed_answer_is_the_sampled_one(talk, tiny, tune):
    chatted = talk("hi\n").out.split("> ")[1].strip()
    asked = tune("generate", "hi", "--model", tiny.model, "--max-new-tokens", 6, "--temperature", 0).out.strip()
    assert re.sub(r"\s", "", chatted) == re.sub(r"\s", "", asked)
