"""Worker processes of rewards: how they start, are replaced, and what is left of them."""

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from treetune.core.rollout import echo, reward_pool

spec = importlib.util.spec_from_file_location("reward_scene", Path(__file__).with_name("reward_scene.py"))
scene = importlib.util.module_from_spec(spec)
spec.loader.exec_module(scene)
here = scene.here


def test_a_worker_that_dies_between_scorings_is_replaced(here):
    with reward_pool.Pool(["rewards.size"], workers=2) as pool:
        rows = [scene.group("a"), scene.group("bb")]
        before = pool.pids()
        for pid in before:
            os.kill(pid, signal.SIGKILL)
        assert all(scene.gone(pid) for pid in before)
        assert pool.score(rows)[..., 0].tolist() == [[1], [2]]
        assert not set(pool.pids()) & set(before) and pool.report()["rewards.size"]["failed"] == 0


def test_an_interrupted_scoring_leaves_no_answer_for_the_next(here):
    def interrupt(text):
        raise KeyboardInterrupt

    with reward_pool.Pool(["rewards.odd", "rewards.process"], workers=2, say=interrupt) as pool:
        with pytest.raises(KeyboardInterrupt):
            pool.score([scene.group("nan", "two")])
        assert pool.score([scene.group("two", "true")])[0, :, 0].tolist() == [2, 1]
        assert pool.report()["rewards.process"]["rows"] == 2


def test_large_texts_and_any_characters_arrive(here):
    texts = ["x" * 3_000_000, "\ud800 \x00 é 日", ""]
    assert scene.values("rewards.size", *texts) == [3_000_000, 7, 0]


def test_nothing_that_a_function_prints_or_reads_reaches_the_parents_streams(here, capfd):
    assert scene.values("rewards.talks", "a", log=here / "rewards.log") == [0.0]
    assert capfd.readouterr() == ("", "")
    assert (here / "rewards.log").read_text().splitlines() == ["from the reward", "and an error"]
    scene.values("rewards.talks", "a")
    out, err = capfd.readouterr()
    assert out == "" and "from the reward" in err


def test_a_child_that_a_function_forked_cannot_answer_for_it(here):
    with reward_pool.Pool(["rewards.forks"]) as pool:
        assert pool.score([scene.group("fork", "b")])[0, :, 0].tolist() == [1, 1]
        assert scene.gone(int((here / "child.pid").read_text()))
        assert pool.score([scene.group("a", "b")])[0, :, 0].tolist() == [1, 1]


def test_what_a_function_started_ends_with_it(here):
    with pytest.raises(ValueError, match="no answer within 0.5 s"):
        scene.values("rewards.starts", "a", timeout_s=0.5)
    assert scene.gone(int((here / "child.pid").read_text()))


def test_close_ends_every_worker(here):
    pool = reward_pool.Pool(["digits"], workers=3)
    pids = pool.pids()
    assert len(pids) == 3 and all(Path(f"/proc/{pid}").exists() for pid in pids)
    pool.close()
    pool.close()
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids) and not pool.pids()
    with pytest.raises(RuntimeError, match="closed"):
        pool.score([])


def test_a_pool_that_is_forgotten_ends_its_workers(here):
    (pid,) = reward_pool.Pool(["digits"]).pids()
    assert scene.gone(pid)


PARENT = """
import signal
import sys
from reward_scene import group
from treetune.core.rollout import reward_pool
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts what runs in its background with SIGINT ignored
pool = reward_pool.Pool(["rewards.leaves" if sys.argv[2] == "leave" else "rewards.faulty"], workers=2, timeout_s=float(sys.argv[1]))
print(*pool.pids(), flush=True)
if sys.argv[2] != "idle":
    pool.score([group(sys.argv[2]), group(sys.argv[2])])
sys.stdin.read()
"""


@pytest.fixture
def parent(here):
    """Starts a script that has a pool; gives the process and the ids of its workers."""
    shutil.copy(Path(__file__).with_name("reward_scene.py"), here)
    (here / "parent.py").write_text(PARENT)
    started, workers = [], []

    def start(timeout_s, state):
        command = [sys.executable, "parent.py", str(timeout_s), state]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        started.append(process)
        workers.extend(int(pid) for pid in process.stdout.readline().split())
        return process, workers

    yield start
    for process in started:
        process.kill()
        for pid in workers:
            if not scene.gone(pid, 0):
                os.kill(pid, signal.SIGKILL)
        process.communicate()


