"""One rank of the distributed tests. argv: job, folder, axes of the mesh such as replicate=2,data=2.

Results go to the folder as safetensors and JSON, from rank 0 unless they differ.

train: three steps in every mode, checkpoints saved from and loaded into every placement, a poisoned row on the last rank.
kinds: three steps of an adapter of each kind, in every mode.
again: the checkpoints that four ranks saved, read with every sharding.
fail: the last rank raises an error in the middle of a step.
die: the last rank is killed in the middle of its second save.
"""

import contextlib
import gc
import json
import os
import signal
import sys
from pathlib import Path

import counting
import scene
import torch
from safetensors.torch import load_file, save_file
from torch.multiprocessing.reductions import StorageWeakRef

from treetune.cli.options import meshes as axes
from treetune.core import async_save, ckpt, ckpt_parts, shard, tensor_file, tree
from treetune.core.run import faults
from treetune.core.run.ranks import Ranks, join_ranks
from treetune.core.state import TrainState
from treetune.losses import sft_objective
from treetune.models import dense, policy

MODES, KIND_MODES = ("none", "moments", "gradients", "full"), ("none", "full")


def write(path: Path, tensors: dict) -> None:
    save_file({name: leaf.contiguous() for name, leaf in tensors.items()}, path)


def train(folder: Path, ranks: Ranks) -> None:
    base, crossed = scene.model(), {}
    for sharding in MODES:
        for trains in scene.TRAINS:
            out, state, _ = scene.run(trains, ranks, sharding)
            name = f"{sharding}-{trains}"
            ckpt.save(folder / name, state, {"base_digest": ""})
            loaded, _ = ckpt.load(folder / "one" / trains / "step_000003", scene.like(base, trains, ranks, sharding))
            if ranks.rank == 0:
                write(folder / f"{name}.safetensors", out)
            both = scene.whole(loaded)
            if ranks.rank == 0:
                write(folder / f"{name}.loaded.safetensors", both)
            crossed[name] = across(folder / name / "step_000003", scene.like(base, trains, ranks, MODES[3 - MODES.index(sharding)]), state)
    starts = {mode: scene.start(base, "full", ranks, mode)[0] for mode in MODES}
    local = {mode: tree.bytes(tree.map(shard.local, state.params)) for mode, state in starts.items()}
    moments = {mode: tree.bytes(tree.map(shard.local, state.opt)) for mode, state in starts.items()}
    bad = {mode: poison(base, ranks, mode) for mode in MODES}
    alive = {trains: whole_alive(base, trains, ranks) for trains in scene.TRAINS}
    sent = counting.counts(ranks, scene.stream([0, 2]))
    twice = ranks._replace(mesh=shard.mesh("cpu", replicate=ranks.world, data=1))
    seen = gradients(policy.place(scene.trees(base, "full"), twice.mesh, "full"), twice)
    if ranks.rank == 0:
        write(folder / "hybrid.safetensors", seen)
    same = {remat: equal_again(base, ranks, remat) for remat in ("full", "selective", "none+disk", "selective+disk")}
    found = {"bytes": local, "moments": moments, "bad": bad, "alive": alive, "sent": sent, "same": same}
    found |= {
        "wide": wide(base, ranks),
        "after": after(base, ranks),
        "left": left_after_a_step(base, ranks),
        "crossed": crossed,
        "meshes": meshes(folder / "meshes", ranks),
    }
    (folder / f"rank{ranks.rank}.json").write_text(json.dumps(found))


def across(path: Path, other: TrainState, state: TrainState) -> list[str]:
    """The leaves of a checkpoint that are not those of the state, read with another sharding."""
    loaded, wanted = scene.whole(ckpt.load(path, other)[0]), scene.whole(state)
    return [name for name, leaf in wanted.items() if not torch.equal(leaf, loaded[name])]


