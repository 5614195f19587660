"""Folders that we quantise: those of bitsandbytes to the bit, with the logits of transformers, and as they were when read again."""

import importlib.util
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from treetune.core import manifest, quant, tree
from treetune.core.quant import Scheme
from treetune.models import bridge, families, hf, loading, merging, quantised, quantising

bitsandbytes = pytest.importorskip("bitsandbytes", reason="the oracle of quantised files")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.usefixtures("float32_products")

MODELS = {
    "llama": ("Llama", dict(tie_word_embeddings=True)),
    "qwen2": ("Qwen2", dict()),
    "phi3": ("Phi3", dict()),
    "qwen3_moe": ("Qwen3Moe", dict(head_dim=16, moe_intermediate_size=64, num_experts=4, num_experts_per_tok=2)),
    "glm4": ("Glm4", dict(head_dim=16)),
}
SCHEMES = {
    "nf4": (Scheme("nf4"), dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)),
    "fp4": (Scheme("fp4", double=False), dict(load_in_4bit=True, bnb_4bit_quant_type="fp4")),
    "int8": (Scheme("int8"), dict(load_in_8bit=True)),
}
IDS = torch.arange(40) % 96


def tokens(text, **_):
    return {"input_ids": [5, 6, 7]}


def written(model, scheme, path, dtype=torch.float32):
    tensors, config = quantising.described(model, scheme, dtype)
    hf.write(path, tensors, config)
    return path


def some(kinds):
    """(model, kind): each model with a kind of its own, llama and glm4 with all; the others are slow."""
    cases = [
        (name, kind, name in ("llama", "glm4") or (i + j) % len(kinds) == 0)
        for i, name in enumerate(MODELS)
        for j, kind in enumerate(kinds)
    ]
    return [(name, kind) if fast else pytest.param(name, kind, marks=pytest.mark.slow) for name, kind, fast in cases]


@pytest.mark.sampled(4)
@pytest.mark.parametrize(("name", "kind"), some([*SCHEMES]))
def test_a_folder_of_ours_is_that_of_transformers(name, kind, plain, tmp_path):
    """Every tensor but the spelling of the state; logits, too."""
    scheme, options = SCHEMES[kind]
    path = written(hf.load(plain(*MODELS[name])), scheme, tmp_path / "ours")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(path)
    config = transformers.BitsAndBytesConfig(**options)
    expected = transformers.AutoModelForCausalLM.from_pretrained(plain(*MODELS[name]), quantization_config=config, dtype=torch.float32)
    expected.save_pretrained(tmp_path / "theirs")
    ours, theirs = load_file(path / "model.safetensors"), load_file(tmp_path / "theirs/model.safetensors")
    assert ours.keys() == theirs.keys()
    assert not [key for key, leaf in theirs.items() if "quant_state" not in key and not torch.equal(ours[key], leaf)]
    with torch.no_grad():
        logits = loaded(IDS[None]).logits[0]
        assert torch.equal(logits, expected(IDS[None]).logits[0])
    # bitsandbytes also rounds what meets weights in 8 bits.
    own = families.document_logits(hf.load(path), IDS)
    assert torch.allclose(own, logits, atol=1e-4 if kind != "int8" else 2e-2)


def model_that_sees(kind, path):
    """A small random model of whole blocks of 64 whose files name weights otherwise than its modules do."""
    spec = importlib.util.spec_from_file_location("architectures", Path(__file__).with_name("architectures.py"))
    architectures = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(architectures)
    architectures.SIZES = ((r".*intermediate_size", 192), *architectures.SIZES)
    torch.manual_seed(0)
    kinds = transformers.models.auto.modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    getattr(transformers, kinds[kind])(architectures.tiny(kind)).save_pretrained(path)
    return path


