"""Mutated config files: whatever an option or a field of `datasets` holds, it is read, or it is one line that names it; never a traceback.

Every option of every command, and every field of an entry, is replaced by null, another type, nothing, negative, huge and nested values.
"""

import contextlib
import types

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from treetune.cli import main
from treetune.core.config import table
from treetune.core.data import dataset_fields

SCALARS = [
    "", "~", "null", "true", "no", "On", "0", "-1", "1", "7", "1.5", "-0.5", "1e1", "1e-5", "1e23", "1e400", "-1e400", "1.0e+400", "5.0",
    ".inf", "-.inf", ".nan", "017", "0x1F", "0o17", "08", "12:30", "190:20:30.15", "2_000", "2024-01-01", "2024-01-01 10:00:00", "'5'",
    "'yes'", '""', "' '", "x", "-x-", "'--seed=3'", "'--help'", '"\\0"', '"\\ud83d\\ude00"', '"two\\nlines"',
    "\u00e9\u4f60\U0001f600", "nope.jsonl",
    "nope/nope", "/", "..", "/dev/null", "'*'", "'['", "'('", "'{'", "'%'",
    "'a=b'", "'x=nan'", "'=1'", "'{{ x'", "'http://'", "'file://nope'",
    "'a.b'",
    "'a.py:b'", "'[:1%]'", "'train[:'", "9" * 20, "-" + "9" * 20, "9" * 400, "9" * 5000, "a" * 5000, "'" + "\u202e" * 9 + "'",
    "!!binary aGk=",
    "!!set {a}", "!!python/name:os.system", "*nope", "&a [*a]", "<<", "'<<'", "=",
]  # fmt: skip
NESTED = st.recursive(
    st.sampled_from([text for text in SCALARS if text and len(text) < 50 and text[0] not in "!&*"]),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3).map(lambda items: f"[{', '.join(items)}]"),
        st.lists(
            st.tuples(st.sampled_from(["a", "path", "role", "content", "user", "'1'", "x y"]), inner),
            max_size=3,
            unique_by=lambda kv: kv[0],
        ).map(lambda items: "{" + ", ".join(f"{name}: {value}" for name, value in items) + "}"),
    ),
    max_leaves=6,
)
VALUES = st.one_of(st.sampled_from(SCALARS), NESTED, st.integers(1, 200).map(lambda depth: "[" * depth + "x" + "]" * depth))
OPTIONS = [(command, name) for command in main.COMMANDS for name in table.defaults(main.COMMANDS[command].config)]
REQUIRED = {"merge": ["a/b", "b/c"], "check": ["a/b"], "quantize": ["a/b", "b/c"], "export": ["a/b", "b/c"]}
KEPT = {"max_examples": 120, "deadline": None, "derandomize": True}
CHECKS = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
KINDS = {"sft": "chat.jsonl", "dpo": "pairs.jsonl", "kto": "judged.jsonl", "reward": "pairs.jsonl", "prm": "steps.jsonl"}


def one_line(done, *names):
    """Accepted, or refused in one line of bounded length that names one of `names`."""
    assert done.code in (0, 2), done
    if done.code == 2:
        assert done.err.startswith("treetune: error: ") and done.err.count("\n") == 1, done.err
        assert len(done.err) < 8000 and "TREETUNE_TRACEBACK" not in done.err, done.err
        assert any(name in done.err for name in names), (names, done.err)


@pytest.fixture
def stopped(monkeypatch):
    """Commands end where their work would start."""
    monkeypatch.setattr(
        main, "importlib", types.SimpleNamespace(import_module=lambda name: types.SimpleNamespace(run=lambda config, given: 0))
    )


def an_option(here, tune, command, name, text):
    (here / "c.yaml").write_text(f"{name}: {text}\n", encoding="utf-8", errors="surrogatepass")
    before = sorted(path.name for path in here.iterdir())
    names = (name, name.replace("_", "-"), "c.yaml", text.strip("'\""), *REQUIRED.get(command, []))
    one_line(tune(command, *REQUIRED.get(command, []), "--config", "c.yaml"), *names)
    assert sorted(path.name for path in here.iterdir()) == before


@given(st.sampled_from(OPTIONS), VALUES)
@settings(**KEPT, suppress_health_check=CHECKS)
def test_any_value_of_any_option_is_read_or_one_line(here, tune, stopped, option, text):
    an_option(here, tune, *option, text)


