"""`treetune chat`: a conversation in the terminal."""

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

from treetune.cli import bases, setup
from treetune.cli.configs import Chat
from treetune.cli.errors import checking_input
from treetune.cli.screen import Screen
from treetune.core.data import detokenise, prompt_ids
from treetune.models import decode


def run(config: Chat, given: frozenset[str]) -> int:
    """Read a line, answer it, until /quit or the end of input; the exit code."""
    screen = Screen()
    start = [{"role": "system", "content": config.system}] if config.system else []
    with checking_input():
        options = bases.with_base(config.model, config.adapter.adapter, given)
        tokenizer = setup.load_tokenizer(options, config.adapter.adapter, say=screen.line)
        prompt_ids.encode_turns(tokenizer, [*start, {"role": "user", "content": "?"}])
        model, used = bases.load_adapted(options, config.adapter.adapter, on=setup.device(options.device), say=screen.line)
        stop = setup.stop_ids(options, tokenizer)
        prompt_ids.check_ids(prompt_ids.encode_turns(tokenizer, [*start, {"role": "user", "content": "?"}]), model.cfg.vocab_size)
    name = setup.pair_name(options, config.adapter.adapter)
    screen.line(f"{name}; Ctrl-C stops an answer, /reset starts over, /quit leaves", "dim")
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
            keywords = asdict(config.sample) | {"seed": config.sample.seed + turn}
            keywords["max_new_tokens"] = min(keywords["max_new_tokens"], room)
            answer = told(screen, tokenizer, partial(decode.sample, model, [ids], lora=used, stop=stop, **keywords))
            messages.append({"role": "assistant", "content": answer})
            turn += 1
    return 0


class Told:
    """An answer that is shown while it is drawn: whole characters, and no blanks at its ends. Lives as long as the answer."""

    def __init__(self, screen: Screen, tokenizer: Any):
        self.screen, self.tokenizer, self.tokens = screen, tokenizer, []
        self.decoder = detokenise.Decoder(tokenizer, skip_special_tokens=True)
        self.begun, self.blank = False, ""

    def tell(self, _: Any, token: Any) -> None:
        """One more token, as `decode.sample` tells it."""
        self.tokens.append(int(token))
        self.show(self.decoder.push(self.tokens[-1]))

    def show(self, units: list[detokenise.TextUnit]) -> None:
        """What is settled of the text; blanks are held back until something follows them."""
        text = self.blank + "".join(unit.text for unit in units)
        settled = text.rstrip()
        self.blank = text[len(settled) :]
        if settled:
            self.screen.stream(settled if self.begun else settled.lstrip())
            self.begun = True

    def text(self) -> str:
        """The answer as far as it came."""
        return self.tokenizer.decode(self.tokens, skip_special_tokens=True).strip()


def told(screen: Screen, tokenizer: Any, sample: Callable[..., Any]) -> str:
    """The answer that `sample(tell=)` draws, shown as it comes; Ctrl-C ends it where it is."""
    answer = Told(screen, tokenizer)
    try:
        sample(tell=answer.tell)
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
