"""What the command imports before it answers, what its help says, and that every example runs."""

import contextlib
import functools
import glob
import io
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from treetune.cli import main, parse, requirements
from treetune.cli.methods import CONFIGS
from treetune.core.config import table

ROOT = Path(__file__).parents[2]
TREETUNE = str(Path(sys.executable).with_name("treetune"))
HEAVY = ("torch", "transformers", "datasets", "numpy", "pyarrow", "safetensors")
QUICK = {
    "help": (["--help"], 0),
    "no command": ([], 2),
    "unknown command": (["sfft"], 2),
    "misspelt flag": (["sft", "--lora-rr", "3"], 2),
    "wrong type": (["sft", "--lora-r", "x"], 2),
    "out of range": (["sft", "--lora-r", "0"], 2),
    "would be ignored": (["sft", "--momentum", "0.9"], 2),
    "contradiction": (["sft", "--resume", "auto", "--overwrite"], 2),
    "no config file": (["sft", "--config", "no.yaml"], 2),
    "config key": (["sft", "--config", "c.yaml"], 2),
    "command help": (["sft", "--help"], 0),
    "list of runs": (["runs", "."], 0),
    "no run to examine": (["doctor", "."], 2),
    "config value": (["sft", "--config", "types.yaml"], 2),
    "data set field": (["sft", "--config", "sets.yaml"], 2),
    "data set file": (["sft", "--config", "files.yaml"], 2),
    "missing data": (["sft", "--data", "nope.jsonl"], 2),
    "data of no known type": (["sft", "--data", "c.yaml"], 2),
    "missing held-out data": (["dpo", "--val-data", "nope.jsonl"], 2),
    "missing model": (["grpo", "--model", "nope"], 2),
    "missing reference": (["dpo", "--ref-model", "nope"], 2),
    "missing adapter": (["generate", "hi", "--adapter", "nope"], 2),
    "missing start": (["sft", "--lora-model-dir", "nope"], 2),
    "missing shape": (["pretrain", "--from-config", "nope.json"], 2),
    "missing reward": (["grpo", "--reward-funcs", "nope.py:f"], 2),
    "missing rollout": (["grpo", "--rollout-func", "nope.py:f"], 2),
    "missing template": (["sft", "--chat-template", "nope.jinja"], 2),
    "missing checkpoint": (["sft", "--resume", "nope"], 2),
    "missing python": (["serve", "--python", "nope"], 2),
    "output below a file": (["sft", "--output-dir", "c.yaml/run"], 2),
    "rows to score": (["score", "m", "--data", "nope.jsonl"], 2),
    "rows to evaluate": (["eval", "--data", "nope.jsonl"], 2),
    "scores below a file": (["score", "m", "--output", "c.yaml/scores.jsonl"], 2),
    "prepared below a file": (["sft", "--dataset-prepared-path", "c.yaml/kept"], 2),
}
# A process that has imported nothing but the command, and a fork of it for each answer: each starts as a process of its own would.
ANSWERS = f"""import json, os, sys, tyro
from treetune.cli.main import main
for number, args in enumerate(json.load(sys.stdin)):
    if os.fork():
        os.wait()
        continue
    for handle in (1, 2):
        os.dup2(os.open(f"{{number}}.{{handle}}", os.O_WRONLY | os.O_CREAT), handle)
    try:
        code = main(args)
    except SystemExit as stop:
        code = stop.code or 0
    print('LOADED', code, *[name for name in {HEAVY} if name in sys.modules], flush=True)
    os._exit(0)
"""


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """{case: what is printed, and the errors}, of QUICK."""
    home = tmp_path_factory.mktemp("answers")
    files = {"c": "lora_rr: 3", "types": "lora_r: x", "sets": "datasets: [{path: a, limit: x}]", "files": "datasets: [{path: nope.csv}]"}
    for name, text in files.items():
        (home / f"{name}.yaml").write_text(f"{text}\n")
    told = json.dumps([args for args, _ in QUICK.values()])
    done = subprocess.run([sys.executable, "-c", ANSWERS], input=told, capture_output=True, text=True, cwd=home, check=False)
    assert done.returncode == 0, done.stderr
    return {case: [(home / f"{number}.{handle}").read_text() for handle in (1, 2)] for number, case in enumerate(QUICK)}


@pytest.mark.sampled(4)
@pytest.mark.parametrize("case", QUICK)
def test_answers_before_anything_heavy_is_imported(case, answers):
    """What takes seconds to import is not among the modules when the answer is there; benchmarks measure the seconds."""
    (args, code), (out, err) = QUICK[case], answers[case]
    assert out.splitlines()[-1] == f"LOADED {code}", out + err
    assert err.count("\n") == (code == 2 and bool(args)), err


@functools.cache
def shown(command) -> str:
    """The help of a command, 90 columns wide."""
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), pytest.raises(SystemExit) as stop:
        patch.setenv("COLUMNS", "90")
        main.main([command, "--help"])
    assert stop.value.code in (0, None)
    return out.getvalue()


