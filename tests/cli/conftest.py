"""A tiny random model with a byte-level tokenizer and rows to train it on, and a way to run commands on them.

Everything is written once per session and never changed; each test runs in an empty folder of its own.
"""

import gc
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import NamedTuple

import pytest

os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SIZES = dict(
    vocab_size=260, hidden_size=32, mlp_size=48, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, max_positions=256, tied=True,
    init_std=0.2,
)  # fmt: skip


class Tiny(NamedTuple):
    """Folders and files that tests share: models, and rows of each format."""

    model: Path
    other: Path  # another width
    same: Path  # the same sizes, other weights
    untied: Path  # a head of its own
    bare: Path  # no chat template
    long: Path  # 2048 positions
    chat: Path
    alpaca: Path
    text: Path


class Done(NamedTuple):
    """A finished command: its exit code and what it printed."""

    code: int
    out: str
    err: str


def tokenizer(template: str | None = CHATML):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    fast.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    fast.chat_template = template
    return fast


def chats(count: int, first: int = 0) -> list[dict]:
    """Sums of ragged lengths, a few with a second turn."""
    rows = []
    for i in range(first, first + count):
        turns = [("user", f"{i} + {i * 7 % 11}" + " please" * (i % 3)), ("assistant", f"{i + i * 7 % 11}" + "!" * (i % 4))]
        turns += [("user", "sure?"), ("assistant", "yes")] * (i % 5 == 0)
        rows.append({"messages": [{"role": role, "content": content} for role, content in turns]})
    return rows


