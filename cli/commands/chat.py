"""`treetune chat`: a conversation in the terminal."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

from treetune.cli.errors import checking_input
from treetune.cli.options.commands import Chat
from treetune.cli.screen import Screen
from treetune.core.data import detokenise, prompt_ids
from treetune.models import decode, target


def run(config: Chat, given: frozenset[str]) -> int:
    """Read a line, answer it, until /quit or the end of input; the exit code."""
    screen = Screen()
    start = [{"role": "system", "content": config.system}] if config.system else []
    with checking_input():
        chosen = target.choose(config.adapter.adapter, named="model" in given, **asdict(config.model))
        tokenizer = target.load_tokenizer(chosen, say=screen.line)
        ids = prompt_ids.encode_turns(tokenizer, [*start, {"role": "user", "content": "?"}])  # whether it can chat, before weights are read
        model, lora = target.load_model(chosen, say=screen.line)
        stop = target.stop_ids(chosen, tokenizer)
        prompt_ids.check_ids(ids, model.cfg.vocab_size)
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
            room = model.cfg.max_positions - len(ids)
            if room < 1:
                screen.warn(f"the conversation fills all {model.cfg.max_positions} positions of the model; starting over")
                messages = list(start)
                continue
            options = asdict(config.sample) | {"seed": config.sample.seed + turn}
            options["max_new_tokens"] = min(options["max_new_tokens"], room)
            answer = print_answer(screen, tokenizer, partial(decode.sample, model, [ids], lora=lora, stop=stop, **options))
            messages.append({"role": "assistant", "content": answer})
            turn += 1
    return 0


class Answer:
    """An answer that is shown while it is sampled: whole characters, and no blanks at its ends. Lives as long as the answer."""

    def __init__(self, screen: Screen, tokenizer: Any):
        self.screen, self.tokenizer = screen, tokenizer
        self.tokens: list[int] = []
        self.decoder = detokenise.Decoder(tokenizer, skip_special_tokens=True)
        self.started, self.blank = False, ""

    def push(self, _: Any, token: Any) -> None:
        """Take one more token, as `decode.sample` tells it."""
        self.tokens.append(int(token))
        self.show(self.decoder.push(self.tokens[-1]))

    def show(self, units: Sequence[detokenise.TextUnit]) -> None:
        """Print what is settled of the text; blanks are held back until something follows them."""
        text = self.blank + "".join(unit.text for unit in units)
        settled = text.rstrip()
        self.blank = text[len(settled) :]
        if settled:
            self.screen.stream(settled if self.started else settled.lstrip())
            self.started = True

    def text(self) -> str:
        """The answer as far as it came."""
        return self.tokenizer.decode(self.tokens, skip_special_tokens=True).strip()


def print_answer(screen: Screen, tokenizer: Any, sample: Callable[..., Any]) -> str:
    """The answer that `sample(tell=)` draws, printed as it comes; Ctrl-C ends it where it is."""
    answer = Answer(screen, tokenizer)
    try:
        sample(tell=answer.push)
        answer.show(answer.decoder.flush())
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
