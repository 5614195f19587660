"""A vLLM server as the engine of a run: requests, weights that follow the trainer's, and the canary that proves it."""

import contextlib
import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np

from treetune.core import owned, partition
from treetune.core.rollout import documents, server, sync, vllm
from treetune.core.rollout.group import Completion, Sampled
from treetune.core.run import ranks as processes
from treetune.core.run.errors import RunFailed
from treetune.core.run.ranks import ALONE, Ranks
from treetune.core.state import Params, TrainState

T = TypeVar("T")
CANARY = 32  # tokens
SENT = "sent"  # folder of weights that several servers get
START_RETRY_S = 5.0  # that a server is waited for when a run starts; later a busy one gets more


class EngineSettings(NamedTuple):
    """How a run reaches its server, and when and how weights go there."""

    url: str  # of the server that this rank asks
    model: str  # its name in requests
    model_paths: tuple[str, ...]  # other names, paths and ids that the server may have loaded it from
    vocab_size: int
    longest: int  # tokens of the longest prompt with its completion
    folder: Path  # weights for the server are written here
    seeds: tuple[int, int]  # of training and of evaluation
    dtype: str  # the trainer computes in
    timeout_s: float = 240.0
    canary_tolerance: float | None = None  # mean difference of log-probs, nats; None: by dtype
    sync_interval: int = 1  # optimiser steps
    adapter_versions: int | None = 2  # adapters that stay loaded; None: whole weights are synced, not adapters
    in_place: bool = False  # whole weights reach the server without a restart
    sync_at_start: bool = False  # the run starts with other weights than the server's
    servers: int = 1  # that serve the run
    server: int = 0  # the number of this rank's among them


class Save(Protocol):
    """Writes what trains as vLLM loads it: an adapter folder, or a model folder."""

    def __call__(self, state: TrainState, trained: Params, folder: Path, /) -> object:
        """trained: the whole leaves of state.params, which may be sharded there."""
        ...


class PromptLogprobs(Protocol):
    """The trainer's log-probs of a prompt, for the canary."""

    def __call__(self, state: TrainState, tokens: Sequence[int], /) -> np.ndarray:
        """Float64 [c - 1], nats at temperature 1, of tokens[1:] under the weights of the state."""
        ...


class ManagedServer(NamedTuple):
    """A server that the run started, and its command line on a model folder."""

    server: server.Server
    command: Callable[[Path], list[str]]


def managed(
    options: server.ServerOptions, folder: Path, *, python: str, log: Path, in_place: bool, say: Callable[[str], None]
) -> ManagedServer:
    """Start the server of a run on a model folder. Raises RunFailed when it does not come up, ValueError for what cannot be started."""
    command = partial(server.command, python, options=options)
    line = command(folder)
    say(f"starting vLLM on port {options.port}; its output goes to {log}")
    return ManagedServer(server.start(line, options, log=log, in_place=in_place), command)


class Followed(NamedTuple):
    """What ranks beside its first one know of the weights on a server, which the first one gives it: the name to sample them by."""

    model: str

    def recover(self) -> None:
        """Errors: RunFailed; its first rank alone can give the server its weights again."""
        raise RunFailed("the server was started again and lacks the adapter of this run: --resume auto goes on from the last checkpoint")

    def intact(self) -> None:
        """Nothing: its first rank owns the files."""


