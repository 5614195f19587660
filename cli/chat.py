"""`treetune chat`: a conversation in the terminal."""

from treetune.cli import bases, prompts, setup
from treetune.cli.configs import Chat
from treetune.cli.errors import checking_input
from treetune.cli.screen import Screen
from treetune.models import decode


def run(config: Chat, given: frozenset[str]) -> int:
    """Read a line, answer it, until /quit or the end of input; the exit code."""
    screen = Screen()
    start = [{"role": "system", "content": config.system}] if config.system else []
    with checking_input():
        options = bases.with_base(config.model, config.adapter.adapter, given)
        tokenizer = setup.load_tokenizer(options, config.adapter.adapter, say=screen.line)
        prompts.turns_ids(tokenizer, [*start, {"role": "user", "content": "?"}])
        model, used = bases.load_adapted(options, config.adapter.adapter, on=setup.device(options.device), say=screen.line)
        stop = setup.stop_ids(options, tokenizer)
        prompts.check_ids(prompts.turns_ids(tokenizer, [*start, {"role": "user", "content": "?"}]), model.cfg)
    screen.line(
        f"{options.model}{' + ' + config.adapter.adapter if config.adapter.adapter else ''}; /reset starts over, /quit leaves", "dim"
    )
    messages, turn = list(start), 0
    while (text := _ask(screen)) is not None:
        if text == "/reset":
            messages = list(start)
        elif text:
            messages.append({"role": "user", "content": text})
            with checking_input():
                ids = prompts.turns_ids(tokenizer, messages)
                prompts.check_ids(ids, model.cfg, "the conversation")
            room = model.cfg.max_positions - len(ids)
            if room < 1:
                screen.warn(f"the conversation fills all {model.cfg.max_positions} positions of the model; starting over")
                messages = list(start)
                continue
            keywords = prompts.sampling(config.sample) | {"seed": config.sample.seed + turn}
            keywords["max_new_tokens"] = min(keywords["max_new_tokens"], room)
            drawn = decode.sample(model, [ids], lora=used, stop=stop, **keywords)
            answer = prompts.answers(tokenizer, drawn)[0].strip()
            messages.append({"role": "assistant", "content": answer})
            screen.line(answer + "\n")
            turn += 1
    return 0


def _ask(screen: Screen) -> str | None:
    """The next line that the user types; None to leave."""
    try:
        text = screen.console.input("[bold cyan]> [/]").strip()
    except (EOFError, KeyboardInterrupt):
        return None
    return None if text == "/quit" else text
