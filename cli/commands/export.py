"""`treetune export`: a GGUF file for llama.cpp and Ollama from a model or a run, compared with it before it is kept."""

from pathlib import Path
from typing import Any

from treetune.cli.options.commands import Export
from treetune.cli.screen import Screen
from treetune.core.data import chat_templates, ollama
from treetune.core.data.ollama import Template
from treetune.core.run.errors import checking_input
from treetune.models import fetch, folder, gguf_export, gguf_tokenizer, gguf_writer, heads, hf, target
from treetune.models.gguf_export import Source
from treetune.models.target import Target
from treetune.models.tokenizer import adapter_folder


def run(config: Export, given: frozenset[str]) -> int:
    """Load, write, read back, compare, keep; the exit code."""
    screen, output = Screen(), Path(config.output)
    with checking_input():
        chosen = _choose(config)
        _check(chosen, screen)
        tokenizer = target.load_tokenizer(chosen, say=screen.line)
        template = _template(tokenizer)
        end = gguf_tokenizer.first_added(tokenizer, template.ending)
        model, lora = target.load_model(chosen, say=screen.line)
        source = Source(model, lora, tokenizer, chosen.name, end)
        file = f"{output.absolute().name}-{config.gguf}.gguf"
        with folder.writing(output) as part:
            written = gguf_export.write(part / file, source, config.gguf, _conversations(tokenizer), max_kl=config.max_kl)
            screen.line(gguf_export.describe(written))
            stops = {*target.stop_ids(chosen, tokenizer), *([] if end is None else [end])}
            text = ollama.modelfile(file, template.text, tokenizer.convert_ids_to_tokens(sorted(stops)))
            (part / "Modelfile").write_text(text, encoding="utf-8")
    screen.line(_describe(template))
    if (bos := gguf_tokenizer.unwritten_bos(tokenizer, _conversations(tokenizer))) is not None:
        screen.line(
            f"llama.cpp and Ollama begin conversations with {bos}, as the tokenizer does texts; the chat template does not write it"
        )
    screen.line(f"saved {output / file} and {output / 'Modelfile'}")
    return 0


def _choose(config: Export) -> Target:
    """The model, or the base model with the adapter of a folder or run."""
    is_adapter = (adapter_folder(config.path) / "adapter_config.json").is_file()
    if not is_adapter and config.model is not None:
        raise ValueError(f"--model names the base of an adapter, and {config.path} is none: leave it out")
    adapter = config.path if is_adapter else None
    model, named = (config.model or "", config.model is not None) if is_adapter else (config.path, True)
    return target.choose(adapter, model=model, named=named, revision=config.revision, dtype="float32", device="cpu")


def _check(chosen: Target, screen: Screen) -> None:
    """Refuse by the config.json, before weights are read."""
    path = fetch.resolve(chosen.model, say=screen.line, revision=chosen.revision)
    if not path.is_dir():
        return
    if heads.kind(path) is not None:
        raise ValueError(f"{chosen.model} is a reward model, which GGUF files here do not hold: name a language model")
    gguf_writer.check(*hf.read_config(path / "config.json"), chosen.model)


def _template(tokenizer: Any) -> Template:
    """Ollama's TEMPLATE of the tokenizer's chat template."""
    if not tokenizer.chat_template:
        return Template(None, "the tokenizer has no chat template", "")
    source = chat_templates.template_source(tokenizer)
    bos = tokenizer.bos_token if gguf_tokenizer.adds_bos(tokenizer) else ""
    template = ollama.template(chat_templates.renderer(tokenizer, None, None, {}), bos=bos)
    if chat_templates.writes_date(source):
        return template._replace(text=None, reason="the chat template writes the date")
    return template


def _conversations(tokenizer: Any) -> list[str]:
    """The probe conversations as texts, those that the chat template writes."""
    if not tokenizer.chat_template:
        return []
    render, texts = chat_templates.renderer(tokenizer, None, None, {}), []
    for messages in ollama.conversations():
        try:
            texts.append(render(messages, add_generation_prompt=True))
        except ValueError:
            continue
    return texts


def _describe(template: Template) -> str:
    if template.text is not None:
        return "Modelfile: its TEMPLATE renders the probe conversations as the chat template does"
    return f"Modelfile: no TEMPLATE ({template.reason}); Ollama takes its own for the file's chat template, if it knows it"
