"""Completions from a vLLM server: requests, weights that follow the trainer's, and the canary that proves it."""

import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from treetune.cli import finish, rl_data, rollouts, setup
from treetune.cli.commands import serve
from treetune.cli.errors import RunFailed
from treetune.core import shard, tree
from treetune.core.data import pack, spans
from treetune.core.rollout import sync, vllm
from treetune.core.rollout.group import Completion, Sampled
from treetune.core.rollout.server import Server
from treetune.core.state import Params, TrainState
from treetune.models import Model, bare, logprobs
from treetune.ops import attention

CANARY = 32  # tokens


class Drawers(NamedTuple):
    """train, held: who draws for training and for evaluation. snapshot(state): what a thread may sample from while the state moves on.

    start(state) and between(state, metrics, step) give an engine the weights; metrics() are its numbers since the last call.
    """

    train: rollouts.Draw
    held: rollouts.Draw
    snapshot: Callable[[Any], Any]
    start: Callable[[TrainState], None] = lambda state: None
    between: Callable[[TrainState, dict, int], TrainState] | None = None
    close: Callable[[], None] = lambda: None
    metrics: Callable[[], dict] = dict


class Engine:
    """A server with the weights of a run; has a lifetime: connections, the server if it is ours, adapter folders."""

    def __init__(
        self, config: Any, model: Model, trees: setup.Trees, tokenizer: Any, *, stop: Sequence[int], on: torch.device, root: Path, say
    ):
        options, rollout = config.engine, config.rollout
        self.config, self.model, self.trees, self.tokenizer, self.on, self.say = config, bare(model), trees, tokenizer, on, say
        self.ends = sorted({*stop, *rollout.stop_token_ids})
        self.server: Server | None = None
        self.client: vllm.Client | None = None  # `close` asks, also where connecting failed
        # vLLM computes the log-probs of a prompt with the adapters of whatever else runs: the canary must run alone.
        self.alone = threading.Lock()
        host = options.vllm_server_host
        url = f"http://{f'[{host}]' if ':' in host else host}:{options.vllm_server_port}"
        if options.vllm_mode == "managed":
            self.server, url = serve.managed(config, model, say=say)
        try:
            self._connect(url, root)
            self.base_logp = self._expected(model, None)
        except BaseException:
            self.close()
            raise

    def _connect(self, url: str, root: Path) -> None:
        config, options, model = self.config, self.config.engine, self.model
        name = serve.served_name(config.model)
        alive = self.server.alive if self.server else lambda: True
        timeout = options.vllm_server_timeout
        self.client = vllm.Client(url, model=name, vocab_size=model.cfg.vocab_size, timeout_s=timeout, alive=alive)
        folder = serve.model_folder(config.model, say=self.say)
        self._reach([name, config.model.model, str(folder), setup.model_name(config.model)], serve.longest(config))
        tokens = [i % model.cfg.vocab_size for i in range(17, 17 + CANARY)]
        foreign = options.vllm_mode == "server"  # which may compute in another dtype than the trainer
        how = {"dtype": serve.engine_dtype(config, model), "tolerance": options.vllm_canary_tolerance, "widen": foreign}
        self.sync = self._sync(sync.Canary(self.client, tokens, **how), root)
        self.version, self.verdict = 0, None

    def _sync(self, canary: sync.Canary, root: Path) -> Any:
        where = root / "engine"
        if self.trees.lora is not None:
            pipe = self.config.pipeline
            steps = pipe.steps_per_generation * pipe.num_iterations * (pipe.prefetch_depth + 1 if pipe.async_prefetch else 1)
            return sync.Adapters(self.client, where, canary, keep=2 + -(-steps // pipe.vllm_sync_interval))
        command = partial(serve.managed_command, self.config)
        in_place = self.config.engine.vllm_reload_in_place
        return sync.Weights(self.client, where, canary, server=self.server, command=command, in_place=in_place)

    def _reach(self, accepted: list[str], needed: int) -> None:
        """Check what the server serves; nobody waits long for one that is not there."""
        patience, self.client.retry_s = self.client.retry_s, 5.0
        try:
            self.client.check(accepted=accepted, needed_len=needed)
        except vllm.Lost as error:
            raise ValueError(str(error)) from error
        except vllm.Unreachable as error:
            raise ValueError(f"{error}: start one with treetune serve, or give --vllm-mode managed") from error
        self.client.retry_s = patience

    def draw(self, policy: Any, ids: Sequence[Sequence[int]], numbers: Sequence[int], *, n: int, max_tokens: int, seed: int) -> Sampled:
        """Completions from the weights that the server has."""
        rollout = self.config.rollout
        asked = partial(
            self.client.sample, ids, [vllm.request_seed(seed, number) for number in numbers], n=n, max_tokens=max_tokens,
            temperature=rollout.temperature, top_p=rollout.top_p, top_k=rollout.top_k, min_p=rollout.min_p,
            repetition_penalty=rollout.repetition_penalty, stop_token_ids=self.ends, regex=rollout.vllm_guided_decoding_regex,
            extra=rl_data.named_values(rollout.generation_kwargs, "generation-kwargs"),
        )  # fmt: skip
        with self.alone:
            version, found = sync.steady(lambda name: (self.version, asked(model=name)), self.sync, self.server)
        return Sampled([[self._completion(one) for one in group] for group in found], version)

    def held(self, policy: TrainState, *given: Any, **named: Any) -> Sampled:
        """As `draw`, from the weights of the state: what is evaluated is what is saved."""
        if self.version != int(policy.step):
            self.push(policy)
        return self.draw(None, *given, **named)

    def _completion(self, one: vllm.Drawn) -> Completion:
        made = rollouts.completion(one.tokens, one.logp, set(self.ends), self.tokenizer)
        return made._replace(stopped=one.finish_reason == "stop")  # by a text, too

    def start(self, state: TrainState) -> None:
        """Check that the server has the base model, and give it the weights where the run has others already."""
        self.verdict = self._told(lambda _: self.sync.start(-1, self.base_logp))
        if int(state.step) > 0 or self.config.adapter.lora_model_dir is not None:
            self.push(state)

    def push(self, state: TrainState) -> None:
        """Give the server the weights of the state, and check that it has them."""
        now, used = finish.current(state, self.model, self.trees.lora)
        trained = tree.map(shard.full, state.params)
        save = partial(self._save, now, used, trained)
        version, expected = int(state.step), self._expected(now, used)
        with self.alone:
            self.verdict = self._told(lambda _: self.sync.sync(version, save, trained, expected))
            self.version = version

    def _told(self, call: Callable[[str], sync.Verdict]) -> sync.Verdict:
        """A sync, once more where the server had to be restarted; what it cannot go on from ends the run."""
        try:
            return sync.steady(call, self.sync, self.server)
        except (RuntimeError, ValueError) as error:  # a lost sync, no answer, a server that does not come up, an adapter that it refuses
            raise RunFailed(str(error)) from error

    def _save(self, model: Model, used: Any, trained: Params, path: Path) -> None:
        finish.write_trained(self.config, self.trees, self.tokenizer, model, used, trained, path)

    def between(self, state: TrainState, metrics: dict, step: int) -> TrainState:
        """Sync every vllm_sync_interval steps."""
        if step % self.config.pipeline.vllm_sync_interval == 0:
            self.push(state)
        return state

    def metrics(self) -> dict:
        """How far the server was from the trainer at the last sync."""
        if self.verdict is None:
            return {}
        gaps = {"mean": self.verdict.mean_diff, "max": self.verdict.max_diff}
        return {f"sync/logp_difference_{how}": gap for how, gap in gaps.items()} | {"sync/version": self.version}

    @torch.no_grad()
    def _expected(self, model: Model, used: Any) -> np.ndarray:
        """The trainer's log-probs of the canary at temperature 1."""
        tokens = np.array(self.sync.canary.tokens, np.int32)
        batch = pack.collate([spans.Doc(tokens, (np.arange(len(tokens)) > 0).astype(np.float32), 0)])
        plan = attention.plan(batch, window=model.cfg.window, device=self.on, dtype=model.cfg.dtype)
        batch = {key: value.to(self.on) for key, value in batch.items()}
        return np.asarray(logprobs(model.family, model.cfg, model.params, batch, plan, lora=used).logp.double().cpu())

    def close(self) -> None:
        """Leave the server, or end it if it is ours."""
        if self.client is not None:
            self.client.close()
        if self.server is not None:
            self.server.stop()


def build(
    config: Any, model: Model, trees: setup.Trees, tokenizer: Any, *, stop, on: torch.device, root: Path, seeds: Sequence[int], say
) -> Drawers:
    """A vLLM server as the sampler of a run."""
    made = Engine(config, model, trees, tokenizer, stop=stop, on=on, root=root, say=say)
    train, held = (partial(draw, seed=seed) for draw, seed in zip((made.draw, made.held), seeds, strict=True))
    return Drawers(train, held, lambda state: None, made.start, made.between, made.close, made.metrics)
