"""A vLLM server as a child process: started in a process group of its own, watched, and ended with everything that it started."""

import atexit
import contextlib
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import httpx

from treetune.core.run.errors import RunFailed

# Between us and the server: ends the whole process group when the server ends, or when the process that wanted it is gone,
# killed or not, and removes the folder of its sockets. It outlives SIGTERM, which the group gets, to reap the server.
GUARD = """
import os, shutil, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, lambda *_: None)
owner, grace_s, sockets = int(sys.argv[1]), float(sys.argv[2]), sys.argv[3]
child = subprocess.Popen(sys.argv[4:])
while child.poll() is None and os.getppid() == owner:
    time.sleep(0.2)
if child.poll() is None:
    os.killpg(0, signal.SIGTERM)
    end = time.monotonic() + grace_s
    while child.poll() is None and time.monotonic() < end:
        time.sleep(0.1)
    shutil.rmtree(sockets, ignore_errors=True)
    os.killpg(0, signal.SIGKILL)
shutil.rmtree(sockets, ignore_errors=True)
sys.exit(child.returncode if child.returncode >= 0 else 128 - child.returncode)
"""
# What the server needs in its environment, unless the user has set it: adapters at run time, no usage reports.
ENVIRONMENT = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "VLLM_CPU_KVCACHE_SPACE": "2"}
VENV_PYTHON = Path(".vllm-venv") / "bin" / "python"  # in the working folder: `make vllm-env` builds it
TAIL = 8  # lines of its log that an error shows


def find_python(named: str | None) -> str:
    """The Python that has vLLM: the one named, $TREETUNE_VLLM_PYTHON, .vllm-venv in this folder, or this one. Raises ValueError."""
    named = named or os.environ.get("TREETUNE_VLLM_PYTHON")
    if named:
        if shutil.which(named) is None:
            raise ValueError(f"there is no program {named}; name the Python of the environment that has vLLM")
        return named
    if VENV_PYTHON.is_file():
        return str(VENV_PYTHON.absolute())
    if importlib.util.find_spec("vllm") is None:
        how = "name its Python with --python (treetune serve), --vllm-python (treetune grpo) or TREETUNE_VLLM_PYTHON"
        raise ValueError(f"vLLM was not found: `make vllm-env` builds .vllm-venv; or {how}")
    return sys.executable


class ServerOptions(NamedTuple):
    """Options of vLLM's server; None leaves the choice to vLLM. max_lora_rank None: no adapters."""

    name: str  # of the model in requests
    port: int
    host: str = "127.0.0.1"
    dtype: str = "auto"
    max_model_len: int | None = None
    gpu_memory_utilization: float | None = None
    tensor_parallel_size: int = 1
    data_parallel_size: int = 1
    enable_prefix_caching: bool | None = None
    enforce_eager: bool = False
    max_lora_rank: int | None = None
    logprobs_mode: str = "processed_logprobs"
    seed: int = 0
    extra: Sequence[str] = ()  # arguments of its command line
    device: int | None = None  # that CUDA device of this process alone


