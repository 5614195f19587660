"""The examples and the pages of documentation that come with the package, in a checkout and in an installed one. Imports no torch."""

import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
COPIED = ("*.yaml", "*.py", "*.ipynb", "*.md", "*.jsonl", "*.svg", "*.png", "LICENSE*")
# What a topic is called elsewhere: the page that has it.
PAGES = {
    "sft": "training", "full": "training", "lora": "training", "pretrain": "training", "pretraining": "training",
    "finetune": "training", "dpo": "preferences", "kto": "preferences", "orpo": "preferences", "simpo": "preferences",
    "cpo": "preferences", "reward": "preferences", "prm": "preferences", "preference_tuning": "preferences",
    "reward_modelling": "preferences", "grpo": "online", "rl": "online", "vllm": "online", "datasets": "data", "config": "runs",
    "qlora": "memory", "quantization": "memory", "fsdp": "distributed", "new_model_support": "models",
    "model_architectures": "models", "trackers": "tracking", "installation": "install", "quickstart": "start", "getting_started": "start",
    "export": "deployment", "gguf": "deployment", "ollama": "deployment", "merge": "deployment",
    "trl": "from_others", "unsloth": "from_others", "llama_factory": "from_others", "profiler": "profiling", "hyperparameters": "methods",
}  # fmt: skip


def topics() -> dict[str, str]:
    """{name of a page: its first line, without the mark of a heading}."""
    return {file.stem: file.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ") for file in sorted((ROOT / "docs").glob("*.md"))}


def page(topic: str) -> str:
    """The text of a page, by its name or by a topic on it. Errors: ValueError for a topic that no page has."""
    word = topic.lower().replace("-", "_")
    name = word if word in topics() else PAGES.get(word)
    if name is None:
        raise ValueError(f"there is no page about {topic}; there are {', '.join(topics())}")
    return (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")


def copy(name: str, dest: Path) -> int:
    """Copy `examples` or `docs` to a folder that is not there yet; the number of files."""
    sources = {"": ROOT / name}
    if name == "examples":
        samples = ROOT / "samples"
        sources["data"] = samples if samples.is_dir() else ROOT / "examples" / "data"
    files = {
        dest / below / file.relative_to(folder): file
        for below, folder in sources.items()
        for pattern in COPIED
        for file in folder.rglob(pattern)
        if "__pycache__" not in file.parts
    }
    for target, file in files.items():
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)
    return len(files)
