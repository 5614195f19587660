"""One rank with its part of networks that score. argv: folder, meshes such as tensor=2,data=2. What it found goes to rankI.json.

Reward models: a folder, an adapter on another, one that scores steps, and an adapter on a quantised base.
Feature networks: the base under an adapter, a copy, one on
the host. Ranks score unlike many groups, and some nothing at all.
"""

import json
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch

from treetune.cli.methods import rewarding
from treetune.cli.options import meshes
from treetune.cli.options.model import ModelOptions
from treetune.cli.options.rollout import RewardFunctions
from treetune.core import shard, tree
from treetune.core.data import pack
from treetune.core.data.prompts import Prompt
from treetune.core.param import Params
from treetune.core.rollout import feature_rewards
from treetune.core.rollout.group import Completion, Group
from treetune.core.run import ranks as processes
from treetune.core.run.ranks import ALONE, Ranks, join_ranks
from treetune.models import batches, feature_network, loading, policy, tensor_rules
from treetune.models.adapter import Base
from treetune.models.policy import AdapterSpec

CPU = torch.device("cpu")
JUDGES = ("whole", "adapter", "steps", "nf4")
NETWORKS = ("base", "copy", "host")
# Completions of the groups that each of two ranks scores, one call after another: unlike many, and one has nothing to score.
CALLS = (((("red", "blue\n" * 70), (" ", "gr\neen"), ("a", "b")), (("x", "yes"),)), ((("", " "),), (("no " * 30, "1"), ("3", "red"))))


def groups(call: int, rank: int) -> list[Group]:
    """Those of a call on a rank, each with a truth of its own."""
    out = []
    for number, texts in enumerate(CALLS[call][rank % 2]):
        ids = [np.frombuffer(text.encode(), np.uint8).astype(np.int32) for text in texts]
        written = tuple(
            Completion(one, np.zeros(len(one)), np.ones(len(one), bool), True, text) for one, text in zip(ids, texts, strict=True)
        )
        truth = np.arange(3 + number + 2 * rank, dtype=np.int32)
        out.append(Group(Prompt(np.array([9, 8, rank + 1], np.int32), f"Row {rank}", None, {"truth": truth}, number), number, written, 0))
    return out


def scored(name: str, folder: Path, place: rewarding.Place, rank: int) -> tuple[list, int, str]:
    """The scores of a reward model in each call, bytes of its weights here, and their fingerprint."""
    options = RewardFunctions(reward_funcs=(str(folder / name),))
    held: dict[int, int] = {}
    made = rewarding.reward_model.load_judge

    def watched(*args, **options):
        judge, words = made(*args, **options)
        held[0] = local_bytes(judge.model.params)
        return judge, words

    rewarding.reward_model.load_judge = watched
    started = rewarding.start(options, ModelOptions(model="", dtype="float32"), place, say=print, warn=print)
    rewarding.reward_model.load_judge = made
    return [started.score(groups(call, rank)).tolist() for call in range(2)], held[0], next(iter(started.models.values()))


def local_bytes(params: Params) -> int:
    return tree.bytes(tree.map(shard.local, params))


def features(name: str, folder: Path, ranks: Ranks, home, rank: int) -> tuple[list, int]:
    """The features of a network in each call, and bytes of its weights here."""
    base, _ = loading.load_model(folder / "model", dtype="float32", device=CPU, home=home)
    start = policy.full(base) if name == "copy" else policy.adapt(base, AdapterSpec(rank=3, alpha=6.0), base=Base("x", ""), seed=1)
    recipe = feature_network.Recipe((0, 2), lambda states: torch.cat(states, 1), pooled)
    network = feature_network.build(start, recipe, on_cpu=name == "host", hosts=processes.on_hosts(ranks))
    placed = policy.place(network.policy, ranks.mesh, "none" if home is None else "full").frozen
    calls = [partial(call, network, placed) for call in (feature_network.most, feature_network.idle)]
    phi = feature_network.of_prompts(network, placed)
    compared = lambda phi, y: torch.stack([phi.sum(-1), phi.abs().amax(-1), (phi * y[:, None]).sum(-1)], -1)  # noqa: E731
    collate = batches.batcher(base.cfg, CPU, (pack.collate_trees,))
    score = feature_rewards.scorer(feature_rewards.FeatureScorer(phi, collate, compared, set(), 1, CPU, *calls))
    return [score(groups(call, rank)).tolist() for call in (0, 1, 0)], local_bytes(network.computed(placed).params)


def pooled(states, seq, lens, prompt_lens):
    return torch.zeros(len(lens), states.shape[1]).index_add(0, seq, states) / lens[:, None]


def look(folder: Path, mesh: str) -> dict:
    """{network: scores of this rank, their distance from one process's, bytes here over those of the whole}."""
    ranks = join_ranks(CPU, meshes.read((mesh,)))
    home, found = tensor_rules.home(ranks.mesh, "full"), {}
    for name in JUDGES:
        mine, held, digest = scored(name, folder, rewarding.Place(CPU, ranks, home), ranks.row_rank)
        alone, whole, of_whole = scored(name, folder, rewarding.Place(CPU), ranks.row_rank)
        found[name] = distance(mine, alone), held / whole, digest == of_whole
    for name in NETWORKS:
        mine, held = features(name, folder, ranks, home, ranks.row_rank)
        alone, whole = features(name, folder, ALONE, None, ranks.row_rank)
        found[name] = distance(mine, alone), held / whole, mine[0] == mine[2]  # of truths that are remembered
    return found


def distance(mine: list, alone: list) -> float:
    """The largest difference of numbers; they abstain alike."""
    pairs = [(np.array(one, float), np.array(other, float)) for one, other in zip(mine, alone, strict=True)]
    assert all(one.shape == other.shape and (np.isnan(one) == np.isnan(other)).all() for one, other in pairs)
    return max(float(np.abs(np.nan_to_num(one - other)).max()) for one, other in pairs)


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    found = {mesh: look(folder, mesh) for mesh in sys.argv[2:]}
    (folder / f"rank{torch.distributed.get_rank()}.json").write_text(json.dumps(found))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
