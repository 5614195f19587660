"""Scalar heads: what transformers and PEFT compute from the same folders, and what is refused."""

import copy
import json
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

from treetune.core import lora, manifest, param, tree
from treetune.models import adapter, heads, hf

KINDS = ["llama", "mistral", "qwen2", "qwen3", "mixtral", "qwen3_moe", "gpt_oss", "phi3", "gemma2"]
SHAPES = {"sequence": (1, False), "token": (2, True)}
# Both shapes of llama, one of each other family.
EACH = [
    (kind, what) if kind == "llama" or (i + j) % 2 else pytest.param(kind, what, marks=pytest.mark.slow)
    for i, kind in enumerate(KINDS)
    for j, what in enumerate(SHAPES)
]
ATOL = 1e-5  # logits of size 1 in float32: hidden states agree to 1e-6 of their size, and 32 products are summed
RANK, ALPHA = 4, 12.0
PAD = 95  # a token that no document holds


@pytest.fixture(scope="module")
def texts():
    """Ragged documents without the padding token."""
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(0, PAD, (size,), generator=generator).tolist() for size in (11, 3, 24, 7)]


def head_of(ours, what, seed=0):
    """A head away from its start: no bias of 0."""
    classes, bias = SHAPES[what]
    generator = torch.Generator().manual_seed(seed)
    fresh = heads.init(ours.cfg, classes, bias=bias, seed=seed)
    return tree.map(lambda leaf: leaf + 0.1 * torch.randn(leaf.shape, generator=generator), fresh)


def reading(batch, where):
    """The batch that reads the last token of each document, or every token."""
    rows = batch["cu_docs"][1:].long() - 1 if where == "sequence" else torch.arange(len(batch["tokens"]))
    return {key: leaf for key, leaf in batch.items() if key != "targets"} | {"at": rows}


def scored(ours, head, batch, what, found=None):
    return heads.scores(ours.family, ours.cfg, ours.params, head, reading(batch, what), lora=found)


def padded(texts):
    width = max(len(ids) for ids in texts)
    mask = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids in texts])
    return {"input_ids": torch.tensor([ids + [PAD] * (width - len(ids)) for ids in texts]), "attention_mask": mask}


def flat(model, texts, what):
    """transformers' logits [N, C] of a right-padded batch, in the order of our rows."""
    inputs = padded(texts)
    with torch.no_grad():
        out = model(**inputs).logits
    return out if what == "sequence" else out[inputs["attention_mask"].bool()]


def auto(what):
    import transformers

    return {"sequence": transformers.AutoModelForSequenceClassification, "token": transformers.AutoModelForTokenClassification}[what]


