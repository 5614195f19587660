"""Bits flipped at random in what treetune wrote: refused in one line, or nothing that is read has changed. Never other weights."""

import random
import shutil
import sys

import pytest
import torch

from treetune.core import ckpt, manifest, tree
from treetune.core.state import TrainState
from treetune.models import heads, hf, target
from treetune.models import tokenizer as tokenizers

FLIPS = 40  # of each kind; the slow test takes 1,000


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """Where the run is kept that every test takes a copy of."""
    return tmp_path_factory.mktemp("kept") / "run"


@pytest.fixture
def adapter(sft, here, kept):
    """An adapter with whole weights and a tokenizer of its own, and the checkpoint beside it."""
    if not kept.exists():
        assert sft("--output-dir", "run", "--tokens", "<a>", "--sample-prompt=").code == 0
        shutil.move(here / "run", kept)
    return shutil.copytree(kept, here / "run") / "adapter"


@pytest.fixture
def model(tiny, here):
    """A model as treetune writes it."""
    base = hf.load(tiny.model)
    hf.save(here / "saved", base, tokenizer=hf.tokenizer(tiny.model), max_shard_bytes=10_000)
    return here / "saved"


@pytest.fixture
def reward(tiny, here):
    """A reward model."""
    base = hf.load(tiny.model)
    heads.save(here / "reward", base, heads.init(base.cfg, 1, bias=False, seed=1), tokenizer=hf.tokenizer(tiny.model))
    return here / "reward"


def words(tokenizer):
    return tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template, sorted(map(str, tokenizer.special_tokens_map.items()))


def read_model(path):
    found = hf.load(path)
    return found.cfg, ckpt.digest(found.params), words(hf.tokenizer(path)), hf.generation_config(path)


def read_reward(path):
    found, head = heads.load(path)
    return found.cfg, ckpt.digest(found.params), ckpt.digest(head), words(hf.tokenizer(path)), heads.kind(path)


def adapter_reader(tiny):
    def read(path):
        chosen = target.Target(str(tiny.model), dtype="float32", device="cpu", adapter=str(path))
        base, used = target.load_model(chosen, say=print)
        return (
            ckpt.digest(base.params),
            ckpt.digest(used.tree),
            used.scale,
            words(tokenizers.load_tokenizer(tiny.model, adapter_path=str(path))),
        )

    return read


def checkpoint_reader(kit, path):
    template = kit.tensors(path / "state.safetensors")

    def read(path):
        parts = tree.from_items((name, torch.zeros_like(leaf)) for name, leaf in template.items())
        state = TrainState(parts["params"], {}, parts["opt"], parts.get("extra", {}), torch.tensor(0))
        loaded, meta = ckpt.load(path, state)
        return ckpt.digest({"params": loaded.params, "opt": loaded.opt}), int(loaded.step), meta

    return read


