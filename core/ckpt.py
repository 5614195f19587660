"""Checkpoints: a TrainState and its bookkeeping on disk, valid at every moment, without pickle.

A checkpoint is a folder `step_000100/` with `state.safetensors` (params, opt and extra by path), or the files of several ranks and an
index (`ckpt_parts`), with `state.json` and a manifest of all, which is compared when they are read. It is written into a hidden sibling,
flushed to the disk and renamed when all ranks have written, so a folder of that name is always whole. The frozen base is not stored, only
its digest. Any number of ranks can load it, with any sharding.
"""

import hashlib
import json
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from treetune.core import ckpt_parts, drafts, durable, exchange, fields, manifest, owned, quant, shard, tree
from treetune.core.state import Params, TrainState

WHOLE, PARTS, UNVERIFIED = 2, 3, 1  # formats: whole leaves, parts of several ranks, and whole ones of before there was a manifest
FIX = "resume from another checkpoint"
DIGEST_THREADS = 8
fsync = durable.fsync


class SaveError(OSError):
    """A checkpoint could not be written; the ones before it are untouched."""


def digest(params: Params) -> str:
    """sha256 over the paths, shapes, dtypes and bytes of all leaves (a collective when leaves are sharded)."""
    sha = hashlib.sha256()
    # By path, because the order of a dict is not part of the weights.
    for path, leaf in sorted(tree.items(params)):
        if quant.quantised(leaf):
            sha.update(f"{path} {quant.facts(leaf)} ".encode())
            continue
        whole = shard.full(leaf).contiguous().cpu()
        sha.update(f"{path} {tuple(whole.shape)} {whole.dtype} ".encode())
        sha.update(whole.reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


def leaf_digest(params: Params) -> str:
    """sha256 of the sha256 of every leaf's path, shape, dtype and bytes, hashed in several threads: a collective for sharded leaves."""
    leaves = sorted(tree.items(params))
    mesh = next((mesh for _, leaf in leaves if (mesh := shard.mesh_of(leaf)) is not None), None)
    if mesh is not None:
        return hashlib.sha256("".join(_in_turns(leaves, mesh.get_group((mesh.mesh_dim_names or (None,))[-1]))).encode()).hexdigest()
    if tree.bytes(params) < manifest.SMALL:
        return hashlib.sha256("".join(_one_digest(*leaf) for leaf in leaves).encode()).hexdigest()
    # hashlib lets go of the interpreter's lock for large buffers, so threads do hash leaves at the same time.
    with ThreadPoolExecutor(DIGEST_THREADS) as threads:
        return hashlib.sha256("".join(threads.map(_one_digest, *zip(*leaves, strict=True))).encode()).hexdigest()


def _one_digest(path: str, leaf: Any) -> str:
    if quant.quantised(leaf):
        return f"{path} {quant.facts(leaf)}"
    whole = leaf.detach().contiguous().cpu().reshape(-1)
    sha = hashlib.sha256(f"{path} {tuple(leaf.shape)} {leaf.dtype} ".encode())
    sha.update(whole.view(torch.uint8).numpy().data)
    return sha.hexdigest()


def _in_turns(leaves: list[tuple[str, Any]], group: dist.ProcessGroup) -> list[str]:
    """The digests of leaves that are gathered one after another and hashed by the ranks in turn, each while others gather the next."""
    rank, world, own = group.rank(), group.size(), dict[int, Any]()
    with ThreadPoolExecutor(1) as thread:
        for number, (path, leaf) in enumerate(leaves):
            whole = leaf if quant.quantised(leaf) else shard.full(leaf)  # of which its facts are hashed
            if number % world == rank:
                for earlier in own.values():  # so that a rank has no more than two whole leaves
                    earlier.result()
                own[number] = thread.submit(_one_digest, path, whole)
            del whole
    every: list[Any] = [None] * world
    dist.all_gather_object(every, {number: one.result() for number, one in own.items()}, group=group)
    digests = {number: digest for part in every for number, digest in part.items()}
    return [digests[number] for number in range(len(leaves))]


def save(root: Path, state: TrainState, meta: dict) -> Path:
    """Write `root/step_NNNNNN` and return it; `meta` is JSON. Every rank calls it and writes what it holds; the meta is the first one's.

    Raises SaveError, on all ranks, when the disk of one refuses; earlier checkpoints stay valid.
    """
    return write(root, int(state.step), ckpt_parts.own(state, exchange.rank()), meta, exchange.group())


def write(root: Path, step: int, own: ckpt_parts.Own, meta: dict, group: exchange.Group) -> Path:
    """`save` of this rank's parts of the state of a step; the ranks agree over a group."""
    path, rank = Path(root) / name(step), exchange.rank()
    draft = drafts.name(path)
    try:
        # All ranks write into the draft of the first one.
        draft = Path(exchange.first(lambda: _made(draft), group))
        file = ckpt_parts.file_name(own, rank, exchange.size())
        written = exchange.each(lambda: ckpt_parts.write(draft, file, own), group)
        files = [one for one in written if one is not None]
        exchange.first(lambda: _finish(draft, path, own, files, {"step": step, **meta}), group)
    except OSError as error:
        raise SaveError(f"could not save {path}: {error}; the checkpoints before it are intact, free some space") from error
    finally:
        if rank == 0:
            shutil.rmtree(draft, ignore_errors=True)
    return path


def _made(draft: Path) -> str:
    draft.mkdir(parents=True)
    return str(draft)


def _finish(draft: Path, path: Path, own: ckpt_parts.Own, files: list[dict], meta: dict) -> None:
    """Turn a draft with the files of all ranks into a checkpoint."""
    if own.split:
        ckpt_parts.write_index(draft, own.shapes, files)
    (draft / "state.json").write_text(json.dumps({"format": PARTS if own.split else WHOLE, **meta}, indent=1))
    manifest.write(draft, {file["name"]: manifest.Entry(*file["entry"]) for file in files})
    commit(draft, path)


def commit(draft: Path, path: Path) -> None:
    """Flush every file of `draft` to the disk and rename it to `path`, replacing what is there."""
    # Contents first, the name last: a disk may write a rename before the bytes of what is renamed, and a crash between the two would
    # leave an empty file under a good name.
    for file in draft.iterdir():
        fsync(file)
    fsync(draft)
    owned.replace(draft, path, owned.CHECKPOINT)
    fsync(path.parent)


def recover(root: Path) -> None:
    """Restore a checkpoint that a crash left under a draft's name, and delete drafts. The caller must hold the lock of the run folder."""
    owned.restore(root, owned.CHECKPOINT, locked=True)
    drafts.sweep(root, locked=True)


def read_meta(path: Path) -> dict:
    """The JSON side of a checkpoint. Raises ValueError when `path` is not one, or its files are not as they were written."""
    path, file = Path(path), Path(path) / "state.json"
    # One process for all: it is the first that chooses a checkpoint.
    listed = manifest.check(path, weights=exchange.rank() == 0, fix=FIX)
    if not file.is_file():
        raise ValueError(f"{path} is not a checkpoint: it has no state.json")
    try:
        meta = fields.mapping(json.loads(file.read_text(encoding="utf-8")), file.name)
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file} is damaged ({error}): {FIX}") from error
    if (version := meta.values.get("format")) not in (UNVERIFIED, WHOLE, PARTS):
        raise ValueError(f"{path} has checkpoint format {version!r}; this version reads {UNVERIFIED} to {PARTS}")
    if version != UNVERIFIED and not listed:
        raise ValueError(f"{path} has lost its {manifest.NAME}, so its files cannot be checked: copy the whole folder, or {FIX}")
    _check_step(path, meta)
    return meta.values


