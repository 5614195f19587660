"""What tests of preference objectives share: a tiny model and its reference, ragged pairs, ways to cut up a step, and its gradient."""

import importlib.util
from pathlib import Path

import torch

from treetune.cli.methods import METHODS
from treetune.cli.methods.cpo import Cpo, CpoLoss
from treetune.cli.methods.dpo import Dpo, DpoLoss
from treetune.cli.methods.kto import Kto, KtoLoss
from treetune.cli.methods.method import Setting
from treetune.cli.methods.orpo import Orpo, OrpoLoss
from treetune.cli.methods.prm import Prm
from treetune.cli.methods.reward import Reward, RewardLoss
from treetune.cli.methods.simpo import Simpo, SimpoLoss
from treetune.cli.options.reference import ReferenceOptions
from treetune.core import lora, optim, param, shard, step, tree
from treetune.core.data import trees
from treetune.core.run.ranks import Ranks
from treetune.core.state import TrainState
from treetune.models import Model, hf, llama
from treetune.models.policy import Policy
from treetune.ops import attention

VOCAB = 53
SIZES = ((3, 7, 2), (1, 1, 5), (9, 4, 4), (2, 12, 1), (6, 3, 8), (4, 1, 1), (5, 6, 9), (2, 2, 3))  # prompt, chosen, rejected
CPU = torch.device("cpu")
CONFIGS = {
    "dpo": (Dpo, DpoLoss), "kto": (Kto, KtoLoss), "orpo": (Orpo, OrpoLoss),
    "simpo": (Simpo, SimpoLoss), "cpo": (Cpo, CpoLoss),
    "reward": (Reward, RewardLoss), "prm": (Prm, None),
}  # fmt: skip


