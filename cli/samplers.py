"""The sampler of a run from its options: the trainer's own weights or a vLLM server, and a rollout on top of either."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from treetune.cli import artifacts, setup
from treetune.cli.options import online
from treetune.core import option_pairs
from treetune.core.data import pack, spans
from treetune.core.lora import Lora
from treetune.core.rollout import custom, server, vllm
from treetune.core.rollout import engine as engines
from treetune.core.rollout import sampler as core_sampler
from treetune.core.state import Params, TrainState
from treetune.models import Model, logprobs, serving
from treetune.models import policy as policies
from treetune.models.policy import Policy
from treetune.ops import attention


def describe(config: Any) -> str:
    """Who samples, and how."""
    if not config.engine.use_vllm:
        return "the trainer's own weights" + (", a generation ahead" if config.pipeline.async_prefetch else "")
    address, every = f"{config.engine.vllm_server_host}:{config.engine.vllm_server_port}", config.pipeline.vllm_sync_interval
    return f"vLLM at {address}, which gets the weights " + ("after every step" if every == 1 else f"every {every} steps")


def engine_of(
    config: Any, policy: Policy, *, device: torch.device, root: Path, seeds: Sequence[int], say: Callable[[str], None]
) -> core_sampler.Engine:
    """The engine that the options name; seeds of training and of evaluation. root: the run folder, where weights for a server go."""
    params = sampling_params(config.rollout, setup.stop_ids(config.model, policy.tokenizer))
    if config.engine.use_vllm:
        settings, managed = _server(config, policy, root / "engine", (seeds[0], seeds[1]), say)
        return _vllm_engine(config, settings, params, managed, policy, device)
    sizes = Model(policy.family, policy.cfg, {})
    return core_sampler.LocalEngine(*(local(sizes, policy.lora, params, policy.tokenizer, seed=seed) for seed in seeds))


def sampler_of(config: Any, engine: core_sampler.Engine, rollout: core_sampler.Rollout, *, evaluation_n: int = 1) -> core_sampler.Sampler:
    """The sampler of a run on an engine; evaluations take evaluation_n completions of each prompt."""
    options = config.rollout
    sizes = {"n": options.num_generations, "evaluation_n": evaluation_n, "max_tokens": options.max_completion_length}
    return core_sampler.build(engine, rollout, **sizes)


def rollout_of(options: Any, tokenizer: Any, cfg: Any) -> core_sampler.Rollout:
    """The user's rollout function, or one reply after each prompt. Errors: ValueError when there is no such function."""
    if options.rollout_func is None:
        return core_sampler.single_turn
    return custom.load(options.rollout_func, tokenizer, vocab_size=cfg.vocab_size, max_positions=cfg.max_positions)


def local(model: Model, lora: Lora | None, params: vllm.SamplingParams, tokenizer: Any, *, seed: int) -> core_sampler.TokenSampler:
    """The sampler of the trainer's own weights."""
    sizes = Policy(model.family, model.cfg, {}, {}, lora)
    shape = {"temperature": params.temperature, "top_p": params.top_p, "top_k": params.top_k, "min_p": params.min_p}
    sample = policies.sampler(sizes, **shape, stop=params.stop_ids, seed=seed)
    return core_sampler.local(sample, stop_ids=list(params.stop_ids), tokenizer=tokenizer)


def sampling_params(options: Any, stop: Sequence[int]) -> vllm.SamplingParams:
    """How the options draw tokens; stop: the ids that end a completion of the model."""
    return vllm.SamplingParams(
        options.temperature,
        options.top_p,
        options.top_k,
        options.min_p,
        options.repetition_penalty,
        sorted({*stop, *options.stop_token_ids}),
        options.vllm_guided_decoding_regex,
        option_pairs.named_values(options.generation_kwargs, "generation-kwargs"),
    )