@pytest.mark.sampled(2)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_parent_that_is_stopped_leaves_no_idle_worker(parent, number):
    process, pids = parent(30, "idle")
    assert len(pids) == 2
    process.send_signal(number)
    assert all(scene.gone(pid) for pid in pids)


def test_ctrl_c_while_rewards_hang_leaves_no_worker(parent):
    process, pids = parent(30, "hang")
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    assert all(scene.gone(pid) for pid in pids)
    assert "KeyboardInterrupt" in process.communicate(timeout=10)[1] and process.returncode == -signal.SIGINT


def test_a_call_whose_parent_was_killed_ends_quietly(parent):
    process, pids = parent(30, "wait")
    time.sleep(0.2)
    process.kill()
    assert all(scene.gone(pid) for pid in pids)
    assert process.communicate(timeout=10)[1] == ""


def test_a_worker_that_hangs_without_a_parent_ends_by_itself(parent):
    """Nobody is left to keep the limit."""
    process, pids = parent(30, "hang")
    time.sleep(0.2)
    process.kill()
    assert all(scene.gone(pid, 5) for pid in pids)


def _children(here, count=1):
    """Process ids that `leaves` wrote down, of sleepers in sessions of their own."""
    end = time.monotonic() + 20
    while not (here / "children").exists() or len((here / "children").read_text().split()) < count:
        assert time.monotonic() < end
        time.sleep(0.02)
    return [int(pid) for pid in (here / "children").read_text().split()]


def test_what_a_function_started_is_gone_with_the_pool(here):
    with reward_pool.Pool(["rewards.leaves"]) as pool:
        assert pool.score([scene.group("a", "b")])[0, :, 0].tolist() == [1, 1]
        assert not any(scene.gone(pid, 0) for pid in _children(here))
    assert all(scene.gone(pid) for pid in _children(here))


def test_what_a_function_started_is_gone_after_its_limit(here):
    with reward_pool.Pool(["rewards.leaves"], timeout_s=1.0) as pool:
        with pytest.raises(ValueError, match="no answer within 1 s"):
            pool.score([scene.group("hang")])
        assert all(scene.gone(pid) for pid in _children(here))


def test_what_a_function_started_is_gone_after_its_worker_crashed(here):
    """Its parent is gone and its session is its own: nothing but its environment tells whose it was."""
    with reward_pool.Pool(["rewards.leaves"]) as pool:
        with pytest.raises(ValueError, match="exit"):
            pool.score([scene.group("crash")])
        assert all(scene.gone(pid) for pid in _children(here))


def test_what_a_function_started_is_gone_with_a_killed_trainer(parent, here):
    process, _ = parent(30, "leave")
    children = _children(here)
    process.kill()
    assert all(scene.gone(pid) for pid in children)


def test_output_of_functions_is_kept_up_to_a_limit_and_the_cut_is_told(here):
    log = here / "rewards.log"
    with reward_pool.Pool(["rewards.prints"], log=log) as pool:
        assert pool.score([scene.group("3000000", "short")])[0, :, 0].tolist() == [1, 1]
        pool.score([scene.group("10", "10")])
    text = log.read_bytes()
    assert len(text) < 1_300_000 and text.count(b"the rest is left out") == 1 and b"1048576 bytes of a call" in text
    assert text.endswith(b"x" * 10 + b"\n"), "the next call is kept"


def test_output_in_all_has_a_limit(tmp_path):
    sink = echo.Echo(tmp_path / "log", call=100, all=250)
    for _ in range(5):
        write = sink.pipe("one")
        os.write(write, b"Q" * 90)
        os.close(write)
        sink.close()
    text = (tmp_path / "log").read_text()
    assert text.count("Q") == 250 and text.count("250 bytes in all: the rest is left out") == 1


def test_workers_are_light():
    """The worker's modules bring nothing heavy."""
    heavy = "[name for name in ('torch', 'numpy', 'transformers') if name in sys.modules]"
    command = [sys.executable, "-P", "-c", f"import sys; from treetune.core.rollout import worker; print({heavy})"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == "[]"
