"""Config files: values arrive as their types or are refused by name; nothing is guessed, and a file cannot cost more than its size."""

import random

import pytest
import yaml

from treetune.cli import main, parse
from treetune.cli.methods.sft import Sft
from treetune.core.config import reading, table
from treetune.core.data import dataset_fields

READ = {
    "max_steps: 1e1": ("max_steps", 10),
    "max_steps: 2_000": ("max_steps", 2000),
    "max_steps: 5.0": ("max_steps", 5),
    "learning_rate: 1e-5": ("learning_rate", 1e-5),
    "optimizer: adamw_torch": ("optimizer", "adamw"),
    "optimizer: adamw_bnb_8bit": ("optimizer", "adamw_8bit"),
    "optimizer: paged_lion_32bit": ("optimizer", "paged_lion"),
    "optim_args: {adjust: original}": ("optim_args", ('adjust="original"',)),
    "learning_rate: 2": ("learning_rate", 2.0),
    "lora_r: 0x10": ("lora_r", 16),
    "seed: 1_000_000.0": ("seed", 1_000_000),
    "seed: 4611686018427387903": ("seed", 2**62 - 1),
    "shuffle: no": ("shuffle", False),
    "seed: +3": ("seed", 3),
    "seed: 1e18": ("seed", 10**18),
    "weight_decay: .5": ("weight_decay", 0.5),
    'tokens: ["yes", "12:30", "-x", "--seed=3", ""]': ("tokens", ("yes", "12:30", "-x", "--seed=3", "")),
    "data: a.jsonl": ("data", ("a.jsonl",)),
    'default_system_message: "12:30"': ("default_system_message", "12:30"),
    "default_system_message: null": ("default_system_message", None),
    "default_system_message: !!str 12:30": ("default_system_message", "12:30"),
    "default_system_message: 1e5": ("default_system_message", "1e5"),
    "tokens: &a [x]\nlora_target_modules: *a": ("lora_target_modules", ("x",)),
    "\ufeffseed: 3": ("seed", 3),
    "seed: 3\r\nlora_r: 4\r\n": ("lora_r", 4),
    "special_tokens: {pad_token: <p>}": ("special_tokens", ("pad_token=<p>",)),
    "lora_layers: [0, 1e0]": ("lora_layers", (0, 1)),
    "sample_prompt: |\n  two\n  lines\n": ("sample_prompt", "two\nlines\n"),
    "--- \nseed: 3\n...\n": ("seed", 3),
    "max_steps: ~": ("max_steps", None),
}


