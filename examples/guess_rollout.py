"""A multi-turn environment: the model guesses a number, the environment answers higher or lower. See examples/guess.yaml.

Tokens of the environment are marked False in `trained`: they are context and are not trained on. Sampled token ids are passed on
unchanged; only the text of the environment is tokenised.
"""

import re

TURNS, TOKENS = 4, 8  # guesses of a game, tokens of a guess


def rollout(prompts, generate, *, num_generations, tokenizer):
    """Play num_generations games for each prompt, one turn of all games at a time."""
    games = [[_game(prompt) for _ in range(num_generations)] for prompt in prompts]
    every = [game for group in games for game in group]
    for turn in range(TURNS):
        playing = [game for game in every if not game["over"]]
        drawn = generate([game["prompt"] + game["tokens"] for game in playing], max_tokens=TOKENS) if playing else []
        for game, one in zip(playing, drawn, strict=True):
            _add(game, one["tokens"], one["logp"], trained=True)
            reply = _reply(game, one["text"])
            if reply != "right" and turn + 1 < TURNS:
                ids = _encoded(reply, tokenizer, after=one["tokens"][-1])
                _add(game, ids, [float("nan")] * len(ids), trained=False)
    return [[{key: game[key] for key in ("tokens", "logp", "trained", "text")} for game in group] for group in games]


def solved(completions, number) -> list[float]:
    """1 for the right number, less 0.1 for each guess before it; `text` of a game is its guesses and replies, one a line."""
    games = [one[-1]["content"].split("\n") for one in completions]
    return [1 - 0.1 * (len(game) - 1) if game[-1].endswith(" right") else 0.0 for game in games]


def near(completions, number) -> list[float]:
    """How near the nearest guess came, 1 at the number and 0 at a distance of 10, or without any number."""
    guesses = [[int(guess) for guess in re.findall(r"^(\d+) ", one[-1]["content"], re.M)] for one in completions]
    return [max((1 - abs(guess - right) / 10 for guess in some), default=0.0) for some, right in zip(guesses, number, strict=True)]


def _game(prompt: dict) -> dict:
    start = {"prompt": prompt["tokens"], "number": prompt["columns"]["number"]}
    return start | {"tokens": [], "logp": [], "trained": [], "text": "", "over": False}


def _add(game: dict, tokens: list[int], logp: list[float], *, trained: bool) -> None:
    game["tokens"] = game["tokens"] + tokens
    game["logp"] = game["logp"] + logp
    game["trained"] = game["trained"] + [trained] * len(tokens)


def _reply(game: dict, text: str) -> str:
    """What the environment says to a guess; keeps the transcript."""
    match = re.search(r"\d{1,3}", text)
    guess, number = int(match[0]) if match else None, game["number"]
    reply = "a number, please" if guess is None else "right" if guess == number else "higher" if guess < number else "lower"
    game["over"] = reply == "right"
    game["text"] = f"{game['text']}\n{'?' if guess is None else guess} {reply}".strip()
    return reply


def _encoded(reply: str, tokenizer, *, after: int) -> list[int]:
    """The ids between two turns of the model: the end of its turn, unless it wrote that itself, and the environment's turn."""
    talk = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "ANSWER"}, {"role": "user", "content": reply}]
    text = tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
    ids = tokenizer.encode(text.rpartition("ANSWER")[2], add_special_tokens=False)
    return ids[1:] if ids[0] == after else ids
