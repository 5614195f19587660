"""`treetune generate`: answers to prompts, as a chat or as plain continuation."""

from dataclasses import asdict

from treetune.cli import bases, setup
from treetune.cli.configs import Generate
from treetune.cli.errors import checking_input
from treetune.cli.screen import Screen
from treetune.core.data import prompt_ids
from treetune.models import decode


def _prompt_ids(config: Generate, tokenizer) -> list[list[int]]:
    if config.raw:
        return [prompt_ids.encode_text(tokenizer, text) for text in config.prompt]
    return [prompt_ids.encode_chat(tokenizer, text, system=config.system) for text in config.prompt]


def run(config: Generate, given: frozenset[str]) -> int:
    """Print the answers; the exit code."""
    screen = Screen()
    with checking_input():
        options = bases.with_base(config.model, config.adapter.adapter, given)
        tokenizer = setup.load_tokenizer(options, config.adapter.adapter, say=screen.line)
        ids = _prompt_ids(config, tokenizer)
        model, used = bases.load_adapted(options, config.adapter.adapter, on=setup.device(options.device), say=screen.line)
        for one in ids:
            prompt_ids.check_ids(one, model.cfg.vocab_size)
        drawn = decode.sample(model, ids, n=config.num_samples, lora=used, stop=setup.stop_ids(options, tokenizer), **asdict(config.sample))
    for row, text in enumerate(prompt_ids.decode_samples(tokenizer, drawn)):
        if len(config.prompt) > 1 or config.num_samples > 1:
            screen.line(f"# {config.prompt[row // config.num_samples]}", "bold")
        screen.line(text.strip() + "\n" * (config.num_samples > 1 or len(config.prompt) > 1))
    return 0