def in_transformers(path, what, **config):
    options = dict(dtype=torch.float32, attn_implementation="eager", output_loading_info=True, **config)
    model, report = auto(what).from_pretrained(path, **options)
    assert not any(report[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


@pytest.fixture
def padder(words):
    """A tokenizer of 96 tokens with its padding token in row 95."""
    tokenizer = copy.deepcopy(words)
    tokenizer.add_tokens([f"@{i}" for i in range(len(tokenizer), PAD)])
    tokenizer.add_special_tokens({"pad_token": "<|fill|>"})
    assert tokenizer.pad_token_id == PAD
    return tokenizer


@pytest.mark.sampled(4)
@pytest.mark.parametrize(("kind", "what"), EACH)
def test_transformers_scores_a_saved_folder_alike(oracle, stream, texts, padder, tmp_path, kind, what):
    ours = hf.load(oracle(kind, kind == "qwen2")[1])
    head = head_of(ours, what)
    heads.save(tmp_path / "saved", ours, head, tokenizer=padder, max_shard_bytes=20_000)
    assert not list(tmp_path.glob("saved/*.bin")) and len(list(tmp_path.glob("saved/*.safetensors"))) > 2
    expected = scored(ours, head, stream(texts), what)
    assert expected.dtype == torch.float32 and expected.shape == (len(texts) if what == "sequence" else 45, SHAPES[what][0])
    assert expected.std(0).min() > 0.1
    model = in_transformers(tmp_path / "saved", what)
    torch.testing.assert_close(flat(model, texts, what), expected, atol=ATOL, rtol=0)
    labels = {"sequence": ["reward"], "token": ["bad", "good"]}[what]
    assert model.config.num_labels == len(labels) and list(model.config.id2label.values()) == labels
    assert model.config.pad_token_id == PAD and heads.kind(tmp_path / "saved") == what
    again, same = heads.load(tmp_path / "saved")
    assert again.cfg == ours.cfg and again.family == ours.family
    assert {path for path, _ in tree.items(again.params)} == {path for path, _ in tree.items(ours.params)} - {"lm_head"}
    assert all(torch.equal(leaf, dict(tree.items(ours.params))[path]) for path, leaf in tree.items(again.params))
    assert all(torch.equal(a, b) for a, b in zip(tree.leaves(same), tree.leaves(head), strict=True))
    heads.save(tmp_path / "twice", again, same, tokenizer=padder)
    assert json.loads((tmp_path / "twice/config.json").read_text()) == json.loads((tmp_path / "saved/config.json").read_text())


@pytest.mark.sampled(4)
@pytest.mark.parametrize(("kind", "what"), EACH)
def test_a_folder_of_transformers_is_scored_alike(oracle, stream, texts, tmp_path, kind, what):
    config = copy.deepcopy(oracle(kind)[0].config)
    config.num_labels, config.pad_token_id = 3, PAD
    torch.manual_seed(0)
    model = auto(what).from_config(config).eval()
    with torch.no_grad():
        for leaf in model.parameters():
            leaf.add_(torch.randn(leaf.shape, generator=torch.Generator().manual_seed(leaf.numel())) * 0.1)
        model.get_input_embeddings().weight.mul_(5.0)
    model.save_pretrained(tmp_path)
    ours, head = heads.load(tmp_path)
    assert heads.kind_of(head) == what and "lm_head" not in ours.params
    expected = flat(model, texts, what)
    assert expected.std(0).min() > 0.01
    torch.testing.assert_close(scored(ours, head, stream(texts), what), expected, atol=ATOL, rtol=0)


@pytest.mark.parametrize("what", SHAPES)
def test_a_packed_stream_is_scored_like_its_documents(oracle, stream, texts, what):
    ours = hf.load(oracle("mistral")[1])
    head = head_of(ours, what)
    alone = torch.cat([scored(ours, head, stream([ids]), what) for ids in texts])
    torch.testing.assert_close(scored(ours, head, stream(texts), what), alone, atol=ATOL, rtol=0)


def test_branches_are_scored_like_whole_documents(oracle, stream, texts):
    ours = hf.load(oracle("qwen3")[1])
    head = head_of(ours, "sequence")
    trunk, one, two = texts[0], texts[1], texts[2]
    sizes = [len(trunk), len(one), len(two)]
    total = sum(sizes)
    branch = torch.arange(3).repeat_interleave(torch.tensor(sizes))
    batch = stream([trunk + one + two]) | {
        "positions": torch.cat([torch.arange(sizes[0]), *(sizes[0] + torch.arange(size) for size in sizes[1:])]),
        "branch": branch.int(), "start": torch.where(branch > 0, sizes[0], 0).int(), "at": torch.tensor([total - sizes[2] - 1, total - 1]),
    }  # fmt: skip
    got = heads.scores(ours.family, ours.cfg, ours.params, head, batch)
    torch.testing.assert_close(got, scored(ours, head, stream([trunk + one, trunk + two]), "sequence"), atol=ATOL, rtol=0)


def test_scores_are_the_products_of_the_hidden_states(oracle, stream, texts):
    """An adapter on the language head changes nothing, and a bfloat16 model keeps a float32 head."""
    model, path = oracle("llama")
    ours = hf.load(path)
    head = head_of(ours, "token")
    with torch.no_grad():
        hidden = model.model(torch.tensor([texts[0]])).last_hidden_state[0].double()
    expected = hidden @ head["score"]["weight"].double().T + head["score"]["bias"].double()
    on_head = param.init(lora.abstract(hf.abstract_of(ours), ["lm_head"], rank=RANK), seed=1)
    on_head = lora.Lora(tree.map(lambda leaf: leaf + 1.0, on_head), 2.0)
    for found in (None, on_head):
        got = scored(ours, head, stream([texts[0]]), "token", found)
        torch.testing.assert_close(got.double(), expected, atol=ATOL, rtol=0)
    low = hf.load(path, dtype=torch.bfloat16)
    rows = torch.randn(5, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    exact = rows.double() @ head["score"]["weight"].double().T + head["score"]["bias"].double()
    torch.testing.assert_close(heads.logits(rows, head).double(), exact, atol=1e-6, rtol=0)
    got = scored(low, head, stream([texts[0]]), "token")
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), expected, atol=0.15, rtol=0)  # bfloat16 hidden states of size 3


def test_a_gradient_reaches_head_and_model(oracle, stream, texts):
    """d sum(scores) / d bias counts the rows, d / d weight sums the hidden states; weights of the model get theirs too."""
    model, path = oracle("llama")
    ours = hf.load(path)
    head = tree.map(lambda leaf: leaf.requires_grad_(), head_of(ours, "token"))
    ours.params["norm"].requires_grad_()
    scored(ours, head, stream(texts[:2]), "token").sum().backward()
    with torch.no_grad():
        hidden = torch.cat([model.model(torch.tensor([ids])).last_hidden_state[0] for ids in texts[:2]])
    assert torch.equal(head["score"]["bias"].grad, torch.full((2,), 14.0))
    torch.testing.assert_close(head["score"]["weight"].grad, hidden.sum(0).expand(2, -1), atol=1e-4, rtol=0)
    assert ours.params["norm"].grad.abs().min() > 0


def test_a_fresh_head_is_small_and_of_its_seed(oracle):
    cfg = hf.load(oracle("llama")[1]).cfg
    head = heads.init(cfg, 400, bias=True, seed=1)
    assert head["score"]["weight"].shape == (400, 32) and head["score"]["weight"].dtype == torch.float32
    assert head["score"]["weight"].std() == pytest.approx(cfg.init_std, rel=0.05)
    assert torch.equal(head["score"]["bias"], torch.zeros(400)) and "bias" not in heads.init(cfg, 1, bias=False, seed=1)["score"]
    assert torch.equal(heads.init(cfg, 400, bias=True, seed=1)["score"]["weight"], head["score"]["weight"])
    assert not torch.equal(heads.init(cfg, 400, bias=True, seed=2)["score"]["weight"], head["score"]["weight"])
    with pytest.raises(ValueError, match="0 classes"):
        heads.init(cfg, 0, bias=False, seed=1)


def edited(path, tmp_path, *, tensors=None, config=None):
    """A copy of a model folder with changed tensors (None drops one) and changed config fields."""
    leaves = load_file(path / hf.SINGLE) | (tensors or {})
    save_file({key: leaf for key, leaf in leaves.items() if leaf is not None}, tmp_path / hf.SINGLE)
    fields = json.loads((path / "config.json").read_text()) | (config or {})
    (tmp_path / "config.json").write_text(json.dumps(fields))
    return tmp_path


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    "tensors,config,message",
    [
        ({"score.weight": None}, {}, "lacks 1 tensors, the first is score.weight"),
        ({"score.bias": None}, {}, "lacks 1 tensors, the first is score.bias"),
        ({"model.norm.weight": None}, {}, "first is model.norm.weight"),
        ({"classifier.weight": torch.zeros(2, 32)}, {}, "first is classifier.weight"),
        ({"score.weight": torch.zeros(2, 31)}, {}, r"score.weight has shape \[2, 31\]; config.json implies \[2, 32\]"),
        ({}, {"id2label": {"0": "only"}}, r"config.json implies \[1, 32\]"),
        ({}, {"architectures": ["LlamaForSequenceClassification"]}, "first is score.bias"),
        ({}, {"architectures": ["LlamaForCausalLM"]}, "LlamaForCausalLM.*ForSequenceClassification or .*ForTokenClassification"),
        ({}, {"architectures": None}, "a model with a head"),
        ({}, {"model_type": "no_such"}, "a causal language model of the installed transformers"),
    ],
)
def test_folders_that_do_not_fit_are_refused(oracle, tmp_path, tensors, config, message):
    ours = hf.load(oracle("llama")[1])
    heads.save(tmp_path / "saved", ours, head_of(ours, "token"))
    (tmp_path / "edited").mkdir()
    path = edited(tmp_path / "saved", tmp_path / "edited", tensors=tensors, config=config)
    with pytest.raises(ValueError, match=message):
        heads.load(path)


