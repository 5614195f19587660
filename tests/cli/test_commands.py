"""eval, generate, chat, merge, info and pretrain on a tiny model, against transformers where it can say what is right."""

import io
import json
import math
import sys

import pytest
import torch

from treetune.core import quant, tree
from treetune.models import hf


def number(done, name):
    """The number printed after a name of a table."""
    assert done.code == 0, done.err
    line = next(line for line in done.out.splitlines() if line.startswith(name))
    return float(line.split()[len(name.split())])


@pytest.fixture
def adapter(finished):
    """A run whose adapter is far from nothing, and its folder."""
    return finished("sft", "--max-steps", 4, "--learning-rate", 0.05)


def expected_loss(kit, model, rows):
    """Mean loss and accuracy over assistant text and its end token, token by token through transformers in float64."""
    import transformers

    net = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)
    tokenizer, losses, hits = kit.tokenizer(), [], []
    for row in rows:
        ids, scored = [], []
        for message in row["messages"]:
            head, body = f"<|im_start|>{message['role']}\n", message["content"] + "<|im_end|>"
            for text, on in ((head, False), (body, message["role"] == "assistant"), ("\n", False)):
                new = tokenizer(text)["input_ids"]
                ids, scored = ids + new, scored + [on] * len(new)
        with torch.no_grad():
            logp = net(torch.tensor([ids])).logits[0].log_softmax(-1)
        at = [i for i, on in enumerate(scored) if on]
        losses += [-logp[i - 1, ids[i]].item() for i in at]
        hits += [logp[i - 1].argmax().item() == ids[i] for i in at]
    return sum(losses) / len(losses), sum(hits) / len(hits), len(losses)


def test_eval_agrees_with_transformers(kit, tiny, tune):
    done = tune("eval", "--model", tiny.model, "--data", tiny.chat, "--sequence-len", 128)
    loss, accuracy, count = expected_loss(kit, tiny.model, kit.chats(24))
    assert math.isclose(number(done, "loss"), loss, abs_tol=2e-6)
    assert math.isclose(number(done, "perplexity"), math.exp(loss), abs_tol=1e-3)
    assert math.isclose(number(done, "accuracy"), accuracy, abs_tol=1e-4)
    assert number(done, "tokens") == count


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    "extra", [["--no-sample-packing"], ["--micro-batch-size", 7], ["--sequence-len", 200], ["--no-sample-packing", "--micro-batch-size", 1]]
)
def test_eval_does_not_depend_on_packing_or_batch(extra, tiny, tune):
    base = ["eval", "--model", tiny.model, "--data", tiny.chat]
    plain = tune(*base, "--sequence-len", 128)
    other = tune(*base, *extra, *([] if "--sequence-len" in extra else ["--sequence-len", 128]))
    assert math.isclose(number(plain, "loss"), number(other, "loss"), abs_tol=2e-6)
    assert number(plain, "tokens") == number(other, "tokens")


def test_merged_model_evaluates_like_model_and_adapter(adapter, tiny, tune, here):
    data = ["--data", tiny.chat, "--sequence-len", 128]
    apart = number(tune("eval", "--adapter", adapter, *data), "loss")
    bare = number(tune("eval", "--model", tiny.model, *data), "loss")
    done = tune("merge", adapter, "merged")
    assert done.code == 0 and "largest logit difference" in done.out and "saved merged" in done.out
    assert math.isclose(number(tune("eval", "--model", "merged", *data), "loss"), apart, abs_tol=1e-5)
    assert abs(apart - bare) > 1e-2
    assert {path.name for path in (here / "merged").iterdir()} >= {"model.safetensors", "config.json", "tokenizer.json"}


PLACES = {
    "all but vectors": ["--lora-target-modules", "."],
    "head": ["--lora-target-modules", "lm_head"],
    "embedding": ["--lora-target-modules", "embed_tokens", "v_proj"],
    "whole head": ["--lora-modules-to-save", "lm_head"],
    "whole embedding": ["--lora-modules-to-save", "embed_tokens"],
    "whole norms": ["--lora-modules-to-save", "norm"],
    "one layer": ["--lora-layers", "1"],
    "rank-stabilised": ["--lora-rslora", "--lora-alpha", "8"],
    "DoRA": ["--lora-dora", "--lora-rank-pattern", "q_proj=2"],
    "PiSSA": ["--lora-init", "pissa", "--lora-dora"],
}
FAST = [(place, True) for place in ("all but vectors", "head", "embedding", "whole head", "one layer", "DoRA")]
FAST += [("head", False), ("whole embedding", False)]


