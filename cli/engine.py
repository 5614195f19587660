"""Completions from a vLLM server: requests, weights that follow the trainer's, and the canary that proves it."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from treetune.cli import finish, rl_data, rollouts, serve, setup
from treetune.cli.errors import RunFailed
from treetune.core import shard, tree
from treetune.core.data import pack, spans
from treetune.core.rollout import sync, vllm
from treetune.core.rollout.server import Server
from treetune.core.state import TrainState
from treetune.models import Model, logprobs
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
        self.config, self.model, self.trees, self.tokenizer, self.on, self.say = config, model, trees, tokenizer, on, say
        self.ends = sorted({*stop, *rollout.stop_token_ids})
        self.server: Server | None = None
        url = f"http://{options.vllm_server_host}:{options.vllm_server_port}"
        if options.vllm_mode == "managed":
            self.server, url = serve.managed(config, model, say=say)
        name = serve.served_name(config.model)
        alive = self.server.alive if self.server else lambda: True
        self.client = vllm.Client(url, model=name, vocab_size=model.cfg.vocab_size, timeout_s=options.vllm_server_timeout, alive=alive)
        needed = config.data.max_prompt_len + rollout.max_completion_length
        self.client.check(needed_len=needed)
        tokens = [i % model.cfg.vocab_size for i in range(17, 17 + CANARY)]
        dtype = serve.engine_dtype(config, model)
        canary = sync.Canary(self.client, tokens, dtype=dtype, tolerance=options.vllm_canary_tolerance)
        self.sync = self._sync(canary, root)
        self.version, self.verdict = 0, None

    def _sync(self, canary: sync.Canary, root: Path) -> Any:
        where = root / "engine"
        if self.trees.lora is not None:
            return sync.Adapters(self.client, where, canary)
        command = partial(serve.managed_command, self.config)
        return sync.Weights(self.client, where, canary, server=self.server, command=command)

    def draw(
        self, policy: Any, ids: Sequence[Sequence[int]], numbers: Sequence[int], *, n: int, max_tokens: int, seed: int
    ) -> rollouts.Drawn:
        """Completions from the weights that the server has."""
        rollout, version = self.config.rollout, self.version
        asked = partial(
            self.client.sample, ids, [vllm.request_seed(seed, number) for number in numbers], n=n, max_tokens=max_tokens,
            temperature=rollout.temperature, top_p=rollout.top_p, top_k=rollout.top_k, min_p=rollout.min_p,
            repetition_penalty=rollout.repetition_penalty, stop_token_ids=self.ends, regex=rollout.vllm_guided_decoding_regex,
            extra=rl_data.named_values(rollout.generation_kwargs, "generation-kwargs"),
        )  # fmt: skip
        found = sync.steady(lambda name: asked(model=name), self.sync, self.server)
        make = partial(rollouts.completion, ends=set(self.ends), tokenizer=self.tokenizer)
        return rollouts.Drawn([[make(one.tokens, one.logp) for one in group] for group in found], version)

    def start(self, state: TrainState) -> None:
        """Check that the server has the base model, and give it the weights where the run has others already."""
        first = int(state.step) == 0
        if self.trees.lora is not None:
            self.verdict = self.sync.start(0, self._expected(state._replace(params={}), None))
            first = first and self.config.adapter.lora_model_dir is None
        elif first:
            self.verdict = self.sync.start(0, self._expected(state, None))
        if not first:
            self.push(state)

    def push(self, state: TrainState) -> None:
        """Give the server the weights of the state, and check that it has them."""
        now, used = finish.current(state, self.model, self.trees.lora)
        trained = tree.map(shard.full, state.params)
        save = partial(finish.write_trained, self.config, self.trees, self.tokenizer, now, used, trained)
        version = int(state.step)
        self.verdict = self.sync.sync(version, save, trained, self._expected(state, self.trees.lora))
        self.version = version

    def between(self, state: TrainState, metrics: dict, step: int) -> TrainState:
        """Sync every vllm_sync_interval steps."""
        if step % self.config.pipeline.vllm_sync_interval == 0:
            try:
                self.push(state)
            except sync.SyncError as error:
                raise RunFailed(str(error)) from error
        return state

    def metrics(self) -> dict:
        """How far the server was from the trainer at the last sync."""
        if self.verdict is None:
            return {}
        gaps = {"mean": self.verdict.mean_diff, "max": self.verdict.max_diff}
        return {f"sync/logp_difference_{how}": gap for how, gap in gaps.items()} | {"sync/version": self.version}

    @torch.no_grad()
    def _expected(self, state: TrainState, used: Any) -> np.ndarray:
        """The trainer's log-probs of the canary at temperature 1."""
        now, lora = finish.current(state, self.model, used)
        tokens = np.array(self.sync.canary.tokens, np.int32)
        weight = np.ones(len(tokens), np.float32)
        weight[0] = 0
        batch = pack.collate([spans.Doc(tokens, weight, 0)])
        plan = attention.plan(batch, window=now.cfg.window, device=self.on, dtype=now.cfg.dtype)
        batch = {key: value.to(self.on) for key, value in batch.items()}
        return np.asarray(logprobs(now.family, now.cfg, now.params, batch, plan, lora=lora).logp.double().cpu())

    def close(self) -> None:
        """Leave the server, or end it if it is ours."""
        self.client.close()
        if self.server is not None:
            self.server.stop()


def build(
    config: Any, model: Model, trees: setup.Trees, tokenizer: Any, *, stop, on: torch.device, root: Path, seeds: Sequence[int], say
) -> Drawers:
    """A vLLM server as the sampler of a run."""
    made = Engine(config, model, trees, tokenizer, stop=stop, on=on, root=root, say=say)
    pair = [partial(made.draw, seed=seed) for seed in seeds]
    return Drawers(*pair, lambda state: None, made.start, made.between, made.close, made.metrics)