@pytest.mark.slow
@given(st.sampled_from(OPTIONS), VALUES)
@settings(**(KEPT | {"max_examples": 4000}), suppress_health_check=CHECKS)
def test_thousands_of_values_of_options_are_read_or_one_line(here, tune, stopped, option, text):
    an_option(here, tune, *option, text)


LISTED = {name for command in main.COMMANDS.values() for name, option in table.options(command.config).items() if option.of_mappings}
FLAGS = [(command, name) for command, name in OPTIONS if name not in LISTED]


@given(st.sampled_from(FLAGS), st.sampled_from([text.strip("'\"") for text in SCALARS if "\\" not in text]))
@settings(**(KEPT | {"max_examples": 60}), suppress_health_check=CHECKS)
def test_any_value_of_any_flag_is_read_or_one_line(here, tune, stopped, option, text):
    command, name = option
    flag = f"--{name.replace('_', '-')}"
    done = tune(command, *REQUIRED.get(command, []), f"{flag}={text}")
    one_line(done, name, flag, flag[2:].upper(), "nrecognized", text[:30])
    assert not list(here.iterdir())


def rows(folder, kit):
    """A file of each kind of rows."""
    kit.write_rows(folder / "chat.jsonl", kit.chats(4))
    kit.write_rows(folder / "pairs.jsonl", [{"prompt": f"{i} + 1", "chosen": f"{i + 1}", "rejected": f"{i}, or so"} for i in range(4)])
    kit.write_rows(folder / "judged.jsonl", [{"prompt": f"{i} + 1", "completion": f"{i}", "label": i % 2 == 0} for i in range(4)])
    kit.write_rows(folder / "steps.jsonl", [{"prompt": f"{i}", "completions": ["a", "b"], "labels": [True, False]} for i in range(4)])


FORMATS = {
    "sft": ["chat_template", "{field_instruction: a, field_output: b}", "completion", "alpaca", "input_output", "~"],
    "dpo": ["chat_template.default", "user_defined.default", "passthrough", "chatml.intel"], "kto": ["user_defined.default", "passthrough"],
    "reward": ["chat_template.default", "bradley_terry"], "prm": ["stepwise_supervised"],
}  # fmt: skip


def an_entry(here, kit, tune, tiny, method, name, text, form):
    """The rows are read with a real tokenizer, so that values of the right type are tried too."""
    fields = {"path": KINDS[method]} | ({} if form is None else {"type": form}) | {name: text}
    body = "".join(f"  {key}: {value}\n" for key, value in fields.items())
    (here / "c.yaml").write_text(f"model: {tiny.model}\nmethod: {method}\ndatasets:\n-\n{body}", encoding="utf-8", errors="surrogatepass")
    with contextlib.chdir(here):
        done = tune("preprocess", "--config", "c.yaml")
    one_line(done, "c.yaml", name, KINDS[method], text.strip("'\""), "format", "rows", "template", "split")
    assert {path.name for path in here.iterdir()} == {"c.yaml", *KINDS.values()}


ENTRY = (st.sampled_from(list(KINDS)), st.sampled_from([*dataset_fields.ROWS, "rolez", "'1'"]), VALUES)


@given(*ENTRY, st.data())
@settings(**(KEPT | {"max_examples": 100}), suppress_health_check=CHECKS)
def test_any_value_of_any_field_of_a_data_set_is_read_or_one_line(here, kit, tune, tiny, method, name, text, data):
    rows(here, kit)
    an_entry(here, kit, tune, tiny, method, name, text, data.draw(st.sampled_from([None, *FORMATS[method]])))


@pytest.mark.slow
@given(*ENTRY, st.data())
@settings(**(KEPT | {"max_examples": 3000}), suppress_health_check=CHECKS)
def test_thousands_of_values_of_fields_of_data_sets_are_read_or_one_line(here, kit, tune, tiny, method, name, text, data):
    rows(here, kit)
    an_entry(here, kit, tune, tiny, method, name, text, data.draw(st.sampled_from([None, *FORMATS[method]])))