def meshes(folder: Path, ranks: Ranks) -> dict:
    """Leaves saved with every placement of some meshes and read with every other: bytes on the disk, and what came back otherwise."""
    start = scene.shapes()
    states = [scene.scattered(sizes, specs) for sizes, specs in scene.LAYOUTS[ranks.world]]
    paths, saver, wrong = [folder / str(number) / ckpt.name(1) for number in range(len(states))], async_save.Saver(asynchronous=True), []
    for path, state in zip(paths, states, strict=True):
        saver.begin(path.parent, state, {})
        tree.map(lambda leaf: shard.local(leaf).zero_(), state.params)  # as the next step changes it
        torch.distributed.barrier()  # while the ranks write
    saver.wait()
    for path in paths:
        for state in states:
            empty = tree.map(lambda leaf: shard.like(torch.zeros_like, leaf), state.params)
            loaded, _ = ckpt.load(path, state._replace(params=empty))
            wrong += [[str(path), name] for name, leaf in loaded.params.items() if not torch.equal(shard.full(leaf), start[name])]
    return {"wrong": wrong, "paths": list(map(str, paths)), "full": full_disk(paths[0].parent, states[0], ranks)}


def full_disk(root: Path, state: TrainState, ranks: Ranks) -> dict:
    """What is said on each rank where the last one's disk is full, with and without a thread, and what is left."""
    plain, said = ckpt_parts.write, []

    def write(*args):
        if ranks.rank == ranks.world - 1:
            raise OSError(28, "No space left on device")
        return plain(*args)

    ckpt_parts.write = write
    for asynchronous in (False, True):
        saver = async_save.Saver(asynchronous=asynchronous)
        try:
            saver.begin(root, state._replace(step=state.step + 1), {})
            saver.wait()
        except ckpt.SaveError as error:
            said.append(str(error))
    ckpt_parts.write = plain
    torch.distributed.barrier()
    return {"said": said, "left": sorted(path.name for path in root.iterdir())}


def whole_alive(base, trains: str, ranks: Ranks) -> tuple[int, int]:
    """How many whole leaves of layers a forward pass makes on sharded weights, and how many of them wait for the backward pass."""
    state, placed = scene.start(base, trains, ranks, "full")
    gathered, remember = [], shard.remember

    def watched(whole, source):
        if scene.VOCAB not in whole.shape:
            gathered.append(StorageWeakRef(whole.untyped_storage()))
        return remember(whole, source)

    shard.remember = watched
    params = tree.map(lambda leaf: leaf.detach().requires_grad_(), state.params)
    terms, _ = scene.objective(base, placed).terms(params, state.frozen, *scene.micro_batches(0, ranks.row_rank, ranks.row_ranks)[0])
    shard.remember = remember
    alive = sum(not ref.expired() for ref in gathered)
    sum(terms.values()).backward()
    return len(gathered), alive


def left_after_a_step(base, ranks: Ranks) -> tuple[int, int]:
    """How many whole leaves a step makes, and how many of them outlive it without a search for cycles."""
    state, placed = scene.start(base, "full", ranks, "full")
    step, gathered, remember = scene.stepper(base, placed, ranks, "full"), [], shard.remember

    def watched(whole, source):
        gathered.append(StorageWeakRef(whole.untyped_storage()))
        return remember(whole, source)

    shard.remember = watched
    gc.collect()
    gc.disable()
    step(state, scene.micro_batches(0, ranks.rank, ranks.world))
    left = sum(not ref.expired() for ref in gathered)
    gc.enable()
    shard.remember = remember
    return len(gathered), left


def gradients(placed: policy.Policy, ranks: Ranks, remat: str | None = None) -> dict:
    """The whole gradients of a step of full sharding over several micro-batches."""
    seen, own = {}, scene.optimizer()
    params = tree.map(lambda leaf: shard.like(torch.clone, leaf), placed.params)  # which the step changes
    state = TrainState(params, placed.frozen, own.init(params), {}, torch.tensor(0))
    objective = sft_objective.named(policy.logprob(placed, remat=remat))
    scene.stepper(None, placed, ranks, "full", seen, objective=objective)(state, scene.micro_batches(0, ranks.row_rank, ranks.row_ranks))
    return seen


def equal(one: dict, other: dict) -> bool:
    return bool(one) and one.keys() == other.keys() and all(torch.equal(leaf, other[name]) for name, leaf in one.items())


def equal_again(base, ranks: Ranks, remat: str) -> bool:
    """Whether gradients have the same bits when layers are computed again, or kept elsewhere."""
    placed = policy.place(scene.trees(base, "both"), ranks.mesh, "full")
    return equal(gradients(placed, ranks, remat), gradients(placed, ranks))