@pytest.mark.parametrize("kind", ["gemma3", pytest.param("mistral3", marks=pytest.mark.slow)])
def test_a_model_that_sees_is_quantised_under_the_names_of_its_files(kind, tmp_path):
    model = hf.load(model_that_sees(kind, tmp_path / "plain"))
    path = written(model, Scheme("nf4"), tmp_path / "small")
    small = quantising.quantise(model, Scheme("nf4"), torch.float32)
    stored = [key for key in load_file(path / "model.safetensors") if key.endswith(".absmax")]
    assert len(stored) == sum(quant.quantised(leaf) for leaf in tree.leaves(small.params)) > 8
    assert all(key.startswith("language_model.") for key in stored)
    loaded = transformers.AutoModelForImageTextToText.from_pretrained(path).eval()
    with torch.no_grad():
        logits = loaded(input_ids=IDS[None], use_cache=False).logits[0]
    torch.testing.assert_close(families.document_logits(small, IDS), logits, atol=1e-4, rtol=0)


@pytest.mark.sampled(4)
@pytest.mark.parametrize(("name", "kind"), some([*SCHEMES, "int4", "fp8"]))
def test_read_again_it_is_the_same_to_the_bit(name, kind, plain, tmp_path):
    if name == "qwen3_moe" and kind not in SCHEMES:
        pytest.skip("files of compressed-tensors hold no experts: refused below")
    scheme = SCHEMES[kind][0] if kind in SCHEMES else Scheme(kind)
    model = hf.load(plain(*MODELS[name]))
    again = hf.load(written(model, scheme, tmp_path / "once", torch.bfloat16), dtype=torch.bfloat16)
    small = quantising.quantise(model, scheme, torch.bfloat16)
    assert again.params["norm"].dtype == torch.bfloat16
    count = 0
    for one, other in zip(tree.leaves(again.params), tree.leaves(small.params), strict=True):
        assert quant.quantised(one) == quant.quantised(other) and one.dtype == other.dtype
        if name != "phi3" or kind not in ("nf4",):  # whose maxima of maxima are those of fused tensors
            assert torch.equal(*(quant.dense(leaf) if quant.quantised(leaf) else leaf for leaf in (one, other)))
        count += quant.quantised(one)
    assert count == len(quantised.paths(hf.abstract_of(model), scheme._replace(experts=False))) >= 8


def test_what_stays_dense_is_named(plain, tmp_path):
    _, config = quantising.described(hf.load(plain(*MODELS["qwen3_moe"])), Scheme("nf4"), torch.float32)
    skipped = config["quantization_config"]["llm_int8_skip_modules"]
    layers = [f"model.layers.{i}.mlp.{name}" for i in range(2) for name in ("experts", "gate")]
    assert sorted(skipped) == sorted(["lm_head", *layers])


def test_the_difference_is_that_of_the_folder(plain, tmp_path):
    for name in ("llama", "glm4"):
        model = hf.load(plain(*MODELS[name]))
        options = {"name": str(plain(*MODELS[name]))}
        result = quantising.write(tmp_path / name, model, Scheme("nf4"), torch.bfloat16, FakeTokenizer(), **options)
        again = hf.load(tmp_path / name, dtype=torch.bfloat16)
        ids = merging.probe_ids(tokens, model.cfg)
        assert result.difference.largest > 1e-3 and "nats" in quantising.describe(result)
        small = dict(tree.items(quantising.quantise(model, Scheme("nf4"), torch.bfloat16).params))
        for kind, error in result.errors.items():
            whole = {path: leaf for path, leaf in tree.items(model.params) if path.endswith(f".{kind}")}
            changes = {path: ((quant.dense(small[path], torch.float32) - leaf).norm() / leaf.norm()).item() for path, leaf in whole.items()}
            assert error.worst == max(changes.values()) == changes[error.path] < 0.15
            assert error.mean == pytest.approx(sum(changes.values()) / len(changes))
            assert f"{kind}: weights change by {error.mean:.2%}" in quantising.describe(result)
        if not isinstance(model.cfg, bridge.Config):
            upcast = {
                path: quant.dense(leaf, torch.float32) if quant.quantised(leaf) else leaf.float() for path, leaf in tree.items(again.params)
            }
            expected = merging.compare(
                families.document_logits(model, ids), families.document_logits(model._replace(params=tree.from_items(upcast.items())), ids)
            )
            assert result.difference == expected
        files = [file.stat().st_size for file in (tmp_path / name).glob("*.safetensors")]
        assert result.bytes < sum(files) < result.bytes * 1.6