class VllmEngine:
    """The weights of a run on a server. It owns connections, weight folders and a managed server: call `close`.

    base_logprobs(tokens): as `prompt_logprobs`, of the model that the server begins with; called once.
    ranks: those of the run. Each draws by itself (of those with the same rows the first one, for all of them) from one of the servers.
    A server gets the weights from the first rank that asks it, which has started it where it is managed, while all others wait.
    Raises ValueError where no server answers, and for one of another model or with too short a window.
    """

    def __init__(
        self,
        settings: EngineSettings,
        params: vllm.SamplingParams,
        tokenizer: Any,
        *,
        save: Save,
        prompt_logprobs: PromptLogprobs,
        base_logprobs: Callable[[Sequence[int]], np.ndarray],
        managed: ManagedServer | None = None,
        ranks: Ranks = ALONE,
    ):
        self.ranks, self.first = ranks, ranks.rank == 0
        self.owner = owns(ranks, settings.servers)
        self.ask = processes.of_same_rows(ranks, self._asked, (sync.SyncError, vllm.Lost, vllm.Unreachable, RunFailed))
        self.settings, self.params, self.tokenizer = settings, params, tokenizer
        self.save, self.prompt_logprobs = save, prompt_logprobs
        self.server = None if managed is None else managed.server
        # vLLM computes the log-probs of a prompt with the adapters of whatever else runs: the canary must run alone.
        self.alone = threading.Lock()
        self.version = 0
        self.verdict: sync.CanaryVerdict | None = None
        with contextlib.ExitStack() as resources:  # ended here if the server is refused
            if self.server is not None:
                resources.callback(self.server.stop)
            self.client = self._client(resources)
            processes.each(ranks, self._check)
            canary = self._canary()
            self.sync = self._of_first(canary, managed) if self.owner else Followed(settings.model)
            self.tokens, self.base_logp = canary.tokens, base_logprobs(canary.tokens)
            self.resources = resources.pop_all()

    def _client(self, resources: contextlib.ExitStack) -> vllm.Client:
        settings = self.settings
        client = vllm.Client(
            settings.url,
            model=settings.model,
            vocab_size=settings.vocab_size,
            timeout_s=settings.timeout_s,
            alive=self.server.alive if self.server else lambda: True,
        )
        resources.callback(client.close)
        return client

    def _check(self) -> None:
        """Check what the server serves; nobody waits long for one that is not there."""
        settings = self.settings
        try:
            self.client.check(accepted=[settings.model, *settings.model_paths], needed_len=settings.longest, retry_s=START_RETRY_S)
        except vllm.Lost as error:
            raise ValueError(str(error)) from error
        except vllm.Unreachable as error:
            raise ValueError(f"{error}: start one with treetune serve, or give --vllm-mode managed") from error

    def _canary(self) -> sync.Canary:
        settings = self.settings
        tokens = [i % settings.vocab_size for i in range(17, 17 + CANARY)]
        foreign = self.server is None  # which may compute in another dtype than the trainer
        return sync.Canary(self.client, tokens, dtype=settings.dtype, tolerance=settings.canary_tolerance, widen=foreign)

    def _of_first(self, canary: sync.Canary, managed: ManagedServer | None) -> sync.Adapters | sync.Weights:
        if self.settings.adapter_versions is None:
            return self._weights(canary, managed)
        return sync.Adapters(self.client, self._folder(), canary, keep=self.settings.adapter_versions)

    def _folder(self) -> Path:
        """Where the weights for this rank's server are written."""
        root = self.settings.folder
        return root if self.settings.servers == 1 else root / f"server-{self.settings.server}"

    def _weights(self, canary: sync.Canary, managed: ManagedServer | None) -> sync.Weights:
        if managed is None:
            raise ValueError("whole weights reach only a server that the run has started: give --vllm-mode managed, or train an adapter")
        how = {"server": managed.server, "command": managed.command, "in_place": self.settings.in_place}
        return sync.Weights(self.client, self._folder(), canary, **how)

    def draw(self, policy: Any, ids: Sequence[Sequence[int]], numbers: Sequence[int], /, *, n: int, max_tokens: int) -> Sampled:
        """Completions from the weights that the server has."""
        return self._draw(ids, [vllm.request_seed(self.settings.seeds[0], number) for number in numbers], n, max_tokens)

    def draw_evaluation(
        self, policy: TrainState, ids: Sequence[Sequence[int]], numbers: Sequence[int], /, *, n: int, max_tokens: int
    ) -> Sampled:
        """Completions from the weights of the state, which `refresh` has given the server."""
        return self._draw(ids, [vllm.request_seed(self.settings.seeds[1], number) for number in numbers], n, max_tokens)

    def _asked(self, ids: Sequence[Sequence[int]], seeds: Sequence[int], n: int, max_tokens: int) -> tuple[int, list[list[vllm.Drawn]]]:
        ask = partial(self.client.sample, ids, seeds, self.params, n=n, max_tokens=max_tokens)
        # The version is read inside: after a restart, the call is made again with the adapter that is loaded then.
        return sync.steady(lambda name: (self.version, ask(model=name)), self.sync, self.server)

    def _draw(self, ids: Sequence[Sequence[int]], seeds: Sequence[int], n: int, max_tokens: int) -> Sampled:
        with self.alone:
            version, groups = self.ask(ids, seeds, n, max_tokens)
        return Sampled([[self._completion(one) for one in group] for group in groups], version)

    def _completion(self, drawn: vllm.Drawn) -> Completion:
        completion = documents.completion(drawn.tokens, drawn.logp, set(self.params.stop_ids), self.tokenizer)
        return completion._replace(stopped=drawn.finish_reason == "stop")  # by a text, too

    def join(self, policy: Any, /) -> None:
        """Nothing: a server samples for each rank by itself."""

    def refresh(self, policy: TrainState, /) -> None:
        """Give the server the weights of the state if it has others: what is evaluated is what is saved."""
        if self.version != int(policy.step):
            self.push(policy)

    def snapshot(self, state: TrainState) -> None:
        """Nothing: the server has weights of its own."""

    def start(self, state: TrainState) -> None:
        """Check that the server has the base model, and give it the weights where the run has others already."""
        # The base model is asked first, as version -1: a canary that fails here is of another model or dtype, not a lost sync.
        self._agree(lambda sync: sync.start(-1, self.base_logp))
        if int(state.step) > 0 or self.settings.sync_at_start:
            self.push(state)

    def push(self, state: TrainState) -> None:
        """Give the servers the weights of the state, and check that they have them: all ranks do so at one time."""
        trained = partition.gathered(state.params, keep=self.first)
        begun = {name: partition.gathered(state.frozen[name], keep=self.first) for name in ("start",) if name in state.frozen}
        state = state._replace(frozen=state.frozen | begun)
        version, expected = int(state.step), self.prompt_logprobs(state, self.tokens)
        with self.alone:
            save, params = partial(self.save, state, trained), trained if self.first else {}
            if self.settings.servers > 1:
                save = self._sent(version, save, params)
            self._agree(lambda sync: sync.sync(version, save, params, expected))
            self.version = version
        if self.first and self.settings.servers > 1:
            owned.remove(self.settings.folder / SENT, owned.MODEL)

    def _sent(self, version: int, save: sync.Save, params: Params) -> sync.Save:
        """Write the weights once, by the first rank, and link the files into the folder of each server."""
        folder = self.settings.folder / SENT
        processes.each(self.ranks, lambda: self._final(lambda: sync.send(folder, version, save, params)) if self.first else None)
        return partial(sync.linked, folder)

    def _agree(self, call: Callable[[Any], sync.CanaryVerdict]) -> None:
        """A sync of each server by its first rank, once more where one had to be restarted; what it cannot go on from ends the run."""
        processes.barrier(self.ranks)  # none draws while the canary is read
        answers = processes.each(self.ranks, lambda: self._final(lambda: self._steady(call)) if self.owner else None)
        told = {server: (verdict, model) for server, verdict, model in filter(None, answers)}
        self.verdict = sync.worst([verdict for verdict, _ in told.values()])
        if not self.owner:
            self.sync = Followed(told[self.settings.server][1])

    def _steady(self, call: Callable[[Any], sync.CanaryVerdict]) -> tuple[int, sync.CanaryVerdict, str]:
        return self.settings.server, sync.steady(lambda _: call(self.sync), self.sync, self.server), self.sync.model

    def _final(self, call: Callable[[], T]) -> T:
        """What the call gives. Raises RunFailed, which names the server, for a lost sync, no answer, an adapter that it refuses."""
        try:
            return call()
        except (RuntimeError, ValueError) as error:
            several = self.settings.servers > 1 and self.settings.url not in str(error)
            raise RunFailed(f"{self.settings.url}: {error}" if several else str(error)) from error

    def after_step(self, state: TrainState, metrics: dict[str, Any], step: int) -> TrainState:
        """Sync every sync_interval steps."""
        if step % self.settings.sync_interval == 0:
            self.push(state)
        return state

    def metrics(self) -> dict[str, float]:
        """How far the servers were from the trainer at the last sync, at most."""
        if self.verdict is None:
            return {}
        gaps = {"mean": self.verdict.mean_diff, "max": self.verdict.max_diff}
        return {f"sync/logp_difference_{how}": gap for how, gap in gaps.items()} | {"sync/version": self.version}

    def close(self) -> None:
        """Leave the server, or end it if it is ours."""
        self.resources.close()


def owns(ranks: Ranks, servers: int) -> bool:
    """Whether this rank is the first that asks its server, when rank r of those with different rows asks server r mod `servers`."""
    return ranks.leads and ranks.row_rank < servers


def describe(address: str, sync_interval: int) -> str:
    """Who samples where a server does, and when it gets the weights."""
    return f"vLLM at {address}, which gets the weights " + ("after every step" if sync_interval == 1 else f"every {sync_interval} steps")


def adapter_versions(*, steps_per_generation: int, sync_interval: int, prefetch_depth: int = 0) -> int:
    """Adapters that requests under way may still name: those of the generations that are sampled ahead, and two more."""
    return 2 + -(-steps_per_generation * (prefetch_depth + 1) // sync_interval)
