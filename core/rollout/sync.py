"""Weights from the trainer to a vLLM server, and the proof that they arrived: the canary.

c tokens of the canary: one prompt of fixed ids. After every sync its log-probs on the server (float64 [c - 1], nats, temperature 1)
must be the trainer's. Two things are asked of them:
- The mean absolute difference is at most a tolerance, by the dtype that the server computes in.
- When the trainer's have moved since the last sync, the server's have moved too. An engine gives the same bits for the same weights,
  so bits that stay while the trainer moves are a sync that was lost, however small the move. A move below RESOLUTION tells nothing.
"""

import shutil
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from treetune.core import check, drafts, durable, manifest, owned
from treetune.core.rollout.server import Server
from treetune.core.rollout.vllm import Client, Lost, Unreachable
from treetune.core.state import Params

# Mean absolute difference of log-probs between trainer and server with the same weights, at most. Measured with SmolLM2-135M on a CPU:
# 1e-5 in float32 and 0.08 in bfloat16; a GPU in float32 may use TF32 (1e-3). float16 has three bits more than bfloat16.
TOLERANCE = {"float32": 1e-3, "float16": 0.03, "bfloat16": 0.2}
# Largest move of a log-prob on the trainer that its own rounding cannot explain. Any change of bfloat16 weights moves some log-prob by 0.3.
RESOLUTION = {"float32": 1e-4, "float16": 5e-3, "bfloat16": 0.02}
Save = Callable[[Path], object]
T = TypeVar("T")


class SyncError(RuntimeError):
    """The server does not have the weights that it should have."""


class Reading(NamedTuple):
    """Log-probs of the canary at one sync, the trainer's and the server's, and the version of the policy."""

    version: int
    expected: np.ndarray
    got: np.ndarray


class CanaryVerdict(NamedTuple):
    """How far the server is from the trainer (mean and largest difference, nats), how far the trainer has moved since the last sync
    (largest difference), and whether a lost sync would have been seen: False where it moved too little to tell."""  # fmt: skip

    mean_diff: float
    max_diff: float
    moved: float
    conclusive: bool


def judge(now: Reading, before: Reading | None, *, tolerance: float, resolution: float) -> CanaryVerdict:
    """What two readings tell. Raises SyncError when the server has other weights than the trainer."""
    if now.expected.shape != now.got.shape:
        raise ValueError(f"the trainer gave {now.expected.size} log-probs of the canary and the server {now.got.size}; expected as many")
    gap = np.abs(now.got - now.expected)
    moved = 0.0 if before is None else float(np.abs(now.expected - before.expected).max())
    # Asked first: after a small step the old weights, too, are within the tolerance.
    if before is not None and moved > resolution and np.array_equal(now.got, before.got):
        raise SyncError(f"the sync of version {now.version} was lost: the server still has version {before.version}{_moved(moved)}")
    if not gap.mean() <= tolerance:
        text = f"mean difference of log-probs {gap.mean():.2e}, at most {tolerance:g} allowed"
        weights = "other weights"
        if before is not None and np.abs(now.got - before.expected).mean() <= tolerance:
            weights = f"version {before.version}"
        raise SyncError(f"the server has {weights}, not version {now.version}: {text}")
    return CanaryVerdict(float(gap.mean()), float(gap.max()), moved, before is not None and moved > resolution)


def _moved(moved: float) -> str:
    return f", while log-probs of the trainer moved by up to {moved:.2e}"


