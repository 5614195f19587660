"""Options of `treetune serve`. Importing this imports no torch.

Names are those of vLLM and of the documents. Text under the class is the command's help, text under a field the option's.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

from treetune.cli.options.model import ModelName
from treetune.core.config.marks import ADAPTER, LOG, PROGRAM
from treetune.core.config.ranges import PORT, PROCESSES, SECONDS, SHARE, TOKENS, whole
from treetune.core.config.table import group


@dataclass(frozen=True)
class Serve:
    """Start a vLLM server for a model, ready for adapters that a run sends; Ctrl-C ends it with all its processes."""

    model: ModelName = group(ModelName)
    adapter: Annotated[str | None, ADAPTER] = None
    """Serve this adapter too (a folder in PEFT format, or a run folder), under the folder's name."""
    host: str = "127.0.0.1"
    """Address to listen on. Whoever reaches it can sample and load adapters: there is no password."""
    port: Annotated[int, PORT] = 8000
    """Port to listen on."""
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    """What the server computes in; auto is what training uses: bfloat16 on CUDA and float32 on CPU."""
    max_model_len: Annotated[int | None, TOKENS] = None
    """Longest prompt with completion in tokens; if not given, what the model allows."""
    gpu_memory_utilization: Annotated[float, SHARE] = 0.9
    """Fraction of the device memory that the server may use."""
    tensor_parallel_size: Annotated[int, PROCESSES] = 1
    """Devices that share each layer."""
    data_parallel_size: Annotated[int, PROCESSES] = 1
    """Copies of the model that share the requests."""
    enable_prefix_caching: bool = True
    """Keep keys and values of prompts, which completions of the same prompt then share."""
    enforce_eager: bool = False
    """No CUDA graphs and no compilation: starts sooner, runs slower."""
    max_lora_rank: Annotated[int, whole(0, 65536)] = 64
    """Largest rank of adapters; 0 for a server without adapters."""
    logprobs_mode: Literal["processed_logprobs", "raw_logprobs"] = "processed_logprobs"
    """Of which distribution log-probs are reported: the one drawn from, which a run with any temperature but without top_p, top_k and
    min_p wants; or that of temperature 1, which a run with those and temperature 1 wants."""
    python: Annotated[str | None, PROGRAM] = None
    """Python of the environment that has vLLM; if not given, $TREETUNE_VLLM_PYTHON, .vllm-venv here, or this one."""
    log: Annotated[str | None, LOG] = None
    """File for the server's output; if not given, logs/vllm-PORT.log beside the models."""
    start_timeout: Annotated[float, SECONDS] = 600.0
    """Seconds to wait until the server answers."""
    vllm_args: tuple[str, ...] = ()
    """Further options for vLLM, given as they are: --vllm-args=--swap-space=1."""