@given(st.sampled_from([*dataset_fields.PROMPTS, "rolez"]), VALUES)
@settings(**(KEPT | {"max_examples": 40}), suppress_health_check=CHECKS)
def test_any_value_of_any_field_of_prompts_is_read_or_one_line(here, kit, tune, tiny, monkeypatch, name, text):
    from treetune.cli.commands import train
    from treetune.core.run import folder

    kit.write_rows(here / "asked.jsonl", [{"prompt": f"{i}", "answer": "1"} for i in range(4)])
    (here / "c.yaml").write_text(f"model: {tiny.model}\ndatasets:\n- path: asked.jsonl\n" + f"  {name}: {text}\n" * (name != "path"))

    def read(config, options):
        from treetune.cli import row_settings
        from treetune.core.data import loading
        from treetune.core.run.errors import checking_input
        from treetune.models import tokenizer as tokenizers

        with checking_input():
            tokenizer = tokenizers.load_tokenizer(config.model.model)
            loading.load("prompts", row_settings.prompts(config.data), tokenizer, seed=0)
        return 0

    monkeypatch.setattr(train, "run", read)
    monkeypatch.setattr(folder, "create", None)
    one_line(tune("grpo", "--config", "c.yaml"), "c.yaml", name, "asked.jsonl", text.strip("'\""), "transform", "prompts", "max_prompt_len")
    assert {path.name for path in here.iterdir()} == {"c.yaml", "asked.jsonl"}


def test_fields_of_entries_are_those_that_formats_take():
    """Every option of every format of every kind of rows is in the table, and nothing else is."""
    import inspect

    from treetune.core.data import kinds, sources

    taken = {option for kind in kinds.KINDS.values() for name in kind.names for option in kind.takes(name)}
    read = {*inspect.signature(sources.read).parameters} - {"options"} | sources.SourceOptions.__annotations__.keys()
    assert taken | read | {"type", "train_on_split", "weight"} == dataset_fields.ROWS.keys()
    assert sorted(dataset_fields.PROMPTS) == sorted(read | {"type", "field_prompt"})


@pytest.fixture
def assembled(monkeypatch):
    """Training commands end before the first step, where the run folder would be made."""
    from treetune.cli import assembly, fit
    from treetune.core.run.errors import checking_input

    def assemble(config, *, options=frozenset(), **named):
        with contextlib.ExitStack() as stack, checking_input():
            run = fit.begin(config, (), options, stack)
            assembly.assemble(run, None, stack)
        return fit.Result(None, None, [], None)

    monkeypatch.setattr(fit, "run", assemble)


TEXTS = [text for text in SCALARS if text and len(text) < 100 and text[0] not in "!&*<"]
DEEP = [
    (command, name)
    for command in ("sft", "dpo", "kto", "reward", "prm", "pretrain", "orpo", "preprocess", "eval", "generate")
    for name in table.defaults(main.COMMANDS[command].config)
    if name not in LISTED | {"model", "data", "output_dir", "sequence_len", "device", "val_set_size", "prompt", "max_new_tokens", "method"}
]
ROWS = KINDS | {"pretrain": "text.jsonl", "orpo": "pairs.jsonl", "preprocess": "chat.jsonl", "eval": "chat.jsonl"}


def a_run(here, kit, tune, tiny, command, name, text):
    """The model, the rows and the optimiser are made of the options."""
    import shutil

    for path in here.iterdir():
        path.unlink() if path.is_file() else shutil.rmtree(path)
    rows(here, kit)
    kit.write_rows(here / "text.jsonl", [{"text": f"line {i}"} for i in range(6)])
    small = {"model": str(tiny.model), "data": ROWS.get(command), "sequence_len": 128, "max_new_tokens": 2}
    known = table.defaults(main.COMMANDS[command].config)
    keys = {key: value for key, value in small.items() if key in known and value is not None} | {name: text}
    (here / "c.yaml").write_text("".join(f"{key}: {value}\n" for key, value in keys.items()), encoding="utf-8")
    done = tune(command, "--config", "c.yaml")
    one_line(done, "c.yaml", name.removeprefix("lora_"), name.replace("_", "-"), text.strip("'\"[] "), "jsonl")
    left = {path.name for path in here.iterdir()} - {"c.yaml", "text.jsonl", *KINDS.values()}
    assert not left or name in ("html", "output", "dataset_prepared_path") and done.code == 0, left


@pytest.mark.slow
@given(st.sampled_from(DEEP), st.one_of(st.sampled_from(TEXTS), st.sampled_from(TEXTS).map(lambda text: f"[{text}]")))
@settings(**(KEPT | {"max_examples": 1500}), suppress_health_check=CHECKS)
def test_runs_are_assembled_of_any_value_or_it_is_one_line(here, kit, tune, tiny, assembled, option, text):
    a_run(here, kit, tune, tiny, *option, text)
