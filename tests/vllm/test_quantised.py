"""vLLM reads the folders that `treetune quantize` writes for it, with the log-probs of the same folder here.

vLLM on a CPU reads int4 of compressed-tensors; it knows no bitsandbytes (nf4, fp4, int8).
"""

import pytest
import torch

from treetune.core.quant import Scheme
from treetune.core.rollout import server as servers
from treetune.core.rollout import vllm
from treetune.models import families, fetch, hf, quantising

pytestmark = pytest.mark.vllm
IDS = list(range(100, 140))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = fetch.resolve("smollm2-135m-instruct", say=print)
    path = tmp_path_factory.mktemp("quantised") / "int4"
    quantising.save(path, hf.load(place), Scheme("int4"), torch.bfloat16, hf.tokenizer(place), str(place))
    return place, path


@torch.no_grad()
def logprobs(path, dtype):
    logits = families.document_logits(hf.load(path, dtype=dtype), torch.tensor(IDS)).log_softmax(-1)
    return logits[:-1].gather(1, torch.tensor(IDS[1:])[:, None])[:, 0]


def test_a_server_has_the_logprobs_of_a_folder_in_int4(folder, tmp_path):
    place, path = folder
    port = servers.free_port()
    options = servers.ServerOptions("small", port, dtype="bfloat16", max_model_len=128, enforce_eager=True)
    server = servers.Server(
        servers.command(servers.find_python(None), path, options), port=port, log=tmp_path / "vllm.log", deadline_s=300.0
    )
    try:
        client = vllm.Client(server.url, model="small", vocab_size=49152, retry_s=60.0, alive=server.alive)
        client.check(accepted=[path], needed_len=128)
        theirs = torch.tensor(client.prompt_logps(IDS))[-len(IDS) + 1 :]
        client.close()
    finally:
        server.stop()
    ours, plain = logprobs(path, torch.float32), logprobs(place, torch.float32)
    # Both compute in bfloat16 or wider: measured 0.06 in the mean, and 0.91 from the model before it was quantised.
    assert (ours - theirs).abs().mean() < 0.15 < 0.5 < (plain - theirs).abs().mean()
