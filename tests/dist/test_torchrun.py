"""`treetune sft --nproc 2`, and under torchrun, from rows to adapter: two ranks leave the adapter of one, sharded or not."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

COMMAND = ("-m", "treetune.cli.main")


def quiet_env() -> dict:
    """One thread a rank, no hub."""
    return os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}


def started(place, *args) -> subprocess.CompletedProcess:
    """A command that starts its ranks itself."""
    line = [sys.executable, *COMMAND, *map(str, args)]
    return subprocess.run(line, cwd=place, env=quiet_env(), capture_output=True, text=True, timeout=600)


def _tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|end|>")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a tiny model (257 tokens, which no number of ranks divides) and ragged rows of text."""
    from treetune.models import hf, llama

    root = tmp_path_factory.mktemp("torchrun")
    sizes = dict(vocab_size=257, hidden_size=24, mlp_size=40, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=6, max_positions=128)
    hf.save(root / "model", hf.random("llama", llama.Config(**sizes, tied=True, init_std=0.2), seed=3), tokenizer=_tokenizer())
    rows = [{"text": f"Row {i}: " + "red blue green "[: 1 + 5 * i % 14] * (1 + i % 4)} for i in range(24)]
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def _args(place, output, accumulation, *more, adapter=True, steps=4, saves=2):
    options = {
        "model": place / "model", "data": place / "rows.jsonl", "output-dir": output, "gradient-accumulation-steps": accumulation,
        "sequence-len": 64, "micro-batch-size": 1, "max-steps": steps, "learning-rate": 0.02 if adapter else 0.001,
        "device": "cpu", "val-set-size": 4, "sample-prompt": "Row", "sample-tokens": 3, "save-steps": saves,
        "save-total-limit": 9,
    } | ({"lora-r": 3, "lora-dropout": 0.1} if adapter else {})  # fmt: skip
    flags = (str(part) for name, value in options.items() for part in (f"--{name}", value))
    return ["sft", *flags, "--use-tensorboard", *map(str, more)]


def _losses(run) -> list[float]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [record[key] for record in records for key in ("train/loss", "eval/loss") if key in record]


@pytest.fixture(scope="module")
def alone(place):
    """The run of one rank with twice the accumulation, in this process."""
    from treetune.cli import main

    assert main.main(_args(place, place / "alone", 4)) == 0
    return place / "alone"


@pytest.fixture(scope="module")
def pair(place, torchrun):
    """pair(sharding) -> the run folder of two ranks, made once."""
    made = {}

    def get(sharding):
        if sharding not in made:
            args = _args(place, place / sharding, 2, "--sharding", sharding)
            made[sharding] = torchrun(2, *COMMAND, *args, cwd=place) if sharding == "none" else started(place, *args, "--nproc", 2)
        assert made[sharding].returncode == 0, made[sharding].stderr
        return place / sharding

    return get


@pytest.mark.parametrize("sharding", [pytest.param("none", marks=pytest.mark.slow), "full"])
def test_two_ranks_leave_the_adapter_of_one(alone, pair, saved_leaves, sharding):
    run = pair(sharding)
    one, two = (load_file(path / "adapter" / "adapter_model.safetensors") for path in (alone, run))
    assert one.keys() == two.keys() and len(one) == 2 * 2 * 7
    for name, leaf in one.items():
        assert (leaf - two[name]).abs().max() <= 1e-5 and leaf.abs().max() > 1e-3, name
    assert _losses(run) == pytest.approx(_losses(alone), rel=1e-5) and len(_losses(run)) > 4
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == sorted(path.name for path in (alone / "checkpoints").iterdir())
    assert len(list((run / "tensorboard").iterdir())) == 1, "the first rank alone tells trackers"
    first, last = (saved_leaves(path / "checkpoints" / "step_000004") for path in (alone, run))
    assert first.keys() == last.keys() and all(torch.allclose(first[name], last[name], rtol=1e-4, atol=1e-5) for name in first)
    assert (run / "samples.jsonl").read_text() == (alone / "samples.jsonl").read_text()


def test_commands_know_checkpoints_in_parts(pair, capsys):
    from treetune.cli import main

    run = pair("full")
    checkpoint = run / "checkpoints" / "step_000004"
    assert (checkpoint / "state-00002-of-00002.safetensors").exists()
    assert main.main(["runs", str(run)]) == main.main(["doctor", str(run)]) == 0
    assert main.main(["generate", "Row", "--model", str(checkpoint)]) == 2
    assert f"{checkpoint} is a checkpoint, not a model: name its run {run}" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["nf4", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("int4", "int8", "fp8"))])
