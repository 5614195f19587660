"""Added and changed tokens through whole runs: rows that train, folders that PEFT and transformers read, merges that agree."""

import re

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from treetune.core import lora, manifest
from treetune.models import adapter, dense, hf, resize, target, vocabulary

NEW = ("--tokens", " please", "<tool>", "--special-tokens", "pad_token=<|pad|>")  # ids 259 (pad), 260, 261
TEXT = "3 + 1 please<tool><|pad|>"
PROBE = torch.tensor([51, 259, 12, 260, 84, 261, 7, 256])


def ours(root, ids=PROBE):
    """Logits of the adapter in a run folder as every command loads it."""
    chosen = target.Target(adapter.base_of(root / "adapter"), dtype="float32", device="cpu", adapter=str(root))
    model, used = target.load_model(chosen, say=print)
    return dense.probe(model.params, ids, model.cfg, lora=used)


def theirs(model, ids=PROBE):
    with torch.no_grad():
        return model.eval()(ids[None]).logits[0]


def loss(done):
    assert done.code == 0, done
    return re.search(r"loss\s+([\d.]+) nats", done.out)[1]


@pytest.fixture(params=["tied", "untied"])
def base(request, tiny):
    return tiny.model if request.param == "tied" else tiny.untied


def mostly(kind):
    """The same whether tied or not: one kind in the working set."""
    other = pytest.param("untied" if kind == "tied" else "tied", marks=pytest.mark.slow)
    return pytest.mark.parametrize("base", [kind, other], indirect=True)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Where the runs of `run` are kept, and what they printed by their model."""
    return {None: tmp_path_factory.mktemp("trained")}


@pytest.fixture
def run(base, sft, trained):
    """The folder of a LoRA run of three steps with new tokens, and what it printed; it is read only."""
    folder = trained[None] / base.name
    if base not in trained:
        done = sft("--model", base, *NEW, "--learning-rate", 0.05, "--max-steps", 3, "--output-dir", folder)
        assert done.code == 0, done
        trained[base] = done.out
    return folder, trained[base]


def test_new_rows_train_and_are_saved_with_the_adapter(base, run, kit):
    root, printed = run
    assert "3 tokens added (<|pad|>  please <tool>), 260 rows grown to 262" in printed
    untied = "lm_head" in hf.load(base).params
    leaves = "embed_tokens and lm_head train whole" if untied else "embed_tokens train whole"
    assert printed.count(leaves) == 1
    tokenizer = AutoTokenizer.from_pretrained(root / "adapter")
    assert tokenizer.convert_tokens_to_ids(["<|pad|>", " please", "<tool>"]) == [259, 260, 261] and tokenizer.pad_token_id == 259
    saved = kit.tensors(root / "adapter/adapter_model.safetensors")["base_model.model.model.embed_tokens.weight"]
    start = resize.resize(hf.load(base), 262).params["embed_tokens"]
    assert saved.shape == (262, 32)
    assert (saved[260] - start[260]).abs().min() > 0.01, "a token of the rows has a row that trained"


def test_peft_computes_the_same(base, run):
    root, _ = run
    expected = ours(root)
    assert expected.shape == (8, 262)
    alone = peft.AutoPeftModelForCausalLM.from_pretrained(root / "adapter")  # resizes to the tokenizer it finds in the folder
    torch.testing.assert_close(theirs(alone), expected, atol=1e-4, rtol=0)
    under = AutoModelForCausalLM.from_pretrained(base)
    under.resize_token_embeddings(262)
    torch.testing.assert_close(theirs(peft.PeftModel.from_pretrained(under, root / "adapter")), expected, atol=1e-4, rtol=0)


@mostly("tied")
def test_merged_model_config_and_tokenizer_agree(base, run, tune, tiny, here):
    root, _ = run
    done = tune("merge", root, "merged")
    assert done.code == 0, done
    model, tokenizer = AutoModelForCausalLM.from_pretrained("merged"), AutoTokenizer.from_pretrained("merged")
    torch.testing.assert_close(theirs(model), ours(root), atol=1e-4, rtol=0)
    assert model.config.vocab_size == len(tokenizer) == len(model.get_input_embeddings().weight) == 262
    assert model.config.pad_token_id == tokenizer.pad_token_id == 259
    assert model.config.tie_word_embeddings is ("lm_head" not in hf.load(base).params)
    assert tokenizer(TEXT)["input_ids"] == AutoTokenizer.from_pretrained(root / "adapter")(TEXT)["input_ids"]
    evaluation = ("--data", tiny.chat, "--sequence-len", 128)
    apart, folded = (float(loss(tune("eval", *which, *evaluation))) for which in (("--adapter", root), ("--model", "merged")))
    assert apart == pytest.approx(folded, abs=5e-6)  # float32 rounds a sum of two products otherwise than one
    asked = ("generate", TEXT, "--temperature", 0, "--max-new-tokens", 8)
    assert tune(*asked, "--adapter", root).out == tune(*asked, "--model", "merged").out


@mostly("untied")
def test_a_run_with_new_tokens_resumes_bit_for_bit(base, sft, here, kit):
    args = ("--model", base, *NEW, "--learning-rate", 0.01, "--lr-scheduler", "constant", "--warmup-steps", 0)
    assert sft(*args, "--max-steps", 4, "--output-dir", "whole").code == 0
    assert sft(*args, "--max-steps", 2, "--output-dir", "parts").code == 0
    assert sft(*args, "--max-steps", 4, "--resume", "auto", "--output-dir", "parts").code == 0
    one, other = (kit.tensors(here / name / "adapter/adapter_model.safetensors") for name in ("whole", "parts"))
    assert kit.same(one, other)


@mostly("untied")
def test_an_adapter_is_trained_further_with_more_tokens(base, run, sft, kit, here):
    root, _ = run
    more = ("--lora-model-dir", root, "--tokens", "<more>", "--learning-rate", 1e-9, "--output-dir", "more")
    done = sft("--model", base, *more, without=("--lora-r",))
    assert done.code == 0 and "1 tokens added (<more>), 260 rows grown to 263" in done.out, done
    one, other = (kit.tensors(path / "adapter/adapter_model.safetensors") for path in (root, here / "more"))
    key = "base_model.model.model.embed_tokens.weight"
    torch.testing.assert_close(other[key][:262], one[key], atol=1e-7, rtol=0)
    torch.testing.assert_close(other[key][262], one[key].mean(0), atol=1e-7, rtol=0)
    tokenizer = AutoTokenizer.from_pretrained(here / "more/adapter")
    assert tokenizer.convert_tokens_to_ids([" please", "<more>"]) == [260, 262] and tokenizer.pad_token_id == 259
    torch.testing.assert_close(ours(here / "more")[:, :262], ours(root), atol=1e-5, rtol=0)
    again = sft("--model", base, "--lora-model-dir", root, "--output-dir", "again", without=("--lora-r",))
    assert again.code == 0 and len(AutoTokenizer.from_pretrained(here / "again/adapter")) == 262


@mostly("tied")
def test_rows_are_grown_to_a_multiple(base, sft, tune, kit, here):
    done = sft("--model", base, "--tokens", " please", "--embedding-multiple", 32)
    assert done.code == 0 and "260 rows grown to 288" in done.out
    root = here / "runs/sft-001"
    assert ours(root).shape == (8, 288) and tune("merge", root, "merged").code == 0
    model = AutoModelForCausalLM.from_pretrained("merged")
    torch.testing.assert_close(theirs(model), ours(root), atol=1e-4, rtol=0)
    assert model.config.vocab_size == 288 and len(AutoTokenizer.from_pretrained("merged")) == 260


@mostly("untied")
def test_a_padded_vocabulary_keeps_its_rows(base, sft, tune, kit, here):
    padded = kit.write_model(here / "padded", vocab_size=320, tied="lm_head" not in hf.load(base).params)
    done = sft("--model", padded, *NEW, "--embedding-multiple", 64, "--learning-rate", 0.05)
    assert done.code == 0 and "rows grown" not in done.out and "3 tokens added" in done.out
    root = here / "runs/sft-001"
    model = peft.AutoPeftModelForCausalLM.from_pretrained(root / "adapter")
    torch.testing.assert_close(theirs(model), ours(root), atol=1e-4, rtol=0)
    saved = kit.tensors(root / "adapter/adapter_model.safetensors")["base_model.model.model.embed_tokens.weight"]
    assert saved.shape == (320, 32) and (saved[260] - hf.load(padded).params["embed_tokens"][260]).abs().max() > 0.01
    assert tune("merge", root, "merged").code == 0
    torch.testing.assert_close(theirs(AutoModelForCausalLM.from_pretrained("merged")), ours(root), atol=1e-4, rtol=0)


def test_a_token_that_exists_changes_no_weight(tiny, sft, kit, here):
    assert sft("--output-dir", "plain").code == 0
    done = sft("--special-tokens", "pad_token=<|im_end|>", "--tokens", "<|im_start|>", "--output-dir", "same")
    assert done.code == 0 and "added" not in done.out and "train whole" not in done.out
    assert kit.timeless(kit.metrics(here / "same")) == kit.timeless(kit.metrics(here / "plain"))
    tokenizer = AutoTokenizer.from_pretrained(here / "same/adapter")
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 256 and len(tokenizer) == 259
    assert len(AutoTokenizer.from_pretrained(here / "plain/adapter")) == 259
    files = [kit.tensors(here / name / "adapter/adapter_model.safetensors") for name in ("plain", "same")]
    assert kit.same(*files)


@mostly("tied")
def test_modules_that_the_user_names_are_not_named_again(base, sft, here, kit):
    args = ("--model", base, "--tokens", " please", "<tool>", "--lora-modules-to-save", "embed_tokens", "lm_head")
    done = sft(*args)
    assert done.code == 0 and "train whole" not in done.out
    assert kit.tensors(here / "runs/sft-001/adapter/adapter_model.safetensors")["base_model.model.lm_head.weight"].shape == (261, 32)


def test_a_model_that_trains_whole_is_saved_with_its_new_rows(base, sft, kit, here):
    start = hf.load(base)
    hf.save("named", start, tokenizer=kit.tokenizer(), generation={"eos_token_id": 256, "pad_token_id": 258, "top_k": 7})
    more = ("--tokens", " please", "--special-tokens", "eos_token=<|done|>", "pad_token=<|pad|>", "--embedding-multiple", 8)
    done = sft("--model", "named", "--adapter", "none", *more, "--learning-rate", 0.01)
    assert done.code == 0 and "260 rows grown to 264" in done.out, done
    folder = here / "runs/sft-001/model"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    loaded = hf.load(folder)
    torch.testing.assert_close(theirs(model), dense.probe(loaded.params, PROBE, loaded.cfg), atol=1e-4, rtol=0)
    assert model.config.vocab_size == 264 and len(tokenizer) == 262 and ("lm_head" in loaded.params) == ("lm_head" in start.params)
    assert model.config.eos_token_id == tokenizer.eos_token_id == 259 and model.config.pad_token_id == 260
    named = hf.generation_config(folder)
    assert named["eos_token_id"] == [259, 256] and named["pad_token_id"] == 260 and named["top_k"] == 7
    assert (loaded.params["embed_tokens"][261] - resize.resize(start, 264).params["embed_tokens"][261]).abs().max() > 1e-3


def test_pretraining_takes_new_tokens(tiny, tune, here):
    args = ("--model", tiny.model, "--data", tiny.text, "--sequence-len", 64, "--max-steps", 2, "--sample-tokens", 4)
    done = tune("pretrain", *args, "--tokens", " cat", " sat", "--learning-rate", 0.01)
    assert done.code == 0 and "260 rows grown to 261" in done.out, done
    assert hf.load(here / "runs/pretrain-001/model").cfg.vocab_size == 261


def test_a_config_file_may_hold_a_mapping(tiny, sft, here, kit):
    (here / "c.yaml").write_text("special_tokens:\n  pad_token: <|pad|>\ntokens:\n- ' please'\n- <a=b>\n")
    assert sft("--config", "c.yaml").code == 0
    tokenizer = AutoTokenizer.from_pretrained(here / "runs/sft-001/adapter")
    assert tokenizer.convert_tokens_to_ids(["<|pad|>", " please", "<a=b>"]) == [259, 260, 261]
    assert sft("--config", here / "runs/sft-001/config.yaml", "--output-dir", "again").code == 0
    assert kit.timeless(kit.metrics(here / "again")) == kit.timeless(kit.metrics(here / "runs/sft-001"))


def small_adapter(path, base, rows):
    """An adapter folder as left by a tool that cuts a padded vocabulary to its tokenizer; and the model it was trained on."""
    model = resize.cut(hf.load(base), rows)
    made = lora.init(hf.abstract_of(model), ["layers.0.q_proj"], rank=2, seed=0)
    made["layers"][0]["q_proj"]["B"] += 0.1
    whole = {"embed_tokens": model.params["embed_tokens"] * 1.5}
    adapter.save(path, made, family=model.family, info=adapter.Info(2, 4, base=str(base)), whole=whole, tied=True)
    return model._replace(params=model.params | whole), lora.Lora(made, 2.0)


def test_an_adapter_of_a_cut_vocabulary_is_read_and_merged(tiny, tune, here, kit):
    padded = kit.write_model(here / "padded", vocab_size=320)
    model, used = small_adapter(here / "adapter", padded, 259)
    ids = PROBE.clamp(max=258)
    expected = dense.probe(model.params, ids, model.cfg, lora=used)
    torch.testing.assert_close(ours(here, ids), expected, atol=1e-6, rtol=0)
    assert tune("merge", "adapter", "merged").code == 0
    torch.testing.assert_close(theirs(AutoModelForCausalLM.from_pretrained("merged"), ids), expected, atol=1e-4, rtol=0)


def test_an_adapter_with_fewer_rows_than_tokens_is_refused(tiny, tune, sft, here, kit):
    small_adapter(here / "adapter", tiny.model, 200)
    words = ("200 rows of vocabulary", "259 tokens", "another model")
    kit.refused(tune("generate", "1 + 1", "--adapter", "adapter"), *words)
    kit.refused(sft("--lora-model-dir", "adapter", without=("--lora-r",)), *words)


def test_an_adapter_with_a_larger_tokenizer_only_gets_mean_rows(tiny, sft, tune, here):
    """As AutoPeftModelForCausalLM reads it."""
    assert sft("--output-dir", "plain").code == 0
    tokenizer, _ = vocabulary.add_tokens(hf.tokenizer(tiny.model), tokens=["<a>", "<b>"])
    tokenizer.save_pretrained(here / "plain/adapter")
    (here / "plain/adapter" / manifest.NAME).unlink()  # which would tell that files were added
    found, ids = ours(here / "plain", PROBE.clamp(max=260)), PROBE.clamp(max=260)
    torch.manual_seed(0)
    model = peft.AutoPeftModelForCausalLM.from_pretrained(here / "plain/adapter")
    torch.testing.assert_close(found, theirs(model, ids), atol=5e-3, rtol=0)  # theirs are drawn, 6e-6 around the mean
    assert tune("generate", "1<b>", "--adapter", "plain").code == 0


BAD = {
    "no pair": (("--special-tokens", "pad_token"), "--special-tokens takes NAME=TEXT", "'pad_token'"),
    "twice": (("--special-tokens", "pad_token=a", "pad_token=b"), "each name once"),
    "unknown name": (("--special-tokens", "padding=x"), "'padding'", "expected one of bos_token"),
    "empty special": (("--special-tokens", "pad_token="), "pad_token has ''"),
    "empty token": (("--tokens", "a", ""), "tokens has ''"),
    "multiple": (("--embedding-multiple", 0), "embedding_multiple must be at least 1"),
    "adapted embedding": (
        ("--tokens", "<a>", "<b>", "--lora-target-modules", "embed_tokens"), "embed_tokens trains whole", "out of --lora-target-modules"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_is_refused(name, sft, kit, here):
    args, *words = BAD[name]
    kit.refused(sft(*args), *words)
    assert not (here / "runs").exists()


def test_a_mapping_needs_texts(sft, kit, here):
    (here / "c.yaml").write_text("special_tokens:\n  pad_token: 3\n")
    kit.refused(sft("--config", "c.yaml"), "c.yaml: special_tokens: pad_token must be a text, got 3", "quotes")


def test_an_adapter_trained_further_keeps_its_template(tiny, sft, here, kit):
    own = kit.CHATML.replace("\n", ":\n", 1)
    assert sft("--chat-template", own, "--output-dir", "first").code == 0
    done = sft("--lora-model-dir", "first", "--output-dir", "second", without=("--lora-r",))
    assert done.code == 0, done
    assert (here / "second/adapter" / adapter.TEMPLATE).read_text() == own
    for one in ("first", "second"):
        assert not adapter.own_words(here / one / "adapter") and hf.tokenizer(here / one / "adapter").chat_template == own
    assert own != kit.CHATML and hf.tokenizer(tiny.model).chat_template == kit.CHATML


def test_another_tokenizer_reads_the_rows_and_is_saved(kit, tiny, tune, here):
    from transformers import AutoTokenizer

    kit.write_tokenizer(here / "words")
    for kind, place in (("lora", "adapter"), ("none", "model")):
        args = ["--adapter", kind, "--tokenizer-config", "words", "--sample-prompt=", "--output-dir", kind]
        done = tune("sft", *kit.basics(tiny, *args))
        assert done.code == 0, done.err
        saved, given = (AutoTokenizer.from_pretrained(str(path)) for path in (here / kind / place, here / "words"))
        assert saved("17 + 4").input_ids == given("17 + 4").input_ids != kit.tokenizer()("17 + 4").input_ids
    assert tune("generate", "1 + 1", "--adapter", "lora", "--max-new-tokens", 2).code == 0
    kit.refused(tune("sft", *kit.basics(tiny, "--tokenizer-config", "nowhere")), "tokenizer.config.*nowhere is not a folder")
    kit.refused(
        tune("sft", *kit.basics(tiny, "--tokenizer-config", "words", "--lora-model-dir", "lora/adapter", without=("--lora-r",))),
        "tokenizer-config would be ignored: lora_model_dir brings its own",
    )
