"""Every command of the README and of docs/ runs as it stands, page by page and in its order, on tiny models and a few rows.

Ids of the hub are found in a cache that holds a tiny model under each name; runs without an end of their own have few steps.
"""

import dataclasses
import importlib.util
import io
import re
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from treetune.cli import main, requirements, sweep
from treetune.core.rollout import server as servers


def _load(name):
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


pages, hub_server = _load("page_commands"), _load("hub_server")
ROOT = pages.ROOT
FAKE = ROOT / "tests" / "core" / "rollout" / "fake_vllm.py"
STEPS, LONGEST = 2, 20  # of runs that name no number of steps, or more than LONGEST
COMPLETION = 16  # the longest completion, in tokens

# Commands of ours that are not run here, and why.
NOT_RUN = {
    "treetune sft --data chats.jsonl --nproc 8 --nnodes 2 --rendezvous node-0:29500 --sharding full --output-dir /shared/run":
        "a second machine; tests/dist/test_ranks.py has one of two machines on this one",
    "treetune grpo --model Qwen/Qwen3-0.6B --use-vllm --async-prefetch": "a server that samples from this model; tests/vllm has one",
    "treetune sft --model MODEL --data chats.jsonl --wandb-project sums": "the service of W&B; make test-trackers runs it offline",
    "treetune lm-eval --adapter runs/mine --tasks hellaswag gsm8k --limit 200 --output-path results.json":
        "rows of the hub; the next command of the page runs a task of files",
    "treetune sft --data rows.jsonl --eval-reward-funcs 'llm_judge?url=http://127.0.0.1:8000/v1,model=NAME' --eval-answers 100":
        "an endpoint of a judge; tests/core/rollout/test_judge.py has one",
}  # fmt: skip
# Programs of others, and words before ours that need a cluster: their lines are read, and what they name must be there.
OTHERS = {
    "pip": "the package index", "make": "takes minutes", "uv": "the package index", "python3": "makes an environment",
    ".": "an environment", ".vllm-venv/bin/python": "the package index", "docker": "images", "export": "a token", "vllm": "a GPU",
    "curl": "a server", "llama-server": "llama.cpp", "llama-cli": "llama.cpp", "cd": "Ollama", "ollama": "Ollama", "hf": "the hub",
    "srun": "SLURM", "RAY_ADDRESS=ray://head:10001": "a cluster of Ray",
}  # fmt: skip
# Runs that a page speaks of, and does not make itself.
BEFORE = {"deployment": "runs/sft-001", "troubleshooting": "runs/sft-001", "evaluation": "runs/mine"}
QUICK = ("axolotl", "distributed", "tracking", "troubleshooting")  # of the working set
ELSEWHERE = {"extending": "tests/test_extending.py", "start": "tests/cli/test_start_page.py"}  # pages that a test of their own follows
LINES = {page.stem: pages.lines(page) for page in pages.PAGES if page.stem not in ELSEWHERE}
OURS = {stem: [line for line in found if line.ours] for stem, found in LINES.items() if any(line.ours for line in found)}
RANKS = [line.text for found in OURS.values() for line in found if "--nproc" in line.words and "plan" not in line.words]