def test_two_sharded_ranks_train_on_a_quantised_base_as_one_does(place, launch, kind):
    from treetune.cli import main

    # With a small epsilon the first step is little more than the sign of each gradient, and rounding decides some.
    quant = ("--quant", kind, "--adam-epsilon", 1e-3)
    launch(2, "-m", "treetune.cli.main", *_args(place, place / kind, 2, *quant, "--sharding", "full"), cwd=place)
    assert main.main(_args(place, place / f"{kind} alone", 4, *quant)) == 0
    one, two = (load_file(place / run / "adapter" / "adapter_model.safetensors") for run in (f"{kind} alone", kind))
    assert all((leaf - two[name]).abs().max() <= 1e-5 for name, leaf in one.items())
    assert _losses(place / kind) == pytest.approx(_losses(place / f"{kind} alone"), rel=1e-5)


def test_one_rank_continues_what_two_sharded_ranks_began(place, alone, pair):
    from treetune.cli import main

    resume = pair("full") / "checkpoints" / "step_000002"
    assert main.main(_args(place, place / "ended", 4, "--resume", resume)) == 0
    one, two = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (alone, place / "ended"))
    assert all((leaf - two[name]).abs().max() <= 1e-5 for name, leaf in one.items())
    assert main.main(_args(place, place / "other", 3, "--resume", resume)) == 2, "another number of micro-batches in a step"


def test_bad_input_is_said_once_and_ends_all_ranks(place):
    done = started(place, *_args(place, place / "bad", 2, "--lora-target-modules", "q_porj", "--nproc", 2))
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "'q_porj' matches no parameter" in done.stderr, done.stderr
    assert not (place / "bad").exists()


@pytest.mark.slow
def test_a_killed_rank_is_named_and_all_start_again(place):
    """Killed twice with one restart: the second time the run ends; continued, it leaves the bits of a run that nobody killed."""
    more, run = ("--nproc", 2, "--sharding", "full"), place / "killed"
    args = [*_args(place, run, 2, *more, steps=60, saves=10), "--restarts", "1"]
    with subprocess.Popen([sys.executable, *COMMAND, *args], cwd=place, env=quiet_env(), stderr=subprocess.PIPE, text=True) as job:
        for number in (15, 40):
            _wait(job, lambda number=number: (run / "metrics.jsonl").exists() and len(_losses(run)) > number)
            ranks = [int(pid) for pid in Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()]
            os.kill(ranks[-1], signal.SIGKILL)
            killed = time.monotonic()
            _wait(job, lambda ranks=ranks: not any(Path(f"/proc/{pid}/cwd").exists() for pid in ranks))
            assert time.monotonic() - killed < 60
        error = job.communicate(timeout=120)[1]
    assert job.returncode == 1 and "rank " in error and "was killed by SIGKILL" in error, error
    continued = started(place, *args, "--resume", "auto")
    whole = started(place, *_args(place, place / "whole", 2, *more, steps=60, saves=10))
    assert continued.returncode == whole.returncode == 0, continued.stderr + whole.stderr
    one, other = (load_file(place / name / "adapter" / "adapter_model.safetensors") for name in ("killed", "whole"))
    assert one.keys() == other.keys() and all(torch.equal(leaf, other[name]) for name, leaf in one.items())


