"""Text training of models that also see, from the command line."""

import importlib.util
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

spec = importlib.util.spec_from_file_location("architectures", Path(__file__).parents[1] / "models" / "architectures.py")
architectures = importlib.util.module_from_spec(spec)
spec.loader.exec_module(architectures)
VOCABULARY = ((r"(?:decoder_|unpadded_)?vocab_size(?:_per_layer_input)?", 260), (r"max_position_embeddings", 256))
SFT = ["sft", "--data", "chat.jsonl", "--sequence-len", 128, "--max-steps", 3, "--micro-batch-size", 2, "--learning-rate", 0.01]
KINDS = {
    "gemma3": ("Gemma3ForConditionalGeneration", "vision_tower", "multi_modal_projector"),
    "qwen3_5": ("Qwen3_5ForConditionalGeneration", "visual"),
}
SOME = ("gemma3", pytest.param("qwen3_5", marks=pytest.mark.slow))
IDS = [70, 90, 120, 33, 75, 64, 80]


def class_of(kind):
    import transformers

    return getattr(transformers, KINDS[kind][0])


def write(kit, path, kind):
    """A small random model of a kind, with the tokenizer of the other tests, and what its processor reads."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(architectures, "SIZES", VOCABULARY + architectures.SIZES)
        torch.manual_seed(0)
        class_of(kind)(architectures.tiny(kind)).save_pretrained(path)
    kit.tokenizer().save_pretrained(path)
    (path / "preprocessor_config.json").write_text('{"image_processor_type": "a"}')
    return path


def logits(model):
    with torch.no_grad():
        return model(input_ids=torch.tensor([IDS]), use_cache=False).logits[0]


@pytest.mark.parametrize("kind", SOME)
def test_the_trained_model_still_sees(kit, here, tune, kind):
    from treetune.models import certificate_checks, hf

    folder = write(kit, here / "model", kind)
    kit.write_rows(here / "chat.jsonl", kit.chats(24))
    done = tune(*SFT, "--model", folder, "--adapter", "none", "--weight-decay", 0.1, "--output-dir", "run", "--sample-prompt=")
    assert done.code == 0, done
    saved = next(path.parent for path in (here / "run").rglob("config.json"))
    model, seen = class_of(kind).from_pretrained(saved, attn_implementation="eager", output_loading_info=True)
    assert not any(seen[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys")), seen
    with torch.no_grad():
        ours = certificate_checks.logits(hf.load(saved), certificate_checks.pack([IDS]))
    torch.testing.assert_close(ours, logits(model.eval()), atol=1e-4, rtol=0)
    before, after = load_file(folder / hf.SINGLE), load_file(saved / hf.SINGLE)
    assert before.keys() == after.keys()
    other = [key for key in before if any(part in key for part in KINDS[kind][1:])]
    assert other and all(torch.equal(before[key], after[key]) for key in other)
    assert not any(torch.equal(before[key], after[key]) for key in before if key.endswith("q_proj.weight") and key not in other)
    assert (saved / "preprocessor_config.json").read_text() == '{"image_processor_type": "a"}'


@pytest.mark.parametrize("kind", SOME)
def test_an_adapter_is_read_by_peft_and_merged(kit, here, tune, kind):
    peft = pytest.importorskip("peft")
    folder = write(kit, here / "model", kind)
    kit.write_rows(here / "chat.jsonl", kit.chats(24))
    done = tune(*SFT, "--model", folder, "--lora-r", 4, "--output-dir", "run", "--sample-prompt=")
    assert done.code == 0, done
    wrapped = peft.PeftModel.from_pretrained(class_of(kind).from_pretrained(folder, attn_implementation="eager"), here / "run" / "adapter")
    assert tune("merge", "run", "merged").code == 0
    merged = class_of(kind).from_pretrained(here / "merged", attn_implementation="eager").eval()
    torch.testing.assert_close(logits(merged), logits(wrapped.eval()), atol=1e-4, rtol=0)
    before, after = (load_file(path / "model.safetensors") for path in (folder, here / "merged"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before if any(part in key for part in KINDS[kind][1:]))
    assert (here / "merged" / "preprocessor_config.json").is_file()