def flip(file, bit):
    data = bytearray(file.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    file.write_bytes(data)


def wrong_in_silence(root, read, count, seed):
    """What is read after each of `count` flips, one at a time, anywhere below `root`: (flips that changed nothing, wrong ones)."""
    rng, whole = random.Random(seed), read(root)
    files = sorted(path for path in root.rglob("*") if path.is_file())
    same, wrong = 0, []
    for number in range(count):
        file = files[number % len(files)] if number % 2 else rng.choices(files, [path.stat().st_size for path in files])[0]
        bit = rng.randrange(file.stat().st_size * 8)
        flip(file, bit)
        try:
            if read(root) == whole:
                same += 1
            else:
                wrong.append((file.name, bit))
        except ValueError as error:
            assert "\n" not in str(error) and str(root) in str(error), error
        flip(file, bit)
    assert read(root) == whole
    return same, wrong


def places(request, kit, tiny):
    """(folder, how it is read) of each kind of folder that treetune writes."""
    adapter = request.getfixturevalue("adapter")
    checkpoint = adapter.parent / "checkpoints/step_000002"
    return {
        "checkpoint": (checkpoint, checkpoint_reader(kit, checkpoint)),
        "adapter": (adapter, adapter_reader(tiny)),
        "model": (request.getfixturevalue("model"), read_model),
        "reward": (request.getfixturevalue("reward"), read_reward),
    }


def check_flips(request, kit, tiny, count):
    for seed, (kind, (root, read)) in enumerate(places(request, kit, tiny).items()):
        same, wrong = wrong_in_silence(root, read, count, seed)
        assert wrong == [], f"{kind}: flips that were not told"
        assert same < count / 4, f"{kind}: flips of white space in a manifest change nothing, all others are told"


def test_flipped_bits_are_told(request, kit, tiny):
    check_flips(request, kit, tiny, FLIPS)


@pytest.mark.slow
def test_a_thousand_flipped_bits_of_each_kind_are_told(request, kit, tiny):
    check_flips(request, kit, tiny, 1000)


def cut(file, rng):
    file.write_bytes(file.read_bytes()[: rng.randrange(file.stat().st_size)])


def zero(file, rng):
    data = bytearray(file.read_bytes())
    start = rng.randrange(len(data) - 8)
    data[start : start + 8] = bytes(byte ^ 255 if byte == 0 else 0 for byte in data[start : start + 8])
    file.write_bytes(data)


def remove(file, rng):
    file.unlink()


@pytest.mark.parametrize("damage", [cut, zero, remove])
def test_cut_overwritten_and_missing_files_are_told(damage, request, kit, tiny):
    """Every file of every kind of folder; a manifest that is missing is told by a checkpoint, and elsewhere accepts what is there."""
    rng = random.Random(1)
    for kind, (root, read) in places(request, kit, tiny).items():
        # A card is for people, who may edit it.
        for file in sorted(path for path in root.rglob("*") if path.is_file() and path.name != manifest.CARD):
            whole = file.read_bytes()
            damage(file, rng)
            if damage is remove and file.name == manifest.NAME and kind != "checkpoint":
                read(root)
            else:
                with pytest.raises(ValueError, match=str(root)):
                    read(root)
            file.write_bytes(whole)


def test_swapped_files_are_told(request, kit, tiny):
    shards = sorted(request.getfixturevalue("model").glob("*.safetensors"))
    one, other = shards[0].read_bytes(), shards[1].read_bytes()
    shards[0].write_bytes(other)
    shards[1].write_bytes(one)
    with pytest.raises(ValueError, match="is not as it was written|has .* bytes"):
        hf.load(shards[0].parent)


COMMANDS = {
    "model": ("*.safetensors", "saved", ["generate", "hi", "--max-new-tokens", 2, "--model", "saved"]),
    "eval": ("tokenizer.json", "saved", ["eval", "--model", "saved", "--data", "DATA", "--sequence-len", 128]),
    "sft": ("config.json", "saved", ["sft", "--model", "saved", "--data", "DATA", "--sequence-len", 128, "--max-steps", 1]),
    "preprocess": ("tokenizer_config.json", "saved", ["preprocess", "--model", "saved", "--data", "DATA", "--sequence-len", 128]),
    "template": ("chat_template.jinja", "saved", ["generate", "hi", "--model", "saved"]),
    "generation": ("generation_config.json", "saved", ["generate", "hi", "--model", "saved"]),
    "adapter": ("adapter_model.safetensors", "run/adapter", ["generate", "hi", "--adapter", "run"]),
    "merge": ("adapter_config.json", "run/adapter", ["merge", "run", "merged"]),
    "start": ("tokenizer.json", "run/adapter", ["sft", "--lora-model-dir", "run", "--data", "DATA", "--max-steps", 1]),
    "score": ("model.safetensors", "reward", ["score", "reward", "--data", "DATA"]),
    "serve": ("adapter_model.safetensors", "run/adapter", ["serve", "--adapter", "run", "--model", "saved", "--python", sys.executable]),
    "serve model": ("tokenizer.json", "saved", ["serve", "--model", "saved", "--python", sys.executable]),
}  # fmt: skip


@pytest.mark.parametrize("what", COMMANDS)
def test_every_command_refuses_a_damaged_folder(what, adapter, model, reward, tiny, kit, here, tune):
    name, folder, args = COMMANDS[what]
    file = sorted((here / folder).glob(name))[0]
    data = file.read_bytes().replace(b"a", b"b", 1) if file.suffix != ".safetensors" else file.read_bytes()[:-1] + b"\x7f"
    file.write_bytes(data)
    before = kit.listing(here)
    done = tune(*(tiny.chat if arg == "DATA" else arg for arg in args))
    kit.refused(done, file.name)
    assert kit.listing(here) == before


def test_an_edit_is_accepted_by_deleting_the_manifest(model, kit, tune):
    (model / "generation_config.json").write_text('{"eos_token_id": 5}')
    kit.refused(tune("generate", "hi", "--model", model), "generation_config.json", f"delete {model / manifest.NAME}")
    (model / manifest.NAME).unlink()
    assert tune("generate", "hi", "--model", model, "--max-new-tokens", 2).code == 0


def test_other_libraries_load_folders_with_a_manifest(adapter, model, reward, tiny):
    import peft
    import transformers

    for kind, path in (("AutoModelForCausalLM", model), ("AutoModelForSequenceClassification", reward)):
        _, report = getattr(transformers, kind).from_pretrained(path, output_loading_info=True)
        assert not report["missing_keys"] and not report["unexpected_keys"]
    base = transformers.AutoModelForCausalLM.from_pretrained(tiny.model)
    base.resize_token_embeddings(len(transformers.AutoTokenizer.from_pretrained(adapter)))
    assert peft.PeftModel.from_pretrained(base, adapter).peft_config
