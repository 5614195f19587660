"""Syncs of adapters and whole weights against a stand-in for the server: what arrives, what is refused, what is caught."""

import importlib.util
import json
import os
import signal
import sys
import threading
from concurrent import futures
from pathlib import Path

import numpy as np
import pytest
import torch

from treetune.core import manifest
from treetune.core.rollout import server as server_
from treetune.core.rollout import sync, vllm

FAKE = Path(__file__).with_name("fake_vllm.py")
spec = importlib.util.spec_from_file_location("fake_vllm", FAKE)
fake_vllm = importlib.util.module_from_spec(spec)
spec.loader.exec_module(fake_vllm)
CANARY = [1, 5, 2, 7, 7, 3, 0, 4]
PARAMS = {"layers": {"0": {"q_proj": {"A": torch.zeros(2, 3), "B": torch.zeros(3, 2)}}}}


def save(number: float, rank: int = 8):
    """What a trainer does to write an adapter; the stand-in makes its weights from the number."""

    def write(folder: Path) -> None:
        folder.mkdir()
        (folder / "adapter_config.json").write_text(json.dumps({"number": number, "r": rank}))

    return write


def expected(number: float) -> np.ndarray:
    return fake_vllm.logps(CANARY, number)


@pytest.fixture
def adapters(client, tmp_path):
    found = sync.Adapters(client, tmp_path / "sync", sync.Canary(client, CANARY, dtype="float32"))
    found.start(0, expected(0.0))
    return found


def drawn_as(fake) -> str:
    """The adapter number behind the model of the last completion request."""
    name = [ask["model"] for path, ask in fake.asked if path == "/v1/completions"][-1]
    return fake.adapters.get(name, 0.0)


def test_each_sync_is_a_new_name_and_sampling_uses_it(fake, client, adapters):
    assert adapters.model == "tiny"
    names = []
    for version, number in enumerate((0.3, -0.2, 0.5), start=1):
        verdict = adapters.sync(version, save(number), PARAMS, expected(number))
        assert verdict.mean_diff < 1e-12 and verdict.conclusive and verdict.moved > 0.01
        names.append(adapters.model)
        client.sample([[1]], [1], max_tokens=2, model=adapters.model)
        assert drawn_as(fake) == number
    assert len(set(names)) == 3 and names[0].startswith("adapter-v000001")
    assert sorted(fake.adapters) == sorted(names[1:]), "the one before the previous is unloaded"
    assert sorted(path.name for path in adapters.root.iterdir()) == ["adapter-v000002", "adapter-v000003"]


@pytest.mark.sampled(2)
@pytest.mark.parametrize("dtype, moves", [("float32", 0.3), ("float32", 0.0005), ("bfloat16", 0.02)])
def test_a_sync_that_is_silently_lost_is_caught(fake, client, tmp_path, dtype, moves):
    adapters = sync.Adapters(client, tmp_path, sync.Canary(client, CANARY, dtype=dtype))
    adapters.start(0, expected(0.0))
    adapters.sync(1, save(0.1), PARAMS, expected(0.1))
    good, fake.forgets = adapters.model, True
    with pytest.raises(sync.SyncError, match="sync of version 2 was lost: the server still has version 1, while .* moved by up to"):
        adapters.sync(2, save(0.1 + moves), PARAMS, expected(0.1 + moves))
    assert adapters.model == good, "the last good version stays the current one"
    assert len(fake.adapters) == 1 and len(list(tmp_path.iterdir())) == 1
    fake.forgets = False
    adapters.sync(2, save(0.1 + moves), PARAMS, expected(0.1 + moves))


def test_the_very_first_sync_lost_is_caught_too(fake, adapters):
    fake.forgets = True
    with pytest.raises(sync.SyncError, match="lost: the server still has version 0"):
        adapters.sync(1, save(0.001), PARAMS, expected(0.001))


def test_a_canary_that_cannot_tell_says_so(adapters):
    adapters.sync(1, save(0.1), PARAMS, expected(0.1))
    assert not adapters.sync(2, save(0.1), PARAMS, expected(0.1)).conclusive
    assert not adapters.sync(3, save(0.1 + 1e-7), PARAMS, expected(0.1 + 1e-7)).conclusive


def test_other_weights_than_the_trainers_are_caught(adapters):
    with pytest.raises(sync.SyncError, match="the server has other weights, not version 1: mean difference"):
        adapters.sync(1, save(0.4), PARAMS, expected(0.1))


def test_another_base_model_is_caught_before_anything_is_sampled(fake, client, tmp_path):
    fake.number = 0.2
    adapters = sync.Adapters(client, tmp_path, sync.Canary(client, CANARY, dtype="float32"))
    with pytest.raises(sync.SyncError, match="the server has other weights, not version 0"):
        adapters.start(0, expected(0.0))


