"""Two runs on one folder at once, and runs short of memory or of disk: one line each, and nothing of what was there is lost."""

import contextlib
import os
import re
import resource
import shutil
import socket
import subprocess
import sys
import traceback

import pytest
import torch

from treetune.core import ckpt
from treetune.core.run import errors, recorder

RUN = ["--sample-prompt=", "--max-steps", 3, "--save-steps", 1, "--save-total-limit", 9]


@pytest.fixture
def together(here, monkeypatch):
    """together(args, args) -> [(exit code, stderr)] of two commands that were forked from this process and start at the same moment."""
    from treetune.cli import main

    def child(name: str, go: int, args: list) -> None:
        code = 99
        try:
            sys.stdout, sys.stderr = open(here / f".out{name}", "w"), open(here / f".err{name}", "w")
            os.read(go, 1)
            code = main.main([str(arg) for arg in args])
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def run(*commands):
        monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
        go, start = os.pipe()
        pids = []
        for name, args in enumerate(commands):
            if (pid := os.fork()) == 0:
                child(str(name), go, args)
            pids.append(pid)
        os.write(start, b"go")
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        os.close(go), os.close(start)
        return [(code, (here / f".err{name}").read_text()) for name, code in enumerate(codes)]

    return run


def whole(kit, root, steps=3):
    """A finished run with records of one process alone."""
    assert [record["step"] for record in kit.metrics(root) if "train/loss" in record] == list(range(1, steps + 1)), root
    assert kit.state(root, steps) and (root / "adapter/adapter_model.safetensors").exists()
    assert not [path for path in root.rglob(".*") if path.name != ".treetune.json"]


def one_wins(ended):
    """One of two went through; the other was refused in one line with the holder's host and number, or came after its end."""
    for code, err in ended:
        busy = re.fullmatch(rf"treetune: error: \S+ is in use by process \d+ on {re.escape(socket.gethostname())}: .*\n", err)
        assert code == 0 or (code == 2 and (busy or "already holds files" in err)), ended
    assert 0 in [code for code, _ in ended], ended


def pairs(count, kit, tiny, tune, together, here):
    for _ in range(count):
        args = kit.basics(tiny, *RUN)
        assert [code for code, _ in together(["sft", *args], ["sft", *args])] == [0, 0]
        whole(kit, here / "runs/sft-001"), whole(kit, here / "runs/sft-002")
        shutil.rmtree(here / "runs")
        args = kit.basics(tiny, *RUN, "--output-dir", "r")
        for extra in ([], ["--overwrite"], ["--resume", "auto"]):
            one_wins(together(["sft", *args, *extra], ["sft", *args, *extra]))
            whole(kit, here / "r")
        shutil.rmtree(here / "r")


def test_two_processes_on_one_folder(kit, tiny, tune, together, here):
    pairs(1, kit, tiny, tune, together, here)


@pytest.mark.slow
def test_twenty_pairs_of_processes_on_one_folder(kit, tiny, tune, together, here):
    pairs(20, kit, tiny, tune, together, here)


# Short of disk.


@pytest.fixture
def disk(here):
    """disk(bytes) makes `disk` in the working folder a file system of this size, or gives it that size."""
    (here / "disk").mkdir()
    made = []

    def size(count: int) -> None:
        options = f"{'remount,' if made else ''}size={count}"
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", here / "disk"], capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
        made.append(count)

    yield size
    if made:
        subprocess.run(["umount", here / "disk"], check=True)


def full_disks(sizes, kit, tiny, tune, here, disk):
    args = kit.basics(tiny, *RUN, "--output-dir", "disk/r")
    for size in sizes:
        disk(size)
        done = tune("sft", *args)
        assert done.code == 0 or (kit.refused(done, "No space left|could not save|could not write") or True), done
        for path in ckpt.steps(here / "disk/r/checkpoints"):
            assert ckpt.read_meta(path) and kit.tensors(path / "state.safetensors")
        disk(64 << 20)
        done = tune("sft", *args, "--resume", "auto")
        assert done.code == 0, done.err
        whole(kit, here / "disk/r")
        shutil.rmtree(here / "disk/r")


