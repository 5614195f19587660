"""`treetune chat`: a conversation in the terminal."""

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

from treetune.cli import web_chat
from treetune.cli.options.commands import Chat
from treetune.cli.screen import Screen
from treetune.core.data import detokenise, prompt_ids
from treetune.core.run.errors import checking_input
from treetune.models import decode, target


def run(config: Chat, given: frozenset[str]) -> int:
    """Read a line, answer it, until /quit or the end of input; the exit code."""
    screen = Screen()
    start = [{"role": "system", "content": config.system}] if config.system else []
    with checking_input():
        if config.gradio:
            web_chat.check()
        chosen = target.choose(config.adapter.adapter, named="model" in given, **asdict(config.model))
        tokenizer = target.load_tokenizer(chosen, say=screen.line)
        ids = prompt_ids.encode_turns(tokenizer, [*start, {"role": "user", "content": "?"}])  # whether it can chat, before weights are read
        model, lora = target.load_model(chosen, say=screen.line)
        stop = target.stop_ids(chosen, tokenizer)
        prompt_ids.check_ids(ids, model.cfg.vocab_size)
    if config.gradio:
        screen.line(f"{chosen.name} at http://{web_chat.HOST}:{config.gradio_server_port}; Ctrl-C ends it")
        return _browser(config, chosen, tokenizer, partial(decode.sample, model, lora=lora, stop=stop), model.cfg.shared_positions)
    screen.line(f"{chosen.name}; Ctrl-C stops an answer, /reset starts over, /quit leaves", "dim")
    messages, turn = list(start), 0
    while (text := _ask(screen)) is not None:
        if text == "/reset":
            messages = list(start)
        elif text:
            messages.append({"role": "user", "content": text})
            with checking_input():
                ids = prompt_ids.encode_turns(tokenizer, messages)
                prompt_ids.check_ids(ids, model.cfg.vocab_size, "the conversation")
            room = model.cfg.shared_positions - len(ids)
            if room < 1:
                screen.warn(f"the conversation fills all {model.cfg.shared_positions} positions of the model; starting over")
                messages = list(start)
                continue
            options = asdict(config.sample) | {"seed": config.sample.seed + turn}
            options["max_new_tokens"] = min(options["max_new_tokens"], room)
            answer = print_answer(screen, tokenizer, partial(decode.sample, model, [ids], lora=lora, stop=stop, **options))
            messages.append({"role": "assistant", "content": answer})
            turn += 1
    return 0


def _browser(config: Chat, chosen: target.Target, tokenizer: Any, sample: Callable[..., Any], positions: int) -> int:
    """The conversation in the browser, until Ctrl-C; the exit code."""
    start = [{"role": "system", "content": config.system}] if config.system else []

    def reply(messages: web_chat.Messages, tell: web_chat.Tell) -> str:
        ids = prompt_ids.encode_turns(tokenizer, [*start, *messages])
        if len(ids) >= positions:
            raise ValueError(f"the conversation fills all {positions} positions of the model: start a new one")
        options = asdict(config.sample) | {"seed": config.sample.seed + len(messages)}
        options["max_new_tokens"] = min(options["max_new_tokens"], positions - len(ids))
        answer = detokenise.Answer(tokenizer)
        sample([ids], tell=lambda _, token: tell(answer.push(int(token))), **options)
        tell(answer.flush())
        return answer.text()

    web_chat.serve(reply, chosen.name, config.gradio_server_port)
    return 0


def print_answer(screen: Screen, tokenizer: Any, sample: Callable[..., Any]) -> str:
    """The answer that `sample(tell=)` draws, printed as it comes; Ctrl-C ends it where it is."""
    answer = detokenise.Answer(tokenizer)
    try:
        sample(tell=lambda _, token: screen.stream(answer.push(int(token))))
        screen.stream(answer.flush())
    except KeyboardInterrupt:
        screen.stream(" ...")
    screen.line("\n")
    return answer.text()


def _ask(screen: Screen) -> str | None:
    """The next line that the user types; None to leave. One Ctrl-C may have been meant for the answer, two in a row leave."""
    for again in (False, True):
        try:
            text = screen.console.input("[bold cyan]> [/]").strip()
            return None if text == "/quit" else text
        except EOFError:
            return None
        except KeyboardInterrupt:
            screen.line("" if again else "\n/quit or Ctrl-C again leaves", "dim")
    return None