class FakeTokenizer:
    """Three tokens for any text, and nothing to save."""

    eos_token_id = bos_token_id = pad_token_id = None
    chat_template = None

    def __call__(self, text, **_):
        return tokens(text)

    def save_pretrained(self, path):
        pass


@pytest.mark.parametrize(
    ("name", "scheme", "expected"),
    [
        ("qwen3_moe", Scheme("fp8"), "has experts"),
        ("qwen3_moe", Scheme("int4"), "has experts"),
        ("odd", Scheme("int4"), r"the rows of layers.0.o_proj are no whole groups of 64 numbers"),
        ("llama", Scheme("nf4"), "is quantised"),
    ],
)
def test_models_without_such_files_are_refused(name, scheme, expected, plain):
    shape = ("Llama", dict(head_dim=20)) if name == "odd" else MODELS[name]
    model = hf.load(plain(*shape), scheme=Scheme("nf4") if name == "llama" else None)
    with pytest.raises(ValueError, match=expected):
        quantising.check(model, scheme, "base")


@pytest.mark.parametrize("kind", ["fp8", "int4"])
@pytest.mark.parametrize("name", ["llama", "phi3"])
def test_files_have_the_logits_of_compressed_tensors(name, kind, plain, tmp_path):
    pytest.importorskip("compressed_tensors", reason="pip install compressed-tensors: the library that reads these files for transformers")
    path = written(hf.load(plain(*MODELS[name])), Scheme(kind), tmp_path / "ours")
    options = transformers.CompressedTensorsConfig(dequantize=True)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, quantization_config=options)
    with torch.no_grad():
        logits = loaded(IDS[None]).logits[0]
    assert torch.allclose(families.document_logits(hf.load(path), IDS), logits, atol=1e-5)


DAMAGED = {
    "packed missing": ({"weight_packed": None}, r"q_proj.weight_packed is missing"),
    "packed short": (
        {"weight_packed": torch.zeros(64, 7, dtype=torch.int32)},
        r"is I32 \[64, 7\], and .* needs I32 \[64, 8\]",
    ),
    "scale missing": ({"weight_scale": None}, r"q_proj.weight_scale is missing"),
    "scale of other groups": ({"weight_scale": torch.ones(64, 3)}, r"weight_scale is F32 \[64, 3\]"),
    "scale not finite": ({"weight_scale": torch.full((64, 1), torch.nan)}, r"not finite"),
    "shape missing": ({"weight_shape": None}, r"q_proj.weight_shape is missing"),
    "another shape": ({"weight_shape": torch.tensor([64, 128])}, r"weight_packed is I32 \[64, 8\], and .* needs I32 \[64, 16\]"),
    "no shape": ({"weight_shape": torch.tensor([-64, 64])}, r"weight_shape is \[-64, 64\]; expected the sizes of a matrix"),
    "zero points": ({"weight_zero_point": torch.zeros(8, 1, dtype=torch.int32)}, r"has besides those of its family .*weight_zero_point"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_folder_of_int4_is_one_line(case, plain, tmp_path):
    changed, expected = DAMAGED[case]
    path = written(hf.load(plain(*MODELS["llama"])), Scheme("int4"), tmp_path / "small")
    (path / manifest.NAME).unlink()
    tensors = load_file(path / "model.safetensors") | {f"model.layers.0.self_attn.q_proj.{name}": leaf for name, leaf in changed.items()}
    save_file({key: leaf for key, leaf in tensors.items() if leaf is not None}, path / "model.safetensors")
    with pytest.raises(ValueError, match=expected) as error:
        loading.load_model(str(path), device=torch.device("cpu"))
    assert "\n" not in str(error.value)
