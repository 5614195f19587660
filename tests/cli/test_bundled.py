"""Examples and documentation that come with the package, prompts from standard input, and the chat in a browser."""

import io
import sys
import threading
import types

import pytest

from treetune.cli import web_chat
from treetune.core.data import bundled


def test_examples_and_docs_are_copied_into_a_new_folder(tune, here):
    assert tune("fetch", "examples").code == 0
    assert (here / "examples/sft_lora.yaml").is_file() and (here / "examples/loops/sft.py").is_file()
    assert (here / "examples/notebooks/fine_tune.ipynb").is_file()
    assert (here / "examples/data/gsm8k_train_sample.jsonl").is_file()
    assert tune("fetch", "docs", "--dest", "pages").code == 0 and (here / "pages/training.md").is_file()
    again = tune("fetch", "examples")
    assert again.code == 2 and "examples" in again.err
    assert "--dest would be ignored" in tune("fetch", "smollm2-135m-instruct", "--dest", "x").err


def test_pages_are_printed_by_name_and_by_topic(tune):
    whole = tune("agent-docs").out
    assert all(name in whole for name in bundled.topics())
    assert tune("agent-docs", "grpo").out == tune("agent-docs", "online").out == bundled.page("online")
    assert "there is no page about cooking; there are" in tune("agent-docs", "cooking").err


def test_every_topic_leads_to_a_page():
    missing = {word for word, name in bundled.PAGES.items() if name not in bundled.topics()}
    assert missing <= {"trackers"}


def test_a_prompt_comes_from_standard_input(tune, tiny, monkeypatch):
    options = ("--model", tiny.model, "--max-new-tokens", 3, "--temperature", 0)
    monkeypatch.setattr(sys, "stdin", io.StringIO("1 + 1\n"))
    assert tune("generate", "-", *options).out == tune("generate", "1 + 1", *options).out


@pytest.mark.parametrize(
    ("stdin", "prompts", "words"),
    [
        (io.StringIO(" \n"), ["-"], "holds no prompt"),
        (None, ["-"], "holds no prompt"),
        (io.StringIO("a\udcff"), ["-"], "no UTF-8 text at character 2"),
        (io.StringIO("a"), ["-", "-"], "given twice"),
    ],
)
def test_a_standard_input_without_a_prompt_is_refused(tune, tiny, kit, monkeypatch, stdin, prompts, words):
    monkeypatch.setattr(sys, "stdin", stdin)
    kit.refused(tune("generate", *prompts, "--model", tiny.model), words)


def test_a_chat_in_the_browser_needs_gradio_and_listens_here_alone(tune, tiny, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install 'treetune[gradio]'" in tune("chat", "--gradio", "--model", tiny.model).err


def test_the_browser_gets_what_the_model_samples(tune, tiny, monkeypatch):
    seen, parts = {}, [{"type": "text", "text": "y"}, {"type": "text", "text": "es"}]  # as of gradio 6

    class ChatInterface:
        def __init__(self, answer, title, analytics_enabled):
            assert not analytics_enabled
            seen["answers"] = list(answer("2 + 2", [{"role": "user", "content": "hi"}, {"role": "assistant", "content": parts}]))

        def launch(self, **options):
            seen["launch"] = options

    module = types.ModuleType("gradio")
    setattr(module, "ChatInterface", ChatInterface)  # noqa: B010  a module has no such attribute, says the type checker
    monkeypatch.setitem(sys.modules, "gradio", module)
    monkeypatch.setattr(web_chat, "check", lambda: None)
    done = tune("chat", "--gradio", "--model", tiny.model, "--max-new-tokens", 4, "--temperature", 0)
    assert done.code == 0, done.err
    assert seen["launch"] == {"server_name": "127.0.0.1", "server_port": 7860, "share": False, "quiet": True}
    assert all(later.startswith(earlier) for earlier, later in zip(seen["answers"], seen["answers"][1:], strict=False))


def test_an_error_of_the_model_reaches_the_browser():
    def reply(messages, tell):
        tell("a")
        raise ValueError("full")

    answer = web_chat.streamed(reply, [])
    assert next(answer) == "a"
    with pytest.raises(ValueError, match="full"):
        next(answer)


def test_sampling_ends_when_nobody_waits_for_the_answer():
    told, ended = [], threading.Event()

    def reply(messages, tell):
        try:
            for i in range(10**6):
                heard.wait()
                tell(str(i))
                told.append(i)
            return ""
        finally:
            ended.set()

    heard = threading.Event()
    answer = web_chat.streamed(reply, [])
    heard.set()
    assert next(answer) == "0"
    answer.close()
    assert ended.wait(30) and len(told) < 10**6


def test_what_is_no_text_is_refused():
    with pytest.raises(ValueError, match="texts only"):
        web_chat._text([{"type": "file", "file": {}}])