def wide(base, ranks: Ranks) -> bool:
    """Whether gradients of weights in 16 bits are summed in float32: as those of the same weights in float32, to the bit."""
    low = policy.full(base, dtype=torch.bfloat16)
    same = low._replace(params=tree.map(lambda leaf: leaf.float(), low.params))
    return equal(*(gradients(policy.place(one, ranks.mesh, "full"), ranks) for one in (low, same)))


def after(base, ranks: Ranks) -> list[bool]:
    """Whether a step is as ever after an error on all ranks in a forward pass, and in the middle of a backward pass."""
    placed, attention = policy.place(scene.trees(base, "full"), ranks.mesh, "full"), dense._attention
    first, out = gradients(placed, ranks, "full"), []
    for last in (1, 4):
        calls = []

        def failing(*args, calls=calls, last=last):
            calls.append(1)
            if len(calls) == last:
                raise ArithmeticError
            return attention(*args)

        dense._attention = failing
        with contextlib.suppress(ArithmeticError):
            gradients(placed, ranks, "full")
        dense._attention = attention
        out.append(len(calls) == last and equal(gradients(placed, ranks, "full"), first))
    return out


def poison(base, ranks: Ranks, sharding: str) -> dict:
    """A step in which document 4, on rank 1, has an infinite loss: was it skipped, did a weight move, what is said of it."""
    state, placed = scene.start(base, "full", ranks, sharding)
    before = scene.whole(state)
    objective = scene.poisoned(base, placed, row=4)
    batches = scene.micro_batches(0, ranks.row_rank, ranks.row_ranks)
    state, metrics = scene.stepper(base, placed, ranks, sharding, objective=objective)(state, batches)
    same = all(torch.equal(leaf, before[name]) for name, leaf in scene.whole(state).items())
    return {"skipped": metrics["skipped"].item(), "same": same, "text": faults.find_not_finite(objective, state, batches)}


def kinds(folder: Path, ranks: Ranks) -> None:
    for sharding in KIND_MODES:
        for name in scene.KINDS:
            out = scene.kind(name, ranks, sharding)
            if ranks.rank == 0:
                write(folder / f"{sharding}-{name}.safetensors", out)


def again(folder: Path, ranks: Ranks) -> None:
    found, base = {}, scene.model()
    for saved in MODES:
        for trains in scene.TRAINS:
            wanted = load_file(folder / f"{saved}-{trains}.safetensors")
            for mode in MODES:
                loaded, _ = ckpt.load(folder / f"{saved}-{trains}" / "step_000003", scene.like(base, trains, ranks, mode))
                wrong = [name for name, leaf in scene.whole(loaded).items() if not torch.equal(leaf, wanted[name])]
                found[f"{saved} {trains} {mode}"] = wrong
    (folder / f"again{ranks.world}-{ranks.rank}.json").write_text(json.dumps(found))


def die(folder: Path, ranks: Ranks) -> None:
    base = scene.model()
    state, _ = scene.start(base, "full", ranks, "full")
    ckpt.save(folder / "runs", state, {"base_digest": ""})
    if ranks.rank == ranks.world - 1:
        plain = tensor_file.write

        def dying(tensors):
            for number, tensor in enumerate(tensors):
                if number == 9:
                    os.kill(os.getpid(), signal.SIGKILL)
                yield tensor

        tensor_file.write = lambda path, sizes, tensors: plain(path, sizes, dying(tensors))
    ckpt.save(folder / "runs", state._replace(step=state.step + 1), {"base_digest": ""})


def fail(folder: Path, ranks: Ranks) -> None:
    """The last rank alone raises in the middle of a backward pass, with messages on their way."""
    attention, calls = dense._attention, []

    def failing(*args):
        calls.append(1)
        if len(calls) == 4 and ranks.rank == ranks.world - 1:
            raise ArithmeticError("a bad row of one rank")
        return attention(*args)

    dense._attention = failing
    gradients(policy.place(scene.trees(scene.model(), "full"), ranks.mesh, "full"), ranks, "full")


def main() -> None:
    torch.set_num_threads(1)
    ranks = join_ranks(torch.device("cpu"), axes.read(tuple(sys.argv[3:])))
    {"train": train, "kinds": kinds, "again": again, "die": die, "fail": fail}[sys.argv[1]](Path(sys.argv[2]), ranks)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


main()
