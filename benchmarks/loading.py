"""Resident memory of loading a model and of one adapter step on it, in bfloat16 against quantised, each in a process of its own.

Random weights of the shape of Llama 3 8B, scaled to about 1 B parameters, of which embeddings and head are 12 % as there; rank 16 on all
linear layers, one document of 64 tokens, full gradient checkpointing. All is over what the process had after its imports and a load of a
small model: VmHWM, the largest resident set, pages of mapped files included, and RssAnon, the memory that is the process's own.

    python benchmarks/loading.py
"""

import argparse
import json
import math
import tempfile
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import harness
import torch
from torch import Tensor

LAYERS, TOKENS, RANK = 18, 64, 16


def resident(name: str) -> int:
    """Bytes of a kind of memory of this process: VmHWM since it was last forgotten, RssAnon."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


class Watch(threading.Thread):
    """The largest RssAnon and VmHWM between two moments, over what was there before."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        Path("/proc/self/clear_refs").write_text("5")  # forgets the largest resident set
        self.before, self.largest, self.ended = resident("RssAnon"), 0, threading.Event()
        self.resident_before = resident("VmHWM")

    def run(self) -> None:
        """Look every millisecond."""
        while not self.ended.is_set():
            self.largest = max(self.largest, resident("RssAnon"))
            time.sleep(0.001)

    def stop(self) -> dict[str, int]:
        """Bytes of the process's own, and all that is resident: the largest since the beginning, and what is left."""
        self.ended.set()
        self.join()
        now = resident("RssAnon")
        return {
            "peak_bytes": max(self.largest, now) - self.before,
            "left_bytes": now - self.before,
            "resident_peak_bytes": resident("VmHWM") - self.resident_before,
        }


def write_model(folder: Path, *, layers: int = LAYERS, vocabulary: int = 32768) -> Path:
    """A model folder of random weights in bfloat16."""
    sizes = dict(hidden_size=2048, mlp_size=7168, num_heads=16, num_kv_heads=4, head_dim=128, tied=False)
    return write(folder, sizes | {"vocab_size": vocabulary, "num_layers": layers}, torch.bfloat16)


def write(folder: Path, sizes: dict[str, Any], dtype: torch.dtype) -> Path:
    """A model folder of random weights, written leaf by leaf."""
    from treetune.core import tree
    from treetune.models import MODELS, hf, hf_keys, llama

    cfg = llama.Config(**sizes)
    generator, abstract = torch.Generator().manual_seed(0), MODELS["llama"].abstract(cfg, dtype=dtype)

    def leaves() -> Iterator[tuple[str, Tensor]]:
        for path, leaf in tree.items(abstract):
            numbers = torch.randn(leaf.shape, generator=generator) * 0.02 if len(leaf.shape) > 1 else torch.ones(leaf.shape)
            yield hf_keys.hf_key("llama", path), numbers.to(dtype)

    named = {hf_keys.hf_key("llama", path): leaf for path, leaf in tree.items(abstract)}
    hf.write(folder, leaves(), MODELS["llama"].to_hf(cfg) | {"dtype": str(dtype).removeprefix("torch.")}, sizes=named)
    return folder


def measure(kind: str, folder: Path) -> dict[str, Any]:
    """Load the model, then train one step on it."""
    from treetune.core import tree
    from treetune.models import loading, quantised

    scheme = quantised.scheme(quant=kind)
    load = partial(loading.load_model, dtype="bfloat16", device=torch.device("cpu"), scheme=scheme)
    step(load(folder / "small")[0])  # imports, tables and the allocator are warm
    watch = Watch()
    watch.start()
    start = time.perf_counter()
    model, _ = load(folder / "large")
    loading_row = {f"load_{name}": value for name, value in watch.stop().items()}
    seconds = time.perf_counter() - start
    watch = Watch()
    watch.start()
    facts = {
        "adapter_bytes": step(model),
        "leaf_bytes": tree.bytes(model.params),
        "largest_leaf_bytes": max(leaf.nbytes for leaf in tree.leaves(model.params)),
        "largest_read_bytes": max(4 * math.prod(leaf.shape) for leaf in tree.leaves(model.params)),
        "load_s": seconds,
    }
    return loading_row | {f"step_{name}": value for name, value in watch.stop().items()} | facts


def step(model) -> int:
    """The gradient of an adapter on all linear layers over one document, and an update; the bytes of adapter, gradient and moments."""
    from treetune.core import grad, lora, optim, tree
    from treetune.core.lora import Lora
    from treetune.models import dense, families, hf

    sizes = hf.abstract_of(model)
    params = {"lora": lora.init(sizes, lora.linears(sizes), rank=RANK, seed=0)}
    batch = dense.single(torch.arange(TOKENS) % model.cfg.vocab_size)
    batch |= {"at": torch.arange(TOKENS - 1), "targets": batch["tokens"][1:], "seq": torch.zeros(TOKENS - 1, dtype=torch.int64)}
    batch["seq_lens"] = torch.tensor([TOKENS - 1])

    def loss(params):
        low = Lora(params["lora"], 2.0)
        return -families.logprobs(model.family, model.cfg, model.params, batch, lora=low, remat="full").logp.sum(), None

    optimizer = optim.adamw()
    _, gradient = grad.value_and_grad(loss)(params)
    optimizer.update(gradient, optimizer.init(params), params, torch.tensor(1e-4))
    return 4 * tree.bytes(params)  # gradient, and two moments


def drive(kinds: list[str], repeats: int) -> None:
    """All kinds in turn; medians and ratios to JSON."""
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder) / "small", layers=1, vocabulary=256)
        write_model(Path(folder) / "large")
        runs = harness.interleave(__file__, [["--kind", kind, "--folder", folder] for kind in kinds], repeats)
    medians = {kind: harness.medians(side) for kind, side in zip(kinds, runs, strict=True)}
    base = medians["none"]
    ratios = {kind: {name: base[name] / row[name] for name in row} for kind, row in medians.items() if kind != "none"}
    result = {"benchmark": "loading", "machine": harness.machine(), "options": {"layers": LAYERS, "tokens": TOKENS, "rank": RANK}}
    print(json.dumps(ratios, indent=1))
    print("saved", harness.save("loading", result | {"medians": medians, "ratio": ratios, "runs": dict(zip(kinds, runs, strict=True))}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kinds", nargs="+", default=["none", "nf4", "int8", "fp8"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--kind")
    parser.add_argument("--folder", type=Path)
    args = parser.parse_args()
    if args.kind:
        print(json.dumps(measure(args.kind, args.folder)))
    else:
        drive(args.kinds, args.repeats)


if __name__ == "__main__":
    main()
