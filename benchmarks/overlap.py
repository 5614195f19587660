"""Messages that travel while layers compute: a step over a slowed link, and the efficiency that counted messages predict for many GPUs.

Measured: two processes that talk by gloo, one thread each, full training of random weights with rematerialisation. Every message takes, on
a thread of its own, a time that is proportional to its bytes, so that all of a step take some part of its computation. A step is timed with
a free link, with the slow one, and with the slow one where each message is waited for at once, in turn. The computation is that of the CPU,
or, so that nothing else on the machine matters, of a small model whose layers wait for as long as a device would compute.

Predicted: the messages of one pass of a small model with the layers of Llama-3.1-8B are counted as they are begun, each with the
computation that they have beside them, and given the bytes of the large model's leaves. A link has a latency a message, and a rate.

    python benchmarks/overlap.py
"""

import argparse
import contextlib
import json
import os
import queue
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import harness
import torch

RANKS, LAYERS, TOKENS, ROUNDS = 2, 8, 192, 5
SHAPE = dict(vocab_size=64, num_heads=8, num_kv_heads=4, tied=False)
# Sizes, and seconds that a layer waits forward; backward twice as long.
COMPUTATIONS = {
    "of the CPU": (dict(hidden_size=512, mlp_size=1536, head_dim=64), 0.0),
    "waiting": (dict(hidden_size=64, mlp_size=192, head_dim=8), 0.05),
}
LINKS = (0.6, 1.0, 1.5)  # time of all messages of a step over that of its computation
LLAMA = dict(
    vocab_size=128256, hidden_size=4096, mlp_size=14336, num_layers=32, num_heads=32, num_kv_heads=8, head_dim=128, tied=False
)  # fmt: skip
COMPUTE_S = 0.86  # of 8192 tokens of it on an H200, with rematerialisation
NETWORKS = {8: (25e-6, 370e9), 64: (150e-6, 330e9)}  # GPUs: seconds a message, bytes a second


class Link:
    """A link that is busy with one message at a time, for its latency and bytes over rate; then the message is really sent."""

    def __init__(self, rate: float):
        self.rate, self.messages = rate, queue.SimpleQueue()
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            size, send, done = self.messages.get()
            time.sleep(size / self.rate)
            send().wait()
            done.set()

    def slow(self, begin: Any) -> Any:
        """A function of `core.messages` that begins a message, over this link."""

        def slowed(to: torch.Tensor, source: torch.Tensor, group: Any) -> Any:
            done = threading.Event()
            self.messages.put((max(to.nbytes, source.nbytes), lambda: begin(to, source, group), done))
            return _Work(done)

        return slowed


class _Work:
    """A message over a slow link."""

    def __init__(self, done: threading.Event):
        self.done = done

    def wait(self) -> None:
        """Wait until it has come."""
        self.done.wait()


class _Alone:
    """A message that is waited for when it is begun."""

    def __init__(self, work: Any):
        work.wait()

    def wait(self) -> None:
        """Nothing: it is there."""


