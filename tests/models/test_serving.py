"""A model for a vLLM server: its name, and a .gguf file as the folder that the server reads."""

from pathlib import Path

import gguf
import numpy as np
import torch

from treetune.models import gguf as ours
from treetune.models import hf, serving


def test_known_models_have_one_name():
    assert serving.served_name("HuggingFaceTB/SmolLM2-135M-Instruct") == "smollm2-135m-instruct"
    assert serving.served_name("some/model") == "some/model"


def test_a_gguf_file_is_written_as_a_folder_once_with_the_numbers_that_training_reads(tmp_path, monkeypatch):
    monkeypatch.setenv("TREETUNE_HOME", str(tmp_path / "home"))
    path = tiny_gguf(tmp_path / "tiny.gguf")
    said = []
    place = serving.model_folder(str(path), say=said.append)
    assert place.is_relative_to(tmp_path / "home") and len(said) == 1
    wanted, found = ours.load(path, dtype=torch.float32).params, hf.load(place).params
    assert torch.equal(found["layers"][0]["q_proj"], wanted["layers"][0]["q_proj"])
    assert serving.model_folder(str(path), say=said.append) == place and len(said) == 1


def tiny_gguf(path: Path) -> Path:
    writer = gguf.GGUFWriter(str(path), "llama")
    for name, value in {"block_count": 1, "context_length": 32, "embedding_length": 8, "feed_forward_length": 16, "head_count": 2,
                        "head_count_kv": 1, "layer_norm_rms_eps": 1e-5, "tokenizer_model": "gpt2", "tokenizer_pre": "smollm",
                        "token_list": ["<|end|>", "a", "b", "ab"], "token_types": [3, 1, 1, 1], "token_merges": ["a b"],
                        "eos_token_id": 0}.items():  # fmt: skip
        getattr(writer, f"add_{name}")(value)
    generator = np.random.default_rng(0)
    shapes = {"attn_norm": (8,), "attn_q": (8, 8), "attn_k": (4, 8), "attn_v": (4, 8), "attn_output": (8, 8), "ffn_norm": (8,),
              "ffn_gate": (16, 8), "ffn_up": (16, 8), "ffn_down": (8, 16)}  # fmt: skip
    named = {f"blk.0.{name}": shape for name, shape in shapes.items()} | {"token_embd": (4, 8), "output_norm": (8,)}
    for name, shape in named.items():
        writer.add_tensor(f"{name}.weight", generator.standard_normal(shape, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