class Canary:
    """Reads the canary's log-probs from the server and judges them against the trainer's and those before.

    `dtype` is what trainer and server compute in. With `widen` it is the trainer's, and a server that somebody else started may compute
    in a coarser one: the first reading, of the base model, tells which.
    """

    def __init__(self, client: Client, tokens: Sequence[int], *, dtype: str, tolerance: float | None = None, widen: bool = False):
        if len(tokens) < 2 or dtype not in TOLERANCE:
            raise ValueError(f"a canary of {len(tokens)} tokens in {dtype}; expected at least 2, in one of {', '.join(TOLERANCE)}")
        self.client, self.tokens = client, list(tokens)
        self.dtype, self.tolerance, self.widen = dtype, tolerance, widen
        self.last: Reading | None = None

    def check(self, model: str, version: int, expected: np.ndarray) -> CanaryVerdict:
        """Compare what the server says as `model` with `expected` [c - 1]. Raises SyncError; the last good reading stays then."""
        now = Reading(version, np.asarray(expected, np.float64), self.client.prompt_logps(self.tokens, model=model))
        if self.widen and self.last is None and now.expected.shape == now.got.shape:
            # Both sides should have the same weights here, so that the difference is rounding and tells the dtype of the server.
            self.dtype = coarser(self.dtype, float(np.abs(now.got - now.expected).mean()))
        verdict = self._judge(now, self.last)
        self.last = now
        return verdict

    def again(self, model: str) -> CanaryVerdict:
        """Compare once more with what was expected last: after a restart of the server."""
        if self.last is None:
            raise ValueError("the canary was never read: call `start` of the sync first")
        now = self.last._replace(got=self.client.prompt_logps(self.tokens, model=model))
        # Without the reading before: the same version again must give the same bits, which is no lost sync.
        return self._judge(now, None)

    def _judge(self, now: Reading, before: Reading | None) -> CanaryVerdict:
        tolerance = TOLERANCE[self.dtype] if self.tolerance is None else self.tolerance
        return judge(now, before, tolerance=tolerance, resolution=RESOLUTION[self.dtype])


def coarser(dtype: str, gap: float) -> str:
    """The finest dtype, from `dtype` on, that explains this mean difference with room to spare; bfloat16 where none does."""
    order = list(TOLERANCE)[list(TOLERANCE).index(dtype) :]
    return next((name for name in order if 3 * gap <= TOLERANCE[name]), order[-1])


def worst(verdicts: Sequence[CanaryVerdict]) -> CanaryVerdict:
    """The largest differences of several servers; conclusive where all are."""
    mean, largest, moved = (max(one[i] for one in verdicts) for i in range(3))
    return CanaryVerdict(mean, largest, moved, all(one.conclusive for one in verdicts))


class Adapters:
    """Adapters of a run on a server, through the file system: one folder and one name for each version.

    `model` is the name to sample with. `keep` versions stay loaded, the current one among them, for requests that are under way.
    """

    def __init__(self, client: Client, root: str | Path, canary: Canary, *, keep: int = 2):
        self.client, self.root, self.canary, self.keep = client, Path(root), canary, keep
        self.run = uuid.uuid4().hex[:8]  # names are new to a server that an earlier run used
        self.kept: list[int] = []

    @property
    def model(self) -> str:
        """The name of the newest good version on the server; the base model's before the first sync."""
        return self.name(self.kept[-1]) if self.kept else self.client.model

    def name(self, version: int) -> str:
        """The name of a version on the server."""
        # vLLM keeps an adapter under its name even when the files change, so every version of every run has its own.
        return f"{self.folder(version).name}-{self.run}"

    def folder(self, version: int) -> Path:
        """The folder of a version."""
        return self.root / f"adapter-v{version:06}"

    def start(self, version: int, expected: np.ndarray) -> CanaryVerdict:
        """Check that the server's base model is the trainer's; `expected` are the base model's log-probs."""
        return self.canary.check(self.client.model, version, expected)

    def sync(self, version: int, save: Save, params: Params, expected: np.ndarray) -> CanaryVerdict:
        """Write the adapter with `save(folder)`, load it as a new version, and check it against the trainer's `expected`.

        Raises SyncError, naming the leaf, when `params` hold a nan or inf (nothing is written), and when the server has other weights
        afterwards; ValueError when the server refuses the adapter. The version before stays the current one then.
        """
        _finite(params, version)
        if self.kept and version <= self.kept[-1]:
            raise ValueError(f"version {version} comes after version {self.kept[-1]}; each sync needs a higher one")
        write(self.folder(version), save)
        # The server compares no digests of the files that it reads.
        _intact(self.folder(version))
        self.client.load_adapter(self.name(version), self.folder(version))
        try:
            verdict = self.canary.check(self.name(version), version, expected)
        except SyncError:
            self._drop(version)
            raise
        self.kept.append(version)
        while len(self.kept) > self.keep:
            self._drop(self.kept.pop(0))
        return verdict

    def recover(self) -> CanaryVerdict:
        """Load the current version again, on a server that was restarted and has none, and check it."""
        if self.kept:
            self.intact()
            self.client.load_adapter(self.model, self.folder(self.kept[-1]))
        return self.canary.again(self.model)

    def intact(self) -> None:
        """Raise SyncError unless the current version's files are as they were written."""
        if self.kept:
            _intact(self.folder(self.kept[-1]))

    def _drop(self, version: int) -> None:
        self.client.unload_adapter(self.name(version))
        owned.remove(self.folder(version), owned.MODEL)


