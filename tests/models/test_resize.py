"""A grown vocabulary: the rows transformers would have around, tied stays tied, and nothing shrinks."""

import copy

import pytest
import torch

from treetune.core import tree
from treetune.models import dense, hf, resize


@pytest.mark.parametrize(
    "rows, size, multiple, expected",
    [(96, 60, None, 96), (96, 96, None, 96), (96, 97, None, 97), (96, 97, 32, 128), (96, 60, 32, 96), (96, 60, 64, 128), (96, 128, 1, 128)],
)
def test_target(rows, size, multiple, expected):
    assert resize.target(rows, size, multiple) == expected


@pytest.mark.parametrize("multiple", [0, -32])
def test_a_multiple_below_one_is_refused(oracle, multiple):
    with pytest.raises(ValueError, match="whole number from 1 up"):
        resize.resize(hf.load(oracle("llama")[1]), 100, multiple=multiple)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("multiple", [None, 32])
def test_the_rows_are_those_of_transformers(oracle, tied, multiple):
    """transformers draws each number of a new row within 0.2 * sqrt(1e-9) = 6e-6 (one deviation) of the mean."""
    model, folder = oracle("qwen2", tied)
    theirs, ours = copy.deepcopy(model), resize.resize(hf.load(folder), 101, multiple=multiple)
    theirs.resize_token_embeddings(101, pad_to_multiple_of=multiple)
    heads = {"embed_tokens": theirs.get_input_embeddings().weight, "lm_head": theirs.get_output_embeddings().weight}
    for name in [name for name in resize.LEAVES if name in ours.params]:
        torch.testing.assert_close(ours.params[name], heads[name].detach(), atol=5e-5, rtol=0)
    assert ours.cfg.vocab_size == theirs.config.vocab_size == len(ours.params["embed_tokens"]) == (101 if multiple is None else 128)
    assert ("lm_head" in ours.params) is not tied and ours.cfg.tied is tied


def test_new_rows_are_the_mean_of_the_old_ones(oracle):
    before = hf.load(oracle("llama", False)[1])
    after = resize.resize(before, 99)
    for name in resize.LEAVES:
        old, new = before.params[name], after.params[name]
        assert torch.equal(new[:96], old)
        mean = old.double().mean(0).float()
        assert torch.equal(new[96:], mean.expand(3, -1))
    assert all(one is other for one, other in zip(tree.leaves(before.params["layers"]), tree.leaves(after.params["layers"]), strict=True))


def test_a_model_with_the_rows_already_comes_back_as_it_is(oracle):
    before = hf.load(oracle("llama")[1])
    assert resize.resize(before, 60) is before and resize.resize(before, 90, multiple=32) is before


def test_bfloat16_rows_are_the_mean_rounded_once(oracle):
    before = hf.load(oracle("llama")[1], dtype=torch.bfloat16)
    new = resize.resize(before, 97).params["embed_tokens"][96]
    assert new.dtype == torch.bfloat16
    assert torch.equal(new, before.params["embed_tokens"].double().mean(0).bfloat16())


@pytest.mark.parametrize("tied", [False, True])
def test_a_resized_model_is_saved_and_read_by_transformers(oracle, documents, tmp_path, tied):
    from transformers import AutoModelForCausalLM

    ours = resize.resize(hf.load(oracle("llama", tied)[1]), 99)
    hf.save(tmp_path / "saved", ours)
    theirs, ids = AutoModelForCausalLM.from_pretrained(tmp_path / "saved"), torch.tensor([*documents[0], 98])
    with torch.no_grad():
        torch.testing.assert_close(dense.probe(ours.params, ids, ours.cfg), theirs(ids[None]).logits[0], atol=1e-4, rtol=0)
    assert theirs.config.vocab_size == 99 and hf.load(tmp_path / "saved").cfg == ours.cfg


def test_cut_is_a_view_of_the_first_rows(oracle, documents):
    ours = hf.load(oracle("llama")[1])
    less, ids = resize.cut(ours, 90), torch.tensor([token % 90 for token in documents[0]])
    assert torch.equal(dense.probe(less.params, ids, less.cfg), dense.probe(ours.params, ids, ours.cfg)[:, :90])
    assert less.params["embed_tokens"].data_ptr() == ours.params["embed_tokens"].data_ptr() and resize.cut(ours, 96) is ours
