"""A running stand-in for a vLLM server, and a client of it."""

import importlib.util
import threading
from pathlib import Path

import pytest

from treetune.core.rollout import vllm

FAKE = Path(__file__).with_name("fake_vllm.py")
spec = importlib.util.spec_from_file_location("fake_vllm", FAKE)
fake_vllm = importlib.util.module_from_spec(spec)
spec.loader.exec_module(fake_vllm)


@pytest.fixture
def start_server():
    """start_server(mode=..., retry_s=...) -> (the fake, a client that has checked it)."""
    running = []

    def begin(*, mode: str = "processed_logprobs", retry_s: float = 10.0):
        fake = fake_vllm.Fake(mode)
        server = fake_vllm.serve(fake)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        client = vllm.Client(f"http://127.0.0.1:{server.server_port}", model="tiny", vocab_size=fake_vllm.VOCAB, retry_s=retry_s)
        running.append((server, client, thread))
        client.check()
        fake.asked.clear()
        return fake, client

    yield begin
    for server, client, thread in running:
        client.close()
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def start(start_server):
    """`start_server`, where a module has no other `start`."""
    return start_server


@pytest.fixture
def pair(start_server):
    """A fake and its client."""
    return start_server()


@pytest.fixture
def fake(pair):
    """The fake server."""
    return pair[0]


@pytest.fixture
def client(pair):
    """The client of `fake`."""
    return pair[1]
