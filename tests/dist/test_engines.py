"""Servers that several ranks ask: in turn, and of ranks with the same rows the first one for all of them."""

import importlib.util
import json
import threading
from pathlib import Path

import pytest

WORKER = Path(__file__).with_name("engine_worker.py")
spec = importlib.util.spec_from_file_location("fake_vllm", Path(__file__).parents[1] / "core" / "rollout" / "fake_vllm.py")
fake_vllm = importlib.util.module_from_spec(spec)
spec.loader.exec_module(fake_vllm)


@pytest.fixture
def fakes():
    """Two running stand-ins, each with its address."""
    made = [fake_vllm.Fake() for _ in range(2)]
    servers = [fake_vllm.serve(fake) for fake in made]
    for server in servers:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield [(fake, f"http://127.0.0.1:{server.server_port}") for fake, server in zip(made, servers, strict=True)]
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.more
@pytest.mark.parametrize("axes", ["tensor=2,data=2", pytest.param("context=2,data=2", marks=pytest.mark.slow)])
def test_ranks_with_the_same_rows_have_what_the_first_of_them_asked_for(fakes, axes, launch, tmp_path):
    launch(4, WORKER, tmp_path, *(url for _, url in fakes), axes, cwd=tmp_path)
    ranks = [json.loads((tmp_path / f"rank{i}.json").read_text()) for i in range(4)]
    assert sorted(rank["row_rank"] for rank in ranks) == [0, 0, 1, 1] and all(rank["version"] == 1 for rank in ranks)
    for row in (0, 1):
        one, other = (rank for rank in ranks if rank["row_rank"] == row)
        assert one["tokens"] == other["tokens"] and one["error"] == other["error"] and "lacks the adapter" in one["error"]
        fake = fakes[row][0]
        completions = [
            ask for path, ask in fake.asked if path == "/v1/completions" and ask.get("return_token_ids") and ask["model"] != "gone"
        ]
        assert len(completions) == 2, "the other rank asks for nothing"
        assert sum(path == "/v1/load_lora_adapter" for path, _ in fake.asked) == 1
    assert all(rank["told"] == ranks[0]["told"] for rank in ranks) and ranks[0]["told"]["sync/version"] == 1
