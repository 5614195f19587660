"""Resident memory of each of 1, 2 and 4 ranks with a model in parts: while it is loaded, in one step of full training, and saved.

Saved are checkpoints, from the state and from copies of it, as `--async-save` makes them, and the model; a checkpoint is also read again.

Random weights of about 1 GB in float32, all of which train in float32 with AdamW on one document of 32 tokens a rank; ranks are processes
that talk by gloo. All is over what a rank had after a load, a step and a save of a small model: RssAnon, the memory that is the process's
own, and VmHWM, the largest resident set, pages of mapped files included.

    python benchmarks/ranks.py
"""

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import loading
import torch

LAYERS, TOKENS, WORLDS = 18, 32, (1, 2, 4)
SIZES = dict(hidden_size=1024, mlp_size=3584, num_heads=16, num_kv_heads=4, head_dim=64, tied=False)


def watched(name: str, base: tuple[int, int], call: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """What a call gives, its largest memory over `base` (RssAnon, VmHWM) and its seconds."""
    from treetune.core import machine

    machine.trim()
    watch = loading.Watch()
    watch.before, watch.resident_before = base
    watch.start()
    start = time.perf_counter()
    out = call()
    seconds = time.perf_counter() - start
    return out, {f"{name}_{key}": value for key, value in (watch.stop() | {"s": seconds}).items()}


def measure(folder: Path) -> dict[str, Any]:
    """This rank's numbers for the large model, after all of it with the small one."""
    from treetune.core import machine
    from treetune.core.run.ranks import join_ranks

    machine.map_large_buffers()
    ranks = join_ranks(torch.device("cpu"))
    whole_run(folder / "small", ranks, (0, 0))
    base = loading.resident("RssAnon"), loading.resident("VmRSS")
    return whole_run(folder / "large", ranks, base)


def whole_run(path: Path, ranks, base: tuple[int, int]) -> dict[str, Any]:
    """Load, train one step, save: what each took."""
    from treetune.core import ckpt, optim, partition, shard, step, tree
    from treetune.core.state import TrainState
    from treetune.losses import sft_objective
    from treetune.models import loading as models
    from treetune.models import policy

    def load() -> policy.Policy:
        home = partition.of(ranks.mesh, "full")
        model, _ = models.load_model(path, dtype="float32", device=torch.device("cpu"), home=home)
        start = policy.full(model)
        ckpt.leaf_digest(model.params)
        return policy.place(start, ranks.mesh, "full")

    placed, rows = watched("load", base, load)
    facts = {
        "held_bytes": tree.bytes(tree.map(shard.local, placed.params)),
        "layer_bytes": sum(leaf.numel() * leaf.itemsize for leaf in tree.leaves(placed.params["model"]["layers"][0])),
        "largest_leaf_bytes": max(leaf.numel() * leaf.itemsize for leaf in tree.leaves(placed.params)),
    }
    optimizer = optim.adamw()
    one = step.make_step(sft_objective.named(policy.logprob(placed)), optimizer, schedule=optim.constant(1e-4), mesh=ranks.mesh)
    state = TrainState(placed.params, placed.frozen, optimizer.init(placed.params), {}, torch.tensor(0))
    placed = policy.bare(placed)
    state, more = watched("step", base, lambda: one(state, [(batch(ranks.rank), None)])[0])
    more |= checkpoints(path.parent / f"{path.name} checkpoints", state, base, ranks.rank)
    out = path.parent / f"{path.name} saved"
    save = lambda: policy.save(placed, out if ranks.rank == 0 else None, params=state.params, frozen=state.frozen)  # noqa: E731
    _, last = watched("save", base, save)
    if ranks.rank == 0:
        shutil.rmtree(out)
    return rows | more | last | facts


def checkpoints(folder: Path, state: Any, base: tuple[int, int], rank: int) -> dict[str, Any]:
    """Save a checkpoint, from the state and from copies beside it, and read it back into the state: what each took."""
    from treetune.core import async_save, ckpt, exchange

    def behind() -> float:
        """Seconds until training may go on."""
        saver, start = async_save.Saver(asynchronous=True), time.perf_counter()
        saver.begin(folder / "copied", state, {})
        seconds = time.perf_counter() - start
        saver.wait()
        return seconds

    exchange.group()
    _, rows = watched("checkpoint", base, lambda: ckpt.save(folder, state, {}))
    copy_s, more = watched("copied", base, behind)
    loaded, last = watched("resume", base, lambda: ckpt.load(folder / ckpt.name(int(state.step)), state, in_place=True))
    size = sum(file.stat().st_size for file in folder.glob("step_*/*"))
    del loaded
    torch.distributed.barrier() if torch.distributed.is_initialized() else None
    if rank == 0:
        shutil.rmtree(folder)
    return rows | more | last | {"checkpoint_bytes": size, "copied_begin_s": copy_s}


def batch(rank: int) -> dict[str, torch.Tensor]:
    """One document, every token of which is scored."""
    from treetune.models import dense

    stream = dense.single((torch.arange(TOKENS) + rank) % 256)
    read = {"at": torch.arange(TOKENS - 1), "targets": stream["tokens"][1:], "seq": torch.zeros(TOKENS - 1, dtype=torch.int64)}
    return stream | read | {"seq_lens": torch.tensor([TOKENS - 1]), "seed": torch.tensor(0)}


def run(world: int, folder: Path) -> list[dict[str, Any]]:
    """What each rank of a world says."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, __file__, "--folder", str(folder)]
    own = {"WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1, "GLOO_SOCKET_IFNAME": "lo"}
    sets = [os.environ | {key: str(value) for key, value in (own | {"RANK": rank, "LOCAL_RANK": rank}).items()} for rank in range(world)]
    started = [subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) for env in sets]
    outputs = [one.communicate()[0] for one in started]
    if any(one.returncode for one in started):
        raise SystemExit(f"{world} ranks failed")
    return [json.loads(text.strip().splitlines()[-1]) for text in outputs]


def drive() -> None:
    """All worlds in turn; the largest of each number over ranks to JSON."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        loading.write(folder / "small", SIZES | {"num_layers": 1, "vocab_size": 256}, torch.float32)
        loading.write(folder / "large", SIZES | {"num_layers": LAYERS, "vocab_size": 8192}, torch.float32)
        every = {str(world): run(world, folder) for world in WORLDS}
    largest = {world: {key: max(row[key] for row in rows) for key in rows[0]} for world, rows in every.items()}
    print(json.dumps(largest, indent=1))
    options = {"layers": LAYERS, "tokens": TOKENS, "worlds": list(WORLDS)} | SIZES
    result = {"benchmark": "ranks", "machine": harness.machine(), "options": options, "largest": largest, "ranks": every}
    print("saved", harness.save("ranks", result))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path)
    args = parser.parse_args()
    if args.folder:
        print(json.dumps(measure(args.folder)))
    else:
        drive()


if __name__ == "__main__":
    main()