# A schedule, which all ranks import, that kills a rank in the middle of its part: rank 1 at step 10, rank 0 at step 20 of the next start.
DEADLY = """
import os, signal
from treetune.core import optim, tensor_file

plain, start = tensor_file.write, int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
rank, step = ((1, "step_000010"), (0, "step_000020"), (None, ""))[min(start, 2)]

def dying(tensors):
    for number, tensor in enumerate(tensors):
        if number == 9:
            with open(os.environ["KILLS"], "a") as file:
                file.write(f"{rank}: {step}, ")
            os.kill(os.getpid(), signal.SIGKILL)
        yield tensor

def write(path, sizes, tensors):
    dies = "KILLS" in os.environ and int(os.environ["RANK"]) == rank and step in path.parent.name
    return plain(path, sizes, dying(tensors) if dies else tensors)

tensor_file.write = write

def steady(peak, steps):
    return optim.constant(peak)
"""


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), ("--async-save",)])
def test_ranks_that_are_killed_while_they_save_start_again_to_the_same_bits(place, more):
    """From the checkpoint before the one that was being written, whose draft goes."""
    (place / "steady.py").write_text(DEADLY)
    args = ["--nproc", 2, "--sharding", "full", "--lr-scheduler", f"{place / 'steady.py'}:steady", "--restarts", 2, *more]
    name = f"killed{len(more)}"
    line = [sys.executable, *COMMAND, *map(str, _args(place, place / name, 2, *args, steps=30, saves=5))]
    began = time.monotonic()
    done = subprocess.run(
        line, cwd=place, env=quiet_env() | {"KILLS": str(place / f"{name} killed")}, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    whole = started(place, *_args(place, place / f"not {name}", 2, *args, steps=30, saves=5))
    assert whole.returncode == 0, whole.stderr
    one, other = (load_file(place / run / "adapter" / "adapter_model.safetensors") for run in (name, f"not {name}"))
    assert one.keys() == other.keys() and all(torch.equal(leaf, other[key]) for key, leaf in one.items())
    left, wanted = (sorted(path.name for path in (place / run / "checkpoints").iterdir()) for run in (name, f"not {name}"))
    assert left == wanted, "no draft is left"
    assert (place / f"{name} killed").read_text() == "1: step_000010, 0: step_000020, "
    assert _losses(place / name) == _losses(place / f"not {name}")
    assert time.monotonic() - began < 400


def _wait(job: subprocess.Popen, until) -> None:
    end = time.monotonic() + 300
    while not until():
        assert job.poll() is None and time.monotonic() < end, job.stderr and job.stderr.read()
        time.sleep(0.1)


@pytest.mark.slow
def test_two_ranks_round_weights_in_bfloat16_as_one_does(place, torchrun, saved_leaves):
    """With the same random numbers: all but the few weights whose gradients, sums of bfloat16 numbers, are between two of them."""
    from treetune.cli import main

    own = ["--adapter", "none", "--master-dtype", "bfloat16"]
    assert main.main(_args(place, place / "half alone", 4, *own, adapter=False)) == 0
    args = _args(place, place / "half", 2, *own, "--sharding", "full", adapter=False)
    done = torchrun(2, "-m", "treetune.cli.main", *args, cwd=place)
    assert done.returncode == 0, done.stderr
    one, two = (saved_leaves(place / name / "checkpoints" / "step_000004") for name in ("half alone", "half"))
    names = [name for name, leaf in one.items() if name.startswith("params") and leaf.ndim == 2]
    assert len(names) == 1 + 2 * 7 and all(one[name].dtype == two[name].dtype == torch.bfloat16 for name in names)
    same = torch.cat([(one[name] == two[name]).flatten() for name in names]).float().mean()
    assert same > 0.97, same
    assert _losses(place / "half") == pytest.approx(_losses(place / "half alone"), rel=1e-2)


@pytest.mark.more
@pytest.mark.parametrize("how", ["sleeps", pytest.param("stopped", marks=pytest.mark.slow)])
def test_a_rank_that_hangs_is_named_and_all_leave_their_stacks(place, how):
    """In the user's own loss, or as a process that the system has stopped."""
    halt = "time.sleep(600)" if how == "sleeps" else "os.kill(os.getpid(), signal.SIGSTOP)"
    (place / f"{how}.py").write_text(
        "import os, signal, time\n\ndef mean(logp):\n"
        f"    if os.environ['RANK'] == '1' and logp.requires_grad:\n        {halt}\n    return -logp\n"
    )
    args = _args(place, place / how, 2, "--nproc", 2, "--rank-timeout", 4, "--loss", f"{how}.py:mean")
    began = time.monotonic()
    done = subprocess.run([sys.executable, *COMMAND, *args], cwd=place, env=quiet_env(), capture_output=True, text=True, timeout=120)
    said = "rank 1 hangs in sleeps.py line 5 (mean)" if how == "sleeps" else "rank 1 does not answer"
    assert done.returncode == 1 and done.stderr.count("error:") == 1 and said in done.stderr, done.stderr
    assert time.monotonic() - began < 90
    assert "core/step.py" in (place / how / "stacks" / "rank-0.txt").read_text(), "where the rank waits that does not hang"
    assert json.loads((place / how / "status.json").read_text())["state"] == "failed"