def test_a_server_in_a_coarser_dtype_is_allowed_for_where_asked(client, tmp_path):
    rough = expected(0.0) + np.resize([0.05, -0.05], len(CANARY) - 1)
    with pytest.raises(sync.SyncError, match="mean difference of log-probs 5.00e-02, at most 0.001"):
        sync.Canary(client, CANARY, dtype="float32").check("tiny", 0, rough)
    canary = sync.Canary(client, CANARY, dtype="float32", widen=True)
    assert canary.check("tiny", 0, rough).mean_diff == pytest.approx(0.05) and canary.dtype == "bfloat16"
    with pytest.raises(sync.SyncError, match="other weights"):
        sync.Canary(client, CANARY, dtype="float32", widen=True).check("tiny", 0, expected(0.0) + 0.3)
    with pytest.raises(sync.SyncError, match="at most 0.04"):
        sync.Canary(client, CANARY, dtype="bfloat16", tolerance=0.04).check("tiny", 0, rough)
    assert [sync.coarser("float32", gap) for gap in (1e-5, 5e-4, 0.02, 0.5)] == ["float32", "float16", "bfloat16", "bfloat16"]


def reading(version: int, wanted: np.ndarray, got: np.ndarray) -> sync.Reading:
    return sync.Reading(version, wanted, got)


def test_what_two_readings_tell():
    old, new, noise = np.zeros(8), np.full(8, 0.5), np.linspace(-1e-4, 1e-4, 8)
    before = reading(1, old, old + noise)
    judge = dict(tolerance=1e-3, resolution=1e-4)
    good = sync.judge(reading(2, new, new - noise), before, **judge)
    assert good.conclusive and good.max_diff == pytest.approx(1e-4) and good.mean_diff == pytest.approx(np.abs(noise).mean())
    assert good.moved == pytest.approx(0.5)
    with pytest.raises(sync.SyncError, match="the server has version 1, not version 2"):
        sync.judge(reading(2, new, old - noise), before, **judge)  # old weights, but other bits
    with pytest.raises(sync.SyncError, match="lost"):
        sync.judge(reading(2, old + 2e-4, before.got), before, **judge)  # within the tolerance, yet not one bit moved
    with pytest.raises(sync.SyncError, match="other weights, not version 2"):
        sync.judge(reading(2, new, np.full(8, np.nan)), before, **judge)
    assert not sync.judge(reading(2, old + 5e-5, before.got), before, **judge).conclusive
    with pytest.raises(ValueError, match="trainer gave 7 .* the server 8"):
        sync.judge(reading(2, new[1:], new), before, **judge)


def test_a_weight_that_is_not_finite_never_reaches_the_server(fake, adapters):
    bad = {"layers": {"0": {"q_proj": {"A": torch.zeros(2, 3), "B": torch.tensor([1.0, float("nan")])}}}}
    fake.asked.clear()
    with pytest.raises(sync.SyncError, match=r"version 1 was not given to the server: layers\.0\.q_proj\.B not finite"):
        adapters.sync(1, save(0.1), bad, expected(0.1))
    assert fake.asked == [] and not adapters.root.exists()


def test_an_adapter_that_the_server_refuses_is_one_line_with_its_reason(adapters):
    with pytest.raises(ValueError, match="refuses /v1/load_lora_adapter: LoRA rank 32 is greater than max_lora_rank 16"):
        adapters.sync(1, save(0.1, rank=32), PARAMS, expected(0.1))
    with pytest.raises(ValueError, match=r"save\(.*\) wrote nothing there"):
        adapters.sync(1, lambda folder: None, PARAMS, expected(0.1))


def test_a_save_that_fails_leaves_no_folder(adapters):
    def torn(folder: Path) -> None:
        save(0.1)(folder)
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError):
        adapters.sync(1, torn, PARAMS, expected(0.1))
    assert not adapters.folder(1).exists()


def test_versions_must_rise(adapters):
    adapters.sync(4, save(0.1), PARAMS, expected(0.1))
    with pytest.raises(ValueError, match="version 4 comes after version 4"):
        adapters.sync(4, save(0.2), PARAMS, expected(0.2))


def test_a_restarted_server_gets_the_current_adapter_again(fake, client, adapters):
    adapters.sync(1, save(0.3), PARAMS, expected(0.3))
    fake.adapters.clear()
    draw = lambda model: client.sample([[1]], [1], max_tokens=2, model=model)  # noqa: E731
    with pytest.raises(vllm.Lost):
        draw(adapters.model)
    sync.steady(draw, adapters)
    assert drawn_as(fake) == 0.3 and list(fake.adapters) == [adapters.model]


def test_a_restarted_server_with_another_model_is_caught(fake, client, adapters):
    adapters.sync(1, save(0.3), PARAMS, expected(0.3))
    fake.adapters.clear()
    fake.number = 1.0
    with pytest.raises(sync.SyncError, match="other weights, not version 1"):
        sync.steady(lambda model: client.sample([[1]], [1], max_tokens=2, model=model), adapters)


def test_an_answer_to_a_load_that_got_lost_is_no_failure(fake, adapters):
    load, calls = fake.load, []

    def torn(ask):
        calls.append(ask)
        status = load(ask)
        return (503, {}) if len(calls) == 1 else status

    fake.load = torn
    assert adapters.sync(1, save(0.3), PARAMS, expected(0.3)).conclusive and len(calls) == 2