def test_a_language_head_beside_the_scores_is_left(oracle, stream, texts, tmp_path):
    ours = hf.load(oracle("llama")[1])
    head = head_of(ours, "sequence")
    heads.save(tmp_path / "saved", ours, head)
    assert "pad_token_id" not in json.loads((tmp_path / "saved/config.json").read_text())
    (tmp_path / "edited").mkdir()
    path = edited(tmp_path / "saved", tmp_path / "edited", tensors={"lm_head.weight": torch.zeros(96, 32)})
    again, same = heads.load(path)
    assert torch.equal(scored(again, same, stream(texts), "sequence"), scored(ours, head, stream(texts), "sequence"))


def test_heads_of_another_shape_are_not_saved(oracle, tmp_path):
    ours = hf.load(oracle("llama")[1])
    weight = torch.zeros(2, 32)
    for score, options, message in (
        ({"weight": torch.zeros(2, 31)}, {}, r"\[2, 31\]; the model asks for \[classes, 32\]"),
        ({"weight": weight, "bias": torch.zeros(3)}, {}, r"score.bias has shape \[3\]; score.weight asks for \[2\]"),
        ({"weight": weight}, {"labels": ("one",)}, "2 different names"),
        ({"weight": weight}, {"labels": ("one", "one")}, "2 different names"),
    ):
        with pytest.raises(ValueError, match=message):
            heads.save(tmp_path / "saved", ours, {"score": score}, **options)
    assert not (tmp_path / "saved").exists()


