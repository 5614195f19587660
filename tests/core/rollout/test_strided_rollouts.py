"""Documents of a stream grown by rollouts: what is asked of the callables, and where their answers stand."""

import numpy as np
import torch

from treetune.core import strided
from treetune.core.data import ebft, strides
from treetune.core.rollout import strided_rollouts

PLACES = strides.Places(stride=3, context_length=2, generate_max_len=2)
N = 3


def stream(*sizes):
    """Raw texts of these sizes."""
    docs = []
    for row, size in enumerate(sizes):
        docs.append(ebft.StridedDoc(np.arange(1, size + 1, dtype=np.int32), np.ones(size, np.float32) * (np.arange(size) > 0), 0, row))
    return strides.collate(docs)


def rollouts(*, trained=True):
    """Rollout r of a stream writes 100 + r, and has the score and the advantage r."""

    def sample(state, host, anchors):
        return (100 + torch.arange(anchors.start.shape[0] * N))[:, None].expand(-1, anchors.length)

    def score(phi, y, tokens, true):
        assert phi.shape == (*tokens.shape[:2], 1) and y.shape == (true.shape[0], 1) and tokens.shape[2] == true.shape[1]
        number = (tokens[:, :, 0] - 100).double()
        return {"advantage": number, "ebft_reward": number, "cfm": true[:, :1].double().expand(-1, N)}

    def features(state, grown, plan, layout):
        assert plan == "plan"
        return torch.zeros(layout.truth.shape[0], N, 1), torch.zeros(layout.truth.shape[0], 1)

    return strided_rollouts.StridedRollouts(PLACES, N, trained, sample, lambda grown: "plan", features, score, torch.device("cpu"))


def test_scores_stand_at_the_sequences_of_their_rollouts():
    batch, plan = strided_rollouts.grow(rollouts(), None, stream(8, 3, 5))
    assert plan == "plan" and batch["num_blocks"] == 3  # two in the first document, none in the second, one in the third
    at = strided.sequences(batch)
    assert batch["doc_of_seq"][at].tolist() == [0] * 6 + [2] * 3
    assert batch["advantage"][at].tolist() == list(range(9)) and batch["ebft_reward"].sum() == batch["advantage"].sum()
    assert batch["cfm"][at].tolist() == [3] * 3 + [6] * 3 + [3] * 3  # the first true token of each block
    others = [i for i in range(batch["seq_lens"].shape[0]) if i not in at.tolist()]
    assert batch["doc_of_seq"][others].tolist() == [1] and batch["advantage"][others].tolist() == [0]


def test_a_step_has_the_deviation_over_all_micro_batches():
    prepared = strided_rollouts.prepare(rollouts(), None, [(stream(8), None), (stream(5), None)])
    gains = torch.tensor([*range(6), *range(3)]).double()
    for batch, _ in prepared:
        torch.testing.assert_close(batch["advantages_std"], gains.std(correction=0))


def test_where_cross_entropy_alone_trains_only_evaluations_have_blocks():
    step, evaluation = stream(8) | {"seed": torch.tensor(1)}, stream(8)
    grown = [strided_rollouts.grow(rollouts(trained=False), None, batch)[0] for batch in (step, evaluation)]
    assert [int(batch["num_blocks"]) for batch in grown] == [0, 2]