@pytest.mark.sampled(4)
@pytest.mark.parametrize(
    ("place", "tied"),
    [
        (place, tied) if (place, tied) in FAST else pytest.param(place, tied, marks=pytest.mark.slow)
        for tied in (True, False)
        for place in PLACES
    ],
)
def test_trained_equals_saved_equals_merged(place, tied, kit, tiny, sft, tune, here):
    """Wherever the adapter sits, the last evaluation of the run, eval of the folder and eval of the merged model agree."""
    model = tiny.model if tied else tiny.untied
    done = sft("--model", model, "--val-data", tiny.chat, "--output-dir", "run", "--learning-rate", 0.02, "--max-steps", 3, *PLACES[place])
    assert done.code == 0, done.err
    losses = [record["eval/loss"] for record in kit.metrics(here / "run") if "eval/loss" in record]
    assert losses[-1] < losses[0]
    data = ["--data", tiny.chat, "--sequence-len", 128]
    assert math.isclose(number(tune("eval", "--adapter", "run", *data), "loss"), losses[-1], abs_tol=5e-6)
    merged = tune("merge", "run", "merged")
    assert merged.code == 0, merged.err
    assert math.isclose(number(tune("eval", "--model", "merged", *data), "loss"), losses[-1], abs_tol=1e-5)


def test_merge_past_the_bound_saves_nothing(kit, adapter, tune, here):
    before = kit.listing(here)
    done = tune("merge", adapter, "merged", "--save-dtype", "bfloat16", "--max-logit-diff", 1e-6)
    kit.refused(done, "merged logits differ by up to", "not saved")
    assert kit.listing(here) == before
    assert tune("merge", adapter, "merged", "--save-dtype", "bfloat16").code == 0
    assert hf.load("merged", dtype=torch.bfloat16).params["norm"].dtype == torch.bfloat16


def test_merge_onto_a_named_model(adapter, tiny, tune, kit, here):
    assert tune("merge", adapter, "merged", "--model", tiny.same).code == 0
    assert tune("merge", adapter, "plain").code == 0
    assert not kit.same(kit.tensors(here / "merged/model.safetensors"), kit.tensors(here / "plain/model.safetensors"))


@pytest.mark.parametrize("args", [["generate", "hi"], ["eval"], ["merge", "out"], ["chat"]])
def test_adapter_of_another_model_is_refused(args, adapter, tiny, tune, kit, here):
    rest = ["--data", str(tiny.chat), "--sequence-len", "128"] if args == ["eval"] else []
    where = [str(adapter)] if args[0] == "merge" else ["--adapter", str(adapter)]
    before = kit.listing(here)
    done = tune(args[0], *where, *args[1:], "--model", tiny.other, *rest)
    kit.refused(done, "adapter of layers", "the model and rank 4 ask for")
    assert kit.listing(here) == before


def test_adapter_without_its_weights_is_refused(adapter, tune, kit):
    (adapter / "adapter/adapter_model.safetensors").unlink()
    kit.refused(tune("generate", "hi", "--adapter", adapter), "adapter_model.safetensors is missing", "delete .*treetune_manifest.json")


def test_sft_starts_from_an_adapter(adapter, kit, sft, here):
    done = sft("--lora-model-dir", adapter, "--output-dir", "next", without=("--lora-r",))
    assert done.code == 0, done.err
    last = [record for record in kit.metrics(adapter) if "eval/loss" in record][-1]["eval/loss"]
    assert math.isclose(kit.metrics(here / "next")[0]["eval/loss"], last, abs_tol=1e-6)


def test_generate_is_a_function_of_its_seed(tiny, tune):
    def answer(*args):
        done = tune("generate", "1 + 1", "--model", tiny.model, "--max-new-tokens", 8, *args)
        assert done.code == 0, done.err
        return done.out

    assert answer() == answer() == answer("--seed", 0) != answer("--seed", 1)
    assert answer() != answer("--raw") and answer() != answer("--system", "x")
    assert answer("--temperature", 0) == answer("--top-k", 1)


def test_generate_takes_the_likeliest_tokens_of_transformers(kit, tiny, tune):
    import transformers

    net = transformers.AutoModelForCausalLM.from_pretrained(tiny.same, dtype=torch.float32)
    tokenizer = kit.tokenizer()
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "9 + 9"}], add_generation_prompt=True, return_dict=False)
    out = net.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False, pad_token_id=257, eos_token_id=tokenizer.eos_token_id)
    expected = tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True).strip()
    done = tune("generate", "9 + 9", "--model", tiny.same, "--temperature", 0, "--max-new-tokens", 12)
    assert done.code == 0 and done.out.strip() == expected