def test_kinds_of_other_folders(oracle, tmp_path):
    assert heads.kind(oracle("llama")[1]) is None
    assert heads.kind(tmp_path) is None and heads.kind(tmp_path / "nowhere.gguf") is None


def tokenizer_of(words, *special, pad=None, template=None):
    tokenizer = copy.deepcopy(words)
    tokenizer.add_special_tokens({"additional_special_tokens": list(special)} | ({"pad_token": pad} if pad else {}))
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize(
    "special,pad,template,rows,chosen",
    [
        (["<fill>"], "<fill>", "", 96, "<fill>"),  # its own
        (["<turn>", "<text>"], "<|end|>", "{{ '<turn>' }}", 96, "<text>"),  # its own ends every text, another the chat's turns
        (["<text>", "<my_pad>"], None, "", 96, "<my_pad>"),  # a name that says so before any other
        (["<turn>"], "<turn>", "{{ '<turn>' }}", 96, "<|pad|>"),  # a spare row
        (["<turn>"], "<turn>", "{{ '<turn>' }}", 0, None),  # no row: none
    ],
)
def test_padding_never_ends_a_text(words, special, pad, template, rows, chosen):
    tokenizer = tokenizer_of(words, *special, pad=pad, template=template)
    before = (tokenizer.pad_token, len(tokenizer))
    got = heads.padding(tokenizer, rows or len(tokenizer))
    assert got.pad_token == chosen and len(got) == len(tokenizer) + (chosen == "<|pad|>")
    assert got.pad_token_id == (None if chosen is None else got.get_vocab()[chosen])
    assert (tokenizer.pad_token, len(tokenizer)) == before, "the tokenizer that was given is as it was"