def parsed(text, folder, command="sft", *flags):
    (folder / "c.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    config, given = parse.parse(command, main.COMMANDS[command].config, ["--config", "c.yaml", *flags])
    return table.flatten(config), given


@pytest.mark.parametrize("text", READ)
def test_values_are_read_as_they_are_written(text, here):
    name, value = READ[text]
    read = parsed(text, here)[0][name]
    assert (tuple(read) if isinstance(value, tuple) else read) == value and type(read) in (type(value), list)


REFUSED = {
    "tokens: [yes, no]": ("tokens entry 1 must be a text", "yes, which YAML reads as true", "quotes"),
    "tokens: ['<a>', null]": ("tokens entry 2 must be a text", "null"),
    "tokens: [a, [b]]": ("tokens entry 2", "list"),
    "tokens: {a: b}": ("tokens must be a text, or a list", "mapping"),
    "default_system_message: 12:30": ("default_system_message must be a text", "12:30, which YAML reads as the number 750"),
    "default_system_message: 017": ("default_system_message", "the number 15"),
    "default_system_message: 2024-01-01": ("a date", "quotes"),
    "default_system_message: [x]": ("default_system_message must be a text", "list"),
    "default_system_message: 5": ("got 5 (integer)",),
    "seed: 12:30": ("seed must be a whole number", "12:30"),
    "seed: 017": ("seed", "017", "15"),
    "seed: 0o17": ("seed", "0o17"),
    "seed: '5'": ("seed", "quotes away"),
    "seed: 1.5": ("seed must be a whole number", "1.5"),
    "seed: yes": ("seed", "yes"),
    "seed: .inf": ("seed",),
    "seed: .nan": ("seed",),
    "seed: 1e400": ("seed",),
    f"seed: {'9' * 10000}": ("seed", "10000 digits"),
    "seed: 1e23": ("seed", "1e23"),
    "seed: 08": ("seed", "08"),
    "seed: [1]": ("seed", "list"),
    "seed: {a: 1}": ("seed", "mapping"),
    "seed:": ("seed has no value",),
    "learning_rate: 1e-5x": ("learning_rate", "1e-5x"),
    "learning_rate: .nan": ("learning_rate",),
    "learning_rate: 190:20:30.15": ("learning_rate",),
    "learning_rate: 1e400": ("learning_rate",),
    "shuffle: 1": ("shuffle must be true or false", "1 (integer)"),
    "shuffle: ~": ("shuffle has no value",),
    "shuffle: 'on'": ("shuffle must be true or false",),
    "adapter: no": ("adapter must be one of lora, qlora, none", "no"),
    "adapter: ~": ("adapter",),
    "optimizer: adam": ("optimizer", "adamw"),
    "adapter: LORA": ("adapter must be one of",),
    "lora_layers: [0, x]": ("lora_layers entry 2",),
    "lora_layers: [0, -1]": ("lora_layers entry 2",),
    "special_tokens: {pad_token: 5}": ("special_tokens: pad_token must be a text",),
    "special_tokens: {a=b: c}": ("special_tokens", "a=b"),
    "special_tokens: {pad_token: x, pad_token: y}": ("line 1", "'pad_token' is given twice"),
    "seed: 1\nseed: 2": ("line 2", "'seed' is given twice", "line 1"),
    "datasets:\n- path: a\n  type: {format: a,\n   format: b}": ("line 4", "'format' is given twice"),
    "1: 2": ("key 1",),
    "yes: 2": ("key yes",),
    "? [a]\n: 2": ("the key a list",),
    "~: 2": ("key ~",),
    "- a": ("got a list",),
    "just words": ("got a single value",),
    "seed: 1\n---\nseed: 2": ("several documents",),
    "model: !!python/object/apply:os.system ['touch owned']": ("!!python/object/apply:os.system",),
    "model: !!binary aGk=": ("!!binary",),
    "tokens: !!set {a}": ("!!set",),
    "model: !mine x": ("!mine",),
    "model: !!int '5'": ("!!int",),
    "seed:\t3\n\tlora_r: 4": ("not valid YAML", "line"),
    "model: [a": ("not valid YAML",),
    "model: *nope": ("not valid YAML", "nope"),
    "model: &a [*a]": ("nested more than",),
    "<<: 3": ("<<",),
    "data: &a [x, *a]": ("nested more than",),
    b"model: \xff": ("not UTF-8",),
    b"s\x00eed: 1": ("not valid YAML",),
    "model: " + "[" * 3000: ("nested",),
    "model: x" + "\n" * (1 << 20): ("bytes",),
    "model: " + "[" * 60 + "]" * 60: ("nested more than",),
}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("text", REFUSED, ids=lambda text: str(text)[:40])
def test_what_is_not_the_type_is_one_line(text, here, kit, tune):
    (here / "c.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    done = tune("sft", "--config", "c.yaml")
    kit.refused(done, "c.yaml")
    assert all(word in done.err for word in REFUSED[text]), done.err
    assert len(done.err) < 700 and {path.name for path in here.iterdir()} == {"c.yaml"}


def test_aliases_are_bounded_by_what_they_expand_to(here):
    """Nine lists of nine aliases each are 4e8 values; the walk ends after a bounded number of them."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"] + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 9)]
    with pytest.raises(ValueError, match="more than 100000 values"):
        parsed("\n".join(lines), here)


@pytest.mark.parametrize("place", ["", "folder", "/dev/zero", "x" * 300, "a\x00b", "missing/c.yaml"])
def test_a_config_that_is_no_file_is_one_line(place, here, kit, tune):
    (here / "folder").mkdir()
    kit.refused(tune("sft", f"--config={place}"), "config file")


def test_merge_keys_give_way_to_own_ones(here):
    text = "datasets:\n- &base {path: a.jsonl, limit: 3}\n- {<<: *base, limit: 4}\n- {<<: [{split: test}, *base]}\n"
    assert parsed(text, here)[0]["datasets"] == [
        {"path": "a.jsonl", "limit": 3},
        {"path": "a.jsonl", "limit": 4},
        {"path": "a.jsonl", "limit": 3, "split": "test"},
    ]


def test_no_value_becomes_an_argument(here):
    """Texts that begin with dashes stay texts, whatever command line they would make."""
    config, _ = parsed('data: ["--help"]\nlora_target_modules: [q_proj, "--seed=3"]\nsample_prompt: "--overwrite"\n', here)
    assert config["data"] == ["--help"] and config["lora_target_modules"] == ["q_proj", "--seed=3"] and config["seed"] == 42
    assert config["sample_prompt"] == "--overwrite" and config["overwrite"] is False


def test_flags_win_over_the_file(here):
    config, given = parsed("seed: 7\nlora_r: 4\nshuffle: false\ndata: [a, b]\n", here, "sft", "--seed=8", "--shuffle", "--data", "c")
    assert (config["seed"], config["lora_r"], config["shuffle"], config["data"]) == (8, 4, True, ["c"])
    assert given == {"seed", "lora_r", "shuffle", "data"}


def test_a_file_may_hold_the_words_of_a_command(here):
    config, _ = parsed("adapter: run\noutput: merged\n", here, "merge")
    assert (config["adapter"], config["output"]) == ("run", "merged")
    assert parsed("adapter: run\noutput: merged\n", here, "merge", "mine", "there")[0]["adapter"] == "mine"
    assert parsed("prompt: [hi]\n", here, "generate")[0]["prompt"] == ["hi"]


TEXTS = [
    "yes",
    "12:30",
    "--seed=3",
    "null",
    "1e5",
    "017",
    "2024-01-01",
    "~",
    "",
    " a ",
    "\u00e9\u4f60\U0001f600",
    "two\nlines",
    "tab\there",
    "'\"",
    "# no",
    "a: b",
    "\x85\u2028",
    "<<",
    "=",
    "-",
    ".inf",
    "0x1f",
    "!!str x",
    "&a",
    "*a",
    "%",
    "@",
    "`",
]


def odd(kind, option, draw):
    """A value of an option that is hard to write."""
    import typing

    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is tuple and args[0] is not str:
        return tuple(odd(args[0], option, draw) for _ in range(3))
    if origin is tuple:
        return tuple(draw.sample(option.choices or TEXTS, 4))
    if option.choices and type(None) not in args:
        return draw.choice(option.choices)
    if type(None) in args:
        return odd(next(one for one in args if one is not type(None)), option, draw)
    known = option.range
    if kind is int:
        return int(draw.choice([known.low, known.high, draw.randint(int(known.low), int(known.high))]))
    if kind is float:
        low, high = known.low, min(known.high, 1e6)
        value = draw.choice([low + (high - low) * draw.random() / 2, 10 ** -draw.uniform(1, 9)])
        return value if known.holds(value) else 0.25 if known.holds(0.25) else low + 0.25
    return draw.choice([True, False]) if kind is bool else draw.choice(TEXTS)


def filled(config, draw):
    """A config of this class with an odd value for each option."""
    import dataclasses

    kinds, options, parts = table.kinds(config), table.options(config), {}
    entry = {"path": draw.choice(TEXTS) or "x", "type": None, "roles": {"user": draw.sample(TEXTS, 3)}, "limit": 3, "weight": 0.5}
    entry |= {"chat_template_kwargs": {"a": [1, 2.5, None, "yes"], "12:30": {}}, "train_on_inputs": False, "field_tools": None}
    entry["path"] = entry["path"].strip() or "x"
    entry |= {"field_prompt": "yes", "text_column": "on", "skip": 7}
    fields = dataset_fields.of_options(options)
    entry = {name: value for name, value in entry.items() if name in fields and (name != "type" or "roles" in fields)}
    rows = (entry, entry)
    for part in dataclasses.fields(config):
        group = part.default_factory() if part.default_factory is not dataclasses.MISSING else None
        if group is None:
            parts[part.name] = odd(kinds[part.name], options[part.name], draw)
        else:
            values = {name: rows if options[name].of_mappings else odd(kinds[name], options[name], draw) for name in vars(group)}
            parts[part.name] = dataclasses.replace(group, **values)
    return config(**parts)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("command", main.COMMANDS)
def test_a_config_that_was_written_reads_back_as_the_same(command, here):
    config = main.COMMANDS[command].config
    for seed in range(5):
        written = filled(config, random.Random(seed))
        text = reading.to_yaml(written)
        (here / "c.yaml").write_text(text, encoding="utf-8")
        again, _ = parse.parse(command, config, ["--config", "c.yaml"])
        assert again == written and reading.to_yaml(again) == text
    assert parse._run_tyro(command, config, table.flatten(written), []) == again, "as beside flags"


def test_yaml_itself_agrees_with_what_is_written():
    """Other tools read our config.yaml as we do."""
    written = filled(Sft, random.Random(0))
    assert yaml.safe_load(reading.to_yaml(written)) == table.flatten(written)


def test_unknown_keys_are_told_all_at_once(here, kit, tune):
    (here / "c.yaml").write_text("model: m\nmodel_name: m\nlr: 1\nload_in_4bit: true\nlora_rr: 3\nfrobnicate: 1\n")
    done = tune("sft", "--config", "c.yaml")
    kit.refused(
        done,
        "unknown keys 'model_name' .did you mean model",
        "'lr' .did you mean learning_rate",
        "'load_in_4bit' .did you mean quant: nf4\\?",
        "'lora_rr' .did you mean lora_r\\?",
        "'frobnicate'[;,]",
    )
