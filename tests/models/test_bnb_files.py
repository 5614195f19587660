"""Folders of quantised weights: those of transformers with bitsandbytes here, ours there, and damaged ones."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from treetune.cli import parse, requirements
from treetune.cli.options.commands import Generate
from treetune.core import quant, tree
from treetune.core.quant import Scheme
from treetune.models import certificate, describe, families, fetch, hf, loading

bitsandbytes = pytest.importorskip("bitsandbytes", reason="the oracle of quantised files")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.usefixtures("float32_products")

MODELS = {
    "llama": ("Llama", dict()),
    "odd": ("Llama", dict(intermediate_size=90, hidden_size=44, head_dim=6, tie_word_embeddings=True)),
    "qwen2": ("Qwen2", dict()),
    "phi3": ("Phi3", dict()),
    "qwen3_moe": ("Qwen3Moe", dict(head_dim=16, moe_intermediate_size=64, num_experts=4, num_experts_per_tok=2)),
    "glm4": ("Glm4", dict(head_dim=16)),
}
CONFIGS = {
    "nf4": dict(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "nf4-double": dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
    "fp4-double": dict(load_in_4bit=True, bnb_4bit_quant_type="fp4", bnb_4bit_use_double_quant=True),
    "int8": dict(load_in_8bit=True),
}
IDS = torch.arange(40) % 96


@pytest.fixture(scope="session")
def theirs(plain, tmp_path_factory):
    """theirs(name, config) -> a folder that transformers quantised, and its model."""
    root, models = tmp_path_factory.mktemp("theirs"), {}

    def folder(name, config):
        path = root / f"{name}-{config}"
        if path not in models:
            options = transformers.BitsAndBytesConfig(**CONFIGS[config])
            models[path] = transformers.AutoModelForCausalLM.from_pretrained(
                plain(*MODELS[name]), quantization_config=options, dtype=torch.float32
            )
            models[path].save_pretrained(path)
        return path, models[path]

    return folder


def dense_weights(model):
    """{key: weight} of a model of transformers, made dense by bitsandbytes."""
    weights = {}
    for name, module in model.named_modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            weights[f"{name}.weight"] = bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
        elif isinstance(module, bitsandbytes.nn.Linear8bitLt):
            weights[f"{name}.weight"] = bitsandbytes.functional.int8_vectorwise_dequant(module.weight.data, module.weight.SCB)
    return weights


def our_weights(model):
    """{key: weight} of our quantised leaves."""
    leaves = {path: quant.dense(leaf) if quant.quantised(leaf) else leaf for path, leaf in tree.items(model.params)}
    return hf.described(model._replace(params=tree.from_items(leaves.items())))[0]


# Every model and every kind of file, one with another in turn, and all kinds with llama.
CASES = [(name, config, name == "llama" or (i + j) % 3 == 0) for i, name in enumerate(MODELS) for j, config in enumerate(CONFIGS)]


@pytest.mark.sampled(4)
@pytest.mark.parametrize(
    ("name", "config"), [(name, config) if fast else pytest.param(name, config, marks=pytest.mark.slow) for name, config, fast in CASES]
)
def test_a_folder_of_transformers_has_the_same_numbers_here(name, config, theirs):
    path, model = theirs(name, config)
    own = hf.load(path)
    ours, expected = our_weights(own), dense_weights(model)
    assert len(expected) >= 8
    assert all(torch.equal(ours[key], weight.float()) for key, weight in expected.items())
    count = sum(quant.quantised(leaf) for leaf in tree.leaves(own.params))
    assert count >= len(expected) and all(leaf.dtype == torch.float32 for leaf in tree.leaves(own.params))
    with torch.no_grad():
        logits, other = families.document_logits(own, IDS), model(IDS[None]).logits[0]
    # bitsandbytes quantises what meets weights in 8 bits, too.
    assert torch.allclose(logits, other, atol=1e-4 if config != "int8" else 2e-2)


def test_experts_in_parts_are_stacked(plain, tmp_path):
    """Older versions of transformers had a linear layer for each projection of each expert, and bitsandbytes quantised these."""
    path = shutil.copytree(plain(*MODELS["qwen3_moe"]), tmp_path / "old")
    tensors, parts = load_file(path / "model.safetensors"), {}
    for key, weight in tensors.items():
        if "proj" not in key and "mlp.gate" not in key:
            parts[key] = weight
            continue
        codes, state = bitsandbytes.functional.quantize_4bit(weight, quant_type="nf4", compress_statistics="down" in key)
        parts |= {key: codes} | {f"{key}.{name}": part for name, part in state.as_dict(packed=True).items()}
        tensors[key] = bitsandbytes.functional.dequantize_4bit(codes, state)
    save_file(parts, path / "model.safetensors", metadata={"format": "pt"})
    written = json.loads((path / "config.json").read_text())
    quantization = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    (path / "config.json").write_text(json.dumps(written | {"quantization_config": quantization}))
    model = hf.load(path)
    assert quant.quantised(model.params["layers"][0]["experts"]["gate_up_proj"]) and not quant.quantised(
        model.params["layers"][0]["router"]
    )
    ours = our_weights(model)
    assert ours.keys() == tensors.keys()
    assert not [key for key, weight in tensors.items() if not torch.equal(ours[key], weight)]


@pytest.mark.more
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_leaf_is_known_by_its_parts(dtype, theirs):
    path, _ = theirs("llama", "nf4-double")
    one, other = hf.load(path, dtype=dtype), hf.load(theirs("llama", "nf4")[0], dtype=dtype)
    leaf, twin = (model.params["layers"][0]["q_proj"] for model in (one, other))
    assert leaf.dtype == dtype and one.params["norm"].dtype == dtype
    assert quant.digest(leaf) != quant.digest(twin) and torch.equal(quant.spread(leaf), quant.spread(quant.dense(leaf, torch.float32)))
    assert not quant.quantised(one.params["lm_head"])


def test_the_scheme_that_is_asked_for_may_be_that_of_the_folder(theirs):
    path, _ = theirs("llama", "nf4-double")
    one, other = hf.load(path), hf.load(path, scheme=Scheme("nf4"))
    assert all(
        torch.equal(a.codes, b.codes) for a, b in zip(tree.leaves(one.params), tree.leaves(other.params), strict=True) if quant.quantised(a)
    )
    for scheme in (Scheme("int8"), Scheme("nf4", double=False), Scheme("fp4")):
        with pytest.raises(ValueError, match=r"is quantised as nf4 with quant_double, and quant asks for .*: leave quant out to take"):
            hf.load(path, scheme=scheme)


KEY = "model.layers.0.self_attn.q_proj.weight"
STATE = f"{KEY}.quant_state.bitsandbytes__nf4"


def state(**changed):
    """Bytes of the state of KEY with other values; None leaves one out."""
    values = {
        "quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [64, 64], "nested_blocksize": 256, "nested_dtype": "float32",
        "nested_offset": 0.05,
    } | changed  # fmt: skip
    return torch.tensor(list(json.dumps({name: value for name, value in values.items() if value is not None}).encode()), dtype=torch.uint8)


def text(value):
    return torch.tensor(list(value), dtype=torch.uint8)


DAMAGED = {
    "weight missing": ({KEY: None}, r"q_proj.weight is missing, a part of a quantised weight"),
    "absmax missing": ({f"{KEY}.absmax": None}, r"q_proj.weight.absmax is missing"),
    "map missing": ({f"{KEY}.quant_map": None}, r"q_proj.weight.quant_map is missing"),
    "nested map missing": ({f"{KEY}.nested_quant_map": None}, r"nested_quant_map is missing"),
    "nested maxima missing": ({f"{KEY}.nested_absmax": None}, r"nested_absmax is missing"),
    "state missing": ({STATE: None}, r"quant_state.bitsandbytes__nf4 is missing"),
    "weight of floats": ({KEY: torch.zeros(2048, 1)}, r"q_proj.weight is F32 \[2048, 1\], .* needs U8 \[2048, 1\]"),
    "weight too short": ({KEY: torch.zeros(2047, 1, dtype=torch.uint8)}, r"q_proj.weight is U8 \[2047, 1\]"),
    "weight turned": ({KEY: torch.zeros(1, 2048, dtype=torch.uint8)}, r"q_proj.weight is U8 \[1, 2048\]"),
    "maxima of floats": ({f"{KEY}.absmax": torch.zeros(64)}, r"absmax is F32 \[64\], .* needs U8 \[64\]"),
    "maxima too short": ({f"{KEY}.absmax": torch.zeros(63, dtype=torch.uint8)}, r"absmax is U8 \[63\]"),
    "nested maxima too long": ({f"{KEY}.nested_absmax": torch.zeros(2)}, r"nested_absmax is F32 \[2\]"),
    "maxima not finite": ({f"{KEY}.nested_absmax": torch.tensor([float("nan")])}, r"not finite"),
    "another map": ({f"{KEY}.quant_map": torch.linspace(-1, 1, 16)}, r"quant_map is not the table of bitsandbytes' nf4"),
    "another nested map": ({f"{KEY}.nested_quant_map": torch.linspace(-1, 1, 256)}, r"nested_quant_map is not the table"),
    "a map of halves": ({f"{KEY}.quant_map": torch.zeros(16, dtype=torch.float16)}, r"quant_map is F16 \[16\]"),
    "another type": ({STATE: state(quant_type="int2")}, r'quant_type must be nf4, got "int2"'),
    "an unknown state": ({STATE: None, f"{KEY}.quant_state.bitsandbytes__nf9": state()}, r"quant_state.bitsandbytes__nf4 is missing"),
    "truncated JSON": ({STATE: state()[:40]}, r"bitsandbytes__nf4 is not valid JSON"),
    "no JSON": ({STATE: text(b"\xff\xfe")}, r"is not valid JSON"),
    "deep JSON": ({STATE: text(b"[" * 4000)}, r"is not valid JSON"),
    "a list": ({STATE: text(b"[]")}, r"must be a mapping of fields, got \[\]"),
    "long JSON": ({STATE: torch.full((5000,), 32, dtype=torch.uint8)}, r"U8 \[5000\]; expected JSON in at most 4096 bytes"),
    "no blocks": ({STATE: state(blocksize=0)}, r"blocksize must be one of 32"),
    "huge sizes": ({STATE: state(shape=[2**40, 2**40])}, r"shape must be the sizes of a matrix"),
    "huge product": ({STATE: state(shape=[2**30, 2**30])}, r"shape must be the sizes of a matrix"),
    "large sizes": ({STATE: state(shape=[2**20, 2**19])}, r"q_proj.weight is U8 \[2048, 1\], .* needs U8 \[274877906944, 1\]"),
    "negative sizes": ({STATE: state(shape=[-64, -64])}, r"shape must be a list of whole numbers of at least 1"),
    "a vector": ({STATE: state(shape=[4096])}, r"shape must be the sizes of a matrix"),
    "another shape": ({STATE: state(shape=[32, 128])}, r"q_proj.weight has shape \[32, 128\]; config.json implies \[64, 64\]"),
    "no shape": ({STATE: state(shape=None)}, r"shape must be a list of whole numbers of at least 1, got nothing"),
    "an unknown dtype": ({STATE: state(dtype="int64")}, r"dtype must be one of float32, bfloat16, float16"),
    "an endless offset": ({STATE: text(bytes(state().tolist()).replace(b"0.05", b"1e999"))}, r"nested_offset must be a finite number"),
    "other nested blocks": ({STATE: state(nested_blocksize=128)}, r"nested_blocksize must be 256, got 128"),
    "a stranger": ({f"{KEY}.more": torch.zeros(1)}, r"has besides those of its family 1 tensors, the first is .*q_proj.weight.more"),
    "nothing quantised": ("all", r"config.json says nf4 with quant_double, and the files hold no weight so quantised"),
}


def damaged(path, changed, target):
    """A copy of a folder with other tensors; None leaves one out."""
    shutil.copytree(path, target, ignore=shutil.ignore_patterns("*manifest*"))
    tensors = load_file(target / "model.safetensors")
    if changed == "all":
        changed = {key: None for key in tensors if "proj" in key}
    tensors = {key: tensor for key, tensor in (tensors | changed).items() if tensor is not None}
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def refused(path):
    """The one line with which a folder is refused."""
    with pytest.raises(ValueError) as error:
        loading.load_model(str(path), device=torch.device("cpu"))
    message = str(error.value)
    assert str(path) in message and "\n" not in message and "cannot be read: " not in message and len(message) < 400
    return message


@pytest.mark.sampled(4)
@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_folder_is_one_line(case, theirs, tmp_path):
    changed, expected = DAMAGED[case]
    assert re.search(expected, refused(damaged(theirs("llama", "nf4-double")[0], changed, tmp_path / "copy")))


ROWS = f"{KEY.removesuffix('weight')}SCB"
FORM = f"{KEY.removesuffix('weight')}weight_format"
DAMAGED_ROWS = {
    "scales missing": ({ROWS: None}, r"q_proj.SCB is missing"),
    "scales too long": ({ROWS: torch.ones(65)}, r"q_proj.SCB is F32 \[65\], .* needs F32 \[64\]"),
    "scales of halves": ({ROWS: torch.ones(64, dtype=torch.float16)}, r"q_proj.SCB is F16 \[64\]"),
    "scales not finite": ({ROWS: torch.full((64,), float("inf"))}, r"not finite"),
    "weight of bytes": ({KEY: torch.zeros(64, 64, dtype=torch.uint8)}, r"q_proj.weight is U8 \[64, 64\], .* needs I8"),
    "weight a vector": ({KEY: torch.zeros(64, dtype=torch.int8)}, r"q_proj.weight has shape \[64\]; expected that of a matrix"),
    "weight missing": ({KEY: None}, r"q_proj.weight is missing"),
    "another layout": ({FORM: torch.tensor(2, dtype=torch.uint8)}, r"weight_format is 2; expected 0, rows as they are"),
    "a layout of floats": ({FORM: torch.tensor(0.0)}, r"weight_format is F32 \[\]"),
}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("case", DAMAGED_ROWS)
def test_a_damaged_folder_of_int8_is_one_line(case, theirs, tmp_path):
    changed, expected = DAMAGED_ROWS[case]
    assert re.search(expected, refused(damaged(theirs("llama", "int8")[0], changed, tmp_path / "copy")))


def test_a_folder_of_older_versions_says_nothing_of_the_layout(theirs, tmp_path):
    path = damaged(theirs("llama", "int8")[0], {FORM: None}, tmp_path / "copy")
    assert torch.equal(
        hf.load(path).params["layers"][0]["q_proj"].codes, hf.load(theirs("llama", "int8")[0]).params["layers"][0]["q_proj"].codes
    )


CONFIGURED = {
    "gptq": ({"quant_method": "gptq", "bits": 4}, r'quant_method "gptq" .*expected float weights, or those of bitsandbytes'),
    "no name": ({"bits": 4}, r'quant_method "one without a name"'),
    "a list": ([1], r"quantization_config must be a mapping of fields"),
    "neither": ({"quant_method": "bitsandbytes"}, r"load_in_4bit must be true where load_in_8bit is not"),
    "both": ({"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": True}, r"load_in_4bit must be true where"),
    "another type": (
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "af4"},
        r"bnb_4bit_quant_type must be one of",
    ),
    "stored as floats": (
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_storage": "bfloat16"},
        r"bnb_4bit_quant_storage",
    ),
    "the other type": (
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
        r"config.json says fp4, and .*proj.weight is in nf4",
    ),
    "other bits": ({"quant_method": "bitsandbytes", "load_in_8bit": True}, r"hold no weight so quantised"),
    "tensors": (
        {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"a": {"weights": {"num_bits": 4}}}},
        r"type must be int: of this method fp8 with a scale for each row and symmetric int4",
    ),
}


@pytest.mark.parametrize("name", ("llama", "glm4"))
@pytest.mark.parametrize("case", CONFIGURED)
def test_other_quantised_weights_are_refused_by_name(case, name, theirs, tmp_path):
    """Native and bridged families alike."""
    value, expected = CONFIGURED[case]
    path = damaged(theirs(name, "nf4-double")[0], {}, tmp_path / "copy")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"quantization_config": value}))
    assert re.search(expected, refused(path))


def test_a_folder_whose_config_says_nothing_is_refused(theirs, tmp_path):
    path = damaged(theirs("llama", "nf4-double")[0], {}, tmp_path / "copy")
    config = json.loads((path / "config.json").read_text())
    del config["quantization_config"]
    (path / "config.json").write_text(json.dumps(config))
    assert "is a part of a quantised weight, and config.json has no quantization_config" in refused(path)


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("name", "config"), [("llama", "nf4-double"), ("qwen2", "int8"), ("glm4", "nf4")])
def test_a_certificate_compares_the_dense_models(name, config, theirs):
    """Gradients of both, too."""
    result = certificate.certify(theirs(name, config)[0], documents=[list(range(1, 20)), list(range(30, 60))])
    assert not certificate.differences(result) and sum(row.verdict == certificate.PASS for row in result.rows) >= 8


def test_info_and_quant_none(theirs):
    path = str(theirs("llama", "int8")[0])
    assert describe.describe_model(Path(path))["weights"] == "quantised in the files: int8"
    assert fetch.quantised(path) and not fetch.quantised("smollm2-135m-instruct")
    config = parse.parse("generate", Generate, ["--model", path, "--quant", "none"])[0]
    with pytest.raises(ValueError, match=r"quant is none, and .* holds quantised weights: leave quant out"):
        requirements.complete(config, None)
