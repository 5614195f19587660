"""Options of a command that samples completions, taken together: contradictions, lengths. Importing this imports no torch."""

from typing import Any, Protocol

from treetune.cli.options import meshes, policy_loss, reference
from treetune.cli.options.model import AdapterOptions, ModelOptions, VocabularyOptions
from treetune.cli.options.optim import OptimOptions
from treetune.cli.options.pipeline import CorrectionOptions, EngineOptions, PipelineOptions
from treetune.cli.options.policy_loss import PolicyLoss
from treetune.cli.options.reference import RlReference
from treetune.cli.options.rollout import RolloutOptions
from treetune.cli.options.run import RunOptions
from treetune.core.config.ranges import PORT
from treetune.core.config.table import Config


class OnlineConfig(Config, Protocol):
    """The groups of a command that learns from completions it samples."""

    @property
    def model(self) -> ModelOptions:
        """The model to start from."""
        ...

    @property
    def vocabulary(self) -> VocabularyOptions:
        """Tokens to add."""
        ...

    @property
    def adapter(self) -> AdapterOptions:
        """The adapter that trains, or none."""
        ...

    @property
    def rollout(self) -> RolloutOptions:
        """How completions are sampled."""
        ...

    @property
    def loss(self) -> PolicyLoss:
        """The policy loss."""
        ...

    @property
    def correction(self) -> CorrectionOptions:
        """Weights of samples from another policy."""
        ...

    @property
    def pipeline(self) -> PipelineOptions:
        """How generations are made."""
        ...

    @property
    def engine(self) -> EngineOptions:
        """Who samples."""
        ...

    @property
    def reference(self) -> RlReference:
        """The reference of the divergence."""
        ...

    @property
    def optim(self) -> OptimOptions:
        """The optimiser and the length of the run."""
        ...

    @property
    def run(self) -> RunOptions:
        """The run folder, evaluations and checkpoints."""
        ...


def conflicts(config: OnlineConfig) -> None:
    """Raise ValueError for options of loss, sampling, pipeline and engine that contradict each other."""
    loss, rollout, pipe = config.loss, config.rollout, config.pipeline
    policy_loss.conflicts(loss)
    reference.conflicts(config.reference, adapter=config.adapter.adapter, sharding=config.run.sharding)
    if rollout.num_generations < 2 and (loss.advantage or policy_loss.preset(loss.loss).advantage) != "reinforce":
        raise ValueError(
            "num_generations must be at least 2: an advantage compares completions of the same prompt; or --advantage reinforce"
        )
    if rollout.temperature == 0:
        raise ValueError(
            "temperature 0 is greedy decoding, so all completions of a prompt would be identical: give a number above 0, usually 1"
        )
    if pipe.async_prefetch and not config.engine.use_vllm and config.adapter.adapter == "none":
        raise ValueError(
            "async_prefetch samples from a copy of what trains: use an adapter, or use_vllm; whole weights would be held twice"
        )
    low, high = config.correction.vllm_importance_sampling_min, config.correction.vllm_importance_sampling_cap
    if low is not None and low >= high:
        raise ValueError(f"vllm_importance_sampling_min must be below vllm_importance_sampling_cap {high:g}, got {low:g}")
    if loss.loss == "vespo" and config.correction.vllm_importance_sampling_mode.startswith("sequence"):
        raise ValueError("vespo multiplies the tokens' ratios itself: give vllm_importance_sampling_mode token_truncate or token_mask")
    _conflicts_of_shared_streams(config)
    if config.run.sharding == "full" and (pipe.async_prefetch or rollout.rollout_func):
        name = "async_prefetch" if pipe.async_prefetch else "rollout_func"
        raise ValueError(f"{name} does not go with --sharding full: ranks would gather weights at different times")
    if config.engine.use_vllm:
        _conflicts_of_engine(config)


