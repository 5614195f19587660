"""A conversation in the browser, by gradio, on this machine alone."""

import queue
import threading
from collections.abc import Callable, Generator, Iterator
from typing import Any

HOST = "127.0.0.1"
MISSING = "--gradio needs the package gradio: pip install 'treetune[gradio]'"
Messages = list[dict[str, str]]
Tell = Callable[[str], None]
Reply = Callable[[Messages, Tell], str]


def check() -> None:
    """Errors: ValueError where gradio is not installed."""
    import importlib.util

    if importlib.util.find_spec("gradio") is None:
        raise ValueError(MISSING)


def serve(reply: Reply, title: str, port: int) -> None:
    """Serve the conversation until the process ends. reply(messages, tell) -> answer, telling its pieces as they come."""
    import gradio  # pyright: ignore[reportMissingImports]

    def answer(message: str, history: list[dict[str, Any]]) -> Iterator[str]:
        past = [{"role": turn["role"], "content": _text(turn["content"])} for turn in history]
        try:
            yield from streamed(reply, [*past, {"role": "user", "content": message}])
        except ValueError as error:
            raise gradio.Error(str(error), print_exception=False) from error  # of others the browser is told nothing

    # Its own lines speak of options that this command does not have, and what it counts goes to its makers.
    gradio.ChatInterface(answer, title=title, analytics_enabled=False).launch(server_name=HOST, server_port=port, share=False, quiet=True)


def _text(content: str | list[dict[str, Any]]) -> str:
    """The text of a turn, which gradio 6 hands out in parts. Errors: ValueError for a part that is no text."""
    if isinstance(content, str):
        return content
    if any("text" not in part for part in content):
        raise ValueError("the model reads texts only: start a new conversation without files")
    return "".join(part["text"] for part in content)


class _Unheard(Exception):
    """Nobody waits for the answer any more."""


def streamed(reply: Reply, messages: Messages) -> Generator[str, None, None]:
    """The answer as far as it has come, time after time; when it is closed, sampling ends. Errors: what the reply raises."""
    pieces: queue.Queue[str | BaseException | None] = queue.Queue()
    closed = threading.Event()

    def tell(piece: str) -> None:
        if closed.is_set():
            raise _Unheard
        pieces.put(piece)

    def work() -> None:
        try:
            reply(messages, tell)
            pieces.put(None)
        except BaseException as error:
            pieces.put(error)

    threading.Thread(target=work, daemon=True).start()
    text = ""
    try:
        while (piece := pieces.get()) is not None:
            if isinstance(piece, BaseException):
                raise piece
            text += piece
            yield text
    finally:
        closed.set()
