"""Models and adapters by name (a folder, a .gguf file, a known name, a hub id), read with the checks that every use of them needs."""

import os
from pathlib import Path

import torch

from treetune.core import check, fields, machine, param, tree
from treetune.core.lora import Lora
from treetune.core.param import Params
from treetune.core.partition import Partition
from treetune.core.quant import Scheme
from treetune.models import Model, adapter, fetch, gguf, heads, hf, identity, resize, tensor_rules
from treetune.models.fetch import Say, silent
from treetune.models.quantised import Home, See
from treetune.models.tokenizer import adapter_folder, check_rows, has_own_words, load_tokenizer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def select_device(name: str = "auto") -> torch.device:
    """The torch device of a name; "auto" is CUDA where there is one. Under torchrun each rank takes its own CUDA device."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device cuda is not available: this machine or this build of torch has no CUDA; use device cpu")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


def compute_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype that a model computes in: "auto" is bfloat16 on CUDA and float32 on a CPU."""
    return DTYPES.get(name, torch.bfloat16 if device.type == "cuda" else torch.float32)


def load_model(
    name: str | Path,
    *,
    revision: str | None = None,
    dtype: str = "auto",
    device: torch.device,
    scheme: Scheme | None = None,
    see: See | None = None,
    home: Home | None = None,
    say: Say = silent,
) -> tuple[Model, Path]:
    """The model of a name, in its compute dtype on the device, and the path it came from; quantised by a scheme leaf by leaf.

    see: is told of each leaf that is quantised. home: where layers go as they are read, if not to the device, or how
    leaves are split among ranks, all of which call this then.

    Raises ValueError for weights that are not finite.
    """
    path = fetch.resolve(name, say=say, revision=revision)
    if scheme and device.type == "cpu":
        machine.map_large_buffers()
    if isinstance(home, Partition) and (file := path / "config.json").is_file():
        tensor_rules.check(hf.read_config(file)[1], home, path)
    load = gguf.load if str(path).endswith(".gguf") else hf.load
    with fields.reading(f"the model {path}"):
        model = load(path, dtype=compute_dtype(dtype, device), device=device, scheme=scheme, see=see, home=home)
    tensor_rules.check(model.cfg, home, path)
    machine.trim()
    if bad := check.not_finite(model.params):
        raise ValueError(f"{path} holds weights that are not finite: {', '.join(bad[:3])}; download or save the model again")
    return model, path


def random_model(path: str | Path, *, seed: int, dtype: str = "auto", device: torch.device, home: Home | None = None) -> Model:
    """A model of random weights of the shape in a config.json, or in the one of a folder; home: how leaves are split among ranks."""
    file = Path(path) / "config.json" if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise ValueError(f"config file {file} does not exist")
    with fields.reading(file):
        family, cfg = hf.read_config(file)
        tensor_rules.check(cfg, home, path)
        keep = home.split if isinstance(home, Partition) else param.as_is
        return hf.random(family, file, seed=seed, dtype=compute_dtype(dtype, device), keep=lambda path, leaf: keep(path, leaf.to(device)))


def check_configs(name: str | Path, *, revision: str | None = None, sizes: bool = True) -> None:
    """Raise ValueError for a generation_config.json, or with `sizes` a config.json, that cannot be used.

    It is cheap: for before rows are read, and before a run that would save a model with it.
    """
    path = fetch.resolve(name, revision=revision)
    if sizes and path.is_dir():
        hf.read_config(path / "config.json")
    hf.generation_config(path)


def base_name(name: str) -> str:
    """How files should name a base model: a local path absolute, a known name by its hub id, anything else as it is."""
    if (local := Path(name).expanduser()).exists():
        return str((fetch.model_in(local) if local.is_dir() else local).resolve())
    short = fetch.known_name(name)
    return fetch.MODELS[short].hub_id if short else name


def identify_base(name: str, model: Model, scheme: Scheme | None = None) -> adapter.Base:
    """What an adapter on this model says of it; `model` is as it was loaded, before its vocabulary grows."""
    return adapter.Base(base_name(name), identity.digest(model), scheme)


def check_base(path: str, base: adapter.Base, *, say: Say = silent, train: bool = False) -> None:
    """Tell when an adapter is used on another base model than it was trained on.

    Raises ValueError when it is to train further there, or when the model under the name of its base has other weights than it had.
    """
    recorded = adapter.base(adapter_folder(path))
    if not recorded.digest:
        check_base_name(path, base.name, say=say)
    elif recorded.digest != base.digest:
        difference = f"{path} was trained on {recorded.name}, and the weights of {base.name} are others"
        if _absolute(recorded.name) == _absolute(base.name):
            raise ValueError(f"{path} was trained on {recorded.name}, which has other weights now: name the model that it was trained on")
        if train:
            raise ValueError(f"{difference}: leave --model out to train it further on its own base, or start a new adapter on this one")
        say(f"{difference}: this is another model than the one that was trained")


def check_base_name(path: str, name: str, *, say: Say) -> None:
    """Tell when an adapter names another base model than this one."""
    recorded = adapter.base_of(adapter_folder(path))
    if recorded and _absolute(recorded) != _absolute(name):
        say(f"{path} names the base model {recorded}; it is used on {name} as asked: check that it was trained on it")


def _absolute(name: str) -> str:
    return str(Path(name).resolve()) if Path(name).exists() else name


def load_adapter(path: str, model: Model, *, head: bool = False) -> tuple[Lora, Params, adapter.Info]:
    """The adapter, the leaves trained whole and the facts of an adapter folder or of the one in a run folder.

    Raises ValueError for weights that are not finite, and for a reward model's adapter unless `head`.
    """
    folder = adapter_folder(path)
    scores = heads.kind(folder) is not None
    if scores and not head:
        raise ValueError(f"{path} is a reward model's adapter: use it with treetune score, or train it on with treetune reward or prm")
    with fields.reading(f"the adapter {folder}"):
        low, whole, *_, info = (heads.load_adapter if scores else adapter.load)(folder, model)
    if bad := check.not_finite(low.tree) + check.not_finite(whole):
        raise ValueError(f"{path} holds weights that are not finite: {', '.join(bad[:3])}; train or download the adapter again")
    return low, whole, info


def load_adapted(
    name: str,
    path: str | None,
    *,
    revision: str | None = None,
    dtype: str = "auto",
    device: torch.device,
    scheme: Scheme | None = None,
    say: Say = silent,
) -> tuple[Model, Lora | None]:
    """A model with the adapter folder's whole weights laid over its own, and the adapter to run it with."""
    model, _ = load_model(name, revision=revision, dtype=dtype, device=device, scheme=scheme, say=say)
    if path is None:
        return model, None
    check_base(path, identify_base(name, model), say=say)
    model = match_rows(model, path, name, revision=revision)
    low, whole, _ = load_adapter(path, model)
    return model._replace(params=tree.merge(model.params, whole)), low


def match_rows(model: Model, path: str, name: str, *, revision: str | None = None) -> Model:
    """The model of a name with the vocabulary rows that an adapter was trained with, more or fewer than its own."""
    rows = adapter.rows(adapter_folder(path), model.family)
    if rows is None and not has_own_words(path):
        return model
    # An adapter may have fewer rows than a padded model, but never fewer than its tokenizer has tokens.
    if rows is None or rows < model.cfg.vocab_size:
        tokens = len(load_tokenizer(name, adapter_path=path, revision=revision))
        if rows is None:
            return resize.resize(model, tokens)
        check_rows(path, rows, tokens)
    return resize.resize(resize.cut(model, rows), rows)
