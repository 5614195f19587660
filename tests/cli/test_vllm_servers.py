"""Options of several vLLM servers: what is refused before anything starts, and how many serve a run."""

import pytest

from treetune.cli.options import online
from treetune.cli.options.pipeline import EngineOptions

MANAGED, TWO = ["--vllm-mode", "managed"], ["--vllm-server-urls", "http://a:1", "http://b:2"]
REFUSED = {
    "a server that nobody asks": ([*MANAGED, "--vllm-num-servers", 2], "vllm_num_servers is for 2 servers, and 1 rank has prompts"),
    "addresses that nobody asks": (TWO, "vllm_server_urls is for 2 servers"),
    "servers beside ranks of the same rows": (["--nproc", 2, "--shard", "tensor=2", *TWO], "2 servers, and 1 rank has prompts"),
    "an address that is none": (["--vllm-server-urls", "a:1"], "addresses such as http://node-1:8000, each once, got a:1"),
    "an address twice": (["--vllm-server-urls", "http://a:1", "http://a:1"], "each once, got http://a:1"),
    "ports beyond the last": (["--nproc", 4, *MANAGED, "--vllm-num-servers", 3, "--vllm-server-port", 65534], "from 65534 on end at 65535"),
    "a port of addresses": (["--vllm-server-urls", "http://a:1", "--vllm-server-port", 9], "says where the servers are"),
    "addresses of managed servers": ([*MANAGED, "--vllm-server-urls", "http://a:1"], "the run starts its servers"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_servers_that_do_not_fit_are_refused(case, kit, here, tune):
    args, text = REFUSED[case]
    (here / "rows.jsonl").write_text('{"prompt": "1 + 1"}\n')
    kit.refused(tune("grpo", "--data", "rows.jsonl", "--reward-funcs", "digits", "--use-vllm", *args), text)


def test_how_many_servers_sample_for_a_run():
    def count(**engine) -> int:
        return online.servers(type("Config", (), {"engine": EngineOptions(use_vllm=True, **engine)})())

    assert (count(), count(vllm_server_urls=("http://a:1", "http://b:1")), count(vllm_mode="managed", vllm_num_servers=3)) == (1, 2, 3)