def _conflicts_of_shared_streams(config: OnlineConfig) -> None:
    if (size := meshes.sharing(config.run)) == 1:
        return
    pipe, when = config.pipeline, "at different times than they compute"
    refused = {
        "async_prefetch": (pipe.async_prefetch, f"ranks would exchange completions {when}"),
        "streaming_partial_batch": (pipe.streaming_partial_batch, f"ranks would exchange rewards {when}"),
        "rollout_func": (config.rollout.rollout_func, "ranks would have different completions of the same prompts"),
    }
    for name, (given, reason) in refused.items():
        if given:
            raise ValueError(f"{name} does not go with shard context={size}: {reason}")


def _conflicts_of_engine(config: OnlineConfig) -> None:
    engine = config.engine
    _conflicts_of_servers(config)
    if config.pipeline.async_prefetch and config.adapter.adapter == "none":
        raise ValueError("async_prefetch with whole weights on vLLM: the server restarts at each sync, so nothing can be sampled meanwhile")
    if engine.vllm_reload_in_place and engine.vllm_server_host not in ("127.0.0.1", "localhost", "::1"):
        raise ValueError("vllm_reload_in_place opens the server to whoever reaches it: it is for servers on 127.0.0.1 only")
    if config.adapter.adapter == "none" and engine.vllm_mode != "managed":
        raise ValueError("whole weights reach a vLLM server by restarting it: give vllm_mode managed, or train an adapter")
    trained = config.adapter.unfrozen_parameters or config.adapter.lora_bias != "none"
    whole = config.adapter.lora_modules_to_save or (config.adapter.adapter == "lora" and trained)
    if whole or config.vocabulary.tokens or config.vocabulary.embedding_multiple:
        names = "lora_modules_to_save, lora_bias, unfrozen_parameters, tokens and embedding_multiple"
        raise ValueError(f"vLLM takes adapters of low rank only: leave out {names}, or sample without use_vllm")
    if config.adapter.lora_dora or config.adapter.lora_rank_pattern or config.adapter.lora_alpha_pattern:
        raise ValueError(
            "vLLM computes no DoRA, and one scale for all of an adapter: leave out lora_dora, lora_rank_pattern and lora_alpha_pattern, "
            "or sample without use_vllm"
        )


def _conflicts_of_servers(config: OnlineConfig) -> None:
    urls = config.engine.vllm_server_urls
    if wrong := [url for url in urls if not url.startswith(("http://", "https://")) or urls.count(url) > 1]:
        raise ValueError(f"vllm_server_urls takes addresses such as http://node-1:8000, each once, got {wrong[0]}")
    axes = meshes.sizes(config.run) if meshes.processes(config.run) > 1 else {}
    count, asking = servers(config), axes.get("data", 1) * axes.get("replicate", 1)
    if count > asking:
        name = "vllm_server_urls" if urls else "vllm_num_servers"
        raise ValueError(
            f"{name} is for {count} servers, and {asking} rank{'s have' if asking > 1 else ' has'} prompts of their own to ask with"
        )
    if config.engine.vllm_server_port + count - 1 > PORT.high:
        raise ValueError(f"vllm_num_servers {count}: ports from {config.engine.vllm_server_port} on end at {PORT.high}; give a lower port")


def servers(config: Any) -> int:
    """How many servers sample for a run."""
    return len(config.engine.vllm_server_urls) or config.engine.vllm_num_servers


def longest(config: Any) -> int:
    """Tokens of the longest prompt with its completion that a run asks a server for."""
    prompt = config.data.max_prompt_len if hasattr(config.data, "max_prompt_len") else config.data.sequence_len
    return prompt + config.rollout.max_completion_length


def managed_length(config: Any) -> int | None:
    """Tokens of the longest text that the server takes, if the run starts one."""
    engine = config.engine
    return (engine.vllm_max_model_len or longest(config)) if engine.use_vllm and engine.vllm_mode == "managed" else None
