"""The sampler of a run from its options: the trainer's own weights or a vLLM server, and a rollout on top of either."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from treetune.cli.options import online
from treetune.cli.options.online import OnlineConfig
from treetune.cli.options.rollout import RolloutOptions
from treetune.cli.run import Run
from treetune.core import lora, option_pairs, quant, tree
from treetune.core.config import table
from treetune.core.data import pack
from treetune.core.rollout import custom, documents, server, vllm
from treetune.core.rollout import engine as engines
from treetune.core.rollout import sampler as core_sampler
from treetune.core.run import ranks as processes
from treetune.core.state import Params, TrainState
from treetune.models import policy as policies
from treetune.models import sampling, serving
from treetune.models.batches import batcher
from treetune.models.policy import Policy

Say = Callable[[str], None]


def describe(config: OnlineConfig) -> str:
    """Who samples, and how."""
    engine, pipeline = config.engine, config.pipeline
    if engine.use_vllm:
        ports = [engine.vllm_server_port + i for i in range(engine.vllm_num_servers)]
        addresses = list(engine.vllm_server_urls) or [f"{engine.vllm_server_host}:{port}" for port in ports]
        return engines.describe(" and ".join(addresses), pipeline.vllm_sync_interval)
    return core_sampler.describe(ahead=pipeline.async_prefetch)


def rollout_of(options: RolloutOptions, tokenizer: Any, cfg: Any) -> core_sampler.Rollout:
    """The user's rollout function, or one reply after each prompt. Errors: ValueError when there is no such function."""
    if options.rollout_func is None:
        return core_sampler.single_turn
    return custom.load(options.rollout_func, tokenizer, vocab_size=cfg.vocab_size, max_positions=cfg.shared_positions)


def sampling_params(options: RolloutOptions, stop: Sequence[int]) -> vllm.SamplingParams:
    """How the options draw tokens; stop: the ids that end a completion of the model."""
    stop_ids, extra = sorted({*stop, *options.stop_token_ids}), option_pairs.named_values(options.generation_kwargs, "generation-kwargs")
    return table.record(vllm.SamplingParams, options, stop_ids=stop_ids, regex=options.vllm_guided_decoding_regex, extra=extra)


def local(policy: Policy, params: vllm.SamplingParams, *, seed: int) -> core_sampler.TokenSampler:
    """The sampler of the trainer's own weights."""
    shape = {name: getattr(params, name) for name in ("temperature", "top_p", "top_k", "min_p")}
    sample = sampling.sampler(policy, **shape, stop=params.stop_ids, seed=seed)
    return core_sampler.local(sample, stop_ids=params.stop_ids, tokenizer=policy.tokenizer)


def served(run: Run, policy: Policy, params: vllm.SamplingParams, *, seeds: tuple[int, int], extras: dict[str, Any]) -> engines.VllmEngine:
    """The engine of a server, which the first rank that asks it starts if it is the run's own. extras: what is saved beside weights."""
    config, device, say = run.config, run.device, run.say
    options, pipeline = config.engine, config.pipeline
    if any(quant.quantised(leaf) for leaf in tree.leaves(policy.frozen)):
        raise ValueError("use_vllm: the server has the weights of the model as they are, and those that train are quantised: leave one out")
    if policy.lora is not None and (lora.magnitudes(policy.params["lora"]) or policy.lora.ratios):
        raise ValueError(
            "use_vllm: vLLM computes no DoRA, and one scale for all pairs: leave out lora_dora, lora_rank_pattern, lora_alpha_pattern"
        )
    model = serving.locate(config.model.model, revision=config.model.revision, dtype=policy.cfg.dtype, say=say)
    ahead = pipeline.prefetch_depth if pipeline.async_prefetch else 0
    steps, interval = pipeline.steps_per_generation * pipeline.num_iterations, pipeline.vllm_sync_interval
    versions = engines.adapter_versions(steps_per_generation=steps, sync_interval=interval, prefetch_depth=ahead)
    count = online.servers(config)
    number, managed = run.ranks.row_rank % count, None
    url = options.vllm_server_urls[number] if options.vllm_server_urls else server.url(options.vllm_server_host, options.vllm_server_port)
    if options.vllm_mode == "managed":
        url, managed = _started(run, lambda: _managed(config, policy, model, device, say, number))
    settings = engines.EngineSettings(
        url, model.name, model.paths, policy.cfg.vocab_size, online.longest(config), run.folder.root / "engine", seeds, model.dtype,
        options.vllm_server_timeout, options.vllm_canary_tolerance, interval, versions if policy.lora is not None else None,
        options.vllm_reload_in_place, config.adapter.lora_model_dir is not None, count, number,
    )  # fmt: skip
    calls = _calls(policy, extras, device)
    return engines.VllmEngine(settings, params, policy.tokenizer, **calls, managed=managed, ranks=run.ranks)


def _started(run: Run, start: Callable[[], engines.ManagedServer]) -> tuple[str, engines.ManagedServer | None]:
    """The address of this rank's server, and the server where the rank is the first to ask it and has started it: all ranks at a time."""
    count, managed = online.servers(run.config), None

    def begin() -> tuple[int, str] | None:
        nonlocal managed
        managed = start() if engines.owns(run.ranks, count) else None
        return None if managed is None else (run.ranks.row_rank, managed.server.url)

    try:
        urls = dict(filter(None, processes.each(run.ranks, begin)))
    except BaseException:
        if managed is not None:  # the server of another rank did not come up
            managed.server.stop()
        raise
    return urls[run.ranks.row_rank % count], managed


def _managed(
    config: OnlineConfig, policy: Policy, model: serving.ServedModel, device: torch.device, say: Say, number: int
) -> engines.ManagedServer:
    """The server of this number that a run starts for itself."""
    options, port = config.engine, config.engine.vllm_server_port + number
    settings = server.ServerOptions(
        model.name,
        port,
        options.vllm_server_host,
        model.dtype,
        max_model_len=options.vllm_max_model_len or online.longest(config),
        gpu_memory_utilization=options.vllm_gpu_memory_utilization,
        max_lora_rank=None if policy.lora is None else policies.file_rank(policy),
        logprobs_mode=server.logprobs_mode(config.rollout.temperature),
        device=device.index if options.vllm_num_servers > 1 and device.type == "cuda" else None,
    )
    settings, log = server.on_device(settings, cuda=device.type == "cuda"), serving.log_file(port)
    python = server.find_python(options.vllm_python)
    return engines.managed(settings, model.folder, python=python, log=log, in_place=options.vllm_reload_in_place, say=say)


def _calls(policy: Policy, extras: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """What an engine needs of the policy. It outlives the weights that are loaded: only base_logprobs, which is called once, holds them."""
    sizes, collate = policies.bare(policy), batcher(policy.cfg, device, (pack.collate,))
    if (carried := extras.get("carried")) is not None and not carried.own:  # the server has that tokenizer, and gets tokens as numbers
        extras = {name: value for name, value in extras.items() if name != "carried"}

    def save(state: TrainState, trained: Params, folder: Path, /) -> None:
        policies.save(sizes, folder, params=trained, frozen=state.frozen, **extras)

    base = TrainState(policy.params if policy.lora is None else {}, policy.frozen, {}, {}, torch.tensor(0))
    of_base = documents.prompt_logprobs(policies.logprob(sizes._replace(lora=None)), collate)
    of_policy = documents.prompt_logprobs(policies.logprob(sizes), collate)
    return {"save": save, "prompt_logprobs": of_policy, "base_logprobs": lambda tokens: of_base(base, tokens)}