def measure() -> dict[str, Any]:
    """This rank's seconds of a step by computation and link; and the events of a pass of the small model."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "dist"))
    import counting

    from treetune.core.run.ranks import join_ranks
    from treetune.models import policy

    ranks = join_ranks(torch.device("cpu"))
    times = {name: by_link(ranks, *computation) for name, computation in COMPUTATIONS.items()}
    base = policy.full(counting.model(LLAMA["num_layers"]))
    events = counting.passes(policy.place(base, ranks.mesh, "full"), batch(ranks.rank), "full")
    return {"times": times, "events": events}


def by_link(ranks: Any, sizes: dict[str, int], seconds: float) -> dict[str, Any]:
    """Medians of rounds in which all links take their turn."""
    one, size = stepper(ranks, sizes)
    with waiting(seconds):
        timed(one)
        free = torch.tensor(statistics.median(timed(one) for _ in range(3)))
        torch.distributed.broadcast(free, 0)
        links = {str(ratio): Link(size / (ratio * float(free))) for ratio in LINKS}
        rounds = [[timed(one)] + [timed(one, link, alone) for link in links.values() for alone in (False, True)] for _ in range(ROUNDS)]
    first, *others = [statistics.median(column) for column in zip(*rounds, strict=True)]
    rows = {}
    for (name, link), beside, after in zip(links.items(), others[::2], others[1::2], strict=True):
        rows[name] = {"communication_s": size / link.rate, "step_s": beside, "one_after_another_s": after}
    return {"free_s": first, "links": rows}


def stepper(ranks: Any, sizes: dict[str, int]) -> tuple[Callable[[], Any], float]:
    """A forward and backward pass as a function without arguments, and the bytes of all its messages: the last layer travels once."""
    from treetune.core import grad, param, tree
    from treetune.losses import sft_objective
    from treetune.models import Model, llama, policy

    cfg = llama.Config(num_layers=LAYERS, **SHAPE, **sizes)
    whole = param.init(llama.abstract(cfg), seed=5)
    placed = policy.place(policy.full(Model("llama", cfg, whole)), ranks.mesh, "full")
    objective, stream = sft_objective.named(policy.logprob(placed, remat="full")), batch(ranks.rank)
    gradient = grad.value_and_grad(lambda params: (sum(objective.terms(params, {}, stream, None)[0].values()), None))
    layers, every = tree.bytes({"": whole["layers"]}), tree.bytes(whole)
    return lambda: gradient(placed.params), (3 - 1 / LAYERS) * layers + 2 * (every - layers)


@contextlib.contextmanager
def waiting(seconds: float) -> Iterator[None]:
    """Layers wait, as they would for a device: so long forward, twice backward."""
    from treetune.models import dense

    attention = dense._attention

    def computed(h: torch.Tensor, *args: Any) -> torch.Tensor:
        time.sleep(seconds)
        return _Waits.apply(attention(h, *args), 2 * seconds)

    dense._attention = computed if seconds else attention
    try:
        yield
    finally:
        dense._attention = attention


class _Waits(torch.autograd.Function):
    """x, whose gradient takes some seconds."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, seconds: float) -> torch.Tensor:
        ctx.seconds = seconds
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        time.sleep(ctx.seconds)
        return grads[0], None


def batch(rank: int) -> dict[str, torch.Tensor]:
    """One document, every token of which is scored."""
    from treetune.models import dense

    stream = dense.single((torch.arange(TOKENS) + rank) % SHAPE["vocab_size"])
    read = {"at": torch.arange(TOKENS - 1), "targets": stream["tokens"][1:], "seq": torch.zeros(TOKENS - 1, dtype=torch.int64)}
    return stream | read | {"seq_lens": torch.tensor([TOKENS - 1]), "seed": torch.tensor(0)}


def timed(one: Callable[[], Any], link: Link | None = None, alone: bool = False) -> float:
    """Seconds of a step from when all ranks begin until all have ended; over a link, where `alone` each message is waited for at once."""
    from treetune.core import messages

    begin = messages._all_gather, messages._reduce_scatter
    if link is not None:
        slow = [link.slow(one) for one in begin]
        slow = [lambda *args, each=each: _Alone(each(*args)) for each in slow] if alone else slow
        messages._all_gather, messages._reduce_scatter = slow
    torch.distributed.barrier()
    start = time.perf_counter()
    one()
    torch.distributed.barrier()
    messages._all_gather, messages._reduce_scatter = begin
    return time.perf_counter() - start