def test_a_folder_that_changed_on_the_disk_never_reaches_a_server(fake, adapters, monkeypatch):
    """Right after it was written, and when a server that lost it asks again."""
    adapters.sync(1, save(0.3), PARAMS, expected(0.3))
    assert (adapters.folder(1) / manifest.NAME).is_file()
    config = adapters.folder(1) / "adapter_config.json"
    config.write_text(config.read_text().replace("0.3", "0.4"))
    loaded = len(fake.adapters)
    with pytest.raises(sync.SyncError, match="adapter_config.json is not as it was written"):
        adapters.recover()
    write = sync.write
    monkeypatch.setattr(sync, "write", lambda folder, how: (write(folder, how), (folder / "adapter_config.json").write_text("{}")))
    with pytest.raises(sync.SyncError, match="weights for the server were damaged: .*adapter_config.json has 2 bytes"):
        adapters.sync(2, save(0.5), PARAMS, expected(0.5))
    assert len(fake.adapters) == loaded


@pytest.fixture
def managed(tmp_path):
    """A stand-in as a process on the folder `base`, a client of it, and the command line for a folder."""
    save_model(0.0)(tmp_path / "base")
    port = server_.free_port()
    command = lambda folder: [sys.executable, str(FAKE), "--port", str(port), "--model", str(folder)]  # noqa: E731
    server = server_.Server(command(tmp_path / "base"), port=port, log=tmp_path / "log", deadline_s=20.0, grace_s=2.0)
    client = vllm.Client(server.url, model="tiny", vocab_size=12, retry_s=30.0, alive=server.alive)
    client.check()
    yield server, client, command
    client.close()
    server.stop()


def save_model(number: float):
    def write(folder: Path) -> None:
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({"number": number}))

    return write


@pytest.mark.more
@pytest.mark.parametrize("in_place", [False, True])
def test_whole_weights_reach_a_managed_server(managed, tmp_path, in_place):
    server, client, command = managed
    weights = sync.Weights(client, tmp_path / "sync", sync.Canary(client, CANARY, dtype="float32"), server=server, command=command,
                           in_place=in_place)  # fmt: skip
    weights.start(0, expected(0.0))
    first = server.process.pid
    for version, number in ((1, 0.2), (2, -0.4)):
        assert weights.sync(version, save_model(number), PARAMS, expected(number)).conclusive
    assert (server.process.pid == first) == in_place
    assert [path.name for path in weights.root.iterdir()] == ["weights-v000002"]
    with pytest.raises(sync.SyncError, match="other weights, not version 3"):
        weights.sync(3, save_model(0.9), PARAMS, expected(0.1))


def test_a_managed_server_that_was_killed_is_restarted_and_gets_its_adapter(managed, tmp_path):
    server, client, _ = managed
    adapters = sync.Adapters(client, tmp_path / "sync", sync.Canary(client, CANARY, dtype="float32"))
    adapters.start(0, expected(0.0))
    adapters.sync(1, save(0.3), PARAMS, expected(0.3))
    draw = lambda model: client.sample([[1]], [1], max_tokens=8, n=3, model=model)  # noqa: E731
    before = [one.tokens.tolist() for one in draw(adapters.model)[0]]
    os.killpg(server.process.pid, signal.SIGKILL)
    server.process.wait()
    after = [one.tokens.tolist() for one in sync.steady(draw, adapters, server)[0]]
    assert before == after and server.alive()


def test_two_threads_find_the_server_killed_and_one_restarts_it(managed, tmp_path):
    server, client, _ = managed
    adapters = sync.Adapters(client, tmp_path / "sync", sync.Canary(client, CANARY, dtype="float32"))
    adapters.start(0, expected(0.0))
    adapters.sync(1, save(0.3), PARAMS, expected(0.3))
    starts, both = server.starts, threading.Barrier(2)

    def draw(model):
        return client.sample([[1]], [1], max_tokens=8, n=3, model=model)[0]

    def waiting(model):
        """The first call of both threads fails before either goes on."""
        try:
            return draw(model)
        except vllm.Unreachable:
            both.wait(30)
            raise

    before = [one.tokens.tolist() for one in draw(adapters.model)]
    os.killpg(server.process.pid, signal.SIGKILL)
    server.process.wait()
    with futures.ThreadPoolExecutor(2) as pool:
        found = [one.result(60) for one in [pool.submit(sync.steady, waiting, adapters, server) for _ in range(2)]]
    assert [[one.tokens.tolist() for one in group] for group in found] == [before, before]
    assert server.starts == starts + 1


def test_a_server_that_is_not_ours_and_stays_away_ends_the_call(managed, tmp_path):
    server, client, _ = managed
    adapters = sync.Adapters(client, tmp_path / "sync", sync.Canary(client, CANARY, dtype="float32"))
    server.stop()
    with pytest.raises(vllm.Unreachable, match="its process has ended"):
        sync.steady(lambda model: client.sample([[1]], [1], max_tokens=8, model=model), adapters)