def oracle():
    """The padded oracle, which tests cannot import."""
    spec = importlib.util.spec_from_file_location("oracle_preference", Path(__file__).parents[1] / "oracle" / "preference.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def model(dtype: torch.dtype = torch.float64, **changes) -> Model:
    """Norms that are not 1, weights that are not small."""
    sizes = dict(vocab_size=VOCAB, hidden_size=24, mlp_size=40, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=6, tied=True)
    cfg = llama.Config(**(sizes | dict(init_std=0.3, dtype=dtype) | changes))
    params = moved(param.init(llama.abstract(cfg, dtype=torch.float32), seed=5), 0.1, seed=6)
    return Model("llama", cfg, tree.map(lambda leaf: leaf.to(dtype), params))


def moved(params, size: float, *, seed: int):
    """The tree with noise added to every leaf."""
    gen = torch.Generator().manual_seed(seed)
    return tree.map(lambda leaf: leaf + size * torch.randn(leaf.shape, generator=gen).to(leaf.dtype), params)


def _tokens(gen: torch.Generator, size: int):
    return torch.randint(1, VOCAB, (size,), generator=gen).numpy()


def pairs(*, empty: bool = True, margin: bool = False) -> list[trees.TreeDoc]:
    """Eight ragged pairs; one scores with a gap, and (`empty`) one has a rejected side without a scored token."""
    gen, docs = torch.Generator().manual_seed(11), []
    for row, (prompt, chosen, rejected) in enumerate(SIZES):
        sides = [(_tokens(gen, size), torch.ones(size).numpy()) for size in (chosen, rejected)]
        if row == 2:
            sides[0][1][1] = 0
        if row == 6 and empty:
            sides[1][1][:] = 0
        extras = {"margin": (0.25 * row, 0.25 * row)} if margin else {}
        docs.append(trees.grow(_tokens(gen, prompt), sides, row=row, extras=extras))
    return docs


def judged(count: int, good: str = "mixed") -> list[trees.TreeDoc]:
    """Prompts with a completion of their own (kind 0) and a foreign one (kind 1), as `add_foreign_replies` deals them: one further on."""
    gen = torch.Generator().manual_seed(17)
    own = [(_tokens(gen, 2 + i % 4), _tokens(gen, 1 + 3 * i % 7)) for i in range(count)]
    docs = []
    for i, (prompt, reply) in enumerate(own):
        flag = i % 2 == 0 if good == "mixed" else good == "good"
        replies = [(text, torch.ones(len(text)).numpy()) for text in (reply, own[i - 1][1])]
        docs.append(trees.grow(prompt, replies, row=i, extras={"desirable": (flag, flag), "kind": (0, 1)}))
    return docs


def steps(count: int = 5) -> list[trees.TreeDoc]:
    """Bare trunks with a class at some tokens."""
    gen, docs = torch.Generator().manual_seed(23), []
    for row in range(count):
        size = 6 + 2 * row
        classes = torch.full((size,), -1)
        classes[2::3] = torch.randint(0, 2, (len(classes[2::3]),), generator=gen)
        classes, none = classes.int().numpy(), torch.zeros(size, dtype=torch.int32).numpy()
        docs.append(trees.TreeDoc(_tokens(gen, size).astype("int32"), none, none, (classes >= 0).astype("float32"), row, {}, classes))
    return docs


def copied(docs: list[trees.TreeDoc]) -> list[trees.TreeDoc]:
    """Each pair as two documents without branches, the prompt in both."""
    return [trees.single_branch(doc, which) for doc in docs for which in (1, 2)]


def adapted(base: Model, *, scale: float = 0.7) -> Policy:
    """A fresh adapter in the model's dtype."""
    paths = lora.match(hf.abstract_of(base, head=True), "all-linear")
    fresh = lora.init(base.params, paths, rank=3, seed=9, dtype=base.cfg.dtype)
    return Policy(base.family, base.cfg, {"lora": fresh}, {"model": base.params}, lora.Lora(fresh, scale))


def whole(base: Model) -> Policy:
    return Policy(base.family, base.cfg, {"model": tree.map(torch.clone, base.params)}, {})


def config(command: str, **options):
    """The config of a command; `reference` and the loss's own options go to their groups."""
    kind, loss = CONFIGS[command]
    groups = {"reference": ReferenceOptions(**options.pop("reference"))} if "reference" in options else {}
    return kind(**groups) if loss is None else kind(loss=loss(**options), **groups)


def setting(mesh=None) -> Setting:
    """A CPU, without data or anybody to tell."""
    return Setting(CPU, Ranks(0, 1, mesh), None, (), lambda text: None, lambda text: None)


def parts(command: str, base: Model, used: Policy | None = None, *, mesh=None, **options):
    """The method put together as the command does it."""
    chosen = config(command, **options)
    built = METHODS[command].parts(chosen, used or whole(base), setting(mesh))
    if "head" in built.policy.params:
        head = tree.map(lambda leaf: leaf.to(base.cfg.dtype), moved(built.policy.params["head"], 0.3, seed=4))
        built = built._replace(policy=built.policy._replace(params=built.policy.params | {"head": head}))
    return built


def batch(made, docs: list) -> tuple:
    """A micro-batch as `batches.batcher` makes it."""
    streams = [collate(docs) for collate in made.collates]
    found = tuple((one, attention.plan(one, dtype=torch.float64)) for one in streams)
    return found[0] if len(found) == 1 else found


def state(made, *, policy: float = 0.1, seed: int = 8) -> TrainState:
    """Step 0, or with `policy` above 0 a policy that has moved away from its reference."""
    params = tree.map(torch.clone, made.policy.params)
    return TrainState(moved(params, policy, seed=seed) if policy else params, made.policy.frozen, {}, made.extra, torch.tensor(0))


def gradients(made, at: TrainState, cuts: list[list], mesh=None) -> tuple[dict, dict]:
    """({path: gradient before clipping}, metrics) of the step on these groups of documents."""
    seen = {}

    def update(grads, opt, params, lr, found_inf):
        seen.update((path, shard.full(leaf).clone()) for path, leaf in tree.items(grads))
        return params, opt

    one = step.make_step(
        made.objective, optim.Optimizer(lambda params: {}, update), schedule=optim.constant(1.0), clip=None, prepare=made.prepare, mesh=mesh
    )
    _, metrics = one(at, [batch(made, docs) for docs in cuts])
    return seen, metrics


def cuts(docs: list) -> dict[str, list[list]]:
    """Ways to make a step of the documents."""
    return {
        "one stream": [docs],
        "one by one": [[doc] for doc in docs],
        "pairs of rows": [docs[i : i + 2] for i in range(0, len(docs), 2)],
        "uneven": [docs[:1], docs[1:6], docs[6:]],
        "backwards": [docs[::-1]],
        "mixed": [docs[::2], docs[1::2]],
        "with an empty micro-batch": [docs[:5], [], docs[5:]],
    }


def error(got: dict, want: dict) -> float:
    """Largest relative error of any leaf, by norm."""
    assert got.keys() == want.keys()
    return max(((got[path] - leaf).norm() / leaf.norm().clamp(min=1e-300)).item() for path, leaf in want.items())


def rows(docs: list[trees.TreeDoc], which: int) -> list[tuple[list[int], list[int]]]:
    """(ids, labels with -100) of the prompt with one side, for the padded oracle."""
    found = []
    for doc in docs:
        one = trees.single_branch(doc, which)
        found.append((one.tokens.tolist(), [int(t) if w else -100 for t, w in zip(one.tokens, one.weight, strict=True)]))
    return found


def theirs(base: Model, params, dtype: torch.dtype = torch.float64):
    """The padded oracle's network with these weights of the model."""
    return oracle().network(base.cfg, {hf.hf_key("llama", path): leaf.clone() for path, leaf in tree.items(params)}, dtype)


def their_gradients(network) -> dict:
    """{our path: gradient} of the oracle's network."""
    return {name: leaf.grad for name, leaf in network.named_parameters() if leaf.grad is not None}


def named(grads: dict) -> dict:
    """Our gradients by transformers' names."""
    return {hf.hf_key("llama", path.removeprefix("model.")): leaf for path, leaf in grads.items() if path.startswith("model.")}
