"""`treetune serve`: a vLLM server for a model; and the servers that a run starts for itself."""

import hashlib
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from treetune.cli import guard, rundir, setup
from treetune.cli.errors import RunFailed, checking_input
from treetune.cli.options.model import ModelName
from treetune.cli.options.serve import Serve
from treetune.cli.screen import Screen
from treetune.core import manifest
from treetune.core.rollout import server as servers
from treetune.core.rollout.server import Server
from treetune.core.rollout.vllm import LOOPBACK
from treetune.models import adapter_config, fetch, gguf, hf

DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def served_name(options: ModelName) -> str:
    """The name of a model in requests: the short name of one that we know, else as it was given."""
    return fetch.known_name(options.model) or options.model


def model_folder(options: ModelName, *, say: Callable[[str], None]) -> Path:
    """The model as a folder that vLLM reads. A .gguf file is written as one, once, in float32: the numbers that training computes with."""
    found = fetch.resolve(options.model, say=say, revision=options.revision)
    if found.suffix != ".gguf":
        manifest.check(found)  # before a program that does not
        return found
    stat = found.stat()
    digest = hashlib.sha256(f"{found.resolve()} {stat.st_size} {stat.st_mtime_ns}".encode()).hexdigest()[:12]
    place = fetch.home() / "models" / f"{found.stem}-{digest}"
    if not (place / "config.json").is_file():
        say(f"writing {found} as a model folder to {place}")
        with fetch.once(place):
            hf.save(place, gguf.load(found, dtype=torch.float32), tokenizer=gguf.tokenizer(found))
    return place


def rank_of(path: str | Path) -> int:
    """The rank in an adapter folder's config. Raises ValueError where there is none."""
    manifest.check(setup.adapter_folder(str(path)))
    return adapter_config.read(setup.adapter_folder(str(path))).rank


def log_file(port: int) -> Path:
    """Where a server's output goes if nothing else is said."""
    return fetch.home() / "logs" / f"vllm-{port}.log"


def command_of(config: Serve, python: str, place: Path) -> list[str]:
    """The command line of vLLM for these options and a model folder."""
    extra, rank = list(config.vllm_args), config.max_lora_rank or None
    if config.adapter is not None:
        found = setup.adapter_folder(config.adapter)
        rank = max(rank or 0, rank_of(found))
        extra += ["--lora-modules", f"{Path(config.adapter).name}={found.absolute()}"]
    cuda = torch.cuda.is_available()
    options = servers.ServerOptions(
        name=served_name(config.model),
        host=config.host,
        port=config.port,
        dtype=DTYPES[setup.compute_dtype(config.dtype, setup.device("auto"))] if config.dtype != "float16" else "float16",
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
    return servers.command(python, place, options)


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


def run(config: Serve, given: frozenset[str]) -> int:
    """Serve until Ctrl-C or SIGTERM; the exit code."""
    screen = Screen()
    for number in (signal.SIGINT, signal.SIGTERM):  # in the background of a shell SIGINT would be ignored
        signal.signal(number, _interrupt)
    with checking_input():
        _check(config)
        python = servers.find_python(config.python)
        place = model_folder(config.model, say=screen.line)
        command, log = command_of(config, python, place), Path(config.log) if config.log else log_file(config.port)
        if config.host not in LOOPBACK:
            screen.warn(f"listening on {config.host}: whoever reaches port {config.port} can sample and load adapters, without a password")
        screen.line(f"starting vLLM on {place}; its output goes to {log}")
        if config.log and not log.exists():
            rundir.write_new(log, guard.LOG)
        try:
            server = Server(command, host=config.host, port=config.port, log=log, deadline_s=config.start_timeout)
        except RuntimeError as error:
            raise RunFailed(str(error)) from error
    screen.line(f"serving {served_name(config.model)} at {server.url}; Ctrl-C ends it")
    return _watch(server, screen)


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
