"""`treetune generate`: answers to prompts, as a chat or as plain continuation."""

import sys
from dataclasses import asdict, replace
from typing import Any

from treetune.cli.options.commands import Generate
from treetune.cli.screen import Screen
from treetune.core.data import prompt_ids
from treetune.core.run.errors import checking_input
from treetune.models import decode, target


def run(config: Generate, given: frozenset[str]) -> int:
    """Print the answers; the exit code."""
    screen = Screen()
    with checking_input():
        if config.prompt.count("-") > 1:
            raise ValueError("- is given twice, and standard input can be read once")
        config = replace(config, prompt=tuple(_standard_input(config.raw) if text == "-" else text for text in config.prompt))
        chosen = target.choose(config.adapter.adapter, named="model" in given, **asdict(config.model))
        tokenizer = target.load_tokenizer(chosen, say=screen.line)
        ids = _prompt_ids(config, tokenizer)
        model, lora = target.load_model(chosen, say=screen.line)
        for prompt in ids:
            prompt_ids.check_ids(prompt, model.cfg.vocab_size)
        stop = target.stop_ids(chosen, tokenizer)
        samples = decode.sample(model, ids, n=config.num_samples, lora=lora, stop=stop, **asdict(config.sample))
    several = len(config.prompt) > 1 or config.num_samples > 1
    for row, text in enumerate(prompt_ids.decode_samples(tokenizer, samples)):
        if several:
            screen.line(f"# {config.prompt[row // config.num_samples]}", "bold")
        screen.line(text.strip() + "\n" * several)
    return 0


def _standard_input(raw: bool) -> str:
    """The prompt from standard input; of a chat without the line end that `echo` adds. Errors: ValueError for none, and for bytes."""
    text = sys.stdin.read() if sys.stdin is not None else ""  # None: it is closed
    if not text.strip():
        raise ValueError("standard input holds no prompt: write one, as in echo 'What is 17 + 25?' | treetune generate -")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # bytes that are no UTF-8 are read as halves of surrogate pairs
        raise ValueError(f"standard input is no UTF-8 text at character {error.start + 1}") from None
    return text if raw else text.removesuffix("\n").removesuffix("\r")


def _prompt_ids(config: Generate, tokenizer: Any) -> list[list[int]]:
    if config.raw:
        return [prompt_ids.encode_text(tokenizer, text) for text in config.prompt]
    return [prompt_ids.encode_chat(tokenizer, text, system=config.system) for text in config.prompt]
