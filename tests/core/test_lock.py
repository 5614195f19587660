"""Who has a folder: processes of this machine that run or have ended, of other machines, and of other containers."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from treetune.core import drafts, lock, owned, process

HOLDS = """
import sys
from pathlib import Path
from treetune.core import lock
held = lock.Lock(Path(sys.argv[1]))
print(1, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds the folder."""
    child = subprocess.Popen([sys.executable, "-c", HOLDS, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "1\n"
    yield child
    child.kill()
    child.communicate()


def test_a_running_holder_is_named_and_a_killed_one_is_followed(tmp_path, holder):
    host = process.own().host
    for attempt in (lock.Lock, lock.check):
        with pytest.raises(lock.Busy, match=f"in use by process {holder.pid} on {host}"):
            attempt(tmp_path)
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    lock.check(tmp_path)
    held = lock.Lock(tmp_path)
    assert json.loads((tmp_path / lock.NAME).read_text())["pid"] == os.getpid()
    held.release()
    assert not list(tmp_path.iterdir())
    held.release()


def written(folder, **changes):
    (folder / lock.NAME).write_text(json.dumps(process.own()._asdict() | changes))


TAKEN = {
    "another start of this machine": ({"boot": "00000000"}, True),
    "a number that another process has now": ({"pid": 1}, True),
    "a process that has ended": ({"pid": 4194305}, True),
    "another container of this machine": ({"space": "1"}, True),  # its lock would still be the system's
    "another container with a name of its own": ({"host": "elsewhere", "space": "1"}, True),
    "another machine": ({"host": "elsewhere", "boot": "00000000"}, False),
}


@pytest.mark.parametrize("what", TAKEN)
def test_what_a_lock_file_says_without_the_lock_of_the_system(what, tmp_path):
    changes, free = TAKEN[what]
    written(tmp_path, **changes)
    if free:
        lock.Lock(tmp_path).release()
    else:
        with pytest.raises(lock.Busy, match=rf"by process {os.getpid()} on elsewhere: if that process has ended, delete .*{lock.NAME}"):
            lock.Lock(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", '{"host": "x"}'])
def test_a_damaged_lock_file_holds_nobody_up(text, tmp_path):
    (tmp_path / lock.NAME).write_text(text)
    lock.Lock(tmp_path).release()


def test_without_locks_of_the_system_the_process_decides(tmp_path, holder, monkeypatch):
    monkeypatch.setattr(lock, "fcntl", None)
    with pytest.raises(lock.Busy, match=f"process {holder.pid}"):
        lock.Lock(tmp_path)
    holder.kill()
    holder.wait()
    lock.Lock(tmp_path).release()


def test_a_zombie_has_ended():
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    one = process.own()._replace(pid=child.pid, start=process._start(child.pid))
    deadline = time.monotonic() + 30
    while not process.ended(one) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert process.ended(one) and process.pid_ended(child.pid)
    child.wait()
    assert not process.ended(process.own()) and not process.pid_ended(os.getpid())


def test_only_abandoned_drafts_are_swept(tmp_path):
    own = drafts.name(tmp_path / "a")
    foreign = tmp_path / ".a.notes.draft"
    dead = tmp_path / drafts.name(tmp_path / "b").name.replace(f"-{os.getpid()}-", "-4194305-")
    elsewhere = tmp_path / own.name.replace(process.short(process.own().host), "0" * 8)
    for path in (own, foreign, dead, elsewhere):
        path.write_text("x")
    drafts.sweep(tmp_path)
    assert {*tmp_path.iterdir()} == {own, foreign, elsewhere}
    os.utime(elsewhere, (time.time() - 8 * 86400,) * 2)
    drafts.sweep(tmp_path)
    assert {*tmp_path.iterdir()} == {own, foreign}


def test_long_names_have_drafts_that_the_disk_takes(tmp_path):
    drafts.write(tmp_path / ("n" * 250), "text")
    assert [path.name for path in tmp_path.iterdir()] == ["n" * 250]


def test_removing_takes_what_matches_and_nothing_else(tmp_path):
    folder = tmp_path / "step_000001"
    (folder / "mine").mkdir(parents=True)
    for name in ("state.json", "state.safetensors", "mine/notes.md", "state.json.bak"):
        (folder / name).write_text("x")
    (folder / "treetune_manifest.json").write_text(json.dumps({"files": {"state.json.bak": {}}}))  # written with it, by whatever version
    assert not owned.remove(folder, owned.CHECKPOINT)
    assert [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*"))] == ["mine", "mine/notes.md"]
    (folder / "mine/notes.md").unlink()
    (folder / "mine").rmdir()
    assert owned.remove(folder, owned.CHECKPOINT) and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "changes", [{"pid": "1"}, {"pid": -1}, {"pid": 0}, {"pid": 10**30}, {"pid": {}}, {"host": None, "boot": ""}, {"start": 1.5}]
)
def test_a_holder_of_other_types_is_a_damaged_file(changes, tmp_path):
    written(tmp_path, **changes)
    lock.check(tmp_path)
    lock.Lock(tmp_path).release()


def test_a_lock_of_endless_brackets_is_a_damaged_file(tmp_path):
    (tmp_path / lock.NAME).write_text("[" * 4096)
    lock.Lock(tmp_path).release()