def write_rows(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_model(path: Path, *, seed: int = 1, template: str | None = CHATML, **sizes) -> Path:
    """A model folder as others make them: without a manifest, so that a test may edit its files."""
    from treetune.core import manifest
    from treetune.models import hf, llama

    hf.save(path, hf.random("llama", llama.Config(**(SIZES | sizes)), seed=seed), tokenizer=tokenizer(template))
    (path / manifest.NAME).unlink()
    return path


def write_tokenizer(path: Path) -> Path:
    """A folder with a tokenizer of the tiny model's letters in another order, and nothing else."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet(), reverse=True)
    core = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    other = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    other.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    other.chat_template = CHATML
    other.save_pretrained(path)
    return path


def write_experts(path: Path, **changed) -> Path:
    """A model folder with experts in each layer."""
    from treetune.models import decoder_config, hf, moe

    experts = moe.Experts(count=4, top_k=2, width=16, layers=(0, 1), normalised=False)
    sizes = SIZES | {"qk_norm": True, "tied": False, "experts": experts} | changed
    hf.save(path, hf.random("qwen3_moe", decoder_config.Config(**sizes), seed=1), tokenizer=tokenizer())
    return path


@pytest.fixture(scope="session", autouse=True)
def parsers():
    """The parser of a config class is built once, by its class: building it takes longer than all that a refused command does."""
    import tyro
    from tyro import _parsers

    build, built = _parsers.ParserSpecification.from_callable_or_type, {}

    def get(f, **named):
        if named["parent_classes"] or named["default_instance"] is not tyro.MISSING_NONPROP:
            return build(f, **named)
        if f not in built:
            built[f] = build(f, **named)
        return built[f]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_parsers.ParserSpecification, "from_callable_or_type", staticmethod(get))
        yield


def write_biased(path: Path) -> Path:
    """A model folder with biases on the query, key and value projections."""
    from treetune.models import decoder_config, hf

    hf.save(path, hf.random("qwen2", decoder_config.Config(**SIZES | {"qkv_bias": True}), seed=1), tokenizer=tokenizer())
    return path


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Tiny:
    root = tmp_path_factory.mktemp("tiny")
    alpaca = [{"instruction": f"Add 1 to {i}.", "input": "" if i % 2 else "now", "output": str(i + 1)} for i in range(12)]
    text = [{"text": f"Line {i}. " + "the cat sat. " * (1 + i % 4)} for i in range(16)]
    return Tiny(
        write_model(root / "model"),
        write_model(root / "other", hidden_size=48),
        write_model(root / "same", seed=2),
        write_model(root / "untied", tied=False),
        write_model(root / "bare", template=None),
        write_model(root / "long", max_positions=2048),
        write_rows(root / "chat.jsonl", chats(24)),
        write_rows(root / "alpaca.jsonl", alpaca),
        write_rows(root / "text.jsonl", text),
    )


@pytest.fixture(scope="session")
def kit():
    """The helpers of this file, for tests that cannot import it."""
    return sys.modules[__name__]


@pytest.fixture(scope="session")
def runs(tiny, tmp_path_factory) -> Path:
    """A LoRA run `lora` and a full run `full`, finished."""
    from treetune.cli import main

    root = tmp_path_factory.mktemp("runs")
    for name, extra in (("lora", ()), ("full", ("--adapter", "none"))):
        assert main.main(["sft", *basics(tiny, "--sample-prompt=", "--output-dir", root / name, *extra)]) == 0
    return root


@pytest.fixture(scope="module")
def begun(tmp_path_factory) -> Path:
    """A folder for what the tests of a file make once and then only read."""
    return tmp_path_factory.mktemp("begun")


@pytest.fixture
def run(runs, here) -> Path:
    """A run folder `r` in the working folder."""
    return shutil.copytree(runs / "lora", here / "r")


@pytest.fixture(scope="session")
def finished_runs(tmp_path_factory) -> dict[tuple, Path]:
    """The runs of `finished` by their arguments."""
    return {(): tmp_path_factory.mktemp("finished")}


@pytest.fixture
def finished(finished_runs, tiny, tune, here):
    """finished("sft", ...) -> a copy of the folder of a finished run, `run` in the working folder; each is trained once per session."""

    def get(command, *args) -> Path:
        if (command, *args) not in finished_runs:
            folder = finished_runs[()] / str(len(finished_runs))
            done = tune(command, *basics(tiny, *args, "--output-dir", folder))
            assert done.code == 0, done.err
            finished_runs[(command, *args)] = folder
        return shutil.copytree(finished_runs[(command, *args)], here / "run")

    return get


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """An empty working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def tune(here, capsys):
    """tune("sft", "--max-steps", 2, ...) -> Done, in this process, in the empty working folder."""
    from treetune.cli import main

    def run(*args) -> Done:
        capsys.readouterr()
        try:
            code = main.main([str(arg) for arg in args])
        except SystemExit as stop:
            code = stop.code or 0
        out, err = capsys.readouterr()
        return Done(code, out, err)

    return run


@pytest.fixture
def forked(here, monkeypatch):
    """forked(prepare, "sft", ...) -> Done of a command in a process of its own, forked from this one: `prepare()` may break things.

    The code of a process that a signal killed is minus its number. A fork starts in no time; a few tests start a fresh process instead.
    """
    from treetune.cli import main

    def child(prepare, args) -> int:
        sys.stdout, sys.stderr = open(here / ".out", "w"), open(here / ".err", "w")
        prepare()
        return main.main([str(arg) for arg in args])

    def run(prepare, *args) -> Done:
        monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")  # its threads do not live through a fork
        if (pid := os.fork()) == 0:
            gc.freeze()  # what the tests before have left is not looked at, and so not copied
            code = 99
            try:
                code = child(prepare, args)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        until = time.monotonic() + 120
        while not (ended := os.waitpid(pid, os.WNOHANG))[0]:
            time.sleep(0.005)
            if time.monotonic() > until:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                pytest.fail("the forked command hangs")
        code = os.waitstatus_to_exitcode(ended[1])
        return Done(code, *((here / name).read_text() for name in (".out", ".err")))

    return run


@pytest.fixture
def sft(tune, tiny):
    """sft(...) -> Done of a short LoRA run on the chat rows; the arguments add to or replace the basic ones."""
    return lambda *args, without=(): tune("sft", *basics(tiny, *args, without=without))


def basics(tiny: Tiny, *args, without: tuple[str, ...] = ()) -> list[str]:
    """Arguments of a short run, but for those that `args` gives itself and those to leave out."""
    known = {
        "--model": tiny.model, "--data": tiny.chat, "--sequence-len": 128, "--lora-r": 4, "--sample-tokens": 4, "--max-steps": 2,
    }  # fmt: skip
    args = [str(arg) for arg in args]
    full, names = "none" in args, {arg.partition("=")[0] for arg in args}
    if "--sample-prompt=" in args:
        names.add("--sample-tokens")
    kept = {flag: value for flag, value in known.items() if flag not in (*names, *without) and not (full and flag == "--lora-r")}
    return [str(part) for pair in kept.items() for part in pair] + args


def spawn(*args, cwd: Path, program: str = "from treetune.cli.main import main; import sys; sys.exit(main())", **options):
    """A started subprocess with one thread (the tests share few cores); `program` may patch things before main."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-c", program, *[str(arg) for arg in args]]
    return subprocess.Popen(command, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def metrics(root: Path, name: str = "metrics.jsonl") -> list[dict]:
    return [json.loads(line) for line in (root / name).read_text(encoding="utf-8").split("\n") if line]


def samples(root: Path) -> list[dict]:
    return metrics(root, "samples.jsonl")


TIMES = ("step_seconds", "tokens_per_second", "supervised_tokens_per_second", "memory_gib", "eval/seconds")


def timeless(records: list[dict]) -> list[dict]:
    """The records without what the clock and the machine decide."""
    return [{key: value for key, value in record.items() if key not in TIMES} for record in records]


def tensors(path: Path) -> dict:
    """All tensors of a safetensors file."""
    from safetensors.torch import load_file

    return load_file(path)


def state(root: Path, step: int) -> dict:
    return tensors(root / "checkpoints" / f"step_{step:06d}" / "state.safetensors")


def left(root: Path, step: int) -> tuple:
    """All that a finished run leaves, without times."""
    weights = root / ("adapter/adapter_model.safetensors" if (root / "adapter").exists() else "model/model.safetensors")
    return state(root, step), tensors(weights), timeless(metrics(root))


def die_at(step: int):
    """Patch the loop to die right after the weights of this step have changed."""
    from treetune.core.run import recorder

    def prepare():
        push = recorder.Recorder.push

        def patched(self, index, metrics):
            done = push(self, index, metrics)
            if index == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return done

        recorder.Recorder.push = patched

    return prepare


def same(one: dict, other: dict) -> bool:
    """Bit for bit."""
    import torch

    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def refused(done: Done, *words: str) -> None:
    """Assert one line on stderr that holds every word, and exit code 2."""
    assert done.code == 2, done
    lines = done.err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("treetune: error: "), done.err
    for word in words:
        assert re.search(word, lines[0]), f"{word!r} is not in: {lines[0]}"


def snapshot(root: Path) -> dict[str, bytes | str]:
    """Everything below a folder: the bytes of files, the targets of links."""
    found = {}
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root).as_posix()
        found[name] = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else "folder"
    return {name: value for name, value in found.items() if name not in (".out", ".err")}


def listing(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*")}