class Weights:
    """Whole weights of a run on a managed server: each version is a model folder that the server is restarted on, or, with `in_place`,
    reloads through its development endpoints (see `Client.reload_weights`). `command(folder)` is the server's command line."""  # fmt: skip

    def __init__(
        self,
        client: Client,
        root: str | Path,
        canary: Canary,
        *,
        server: Server,
        command: Callable[[Path], list[str]],
        in_place: bool = False,
    ):
        self.client, self.root, self.canary, self.server, self.command = client, Path(root), canary, server, command
        self.in_place = in_place
        self.kept: Path | None = None

    @property
    def model(self) -> str:
        """The name to sample with: always the base model's."""
        return self.client.model

    def start(self, version: int, expected: np.ndarray) -> CanaryVerdict:
        """Check that the server's weights are the trainer's."""
        return self.canary.check(self.model, version, expected)

    def sync(self, version: int, save: Save, params: Params, expected: np.ndarray) -> CanaryVerdict:
        """Write the model with `save(folder)`, have the server take it, and check it. Raises as `Adapters.sync` does."""
        _finite(params, version)
        folder = self.root / f"weights-v{version:06}"
        write(folder, save)
        _intact(folder)
        if self.in_place:
            self.client.reload_weights(folder)
            self.server.command = self.command(folder)  # where a restart would have to begin
        else:
            self.server.restart(self.command(folder))
        verdict = self.canary.check(self.model, version, expected)
        if self.kept not in (None, folder):
            owned.remove(self.kept, owned.MODEL)
        self.kept = folder
        return verdict

    def intact(self) -> None:
        """Raise SyncError unless the current version's files are as they were written."""
        if self.kept is not None:
            _intact(self.kept)

    def recover(self) -> CanaryVerdict:
        """Check a server that was restarted on the current folder."""
        return self.canary.again(self.model)


def write(folder: Path, save: Save) -> None:
    """`save` into a folder that appears whole or not at all, in place of one of that name."""
    part = drafts.name(folder)
    part.parent.mkdir(parents=True, exist_ok=True)
    try:
        save(part)
        if not part.is_dir() or not any(part.iterdir()):
            raise ValueError(f"save({part}) wrote nothing there; it must write the files of an adapter or a model into that folder")
        if not (part / manifest.NAME).exists():
            manifest.write(part)
        owned.replace(part, folder, owned.MODEL)
    finally:
        drafts.delete(part)


def send(folder: Path, version: int, save: Save, params: Params) -> None:
    """Write a version for several servers, whose own folders `linked` makes of it. Raises SyncError, naming the leaf, for nan or inf."""
    _finite(params, version)
    write(folder, save)


def linked(sent: Path, folder: Path) -> None:
    """A folder of the same files, which are copied only where the file system has no links."""
    shutil.copytree(sent, folder, copy_function=durable.link)


def steady(call: Callable[[str], T], sync: Any, server: Server | None = None) -> T:
    """`call(name of the model to sample with)`, once more after a server that was restarted, or that a managed one had to be, has the
    current version again. `sync` is an Adapters or a Weights. Of several threads one restarts the server and the others go on with it.
    Raises Unreachable when the server is gone for good."""  # fmt: skip
    starts = None if server is None else server.starts
    try:
        return call(sync.model)
    except Lost:
        sync.recover()
    except Unreachable:
        if server is None:
            raise
        with server.lock:
            # With other starts, another thread has restarted the server while this one waited.
            if server.starts == starts:
                if server.alive():
                    raise
                sync.intact()
                server.restart()
                sync.recover()
    return call(sync.model)


def _intact(folder: Path) -> None:
    try:
        manifest.check(folder, fix="something wrote to that folder, or the disk is failing; continue with --resume auto")
    except ValueError as error:
        raise SyncError(f"the weights for the server were damaged: {error}") from error


def _finite(params: Params, version: int) -> None:
    if bad := check.not_finite(params):
        raise SyncError(f"version {version} was not given to the server: {', '.join(bad[:3])} not finite")
