"""A model as a vLLM server takes it: the folder to read, the name in requests, the dtype, the rank of an adapter."""

import hashlib
from pathlib import Path
from typing import NamedTuple

import torch

from treetune.core import manifest
from treetune.models import adapter_config, fetch, gguf, hf, loading
from treetune.models.fetch import Say
from treetune.models.tokenizer import adapter_folder

DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}  # by vLLM's names


class ServedModel(NamedTuple):
    """A model as a server has it: its name in requests, the folder to read, all names it may be loaded by, the dtype by vLLM's name."""

    name: str
    folder: Path
    paths: tuple[str, ...]
    dtype: str


def locate(name: str, *, revision: str | None = None, dtype: torch.dtype, say: Say) -> ServedModel:
    """The model of a name for a server that computes in a dtype."""
    folder = model_folder(name, revision=revision, say=say)
    return ServedModel(served_name(name), folder, (name, str(folder), loading.base_name(name)), DTYPES[dtype])


def served_name(name: str) -> str:
    """The name of a model in requests: the short name of a known one, any other as it is."""
    return fetch.known_name(name) or name


def model_folder(name: str, *, revision: str | None = None, say: Say) -> Path:
    """The model as a folder that vLLM reads. A .gguf file is written as one, once, in float32: the numbers that training computes with."""
    path = fetch.resolve(name, say=say, revision=revision)
    if path.suffix != ".gguf":
        manifest.check(path)  # vLLM would not
        return path
    stat = path.stat()
    digest = hashlib.sha256(f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}".encode()).hexdigest()[:12]
    folder = fetch.home() / "models" / f"{path.stem}-{digest}"
    if not (folder / "config.json").is_file():
        say(f"writing {path} as a model folder to {folder}")
        with fetch.once(folder):
            hf.save(folder, gguf.load(path, dtype=torch.float32), tokenizer=gguf.tokenizer(path))
    return folder


def adapter_rank(path: str | Path) -> int:
    """The largest rank in the config of an adapter folder, or of the one in a run folder. Errors: ValueError where there is none."""
    folder = adapter_folder(path)
    manifest.check(folder)
    config = adapter_config.read(folder)
    return max([config.rank, *config.ranks.values()])


def log_file(port: int) -> Path:
    """The file for the output of a server, unless another is named."""
    return fetch.home() / "logs" / f"vllm-{port}.log"
