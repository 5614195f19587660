"""Model cards: what a run that left an adapter or a model says of itself, as facts in JSON and as a README.md for people and the hub.

The facts lie beside the weights, so that a merged model and a later upload have a card of the same run. A README.md that its owner has
edited is the owner's.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from treetune.core import fields, hub_repos, manifest
from treetune.core.run import published

CARD, FACTS = manifest.CARD, "treetune_card.json"
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
LABELS = {
    "adapter": "a LoRA adapter", "model": "a whole model", "merged": "a model with its adapter folded in",
}  # fmt: skip
UNKNOWN = "- nothing is known of its training: its adapter was made without a card"


def add(folder: Path, facts: Mapping[str, Any], *, place: str) -> None:
    """Write the card of a folder, and list it in its manifest; place: as of `text`."""
    entries = manifest.read(folder) if (folder / manifest.NAME).is_file() else None
    public = published.cleared(dict(facts))
    (folder / FACTS).write_text(json.dumps(public, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / CARD).write_text(text(public, place=place), encoding="utf-8")
    if entries is not None:
        manifest.write(folder, {name: entry for name, entry in entries.items() if name not in (CARD, FACTS)})


def read(folder: Path) -> dict[str, Any]:
    """The facts of a folder; {} where there are none. Errors: ValueError for a damaged file."""
    file = folder / FACTS
    if not file.is_file():
        return {}
    try:
        return dict(fields.mapping(json.loads(file.read_text(encoding="utf-8")), str(file)).values)
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file} is damaged ({error}): delete it, and the card says less") from error


def edited(folder: Path) -> bool:
    """Whether the README.md of a folder is not the one that was written with it."""
    listed = manifest.read(folder).get(CARD) if (folder / manifest.NAME).is_file() else None
    return (folder / CARD).is_file() and (listed is None or manifest.entry(folder / CARD) != listed)


def text(facts: Mapping[str, Any], *, place: str) -> str:
    """The README.md of these facts; place: the repository, or folder, that its commands name. Errors: ValueError for odd facts."""
    try:
        body = "\n\n".join(part for part in (_head(facts, place), _training(facts), _merge(facts), _use(facts, place)) if part)
    except (TypeError, AttributeError, KeyError) as error:
        raise ValueError(f"{FACTS} is not as treetune writes it ({type(error).__name__}: {error}): delete it") from error
    return f"{hub_repos.front_matter(_matter(facts))}\n{body}\n"


def _matter(facts: Mapping[str, Any]) -> dict[str, Any]:
    """What the hub reads. A licence is left to the owner, who knows those of the base and of the data."""
    adapter, base = facts["kind"] == "adapter", facts.get("base", "")
    names = [one["name"] for one in facts.get("datasets", ()) if one.get("hub")]
    scores = facts.get("scores", False)
    return {
        "base_model": base if facts.get("base_on_hub") and HUB_ID.fullmatch(base) else None,
        "library_name": "peft" if adapter else "transformers",
        "pipeline_tag": "text-classification" if scores else "text-generation",
        "datasets": [name for name in names if HUB_ID.fullmatch(name)],
        "tags": ["treetune", *([facts["method"]] if "method" in facts else []), *(["lora"] if adapter else [])],
    }


def _head(facts: Mapping[str, Any], place: str) -> str:
    title = place.rpartition("/")[2] if "/" in place else facts.get("run") or place
    trained = f", trained by `treetune {facts['method']}` ({facts['goal']})" if "method" in facts else ""
    revision = f", revision {facts['revision']}" if facts.get("revision") else ""
    base = f" Base model: `{facts['base']}`{revision}." if facts.get("base") else ""
    return f"# {title}\n\nThis is {LABELS[facts['kind']]}{trained}.{base}\n\nThe license is for its owner to name."


def _training(facts: Mapping[str, Any]) -> str:
    if "method" not in facts:
        return f"## Training\n\n{UNKNOWN}"
    parts = [f"## Data\n\n{_datasets(facts)}"]
    if metrics := facts.get("metrics"):
        columns = [name for name in metrics if metrics[name]]
        names = sorted({key for name in columns for key in metrics[name]} - {"step"})
        titles = [f"{name} (step {metrics[name]['step']})" for name in columns]
        head = f"| metric | {' | '.join(titles)} |\n|---|{'---|' * len(columns)}"
        rows = [f"| `{key}` | {' | '.join(_number(metrics[name].get(key)) for name in columns)} |" for key in names]
        parts.append("\n".join(["## Metrics\n", head, *rows]))
    versions = "\n".join(f"- {name} {value}" for name, value in facts.get("versions", {}).items())
    parts.append(f"## Config\n\n{facts['steps']} steps. `treetune train config.yaml` starts it again.\n\n{_block(facts['config'])}")
    parts.append(f"## Versions\n\n{versions}")
    return "\n\n".join(parts)


def _datasets(facts: Mapping[str, Any]) -> str:
    rows = [f"| `{one['name']}` | {one['use']} | {_code(one.get('sha256'))} |" for one in facts.get("datasets", ())]
    lines = ["| data set | for | sha256 of the file |", "|---|---|---|", *rows, "", *(f"- {text}" for text in facts.get("rows", ()))]
    prints = [f"- fingerprint of what was read, {name}: `{value}`" for name, value in facts.get("documents", {}).items() if value]
    return "\n".join([*(lines if rows else lines[4:]), *prints])


def _merge(facts: Mapping[str, Any]) -> str:
    if not (merge := facts.get("merge")):
        return ""
    rows = [
        f"The adapter is folded into the weights, which are saved in {merge['save_dtype']}. On a probe of {merge['probe_tokens']} tokens "
        f"the outputs differ from those of base and adapter by at most {merge['largest']:.2e}, {merge['mean']:.2e} on average; the mean "
        f"KL divergence is {merge['kl']:.2e} nats."
    ]
    if other := merge.get("unquantised"):
        rows.append(f"From the adapter on the base before it was quantised: at most {other['largest']:.2e}, KL {other['kl']:.2e} nats.")
    return "## Merge error\n\n" + " ".join(rows)


def _use(facts: Mapping[str, Any], place: str) -> str:
    base, name = facts.get("base") or "BASE", place.rpartition("/")[2]
    local = f"hf download {place} --local-dir {name}\n" if "/" in place else ""
    if facts.get("scores"):
        flag = "--adapter " if facts["kind"] == "adapter" else ""
        return f"## Use\n\n```bash\n{local}treetune score {flag}{name} --data answers.jsonl\n```"
    if facts["kind"] == "adapter":
        rank = facts.get("rank", 16)
        code = (
            "from peft import AutoPeftModelForCausalLM\nfrom transformers import AutoTokenizer\n\n"
            f'model = AutoPeftModelForCausalLM.from_pretrained("{place}")\ntokenizer = AutoTokenizer.from_pretrained("{place}")'
        )
        serve = f"vllm serve {base} --enable-lora --max-lora-rank {max(rank, 8)} --lora-modules {name}={place}"
        try_it = f"treetune chat --adapter {name}"
    else:
        code = (
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            f'model = AutoModelForCausalLM.from_pretrained("{place}")\ntokenizer = AutoTokenizer.from_pretrained("{place}")'
        )
        serve, try_it = f"vllm serve {place}", f"treetune chat --model {name}"
    return f"## Use\n\n```python\n{code}\n```\n\n```bash\n{serve}\n```\n\n```bash\n{local}{try_it}\n```"


def _block(config: str) -> str:
    return f"```yaml\n{config.rstrip()}\n```"


def _number(value: Any) -> str:
    return f"{value:.5g}" if isinstance(value, int | float) else "" if value is None else str(value)


def _code(value: str | None) -> str:
    return f"`{value}`" if value else ""