def test_generate_several_answers_to_several_prompts(tiny, tune):
    done = tune("generate", "one", "two [b]", "--num-samples", 3, "--model", tiny.model, "--max-new-tokens", 4)
    assert done.code == 0 and done.out.count("# one\n") == 3 and done.out.count("# two [b]\n") == 3


def test_generate_with_an_adapter_uses_its_base(adapter, tiny, tune):
    args = ["generate", "1 + 1", "--temperature", 0, "--max-new-tokens", 12]
    with_adapter, without = tune(*args, "--adapter", adapter), tune(*args, "--model", tiny.model)
    assert with_adapter.code == without.code == 0 and with_adapter.out != without.out
    assert tune(*args, "--adapter", adapter / "adapter").out == with_adapter.out


def test_chat_reads_lines_until_quit(tiny, tune, monkeypatch):
    def talk(lines, *args):
        monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
        done = tune("chat", "--model", tiny.model, "--max-new-tokens", 6, "--temperature", 0, *args)
        assert done.code == 0 and done.err == "", done.err
        return done.out

    one = talk("hi\n/quit\nnever read\n")
    assert one == talk("hi\n") and one.count("> ") == 2
    assert talk("hi\n", "--system", "shout") != one
    again = talk("hi\n\n/reset\nhi\n")
    first, second = [part.strip() for part in again.split("> ") if part.strip()][1:3]
    assert first == second, "after /reset the talk starts over"


def test_chat_that_fills_the_positions_starts_over(tiny, tune, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("x" * 200 + "\n" + "y" * 100 + "\nhi\n"))
    done = tune("chat", "--model", tiny.model, "--max-new-tokens", 40)
    assert done.code == 0 and "fills all 256 positions" in done.out


def test_info_of_everything(adapter, tiny, tune):
    machine = tune("info")
    assert machine.code == 0 and "torch" in machine.out and "cores" in machine.out
    model = tune("info", tiny.model)
    assert model.code == 0 and "llama, 2 layers, hidden 32, mlp 48" in model.out and "256 positions" in model.out
    assert "at the peak of a run: cpu, float32, 2 x 512 tokens, lora r 16, adamw" in " ".join(model.out.split())
    folder = tune("info", adapter / "adapter")
    assert (
        folder.code == 0 and "4, alpha 32" in folder.out and "14 modules" in folder.out and str(tiny.model) in " ".join(folder.out.split())
    )
    run = tune("info", adapter)
    assert run.code == 0 and "step_000004" in run.out and "4 in" in run.out and "held-out loss" in run.out


MEMORY = {
    "dtype": ["--dtype", "bfloat16"], "quant": ["--quant", "nf4"], "adapter": ["--adapter", "none"], "lora_r": ["--lora-r", 64],
    "optimizer": ["--optimizer", "sgd", "--adapter", "none"], "micro_batch_size": ["--micro-batch-size", 64],
    "sequence_len": ["--sequence-len", 4000], "gradient_checkpointing": ["--gradient-checkpointing"],
    "activation_offloading": ["--activation-offloading", "disk"], "layer_offloading": ["--layer-offloading", "disk"],
    "num_generations": ["--num-generations", 64],
    "max_completion_length": ["--num-generations", 64, "--max-completion-length", 999],
}  # fmt: skip


@pytest.mark.parametrize("name", MEMORY)
def test_info_counts_the_memory_of_a_run_with_these_options(name, tiny, tune):
    base = ["info", tiny.model, "--device", "cpu"]
    plain, changed = tune(*base), tune(*base, *MEMORY[name])
    assert plain.code == changed.code == 0, changed.err
    assert plain.out != changed.out


def test_options_of_memory_need_a_model(adapter, tune):
    for path in ([], [adapter], [adapter / "adapter"]):
        done = tune("info", *path, "--lora-r", 8)
        assert done.code == 2 and "--lora-r would be ignored" in done.err


def test_a_run_says_its_memory(kit, tiny, tune):
    done = tune("sft", *kit.basics(tiny, "--max-steps", 1, "--output-dir", "run"))
    assert done.code == 0 and "at the peak" in " ".join(done.out.split())