def test_a_batch_of_texts_is_scored_by_its_ends(oracle, stream, words, tmp_path):
    """A tokenizer that pads with its end token: the saved one does not, so that transformers reads the end token's score."""
    from transformers import AutoTokenizer

    ours = hf.load(oracle("llama")[1])
    head = head_of(ours, "sequence")
    tokenizer = copy.deepcopy(words)
    tokenizer.pad_token = tokenizer.eos_token
    heads.save(tmp_path, ours, head, tokenizer=tokenizer)
    lines = ["abc bca<|end|>", "ab 12 cab abc 345<|end|>"]
    batch = AutoTokenizer.from_pretrained(tmp_path)(lines, return_tensors="pt", padding=True)
    assert batch["attention_mask"].sum(1).tolist()[0] < batch["input_ids"].shape[1]
    with torch.no_grad():
        got = in_transformers(tmp_path, "sequence")(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    expected = scored(ours, head, stream([words(line)["input_ids"] for line in lines]), "sequence")
    torch.testing.assert_close(got, expected, atol=ATOL, rtol=0)


def trained(ours, what, whole=None):
    """An adapter tree, a head and whole leaves away from their start."""
    generator = torch.Generator().manual_seed(4)
    fresh = lora.init(hf.abstract_of(ours), lora.linears(hf.abstract_of(ours)), rank=RANK, seed=0)

    def shifted(leaf):
        return leaf + 0.1 * torch.randn(leaf.shape, generator=generator)

    return tree.map(shifted, fresh), head_of(ours, what), tree.map(shifted, tree.select(ours.params, whole)) if whole else {}


def in_peft(path, what):
    import peft

    of = {"sequence": peft.AutoPeftModelForSequenceClassification, "token": peft.AutoPeftModelForTokenClassification}[what]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = of.from_pretrained(path, num_labels=SHAPES[what][0], pad_token_id=PAD, attn_implementation="eager", dtype=torch.float32)
    assert not [entry.message for entry in caught if "keys" in str(entry.message)]
    return model.eval()


@pytest.mark.sampled(3)
@pytest.mark.parametrize("what", SHAPES)
@pytest.mark.parametrize("kind,tied,whole", [("llama", False, None), ("qwen2", True, "embed_tokens|norm$"), ("qwen3", False, "^norm$")])
def test_peft_scores_a_saved_adapter_alike(oracle, stream, texts, tmp_path, kind, tied, whole, what):
    _, folder = oracle(kind, tied)
    ours = hf.load(folder)
    tree_, head, replaced = trained(ours, what, whole)
    options = dict(family=ours.family, info=adapter.Info(RANK, ALPHA, base=str(folder)), whole=replaced)
    heads.save_adapter(tmp_path, tree_, head, **options)
    laid, scale = ours._replace(params=tree.merge(ours.params, replaced)), lora.scale(rank=RANK, alpha=ALPHA)
    expected = scored(laid, head, stream(texts), what, lora.Lora(tree_, scale))
    plain = scored(ours, head, stream(texts), what)
    assert (expected - plain).abs().max() > 0.1
    torch.testing.assert_close(flat(in_peft(tmp_path, what), texts, what), expected, atol=ATOL, rtol=0)
    found, again, same, info = heads.load_adapter(tmp_path, ours)
    assert heads.kind(tmp_path) == what and info.base == str(folder) and found.scale == scale
    for got, wanted in ((found.tree, tree_), (same, head), (again, replaced)):
        assert dict(tree.items(got)).keys() == dict(tree.items(wanted)).keys()
        assert all(torch.equal(leaf, dict(tree.items(wanted))[path]) for path, leaf in tree.items(got))


@pytest.mark.parametrize("what", SHAPES)
def test_an_adapter_written_by_peft_is_read(oracle, stream, texts, tmp_path, what):
    import peft

    _, folder = oracle("llama")
    torch.manual_seed(0)
    base = auto(what).from_pretrained(folder, num_labels=SHAPES[what][0], pad_token_id=PAD, attn_implementation="eager")
    task = {"sequence": "SEQ_CLS", "token": "TOKEN_CLS"}[what]
    wrapped = peft.get_peft_model(base, peft.LoraConfig(r=RANK, target_modules=["q_proj"], task_type=task, init_lora_weights=False)).eval()
    with torch.no_grad():
        for path, leaf in wrapped.named_parameters():
            leaf.add_(1.0 if "score" in path else 0.0)
    wrapped.save_pretrained(tmp_path)
    ours = hf.load(folder)
    found, _, head, _ = heads.load_adapter(tmp_path, ours)
    got = scored(ours, head, stream(texts), what, found)
    torch.testing.assert_close(got, flat(wrapped, texts, what), atol=1e-4, rtol=0)  # the shifted head sums 32 values of size 1


def test_adapters_without_their_head_are_refused(oracle, tmp_path):
    ours = hf.load(oracle("llama")[1])
    tree_, head, _ = trained(ours, "token")
    options = dict(family=ours.family, info=adapter.Info(RANK, ALPHA, base="x"))
    heads.save_adapter(tmp_path / "whole", tree_, head, **options)
    (tmp_path / "whole" / manifest.NAME).unlink()
    with pytest.raises(ValueError, match="cannot use, the first is base_model.model.score"):
        adapter.load(tmp_path / "whole", ours)
    leaves = load_file(tmp_path / "whole" / adapter.WEIGHTS)
    for name, message in (("score.weight", "lacks .*score.weight"), ("score.bias", "lacks .*score.bias, the head of a TOKEN_CLS")):
        kept = {key: leaf for key, leaf in leaves.items() if not key.endswith(name)}
        save_file(kept, tmp_path / "whole" / adapter.WEIGHTS)
        with pytest.raises(ValueError, match=message):
            heads.load_adapter(tmp_path / "whole", ours)
    save_file(leaves | {"base_model.model.score.weight": torch.zeros(2, 31)}, tmp_path / "whole" / adapter.WEIGHTS)
    with pytest.raises(ValueError, match=r"\[2, 31\]; the model asks for"):
        heads.load_adapter(tmp_path / "whole", ours)
    adapter.save(tmp_path / "plain", tree_, **options)
    with pytest.raises(ValueError, match="task_type 'CAUSAL_LM'; expected SEQ_CLS or TOKEN_CLS"):
        heads.load_adapter(tmp_path / "plain", ours)
    on_head = {"lm_head": {"A": torch.zeros(RANK, 32), "B": torch.zeros(96, RANK)}}
    with pytest.raises(ValueError, match="lm_head trains beside a scalar head"):
        heads.save_adapter(tmp_path / "refused", tree_ | on_head, head, **options)
    assert not (tmp_path / "refused").exists()