def test_a_full_disk_is_one_line_and_the_run_goes_on_later(kit, tiny, tune, here, disk):
    full_disks((8192, 200 << 10), kit, tiny, tune, here, disk)


@pytest.mark.slow
def test_a_disk_that_is_full_at_any_moment_is_one_line_and_the_run_goes_on_later(kit, tiny, tune, here, disk):
    full_disks(range(4096, 600 << 10, 12288), kit, tiny, tune, here, disk)


def test_an_old_run_survives_a_new_one_on_a_full_disk(kit, tiny, tune, here, disk):
    args = kit.basics(tiny, *RUN, "--output-dir", "disk/r")
    disk(4 << 20)
    assert tune("sft", *args).code == 0
    before = kit.snapshot(here / "disk")
    with contextlib.suppress(OSError), open(here / "disk/filler", "wb", buffering=0) as file:
        while file.write(b"x" * 4096) == 4096:
            pass
    kit.refused(tune("sft", *args, "--overwrite", "--seed", 3), "No space left")
    (here / "disk/filler").unlink()
    assert kit.snapshot(here / "disk") == before


# Short of memory.


def limited(spare: int):
    """A process that may take only so much more address space than it has."""

    def prepare():
        with open("/proc/self/statm") as file:
            taken = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + spare, taken + spare))

    return prepare


def at_step(step: int, do):
    """A process that does something when the weights of this step have changed."""

    def prepare():
        push = recorder.Recorder.push
        recorder.Recorder.push = lambda self, index, *rest: (do() if index == step else None, push(self, index, *rest))[1]

    return prepare


def ask_for_too_much():
    limited(1 << 30)()
    torch.empty(1 << 38, dtype=torch.uint8)


def test_a_run_out_of_memory_is_one_line_and_its_checkpoints_stay(kit, tiny, tune, forked, here):
    args = kit.basics(tiny, *RUN, "--output-dir", "r")
    done = forked(at_step(2, ask_for_too_much), "sft", *args)
    assert done.code == 1 and done.err.count("\n") == 1 and "out of memory: try --micro-batch-size 1" in done.err, done
    assert [path.name for path in ckpt.steps(here / "r/checkpoints")] == ["step_000001"]
    assert tune("sft", *args, "--resume", "auto").code == 0
    whole(kit, here / "r")


@pytest.mark.slow
@pytest.mark.parametrize("spare", [1, 4, 8, 16, 32, 64, 128, 256, 512])
def test_a_run_under_a_limit_of_memory_goes_on_from_where_it_was(spare, kit, tiny, tune, forked, here):
    """What fails inside other libraries may end the process; in Python it is one line."""
    args = kit.basics(tiny, "--sample-prompt=", "--output-dir", "r", "--adapter", "none", "--save-steps", 30, without=["--max-steps"])
    assert tune("sft", *args, "--max-steps", 1).code == 0
    before = kit.state(here / "r", 1)
    done = forked(limited(spare << 20), "sft", *args, "--max-steps", 30, "--resume", "auto")
    assert "Traceback" not in done.err and (done.code in (0, 1, 2) or done.code < 0), done
    if done.code != 0:
        assert kit.same(kit.state(here / "r", 1), before)
        assert tune("sft", *args, "--max-steps", 30, "--resume", "auto").code == 0


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to"),
                                   RuntimeError("could not create a primitive"), ImportError("x.so: failed to map segment"),
                                   OSError(12, "Cannot allocate memory")])  # fmt: skip
def test_what_libraries_say_without_memory_is_understood(error):
    with pytest.raises(errors.RunFailed, match="out of memory"), errors.checking_input():
        raise error