def check(options: ServerOptions) -> None:
    """Raise ValueError for numbers that the server cannot have, and for a port that is taken."""
    for name in ("tensor_parallel_size", "data_parallel_size", "max_model_len"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if not 1 <= options.port <= 65535:
        raise ValueError(f"port must be 1 to 65535, got {options.port}")
    if options.gpu_memory_utilization is not None and not 0 < options.gpu_memory_utilization <= 1:
        raise ValueError(f"gpu_memory_utilization must be above 0 and at most 1, got {options.gpu_memory_utilization}")
    if options.max_lora_rank:
        lora_rank(options.max_lora_rank)
    check_port(options.host, options.port)


def on_device(options: ServerOptions, *, cuda: bool) -> ServerOptions:
    """The options as a device takes them: without CUDA there is no share of its memory, and no CUDA graphs."""
    if cuda:
        return options
    # vLLM 0.32 rewinds the seeded generator of a request whose prompt it computes in chunks, which one of the CPU cannot: the server dies.
    chunked = () if any("chunked-prefill" in text for text in options.extra) else ("--no-enable-chunked-prefill",)
    return options._replace(gpu_memory_utilization=None, enforce_eager=True, extra=(*chunked, *options.extra))


def command(python: str | Path, model: str | Path, options: ServerOptions) -> list[str]:
    """The command line of vLLM's server for a model folder.

    Sampling defaults of the model's generation_config.json are off: a request says all. Two adapters can be in use, the current one
    and the one before it.

    Raises ValueError when `model` is not a model folder.
    """
    if not (Path(model) / "config.json").is_file():
        raise ValueError(f"{model} is not a model folder (no config.json): the server needs one with config.json, weights and tokenizer")
    values: dict[str, object] = {
        "model": model, "served-model-name": options.name, "host": options.host, "port": options.port, "dtype": options.dtype,
        "max-model-len": options.max_model_len, "gpu-memory-utilization": options.gpu_memory_utilization,
        "tensor-parallel-size": options.tensor_parallel_size, "data-parallel-size": options.data_parallel_size,
        "logprobs-mode": options.logprobs_mode, "generation-config": "vllm", "seed": options.seed,
    }  # fmt: skip
    caching = options.enable_prefix_caching
    flags = [] if caching is None else ["--enable-prefix-caching" if caching else "--no-enable-prefix-caching"]
    flags += ["--enforce-eager"] * options.enforce_eager
    if options.max_lora_rank is not None:
        flags += ["--enable-lora", "--max-loras", "2", "--max-lora-rank", str(lora_rank(options.max_lora_rank))]
    pairs = [part for key, value in values.items() if value is not None for part in (f"--{key}", str(value))]
    return [str(python), "-m", "vllm.entrypoints.openai.api_server", *pairs, *flags, *options.extra]


def url(host: str, port: int) -> str:
    """The address of a server."""
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def logprobs_mode(temperature: float) -> str:
    """The log-probs that the server of a run should report (see `vllm`).

    Raw ones serve cut distributions at temperature 1 too, processed ones any temperature without cuts.
    """
    return "raw_logprobs" if temperature == 1 else "processed_logprobs"


def lora_rank(rank: int) -> int:
    """The smallest --max-lora-rank that vLLM offers for adapters of this rank. Raises ValueError above 512."""
    offered = (8, 16, 32, 64, 128, 256, 320, 512)
    if not 1 <= rank <= offered[-1]:
        raise ValueError(f"lora rank {rank}: vLLM takes adapters of rank 1 to {offered[-1]}")
    return next(size for size in offered if size >= rank)


def free_port(host: str = "127.0.0.1") -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return probe.getsockname()[1]


def check_port(host: str, port: int) -> None:
    """Raise ValueError when the port cannot be listened on."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ValueError(f"cannot listen on {host} port {port} ({error.strerror}): end what uses it, or take another port") from error


def _free(host: str, port: int) -> bool:
    try:
        check_port(host, port)
    except ValueError:
        return False
    return True


class Server:
    """A running server: `url`, `alive`, `restart`, `stop`. Its output goes to the file `log`.

    `command` is what to run; it must answer GET /health on host:port with 200 within deadline_s. It is ended with its whole process
    group by `stop`, when this process ends in whatever way, and when it does not come up.

    Raises ValueError when the port is taken or the program is missing, RuntimeError with the last lines of the log when the server ends
    or stays silent.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        port: int,
        log: str | Path,
        host: str = "127.0.0.1",
        environment: Mapping[str, str] | None = None,
        deadline_s: float = 600.0,
        grace_s: float = 15.0,
    ):
        self.command, self.host, self.port, self.log = list(command), host, port, Path(log)
        self.environment = {**os.environ, **(environment or {})}
        self.sockets: Path | None = None  # where it keeps them: vLLM leaves its own in the temporary folder when it is killed
        self.deadline_s, self.grace_s = deadline_s, grace_s
        self.process: subprocess.Popen | None = None
        self.written = 0  # bytes of the log that belong to earlier starts
        self.starts = 0
        self.lock = threading.RLock()  # of who restarts it: the thread that trains, or the one that samples ahead
        self._start()

    @property
    def url(self) -> str:
        """Where to reach it from this machine."""
        return url({"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host), self.port)

    def alive(self) -> bool:
        """Whether its process runs."""
        return self.process is not None and self.process.poll() is None

    def wait(self) -> None:
        """Return never, but raise RunFailed with the last lines of the log when the server ends."""
        while self.alive():
            time.sleep(0.3)
        raise RunFailed(f"the server ended; {self.log}: {self.tail()}")

    def restart(self, command: Sequence[str] | None = None) -> None:
        """Stop it, if it still runs, and start it again, with another command if given; returns when it is healthy."""
        self.stop()
        self.command = self.command if command is None else list(command)
        end = time.monotonic() + self.grace_s
        while time.monotonic() < end and not _free(self.host, self.port):  # what was killed may hold it a moment longer
            time.sleep(0.1)
        self._start()

    def stop(self) -> None:
        """End its whole process group: SIGTERM, then SIGKILL for what is left after grace_s."""
        process, self.process = self.process, None
        if process is None:
            return
        atexit.unregister(self.stop)
        _signal(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(self.grace_s)
        _signal(process.pid, signal.SIGKILL)  # also when the server has ended: a worker of it may not have
        process.wait()
        if self.sockets is not None:
            shutil.rmtree(self.sockets, ignore_errors=True)

    def tail(self) -> str:
        """The last lines of the log, in one line; errors first where there are some."""
        text = self.log.read_bytes()[self.written :].decode(errors="replace")
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        errors = [line for line in lines if "Error" in line or "error:" in line]
        return " | ".join(line[-300:] for line in (errors[-2:] or lines[-TAIL:]))

    def _start(self) -> None:
        check_port(self.host, self.port)
        self.log.parent.mkdir(parents=True, exist_ok=True)
        if shutil.which(self.command[0]) is None:
            raise ValueError(f"there is no program {self.command[0]}: name the Python of the environment that has vLLM")
        self.sockets = Path(tempfile.mkdtemp(prefix="treetune-"))
        guarded = [sys.executable, "-c", GUARD, str(os.getpid()), str(self.grace_s), str(self.sockets), *self.command]
        environment = {**ENVIRONMENT, "VLLM_RPC_BASE_PATH": str(self.sockets), **self.environment}
        with self.log.open("ab") as out:
            self.written = out.tell()
            self.process = subprocess.Popen(
                guarded, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )
        atexit.register(self.stop)
        with contextlib.ExitStack() as undo:
            undo.callback(self.stop)
            self._wait()
            undo.pop_all()
        self.starts += 1

    def _wait(self) -> None:
        end = time.monotonic() + self.deadline_s
        with httpx.Client(trust_env=False, timeout=5.0) as http:
            while time.monotonic() < end:
                if self.process is None or not self.alive():
                    code = "?" if self.process is None else self.process.returncode
                    raise RuntimeError(f"the server ended with code {code} before it was up; {self.log}: {self.tail()}")
                try:
                    if http.get(f"{self.url}/health").status_code == 200:
                        return
                except httpx.TransportError:
                    pass
                time.sleep(0.2)
        raise RuntimeError(f"the server was not up after {self.deadline_s:g} s; {self.log}: {self.tail()}")


def start(command: Sequence[str], options: ServerOptions, *, log: Path, in_place: bool = False, deadline_s: float = 600.0) -> Server:
    """Start the server of a command line; in_place opens the endpoints that `Client.reload_weights` needs.

    Raises RunFailed when it does not come up, ValueError when the port is taken or the program is missing.
    """
    environment = {"VLLM_SERVER_DEV_MODE": "1"} if in_place else {}
    if options.device is not None:
        shown = os.environ.get("CUDA_VISIBLE_DEVICES")
        environment["CUDA_VISIBLE_DEVICES"] = shown.split(",")[options.device] if shown else str(options.device)
    try:
        return Server(command, host=options.host, port=options.port, log=log, environment=environment, deadline_s=deadline_s)
    except RuntimeError as error:
        raise RunFailed(str(error)) from error


def _signal(group: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, number)
