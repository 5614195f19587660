"""What only a GPU can tell of a whole model: evaluation never needs more memory than training."""

import pytest
import torch

from treetune.core import lora, optim, state, step, tree
from treetune.losses import sft_objective
from treetune.models import hf, llama, logprobs
from treetune.ops import attention

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def test_evaluation_peaks_below_training(stream):
    sizes = llama.Config(32768, 256, 512, 4, 8, 4, 32, max_positions=512, dtype=torch.bfloat16)
    model = hf.random("llama", sizes, seed=0, dtype=torch.bfloat16)
    weights = tree.map(lambda leaf: leaf.cuda(), model.params)
    batch = stream([[(7 * i) % 32768 for i in range(500)] for _ in range(8)])
    plan = attention.plan(batch, device="cuda", dtype=torch.bfloat16)
    micro = ({key: value.cuda() for key, value in batch.items()}, plan)
    paths = lora.match(hf.abstract_of(model), "all-linear")
    adapter = tree.map(lambda leaf: leaf.cuda(), lora.init(hf.abstract_of(model), paths, rank=8, seed=0))

    def logprob(params, frozen, batch, plan, *, want=()):
        used = lora.Lora(params["lora"], 2.0)
        return logprobs("llama", model.cfg, frozen["model"], batch, plan, lora=used, want=want)

    objective, optimizer = sft_objective.objective(logprob), optim.adamw()
    params = {"lora": adapter}
    start = state.TrainState(params, {"model": weights}, optimizer.init(params), {}, torch.tensor(0, device="cuda"))
    take, evaluate = step.make_step(objective, optimizer, schedule=optim.constant(1e-4)), step.make_eval(objective)
    take(start, [micro])
    peaks = []
    for run in (lambda: take(start, [micro]), lambda: evaluate(start, [micro])):
        torch.cuda.reset_peak_memory_stats()
        run()
        peaks.append(torch.cuda.max_memory_allocated())
    assert peaks[1] <= peaks[0]
    assert peaks[1] < tree.bytes(weights) + 4000 * 32768 * 2  # logits of all rows would take this much by themselves