@pytest.fixture(scope="module")
def home(kit, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("home")
    pages.write_models(root, kit.write_model(root / "model", max_positions=2048, init_std=0.05))  # so small that bfloat16 can merge it
    program = root / "vllm-python"
    program.write_text(f'#!/bin/sh\nshift 2\nexec {sys.executable} {FAKE} "$@"\n')
    program.chmod(0o755)
    return root


def _shortened(config, method, given, file):
    """What a command runs on, with few steps where it would take many, and with short completions."""
    out = complete(config, method, given, file)
    if hasattr(out, "rollout"):
        out = dataclasses.replace(out, rollout=dataclasses.replace(out.rollout, max_completion_length=COMPLETION))
    if method is None or (out.optim.max_steps or LONGEST + 1) <= LONGEST:
        return out
    return dataclasses.replace(out, optim=dataclasses.replace(out.optim, max_steps=STEPS))


def _swept(relay, command):
    """A run of a sweep in this process."""
    return main.main([str(word) for word in command[command.index("treetune.cli.main") + 1 :]])


complete = requirements.complete


@pytest.fixture
def scene(here, home, monkeypatch):
    """scene(page) -> the working folder, with what the page takes for granted; the hub is a fake one that takes uploads."""
    from huggingface_hub import constants

    from treetune.core import hub_repos

    hub = hub_server.Hub()
    url = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    for name, value in {
        "HF_HUB_CACHE": str(home / "hub"), "ENDPOINT": hub.url, "HUGGINGFACE_CO_URL_TEMPLATE": url, "HF_HUB_DISABLE_XET": True,
    }.items():  # fmt: skip
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(hub_repos, "WAITS", (0.01,))
    monkeypatch.setattr(requirements, "complete", _shortened)
    monkeypatch.setattr(sweep._Relay, "call", _swept)
    env = {"HF_HUB_CACHE": home / "hub", "TREETUNE_HOME": home, "HF_ENDPOINT": hub.url, "HF_TOKEN": hub_server.TOKEN}
    for name, value in (env | {"TREETUNE_VLLM_PYTHON": home / "vllm-python"}).items():
        monkeypatch.setenv(name, str(value))

    def write(page: Path) -> Path:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", page.stem != "hub")
        pages.write_scene(here, page, home / "models" / "smollm2-135m-instruct")
        if name := BEFORE.get(page.stem):
            kind = ("--adapter", "none") if page.stem == "evaluation" else ()
            assert main.main(["sft", "--model", "Qwen/Qwen3-0.6B", "--data", "chats.jsonl", "--output-dir", name, *kind]) == 0
        return here

    yield write
    hub.close()


def _serve(words):
    """The server says where it is, and ends when it is told; a stand-in takes the place of vLLM, and a free port that of 8000."""
    command = [sys.executable, "-m", "treetune.cli.main", *words[1:], "--port", str(servers.free_port())]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        said = []
        assert any(said.append(line) or "serving " in line for line in running.stdout), said
        running.send_signal(signal.SIGTERM)
        assert running.wait(40) == 0
    finally:
        running.kill()
        running.communicate()


def _named(words, folder: Path) -> None:
    """What a command of another program names of this folder must be there."""
    for word in words[1:]:
        place = word.rpartition("=")[2].partition(" ")[0]
        if "/" in place and not place.startswith(("/", "-")) and (folder / place.split("/")[0]).exists():
            assert (folder / place).exists(), (words, place)


def _follow(line, tune, folder, monkeypatch):
    if not line.ours:
        return _named(line.words, folder)
    if line.words[1] == "serve":
        return _serve(line.words)
    monkeypatch.setattr("sys.stdin", io.StringIO("1 + 1?\n/quit\n"))
    done = tune(*line.words[1:])
    found = line.words[1] == "doctor" and "nothing found" not in done.out
    assert done.code == (1 if found else 0), (line.text, done.out[-2000:], done.err[-2000:])
    return None


@pytest.mark.parametrize("stem", [stem if stem in QUICK else pytest.param(stem, marks=pytest.mark.more) for stem in OURS])
def test_the_commands_of_a_page_run(stem, scene, tune, monkeypatch):
    page = next(page for page in pages.PAGES if page.stem == stem)
    folder = scene(page)
    for line in LINES[stem]:
        if line.text not in NOT_RUN and line.text not in RANKS:
            _follow(line, tune, folder, monkeypatch)
            _named(["", *re.findall(r"[\w-]+/[\w./-]+", line.comment)], folder)
    if stem == "README":
        assert [name for name in pages.run_folder() if not (folder / "runs" / "sft-001" / name).exists()] == []


@pytest.mark.slow
@pytest.mark.parametrize("text", [text for text in RANKS if text not in NOT_RUN])
def test_commands_of_eight_ranks_run(text, scene, kit):
    folder = scene(ROOT / "docs" / "distributed.md")
    running = kit.spawn(*pages.shlex.split(text)[1:], cwd=folder)
    out, err = running.communicate(timeout=400)
    assert running.returncode == 0 and (folder / "runs/sft-001/adapter").is_dir(), out + err


def test_every_reason_is_that_of_a_command():
    texts = {line.text for found in LINES.values() for line in found}
    assert set(NOT_RUN) - texts == set()
    programs = {line.words[0] for found in LINES.values() for line in found if not line.ours}
    assert programs - {"python"} == OTHERS.keys()


def test_what_is_installed_and_made_exists():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    targets = (ROOT / "Makefile").read_text()
    for line in (line for page in pages.PAGES for line in pages.lines(page)):
        if line.words[0] == "make":
            assert f"\n{line.words[1]}:" in targets, line.text
        if "pip" in line.words and "install" in line.words:
            assert {word[9:-1] for word in line.words if word.startswith("treetune[")} <= extras.keys(), line.text


def test_pages_that_are_followed_elsewhere():
    for name in ELSEWHERE.values():
        assert (ROOT / name).is_file()
