"""`treetune serve`: a vLLM server for a model, until Ctrl-C."""

import signal
from pathlib import Path
from typing import Any

import torch

from treetune.cli.options.serve import Serve
from treetune.cli.screen import Screen
from treetune.core import owned
from treetune.core.config import table
from treetune.core.rollout import server as servers
from treetune.core.rollout.server import Server, ServerOptions
from treetune.core.rollout.vllm import LOOPBACK
from treetune.core.run import folder
from treetune.core.run.errors import checking_input
from treetune.models import loading, serving
from treetune.models.tokenizer import adapter_folder


def run(config: Serve, given: frozenset[str]) -> int:
    """Serve until Ctrl-C or SIGTERM; the exit code."""
    screen = Screen()
    for number in (signal.SIGINT, signal.SIGTERM):  # in the background of a shell SIGINT would be ignored
        signal.signal(number, _interrupt)
    with checking_input():
        server = _start(config, screen)
    try:
        # Whoever reads this line may end it at once.
        screen.line(f"serving {serving.served_name(config.model.model)} at {server.url}; Ctrl-C ends it")
        server.wait()
    except KeyboardInterrupt:
        screen.line("stopping the server")
    finally:
        server.stop()
    return 0


def _start(config: Serve, screen: Screen) -> Server:
    servers.check(_asked(config))
    python = servers.find_python(config.python)
    model_dir = serving.model_folder(config.model.model, revision=config.model.revision, say=screen.line)
    command, log = build_command(config, python, model_dir), Path(config.log) if config.log else serving.log_file(config.port)
    if config.host not in LOOPBACK:
        screen.warn(f"listening on {config.host}: whoever reaches port {config.port} can sample and load adapters, without a password")
    screen.line(f"starting vLLM on {model_dir}; its output goes to {log}")
    if config.log and not log.exists():
        folder.write_new(log, owned.LOG)
    return servers.start(command, _asked(config), log=log, deadline_s=config.start_timeout)


def _asked(config: Serve) -> ServerOptions:
    return table.record(ServerOptions, config, name=serving.served_name(config.model.model), extra=config.vllm_args)


def build_command(config: Serve, python: str, model_dir: Path) -> list[str]:
    """The command line of vLLM for these options and a model folder."""
    options, rank = _asked(config), config.max_lora_rank or None
    if config.adapter is not None:
        rank = max(rank or 0, serving.adapter_rank(config.adapter))
        served = f"{Path(config.adapter).name}={adapter_folder(config.adapter).absolute()}"
        options = options._replace(extra=[*options.extra, "--lora-modules", served])
    dtype = "float16" if config.dtype == "float16" else serving.DTYPES[loading.compute_dtype(config.dtype, loading.select_device())]
    options = servers.on_device(options._replace(dtype=dtype, max_lora_rank=rank), cuda=torch.cuda.is_available())
    return servers.command(python, model_dir, options)


def _interrupt(number: int, frame: Any) -> None:
    raise KeyboardInterrupt