def predicted(events: list[tuple[str, str, int]], gpus: int) -> dict[str, float]:
    """Seconds of the large model's step on so many GPUs, of its messages, and what the computation is of all.

    The link takes messages in turn. A gather is waited for where its leaves are computed with: the embedding's before the first layer, the
    norm's and the head's behind the last one. A sum is waited for when the one behind it is begun, unless that is small, and
    the last at the end.
    """
    from treetune.core import gathers, param
    from treetune.models import llama

    whole = llama.abstract(llama.Config(**LLAMA))
    numbers = {name: param.count({"": part}) for name, part in whole.items() if name != "layers"}
    layer = param.count({"": whole["layers"][0]})
    latency, rate = NETWORKS[gpus]
    # A layer is computed twice forward and once backward, which takes twice as long; the head once each.
    work = layer * LLAMA["num_layers"] * 4 + numbers["lm_head"] * 3
    unit = {"layer": COMPUTE_S * layer / work, "head": COMPUTE_S * numbers["lm_head"] / work}
    now = link = travelled = last = 0.0  # last: when the sum before comes
    arrival: dict[str, float] = {}
    computed = pending = 0  # pending: numbers of the sums under way
    for kind, what, _ in events:
        part = what.split("layers.")[1].split(".")[0] if "layers." in what else what.split(".")[-1]
        if kind == "compute":
            now = max(now, arrival[part], arrival["embed_tokens"]) + unit["layer"]
            computed += 1
            if computed == LLAMA["num_layers"]:
                now = max(now, arrival["norm"], arrival["lm_head"]) + unit["head"]
            continue
        count = layer if part.isdigit() else numbers[part]
        if kind == "sum":  # behind the backward of its layer
            now += 2 * (unit["layer"] if part.isdigit() else unit["head"] if part == "lm_head" else 0)
            if count * gathers.SMALL >= pending:
                now, pending = max(now, last), 0
            pending += count
        size = count * (2 if kind == "gather" else 4)
        cost = latency + size * (gpus - 1) / gpus / rate
        link, travelled = max(link, now) + cost, travelled + cost
        arrival[part], last = link, link if kind == "sum" else last
    end = max(now, link)
    return {"step_s": end, "messages_s": travelled, "efficiency": COMPUTE_S / end, "one_after_another": COMPUTE_S / (COMPUTE_S + travelled)}


def run() -> list[dict[str, Any]]:
    """What each rank says."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    own = {"WORLD_SIZE": RANKS, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1, "GLOO_SOCKET_IFNAME": "lo"}
    sets = [os.environ | {key: str(value) for key, value in (own | {"RANK": rank, "LOCAL_RANK": rank}).items()} for rank in range(RANKS)]
    started = [subprocess.Popen([sys.executable, __file__, "--rank"], env=env, stdout=subprocess.PIPE, text=True) for env in sets]
    outputs = [one.communicate()[0] for one in started]
    if any(one.returncode for one in started):
        raise SystemExit("a rank failed")
    return [json.loads(text.strip().splitlines()[-1]) for text in outputs]


def drive() -> None:
    """Measure, predict, and write JSON."""
    torch.set_num_threads(1)
    rows = run()
    events = rows[0].pop("events")
    assert rows[1].pop("events") == events, "ranks send the same messages in the same order"
    kinds = [kind for kind, what, _ in events if "layers." in what and kind != "compute"]
    counted = {kind: kinds.count(kind) / LLAMA["num_layers"] for kind in ("gather", "sum")}
    counted["outside layers"] = sum("layers." not in what for _, what, _ in events)
    predictions = {str(gpus): predicted(events, gpus) for gpus in NETWORKS}
    options = {"ranks": RANKS, "layers": LAYERS, "tokens": TOKENS, "rounds": ROUNDS, "compute_s": COMPUTE_S} | SHAPE
    options |= {"computations": COMPUTATIONS}
    networks = {str(gpus): dict(zip(("latency_s", "bytes_per_s"), values, strict=True)) for gpus, values in NETWORKS.items()}
    result = {"benchmark": "overlap", "machine": harness.machine(), "options": options, "ranks": rows, "messages": counted}
    result |= {"networks": networks, "predicted": predictions}
    print(json.dumps({"ranks": rows, "messages": counted, "predicted": predictions}, indent=1))
    print("saved", harness.save("overlap", result))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rank", action="store_true")
    if not parser.parse_args().rank:
        drive()
        return
    torch.set_num_threads(1)
    print(json.dumps(measure()))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
