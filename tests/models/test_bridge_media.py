"""Text training of checkpoints that also see: the language model trains, and the rest is saved as it was."""

import importlib.util
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from treetune.core import lora, tree
from treetune.core.lora import Lora
from treetune.models import adapter as adapters
from treetune.models import certificate, certificate_checks, hf, plain_model, policy, resize

spec = importlib.util.spec_from_file_location("architectures", Path(__file__).with_name("architectures.py"))
architectures = importlib.util.module_from_spec(spec)
spec.loader.exec_module(architectures)

DOCUMENTS = ([50, 90, 120, 33, 70, 64, 80], [110, 30, 199, 42, 170, 17, 90, 31, 55, 77, 140, 22, 66])
KINDS = {"gemma3": "vision_tower", "gemma4": "vision_tower", "qwen3_5": "visual", "mistral3": "vision_tower", "qwen3_vl": "visual"}


def class_of(kind):
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    return getattr(transformers, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[kind])


def config_of(kind):
    config = architectures.tiny(kind)
    if kind == "gemma4":  # whose default config has no part that sees
        config.vision_config = architectures.tiny("gemma4_vision")
    return config


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """The folder of a small random model with all its parts."""
    paths = {}

    def make(kind):
        if kind not in paths:
            paths[kind] = tmp_path_factory.mktemp(kind)
            with plain_model.without_bars():
                torch.manual_seed(0)
                class_of(kind)(config_of(kind)).save_pretrained(paths[kind])
        return paths[kind]

    return make


def theirs(kind, path):
    with plain_model.without_bars():
        model, seen = class_of(kind).from_pretrained(path, attn_implementation="eager", output_loading_info=True)
    assert not any(seen[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys")), seen
    return model.eval()


def ours(model, low=None):
    with torch.no_grad():
        return certificate_checks.logits(model, certificate_checks.pack([DOCUMENTS[1]]), low)


def plain_logits(model):
    with torch.no_grad():
        return plain_model.logits(model, DOCUMENTS[1])


@pytest.mark.more
@pytest.mark.parametrize("kind", [kind if kind == "gemma3" else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS])
def test_they_are_certified_with_all_their_parts(folder, kind):
    certified = certificate.certify(folder(kind), DOCUMENTS)
    assert certified.passed, (certified.reason, certificate.differences(certified))
    assert any(KINDS[kind] in path for path, _ in tree.items(hf.load(folder(kind)).params))


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    "kind", [kind if kind in ("gemma3", "mistral3", "qwen3_5") else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS]
)
def test_full_training_leaves_other_parts_alone(folder, tmp_path, kind):
    start = policy.full(hf.load(folder(kind)))
    trained, still = ({path for path, _ in tree.items(part["model"])} for part in (start.params, start.frozen))
    assert not [path for path in trained if KINDS[kind] in path] and [path for path in still if KINDS[kind] in path]
    buffers = ("layer_scalar",)
    assert not [path for path in still if path.startswith(("layers.", "embed_tokens", "lm_head")) and not path.endswith(buffers)]
    moved = {"model": tree.map(lambda leaf: leaf * 1.02, start.params["model"])}
    policy.save(start, tmp_path / "out", params=moved)
    model = theirs(kind, tmp_path / "out")
    torch.testing.assert_close(ours(hf.load(tmp_path / "out")), plain_logits(model), atol=1e-4, rtol=0)
    assert (plain_logits(model) - plain_logits(theirs(kind, folder(kind)))).abs().max() > 1e-3
    before, after = (load_file(root / hf.SINGLE) for root in (folder(kind), tmp_path / "out"))
    assert before.keys() == after.keys()
    same = {key for key in before if torch.equal(before[key], after[key])}
    assert {key for key in before if KINDS[kind] in key} <= same
    language = [key for key in same if ".layers." in key and KINDS[kind] not in key and not key.endswith(buffers)]
    assert not [key for key in language if before[key].any()]


@pytest.mark.parametrize("kind", ["gemma3", "qwen3_5"])
def test_adapters_sit_on_the_language_model(folder, tmp_path, kind):
    peft = pytest.importorskip("peft")
    model = hf.load(folder(kind))
    sizes = hf.abstract_of(model)
    paths = lora.match(sizes, "all-linear")
    assert paths and all(path.startswith("layers.") for path in paths)
    pairs, generator = lora.init(sizes, paths, rank=2, seed=0), torch.Generator().manual_seed(1)
    low = Lora(tree.map(lambda leaf: leaf + 0.1 * torch.randn(leaf.shape, generator=generator), pairs), 2.0)
    info = adapters.Info(2, 4.0, base=str(folder(kind)), paths=paths)
    adapters.save(tmp_path / "adapter", low.tree, family=model.family, info=info, tied=model.cfg.tied)
    wrapped = peft.PeftModel.from_pretrained(theirs(kind, folder(kind)), tmp_path / "adapter").eval()
    assert not [name for name, _ in wrapped.named_parameters() if "lora" in name and KINDS[kind] in name]
    torch.testing.assert_close(ours(model, low), plain_logits(wrapped), atol=1e-4, rtol=0)
    assert (ours(model, low) - ours(model)).abs().max() > 0.01


@pytest.mark.more
@pytest.mark.parametrize("kind", ["gemma3", pytest.param("qwen3_5", marks=pytest.mark.slow)])
def test_new_rows_are_those_of_the_text(folder, tmp_path, kind):
    model = resize.resize(hf.load(folder(kind)), architectures.VOCABULARY + 3)
    hf.save(tmp_path / "out", model)
    assert theirs(kind, tmp_path / "out").get_input_embeddings().weight.shape[0] == architectures.VOCABULARY + 3
    torch.testing.assert_close(ours(hf.load(tmp_path / "out")), plain_logits(theirs(kind, tmp_path / "out")), atol=1e-4, rtol=0)
