"""Reward models: a model with a head that scores sequences, or that tells good tokens from bad ones.

N read rows of D documents, C classes.
"""

from pathlib import Path
from typing import Any, NamedTuple

import torch

from treetune.core import check, fields, tree
from treetune.core.lora import Lora
from treetune.core.param import Params
from treetune.core.partition import Partition
from treetune.core.quant import Scheme
from treetune.core.state import Batch
from treetune.models import Model, adapter, decoder_attention, fetch, heads, hf, identity, loading, quant_config, tensor_rules
from treetune.models.fetch import Say, silent
from treetune.models.policy import Policy
from treetune.models.target import Target
from treetune.models.tokenizer import adapter_folder, load_tokenizer

# Kind of head -> what a batch reads (`read` of `pack.collate_trees`), and its classes.
READ = {"sequence": "last", "token": "classes"}
CLASSES = {"sequence": 1, "token": 2}


class RewardModel(NamedTuple):
    """A model, the adapter on it, its head, and what that scores: "sequence", or "token" for a process reward model."""

    model: Model
    lora: Lora | None
    head: Params
    kind: str

    @property
    def weights(self) -> Params:
        """All weights that decide a score."""
        return {"model": self.model.params, "head": self.head} | ({} if self.lora is None else {"lora": self.lora.tree})

    @property
    def settings(self) -> tuple[float | None, str]:
        """What else decides a score: the scale of the adapter, and what the model computes."""
        return self.lora and self.lora.scale, identity.settings(self.model.family, self.model.cfg)


def locate(name: str | None, adapter_path: str | None) -> tuple[str, str | None]:
    """The base model and the adapter folder of a reward model; `name` may be the folder of an adapter or of a run, too.

    Raises ValueError where the adapter names no base model.
    """
    if name is not None and adapter_path is None and (adapter_folder(name) / adapter.CONFIG).is_file():
        name, adapter_path = None, name
    if name is not None:
        inside = Path(name) / "model"
        return str(inside) if inside.is_dir() and not (Path(name) / "config.json").exists() else name, adapter_path
    base = "" if adapter_path is None else adapter.base_of(adapter_folder(adapter_path))
    if not base:
        raise ValueError(f"{adapter_path} names no base model: give one before --adapter")
    return base, adapter_path


def load(chosen: Target, *, home: Partition | None = None, say: Say = silent) -> RewardModel:
    """A model with its own head, or with the adapter and the head in a folder. home: how leaves but the head's are split among ranks.

    Raises ValueError where there is no head, one of other classes than it should have, or weights that are not finite.
    """
    name, revision, dtype, adapter_path = chosen.model, chosen.revision, chosen.dtype, chosen.adapter
    path, low, device = fetch.resolve(name, say=say, revision=revision), None, loading.select_device(chosen.device)
    home = None if home is None else _fitting(home, path, chosen.scheme)
    if heads.kind(path) is not None:
        with fields.reading(f"the model {path}"):
            model, head = heads.load(path, dtype=loading.compute_dtype(dtype, device), device=device, scheme=chosen.scheme, home=home)
    elif adapter_path is None:
        raise ValueError(f"{name} has no head that scores: expected a reward model, or the adapter folder of one")
    else:
        options = {"revision": revision, "dtype": dtype, "device": device, "scheme": chosen.scheme, "home": home}
        model, head = loading.load_model(name, **options, say=say)[0], {}
    if adapter_path is not None:
        loading.check_base(adapter_path, loading.identify_base(name, model), say=say)
        model = loading.match_rows(model, adapter_path, name, revision=revision)
        with fields.reading(f"the adapter {adapter_path}"):
            low, whole, head, _ = heads.load_adapter(adapter_folder(adapter_path), model)
        model = model._replace(params=tree.merge(model.params, _split(home, whole)))
        low = low._replace(tree=_split(home, low.tree))
    loaded = RewardModel(model, low, head, heads.kind_of(head))
    _check(loaded, chosen.name)
    return loaded


def _fitting(home: Partition, path: Path, scheme: Scheme | None) -> Partition | None:
    """How the leaves of the model in a folder or file are split, of a run whose models are split as `home` says."""
    if not path.is_dir():
        return tensor_rules.along_data(home)  # a .gguf file, whose weights may be quantised
    dense = scheme is None and quant_config.of_folder(path) is None
    return tensor_rules.beside(home, hf.read_config(path / "config.json")[1], dense=dense)


