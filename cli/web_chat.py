"""A conversation in the browser, by gradio, on this machine alone."""

import queue
import threading
from collections.abc import Callable, Iterator
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
        past = [{"role": turn["role"], "content": turn["content"]} for turn in history]
        yield from streamed(reply, [*past, {"role": "user", "content": message}])

    gradio.ChatInterface(answer, title=title).launch(server_name=HOST, server_port=port, share=False)


def streamed(reply: Reply, messages: Messages) -> Iterator[str]:
    """The answer as far as it has come, time after time. Errors: what the reply raises."""
    pieces: queue.Queue[str | BaseException | None] = queue.Queue()

    def work() -> None:
        try:
            reply(messages, pieces.put)
            pieces.put(None)
        except BaseException as error:
            pieces.put(error)

    threading.Thread(target=work, daemon=True).start()
    text = ""
    while (piece := pieces.get()) is not None:
        if isinstance(piece, BaseException):
            raise piece
        text += piece
        yield text