def _check_step(path: Path, meta: fields.Fields) -> None:
    try:
        step = fields.integer(meta, "step", least=0)
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): {FIX}") from error
    if re.fullmatch(r"step_\d+", path.name) and int(path.name.removeprefix("step_")) != step:
        raise ValueError(f"{path} is damaged (its state.json says step {step}): {FIX}")


def newest_sound(root: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint under `root` whose files match its manifest, and the fault of each newer one."""
    faults = []
    for path in reversed(numbered(root)):
        try:
            read_meta(path)
        except ValueError as error:
            faults.append(str(error).removesuffix(f": {FIX}"))
            continue
        return path, faults
    return None, faults


def load(path: Path, like: TrainState, *, base_digest: str | None = None, in_place: bool = False) -> tuple[TrainState, dict]:
    """The state saved at `path`, in the structure, dtypes, devices and sharding of `like`, and its meta.

    in_place: into the memory of `like`, so that there are never two states; after an error some of its leaves have been overwritten.
    Raises ValueError when it belongs to another model: different leaves, shapes, or digest of the frozen base.
    """
    meta = read_meta(path)
    parts = ckpt_parts.trees(like)
    with ckpt_parts.reading(Path(path), FIX) as saved:
        # Shapes come from the index or the header: a checkpoint of another model is refused before any tensor is read.
        _same_leaves(path, {key: leaf.shape for key, leaf in saved.leaves.items()}, parts)
        if base_digest is not None and meta.get("base_digest") != base_digest:
            raise ValueError(f"{path} was trained on another base model: its digest differs from that of the model given")
        filled = iter([saved.read(key, leaf, in_place=in_place) for key, leaf in tree.items(parts)])
    loaded = tree.map(lambda _: next(filled), parts)
    return like._replace(**loaded, step=torch.tensor(meta["step"], device=like.step.device)), meta


def _same_leaves(path: Path, saved: dict[str, tuple], parts: Params) -> None:
    shapes = {key: tuple(leaf.shape) for key, leaf in tree.items(parts)}
    for key in sorted(shapes.keys() ^ saved.keys()):
        place = "the checkpoint but not in this run" if key in saved else "this run but not in the checkpoint"
        raise ValueError(f"{path} belongs to another model or method: {key} is in {place}")
    for key, shape in shapes.items():
        if saved[key] != shape:
            raise ValueError(f"{path} belongs to another model: {key} has shape {saved[key]} there and {shape} here")


def name(step: int) -> str:
    """The name of the checkpoint of a step."""
    return f"step_{step:06d}"


def steps(root: Path) -> list[Path]:
    """Checkpoints under `root`, oldest first, without drafts of an interrupted save and names that no save writes."""
    return [path for path in numbered(root) if (path / "state.json").is_file()]


def numbered(root: Path) -> list[Path]:
    """Paths under `root` with the name of a checkpoint, complete or not, oldest first."""
    folders = Path(root).glob("step_*") if Path(root).is_dir() else []
    numbers = {path: int(path.name.removeprefix("step_")) for path in folders if re.fullmatch(r"step_[0-9]+", path.name)}
    return sorted((path for path, number in numbers.items() if path.name == name(number)), key=numbers.__getitem__)


def remove(path: Path) -> None:
    """Delete a checkpoint's own files, and its folder if nothing else is in it. Links and their targets stay."""
    owned.remove(path, owned.CHECKPOINT)


def prune(root: Path, keep: int | None, *, best: Path | None = None) -> list[Path]:
    """Delete all checkpoints but the newest `keep` (at least 1) and the best one, and drafts of crashed saves; return the deleted paths.

    The caller must hold the lock of the run folder.
    """
    recover(Path(root))
    checkpoints = steps(root)
    old = [] if keep is None else checkpoints[: -max(keep, 1)]
    removed = [path for path in old if best is None or path.name != best.name]
    for path in removed:
        remove(path)
    return removed