def _split(home: Partition | None, params: Params) -> Params:
    return params if home is None else tree.from_items((path, home.split(path, leaf)) for path, leaf in tree.items(params))


def load_judge(name: str, *, dtype: str, device: torch.device, home: Partition | None = None, say: Say = silent) -> tuple[RewardModel, Any]:
    """The reward model of a name, which may be the folder of an adapter or of a run, too, and its tokenizer. home: as of `load`.

    Raises ValueError for what is no reward model.
    """
    base, path = locate(name, None)
    tokenizer = load_tokenizer(base, adapter_path=path, say=say)
    if path is None and heads.kind(fetch.resolve(base)) is None:
        raise ValueError(f"reward {name} is a model without a head that scores: expected a reward model, or module.function")
    scheme = None if path is None else adapter.base(adapter_folder(path)).scheme
    return load(Target(base, dtype=dtype, device=device.type, adapter=path, scheme=scheme), home=home), tokenizer


def _check(loaded: RewardModel, name: str) -> None:
    classes = loaded.head["score"]["weight"].shape[0]
    if classes != CLASSES[loaded.kind]:
        expected = "one score" if loaded.kind == "sequence" else "two classes, bad and good"
        raise ValueError(f"the head of {name} has {classes} classes; expected {expected}")
    if bad := check.not_finite(loaded.weights):
        raise ValueError(f"{name} holds weights that are not finite: {', '.join(bad[:3])}; train or download the model again")


def with_head(policy: Policy, *, classes: int, start: str | None = None, seed: int = 0, device: torch.device) -> Policy:
    """The policy with a head that trains, a fresh one or that of the adapter folder `start`.

    The output matrix of the vocabulary, which no score reads, does not train. Errors: ValueError where it should, and for a head of
    other classes.
    """
    params = dict(policy.params)
    if "lm_head" in params.get("lora", {}) or policy.lora is not None and "lm_head" in params.get("model", {}):
        raise ValueError("no score depends on lm_head: leave it out of --lora-target-modules and --lora-modules-to-save")
    head = tree.map(lambda leaf: leaf.to(device), _head(policy, classes, start, seed))
    frozen = dict(policy.frozen)
    if policy.lora is None:
        for part in (params, frozen):
            part |= {"model": _without_lm_head(part["model"])} if "model" in part else {}
    return policy._replace(params=params | {"head": head}, frozen=frozen)


def _without_lm_head(params: Params) -> Params:
    return {name: part for name, part in params.items() if name not in ("lm_head", "lm_head_bias")}


def _head(policy: Policy, classes: int, start: str | None, seed: int) -> Params:
    if start is None or heads.kind(adapter_folder(start)) is None:
        return heads.init(policy.cfg, classes, bias=classes > 1, seed=seed)
    head = heads.load_adapter(adapter_folder(start), Model(policy.family, policy.cfg, policy.frozen["model"]))[2]
    if (rows := head["score"]["weight"].shape[0]) != classes:
        raise ValueError(f"{start} has a head of {rows} classes, this command trains one of {classes}")
    return head


@torch.no_grad()
def scores(reward_model: RewardModel, batch: Batch, *, documents: int, device: torch.device) -> list[list[float]]:
    """For each document the score of each sequence (its branches, or itself), or the probability that each step is good.

    batch: a stream on the host that reads READ[reward_model.kind]; documents: how many of its documents are no padding.
    """
    counts = torch.zeros(documents, dtype=torch.int64).index_add(0, batch["doc_of_seq"], batch["seq_lens"]).tolist()
    model = reward_model.model
    plan = decoder_attention.plan(batch, model.cfg, device=device)
    batch = {key: value.to(device) for key, value in batch.items()}
    logits = heads.scores(model.family, model.cfg, model.params, reward_model.head, batch, plan, lora=reward_model.lora)  # [N, C]
    flat = logits[:, 0] if reward_model.kind == "sequence" else logits.softmax(-1)[:, 1]
    return [part.tolist() for part in flat.cpu().split(counts)]