@pytest.mark.sampled(3)
@pytest.mark.parametrize("command", main.COMMANDS)
def test_help_shows_every_option_with_its_default(command):
    text = re.sub(r"\s+", " ", re.sub(r"[│╭╮╰╯─]", " ", shown(command)))
    for name, default in table.defaults(main.COMMANDS[command].config).items():
        flag = f" --{name.replace('_', '-')}"
        if table.options(main.COMMANDS[command].config)[name].of_mappings:
            assert f"`{name}`" in text or name == "test_datasets"
            continue
        place = re.search(rf"{flag}(?![-\w])", text)
        if place is None:
            assert f" {name.upper()} " in text or f"[{name.upper()}" in text, f"{name} is neither a flag nor a word"
            continue
        end = text.index("(default: ", place.start()) + len("(default: ")
        words = " ".join(f"'{item}'" if " " in str(item) else str(item) for item in default) if isinstance(default, list) else str(default)
        assert text[end:].replace(" ", "").startswith(f"{words})".replace(" ", "")), (name, default, text[end : end + 40])


@pytest.mark.sampled(3)
@pytest.mark.parametrize("command", main.COMMANDS)
def test_help_names_the_config_file(command):
    assert "--config FILE" in shown(command)


def test_usage_names_every_command(capsys):
    assert main.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(re.search(rf"^  {name} +\w", text, re.M) for name in main.COMMANDS) and "Exit codes: 0" in text


def test_version(capsys):
    from importlib.metadata import version

    assert main.main(["--version"]) == 0
    assert capsys.readouterr().out == f"treetune {version('treetune')}\n"


def test_broken_pipe_is_quiet(here):
    """`treetune sft --help | head -1`: the reader leaves, nothing is wrong."""
    with subprocess.Popen([TREETUNE, "sft", "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        assert process.wait() == 141 and process.stderr.read() == ""


def test_an_answer_of_any_characters_is_printed_where_there_are_few(here, tiny, monkeypatch):
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, io.TextIOWrapper(io.BytesIO(), encoding="ascii", write_through=True))
    assert main.main(["generate", "h\u00e9", "two", "--model", str(tiny.model), "--max-new-tokens", "2"]) == 0
    out, err = (stream.buffer.getvalue().decode("ascii") for stream in (sys.stdout, sys.stderr))
    assert "# h?" in out and err == ""


@pytest.mark.slow
def test_terminal_without_unicode(here, tiny):
    """The same in a process of its own."""
    env = os.environ | {"PYTHONIOENCODING": "ascii", "OMP_NUM_THREADS": "1"}
    args = ["generate", "h\u00e9", "two", "--model", str(tiny.model), "--max-new-tokens", "2"]
    done = subprocess.run([TREETUNE, *args], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "# h?" in done.stdout and done.stderr == ""


EXAMPLES = sorted(glob.glob(str(ROOT / "examples/*.yaml")))


def test_there_are_examples():
    assert EXAMPLES


@pytest.mark.sampled(4)
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: Path(path).name)
def test_example_parses_and_runs_two_steps(path, tiny, tune, kit, here):
    """The first line says how to run it. Its data is read from where it is; the model and the length are those of the tests.

    What needs a vLLM server is parsed and checked.
    """
    first = Path(path).read_text().splitlines()[0]
    said = re.fullmatch(rf"# treetune (\w+) --config examples/{re.escape(Path(path).name)}( .*)?", first)
    assert said, f"{first!r} does not say how to run it"
    command = said[1]
    config = main.COMMANDS[command].config
    os.symlink(ROOT / "examples", here / "examples")
    parsed, given = parse.parse(command, config, ["--config", path])
    assert parsed
    requirements.check(parsed, CONFIGS.get(type(parsed)), given)
    if command == "serve" or (hasattr(parsed, "engine") and parsed.engine.use_vllm):
        return
    args = [command, "--config", path, *shlex.split(said[2] or ""), "--model", str(tiny.long)]
    if hasattr(parsed, "run"):
        answers = [] if command in ("reward", "prm") else ["--sample-tokens", "4"]
        args += ["--max-steps", "2", "--max-rows", "20", "--gradient-accumulation-steps", "1", *answers]
    if command == "ebft":
        short = {"ebft_pretrain.transform": ["--val-set-size", "1"], "ebft_opencode.transform": ["--max-completion-length", "16"]}
        args += short.get(parsed.data.format, [])
    if hasattr(parsed, "data") and "sequence_len" in vars(parsed.data) and "sequence_len" not in Path(path).read_text():
        args += ["--sequence-len", "1024"]
    if command == "grpo":
        length = "length?max=8,cache=4"
        rewards = [length if name.startswith("length?") else name for name in parsed.rewards.reward_funcs]
        args += ["--max-completion-length", "8", "--max-prompt-len", "1536", "--num-generations", "2", "--reward-funcs", *rewards]
    done = tune(*args)
    assert done.code == 0, done.err
    if hasattr(parsed, "run"):
        root = parsed.run.output_dir or f"runs/{command}-001"
        assert [record["step"] for record in kit.metrics(here / root) if "train/loss" in record] == [1, 2]