def _server(
    config: Any, model: Policy, folder: Path, seeds: tuple[int, int], say: Callable
) -> tuple[engines.EngineSettings, engines.ManagedServer | None]:
    """How to reach the server of a run; a managed one is started."""
    options, pipeline = config.engine, config.pipeline
    host = options.vllm_server_host
    url = f"http://{f'[{host}]' if ':' in host else host}:{options.vllm_server_port}"
    managed = None
    if options.vllm_mode == "managed":
        managed = _managed(config, say)
        url = managed.server.url
    versions = engines.adapter_versions(
        steps_per_generation=pipeline.steps_per_generation * pipeline.num_iterations,
        sync_interval=pipeline.vllm_sync_interval,
        prefetch_depth=pipeline.prefetch_depth if pipeline.async_prefetch else 0,
    )
    place = serving.model_folder(config.model.model, revision=config.model.revision, say=say)
    settings = engines.EngineSettings(
        url,
        serving.served_name(config.model.model),
        (config.model.model, str(place), setup.model_name(config.model)),
        model.cfg.vocab_size,
        online.longest(config),
        folder,
        seeds,
        serving.DTYPES[model.cfg.dtype],
        options.vllm_server_timeout,
        options.vllm_canary_tolerance,
        pipeline.vllm_sync_interval,
        versions if config.adapter.adapter == "lora" else None,
        options.vllm_reload_in_place,
        config.adapter.lora_model_dir is not None,
    )
    return settings, managed


def _managed(config: Any, say: Callable) -> engines.ManagedServer:
    options = config.engine
    place, log = (
        serving.model_folder(config.model.model, revision=config.model.revision, say=say),
        serving.log_file(options.vllm_server_port),
    )
    command = partial(_command, config)
    line = command(place)
    say(f"starting vLLM on port {options.vllm_server_port}; its output goes to {log}")
    in_place = options.vllm_reload_in_place
    running = server.managed(line, host=options.vllm_server_host, port=options.vllm_server_port, log=log, in_place=in_place)
    return engines.ManagedServer(running, command)


def _command(config: Any, folder: str | Path) -> list[str]:
    """The command line of the server that a run starts for itself, on a model folder."""
    options, adapter = config.engine, config.adapter
    device, start = setup.device(config.model.device), adapter.lora_model_dir
    settings = server.ServerOptions(
        serving.served_name(config.model.model),
        options.vllm_server_port,
        options.vllm_server_host,
        serving.DTYPES[setup.compute_dtype(config.model.dtype, device)],
        max_model_len=options.vllm_max_model_len or online.longest(config),
        gpu_memory_utilization=options.vllm_gpu_memory_utilization if device.type == "cuda" else None,
        enforce_eager=device.type == "cpu",
        max_lora_rank=None if adapter.adapter == "none" else adapter.lora_r if start is None else serving.adapter_rank(start),
        logprobs_mode=server.logprobs_mode(config.rollout.temperature),
    )
    return server.command(server.find_python(options.vllm_python), folder, settings)


def _vllm_engine(
    config: Any,
    settings: engines.EngineSettings,
    params: vllm.SamplingParams,
    managed: engines.ManagedServer | None,
    start: Policy,
    device: torch.device,
) -> engines.VllmEngine:
    """The engine of a server, with what it needs of the policy."""
    sizes = policies.bare(start)
    kept = artifacts.extras(config, start)

    def save(state: TrainState, trained: Params, folder: Path, /) -> None:
        policies.save(sizes._replace(frozen=state.frozen), folder, params=trained, **kept)

    def prompt_logprobs(state: TrainState, tokens: Sequence[int], /) -> np.ndarray:
        return _prompt_logprobs(*policies.current(sizes, state.params, state.frozen), tokens, device)

    base = Model(start.family, start.cfg, start.params["model"] if start.lora is None else start.frozen["model"])

    def base_logprobs(tokens: Sequence[int]) -> np.ndarray:
        return _prompt_logprobs(base, None, tokens, device)

    calls = {"save": save, "prompt_logprobs": prompt_logprobs, "base_logprobs": base_logprobs}
    return engines.VllmEngine(settings, params, start.tokenizer, **calls, managed=managed)


@torch.no_grad()
def _prompt_logprobs(model: Model, lora: Lora | None, tokens: Sequence[int], device: torch.device) -> np.ndarray:
    """The model's log-probs of tokens[1:] at temperature 1, float64."""
    ids = np.array(tokens, np.int32)
    batch = pack.collate([spans.Doc(ids, (np.arange(len(ids)) > 0).astype(np.float32), 0)])
    plan = attention.plan(batch, window=model.cfg.window, device=device, dtype=model.cfg.dtype)
    batch = {key: value.to(device) for key, value in batch.items()}
    return np.asarray(logprobs(model.family, model.cfg, model.params, batch, plan, lora=lora).logp.double().cpu())
