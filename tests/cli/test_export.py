"""`treetune export`: models, runs and adapters as GGUF files with a Modelfile, and what is refused."""

import re
import shlex
from pathlib import Path

import pytest
import torch

from treetune.cli import main, parse
from treetune.core import lora, tree
from treetune.core.data import go_template
from treetune.models import gguf, hf, target


def kl(out):
    return float(re.search(r"mean KL (\S+) nats", out)[1])


@pytest.mark.more
def test_a_run_is_merged_and_exported(sft, tune, here, kit):
    assert sft("--output-dir", "run", "--max-steps", 3, "--learning-rate", 0.05, "--chat-template", "zephyr").code == 0
    done = tune("export", "run", "out/small", "--gguf", "f16")
    assert done.code == 0, done
    assert "tokenizer the same on" in done.out and "TEMPLATE renders the probe conversations" in done.out and kl(done.out) < 1e-4
    file = here / "out/small/small-f16.gguf"
    chosen = target.choose("run", model="", named=False, dtype="float32", device="cpu")
    model, low = target.load_model(chosen)
    wanted, base = dict(tree.items(lora.merge(model.params, low.tree, low.scale))), dict(tree.items(model.params))
    for path, leaf in tree.items(gguf.load(file).params):
        assert torch.equal(leaf, wanted[path].half().float() if leaf.ndim == 2 else wanted[path]), path
    assert not torch.equal(wanted["layers.0.q_proj"], base["layers.0.q_proj"])
    assert gguf.tokenizer(file).chat_template == (here / "run/adapter/chat_template.jinja").read_text()
    modelfile = (here / "out/small/Modelfile").read_text()
    text = re.search(r'TEMPLATE """(.*?)"""', modelfile, re.S)[1]
    talk = [{"role": "user", "content": "1 + 1?"}]
    rendered = go_template.render(text, {"System": "", "Messages": [{"Role": "user", "Content": "1 + 1?"}]})
    assert rendered == gguf.tokenizer(file).apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
    assert modelfile.startswith("FROM ./small-f16.gguf\n") and modelfile.endswith('PARAMETER stop "<|im_end|>"\n')
    again = tune("eval", "--model", file, "--data", kit.write_rows(here / "rows.jsonl", kit.chats(2)), "--sequence-len", 128)
    assert again.code == 0, again
    kit.refused(tune("export", "run", "out/small"), "out/small")


@pytest.mark.more
def test_models_are_exported_in_each_type(tiny, tune, kit, here):
    for kind, bound in (("f32", 0.0), ("q8_0", 2e-2)):
        done = tune("export", tiny.untied, kind, "--gguf", kind)
        assert done.code == 0 and kl(done.out) <= bound, done
    assert hf.load(here / "f32/f32-f32.gguf").params.keys() == hf.load(tiny.untied).params.keys()
    again = tune("export", here / "f32/f32-f32.gguf", "twice", "--gguf", "f32")
    assert again.code == 0 and (here / "twice/twice-f32.gguf").stat().st_size > 10_000
    done = tune("export", tiny.bare, "bare")
    assert done.code == 0 and "no TEMPLATE (the tokenizer has no chat template)" in done.out, done
    assert (here / "bare/Modelfile").read_text() == 'FROM ./bare-f16.gguf\nPARAMETER stop "<|im_end|>"\n'


def test_what_is_not_exported_leaves_nothing(tiny, tune, kit, here):
    kit.refused(tune("export", tiny.model, "out", "--gguf", "q8_0", "--max-kl", 1e-12), "more than max_kl 1e-12: not kept")
    kit.refused(tune("export", kit.write_experts(here / "experts"), "out"), "is a qwen3_moe model; GGUF files are written of llama")
    kit.refused(tune("export", tiny.model, "out", "--model", tiny.other), "--model names the base of an adapter")
    kit.refused(tune("export", here / "nothing", "out"), "nothing")
    assert not list(here.glob("*out*"))


def test_the_commands_of_the_page_parse():
    page = (Path(__file__).parents[2] / "docs" / "deployment.md").read_text()
    calls = [shlex.split(line, comments=True)[1:] for line in page.splitlines() if line.startswith("treetune ")]
    assert {command for command, *_ in calls} == {"merge", "serve", "export"}
    for command, *args in calls:
        parse.parse(command, main.COMMANDS[command].config, args)
