"""`treetune serve`: a vLLM server for a model, until Ctrl-C."""

import signal
import time
from pathlib import Path
from typing import Any

import torch

from treetune.cli import protection
from treetune.cli.errors import RunFailed, checking_input
from treetune.cli.options.serve import Serve
from treetune.cli.screen import Screen
from treetune.core.rollout import server as servers
from treetune.core.rollout.server import Server
from treetune.core.rollout.vllm import LOOPBACK
from treetune.core.run import folder
from treetune.models import loading, serving
from treetune.models.tokenizer import adapter_folder


def run(config: Serve, given: frozenset[str]) -> int:
    """Serve until Ctrl-C or SIGTERM; the exit code."""
    screen = Screen()
    for number in (signal.SIGINT, signal.SIGTERM):  # in the background of a shell SIGINT would be ignored
        signal.signal(number, _interrupt)
    with checking_input():
        server = _start(config, screen)
    screen.line(f"serving {serving.served_name(config.model.model)} at {server.url}; Ctrl-C ends it")
    return _watch(server, screen)


def _start(config: Serve, screen: Screen) -> Server:
    _check(config)
    python = servers.find_python(config.python)
    model_dir = serving.model_folder(config.model.model, revision=config.model.revision, say=screen.line)
    command, log = build_command(config, python, model_dir), Path(config.log) if config.log else serving.log_file(config.port)
    if config.host not in LOOPBACK:
        screen.warn(f"listening on {config.host}: whoever reaches port {config.port} can sample and load adapters, without a password")
    screen.line(f"starting vLLM on {model_dir}; its output goes to {log}")
    if config.log and not log.exists():
        folder.write_new(log, protection.LOG)
    try:
        return Server(command, host=config.host, port=config.port, log=log, deadline_s=config.start_timeout)
    except RuntimeError as error:
        raise RunFailed(str(error)) from error


def build_command(config: Serve, python: str, model_dir: Path) -> list[str]:
    """The command line of vLLM for these options and a model folder."""
    extra, rank = list(config.vllm_args), config.max_lora_rank or None
    if config.adapter is not None:
        rank = max(rank or 0, serving.adapter_rank(config.adapter))
        extra += ["--lora-modules", f"{Path(config.adapter).name}={adapter_folder(config.adapter).absolute()}"]
    cuda = torch.cuda.is_available()
    dtype = "float16" if config.dtype == "float16" else serving.DTYPES[loading.compute_dtype(config.dtype, loading.select_device())]
    options = servers.ServerOptions(
        name=serving.served_name(config.model.model),
        host=config.host,
        port=config.port,
        dtype=dtype,
        max_model_len=config.max_model_len,
        gpu_memory_utilization=config.gpu_memory_utilization if cuda else None,
        tensor_parallel_size=config.tensor_parallel_size,
        data_parallel_size=config.data_parallel_size,
        enable_prefix_caching=config.enable_prefix_caching,
        enforce_eager=config.enforce_eager or not cuda,
        max_lora_rank=rank,
        logprobs_mode=config.logprobs_mode,
        extra=extra,
    )
    return servers.command(python, model_dir, options)


def _check(config: Serve) -> None:
    for name in ("tensor_parallel_size", "data_parallel_size", "max_model_len"):
        if (value := getattr(config, name)) is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if not 1 <= config.port <= 65535:
        raise ValueError(f"port must be 1 to 65535, got {config.port}")
    if not 0 < config.gpu_memory_utilization <= 1:
        raise ValueError(f"gpu_memory_utilization must be above 0 and at most 1, got {config.gpu_memory_utilization}")
    if config.max_lora_rank:
        servers.lora_rank(config.max_lora_rank)
    servers.check_port(config.host, config.port)


def _interrupt(number: int, frame: Any) -> None:
    raise KeyboardInterrupt


def _watch(server: Server, screen: Screen) -> int:
    try:
        while server.alive():
            time.sleep(0.3)
        raise RunFailed(f"the server ended; {server.log}: {server.tail()}")
    except KeyboardInterrupt:
        screen.line("stopping the server")
        return 0
    finally:
        server.stop()
