"""The code and the commands of docs/online.md, and the reward and rollout functions of the examples."""

import math
import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest

from treetune.cli import main, parse, requirements
from treetune.cli.methods import CONFIGS
from treetune.core import import_path
from treetune.core.config import table
from treetune.losses.presets import POLICY_LOSSES as PRESETS

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "online.md").read_text()


def _generator(texts, kit):
    """generate() of a policy that says `texts`, one after another, and ends each turn itself; what it was asked; its tokenizer."""
    words, asked, left = kit.tokenizer(), [], list(texts)

    def generate(ids, *, max_tokens):
        asked.append([list(one) for one in ids])
        said = [left.pop(0) for _ in ids]
        tokens = [[*words.encode(text, add_special_tokens=False), words.eos_token_id] for text in said]
        return [{"tokens": ids, "logp": [-1.0] * len(ids), "stopped": True, "text": text} for ids, text in zip(tokens, said, strict=True)]

    return SimpleNamespace(generate=generate, asked=asked, tokenizer=words)


def _trained(one) -> list[int]:
    return [token for token, kept in zip(one["tokens"], one["trained"], strict=True) if kept]


def test_the_commands_parse():
    lines = [line.split(" #")[0] for block in re.findall(r"```bash\n(.*?)```", TEXT, re.S) for line in block.splitlines()]
    calls = [shlex.split(line)[1:] for line in lines if line.startswith("treetune ")]
    assert len(calls) >= 5
    for command, *args in calls:
        config, given = parse.parse(command, main.COMMANDS[command].config, args)
        requirements.check(config, CONFIGS.get(type(config)), given)


def test_the_table_of_losses_is_that_of_the_program():
    rows = {row[1]: row[0] for row in re.findall(r"^(\| `(\w+)`(?: \(default\))? \| .*)$", TEXT, re.M) if row[1] in PRESETS}
    assert rows.keys() == PRESETS.keys()
    means = {"token": "tokens of the step", "sequence": "sequences", "constant": "constant length", "sum": "sequences of their token sums"}
    for name, made in PRESETS.items():
        cells = [cell.strip() for cell in rows[name].strip("|").split("|")]
        assert cells[3] == made.advantage and cells[2].startswith(means[made.aggregate]), name
        if made.term in ("ppo_clip", "gmpo"):
            bounds = tuple(float(number) for number in re.findall(r"[\d.]+(?:e-\d)?", cells[4]))
            assert bounds == made.epsilon, name


def test_every_option_that_the_text_names_exists():
    known = {"config", *(name for command in main.COMMANDS.values() for name in table.defaults(command.config))}
    named = {name.replace("-", "_") for name in re.findall(r"--([a-z][a-z-]+)", TEXT)}
    assert named - known - {f"no_{name}" for name in known} == set()


def test_the_reward_of_the_text(kit):
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", TEXT, re.S) if "def accuracy" in block]
    exec(code, names := {})
    said = [[{"role": "assistant", "content": text}] for text in ("it is 4", "5", "6")]
    assert names["accuracy"](said, answer=["4", "4", None], other=[1, 2, 3]) == [1.0, 0.0, None]


def test_the_calculator_of_the_text(kit):
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", TEXT, re.S) if "def rollout" in block]
    exec(code, names := {})
    scene = _generator(["calc(6*7)", "I know: 3", "42 it is"], kit)
    ((tool, plain),) = names["rollout"]([{"tokens": [1, 2]}], scene.generate, num_generations=2, tokenizer=scene.tokenizer)
    assert plain["text"] == "I know: 3" and all(plain["trained"])
    result = scene.tokenizer.encode("\nresult: 42\n", add_special_tokens=False)
    first = [*scene.tokenizer.encode("calc(6*7)"), scene.tokenizer.eos_token_id]
    assert tool["tokens"][: len(first + result)] == first + result and scene.asked[1] == [[1, 2, *first, *result]]
    assert _trained(tool) == first + [*scene.tokenizer.encode("42 it is"), scene.tokenizer.eos_token_id]
    assert [math.isnan(value) for value in tool["logp"]] == [not kept for kept in tool["trained"]]


@pytest.fixture
def guess():
    return lambda name: import_path.import_function(f"{ROOT}/examples/guess_rollout.py:{name}")


def test_a_game_of_guesses(guess, kit):
    scene = _generator(["3", "7", "no idea", "5"], kit)
    prompts = [{"tokens": [1, 2, 3], "columns": {"number": 5}}]
    ((game,),) = guess("rollout")(prompts, scene.generate, num_generations=1, tokenizer=scene.tokenizer)
    assert game["text"] == "3 higher\n7 lower\n? a number, please\n5 right"
    assert scene.tokenizer.decode(game["tokens"]) == (
        "3<|im_end|>\n<|im_start|>user\nhigher<|im_end|>\n<|im_start|>assistant\n7<|im_end|>\n<|im_start|>user\nlower<|im_end|>\n"
        "<|im_start|>assistant\nno idea<|im_end|>\n<|im_start|>user\na number, please<|im_end|>\n<|im_start|>assistant\n5<|im_end|>"
    )
    assert scene.tokenizer.decode(_trained(game)) == "3<|im_end|>7<|im_end|>no idea<|im_end|>5<|im_end|>"
    assert scene.asked[-1][0] == [1, 2, 3, *game["tokens"][:-2]]
    said = [[{"role": "assistant", "content": text}] for text in (game["text"], "9 lower", "? a number, please", "5 right")]
    assert guess("solved")(said, [5] * 4) == [0.7, 0.0, 0.0, 1.0]
    assert guess("near")(said, [5] * 4) == [1.0, 0.6, 0.0, 1.0]


def test_a_game_that_is_won_at_once_asks_no_more(guess, kit):
    scene = _generator(["2", "5"], kit)
    prompts = [{"tokens": [1], "columns": {"number": number}} for number in (2, 5)]
    games = guess("rollout")(prompts, scene.generate, num_generations=1, tokenizer=scene.tokenizer)
    assert [game["text"] for (game,) in games] == ["2 right", "5 right"] and len(scene.asked) == 1


def test_rewards_of_the_examples():
    answer_line, close, brief = (
        import_path.import_function(f"{ROOT}/examples/rewards.py:{name}") for name in ("answer_line", "close", "brief")
    )
    said = ["so\n#### 1,200", [{"role": "assistant", "content": "#### 7\nor not"}], "none"]
    assert answer_line(said, answer=[1, 2, 3]) == [1.0, 0.0, 0.0]
    assert close(said, ["#### 1200", "9", "x"]) == [1.0, pytest.approx(1 / 1.2), None] and close(["none"], [3]) == [0.0]
    assert brief(["a b c", "a b c d e"], words=4) == [0, -0.25]