def test_pretrain_from_a_config_and_from_a_model(kit, tiny, tune, here):
    (here / "c.json").write_text((tiny.model / "config.json").read_text().replace('"num_hidden_layers": 2', '"num_hidden_layers": 1'))
    base = ["pretrain", "--model", tiny.model, "--data", tiny.text, "--sequence-len", 64, "--max-steps", 3, "--sample-tokens", 4]
    assert tune(*base, "--output-dir", "new", "--from-config", "c.json", "--learning-rate", 0.01).code == 0
    assert hf.load(here / "new/model").cfg.num_layers == 1
    records = [record for record in kit.metrics(here / "new") if "eval/loss" in record]
    assert records[-1]["eval/loss"] < records[0]["eval/loss"]
    assert tune(*base, "--output-dir", "on").code == 0
    assert hf.load(here / "on/model").cfg.num_layers == 2
    samples = kit.samples(here / "on")
    assert [sample["step"] for sample in samples] == [0, 3] and samples[0]["prompt"].startswith("Line ")


def test_pretrain_trains_every_token_of_any_column(kit, tiny, tune, here):
    rows = [json.loads(line) for line in tiny.text.read_text().splitlines()]
    kit.write_rows(here / "body.jsonl", [{"id": i, "body": row["text"]} for i, row in enumerate(rows)])
    base = ["pretrain", "--model", tiny.model, "--sequence-len", 64, "--max-steps", 2, "--sample-tokens", 4]
    assert tune(*base, "--data", tiny.text, "--output-dir", "a").code == 0
    assert tune(*base, "--data", "body.jsonl", "--text-column", "body", "--output-dir", "b").code == 0
    assert kit.same(kit.state(here / "a", 2), kit.state(here / "b", 2))
    assert (here / "a/samples.jsonl").read_text() == (here / "b/samples.jsonl").read_text() != ""
    first = kit.metrics(here / "a")[0]
    texts = [row["text"] for row in rows]
    assert first["eval/supervised_tokens"] in {len(one) + len(other) for one in texts for other in texts}, (
        "letters and ends, but no first letter"
    )


def test_several_data_sets_of_several_formats(kit, tiny, tune, here):
    args = [
        "sft",
        "--model",
        tiny.model,
        "--data",
        tiny.chat,
        tiny.alpaca,
        tiny.text,
        "--sequence-len",
        255,
        "--max-steps",
        2,
        "--sample-tokens",
        4,
    ]
    done = tune(*args)
    assert done.code == 0, done.err
    assert all(f"{name}:" in done.out for name in ("chat", "alpaca", "completion")) and "22 rows -> 22 documents" in done.out
    asked = [sample["prompt"] for sample in kit.samples(here / "runs/sft-001")]
    assert len(set(asked)) == 1 and "+" in asked[0]


@pytest.mark.parametrize("options", [[], ["--quant", "int8"], ["--quant", "fp8"], ["--no-quant-double"], ["--save-dtype", "float32"]])
def test_quantize_writes_a_folder_that_loads(options, tiny, tune, here):
    done = tune("quantize", tiny.model, "small", *options)
    assert done.code == 0 and "KL " in done.out and "saved small" in done.out, done
    model = hf.load("small", dtype=torch.float32)
    kind = options[1] if "--quant" in options else "nf4"
    kinds = {leaf.kind for leaf in tree.leaves(model.params) if quant.quantised(leaf)}
    assert kinds == {kind} and json.loads((here / "small/config.json").read_text())["dtype"] == (
        "float32" if "--save-dtype" in options else "bfloat16"
    )
    leaf = model.params["layers"][0]["q_proj"]
    assert (leaf.nested is None) == ("--no-quant-double" in options or kind not in quant.FOUR_BITS)
    shown = tune("generate", "--model", "small", "--max-new-tokens", 2, "--raw", "ab")
    assert shown.code == 0, shown


def test_quantize_refuses_what_it_cannot_write(tiny, tune, kit, adapter, here):
    assert tune("quantize", tiny.model, "small").code == 0
    kit.refused(tune("quantize", "small", "again"), "small is quantised: name the unquantised model")
    kit.refused(tune("quantize", tiny.model, "small"), "small exists: name a folder")
    kit.refused(tune("quantize", tiny.model, "other", "--quant", "int8", "--quant-double"), "quant is int8")
    kit.refused(tune("merge", adapter, "merged", "--model", "small", "--save-dtype", "int3"), "save_dtype|save-dtype")
    kit.refused(tune("merge", adapter, "merged", "--model", "small", "--save-dtype", "int4"), "no whole groups of 64 numbers")
