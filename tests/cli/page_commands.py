"""The commands that a page of the documentation shows, the files that it shows, and the rows that it speaks of."""

import json
import re
import shlex
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MODELS = ("Qwen/Qwen3-0.6B", "meta-llama/Llama-3.1-8B")  # ids of the hub that commands name
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.S | re.M)
SHELLS = ("bash", "sh", "console", "shell", "")


class Line(NamedTuple):
    """One command: as it stands there, without its comment, as words, and its comment."""

    text: str
    words: list[str]
    comment: str

    @property
    def ours(self) -> bool:
        return self.words[0] == "treetune"


def lines(page: Path) -> list[Line]:
    """The commands of fenced blocks of a shell and of indented ones, in order; a line that ends in a backslash goes on."""
    text = page.read_text()
    blocks = [(one.start(), one[2], one[1]) for one in FENCE.finditer(text) if one[1] in SHELLS]
    bare = FENCE.sub(lambda one: re.sub(r"[^\n]", " ", one[0]), text)
    blocks += [(one.start(), one[0], "indented") for one in re.finditer(r"(?:^    \S.*\n)+", bare, re.M)]
    out = []
    for _, block, kind in sorted(blocks):
        for line in block.replace("\\\n", " ").splitlines():
            line = line.strip().removeprefix("$ ")
            if not line or line.startswith("#") or (kind in ("", "indented") and not re.match(r"(treetune|pip|python) ", line)):
                continue
            words = shlex.split(line, comments=True)
            out.append(Line(shlex.join(words), words, line.rpartition(" # ")[2] if " # " in line else ""))
    return out


def files(page: Path) -> dict[str, str]:
    """The files that a page shows: blocks whose first line is `# NAME`, or that stand behind a line that ends in "`NAME`:"."""
    text, out = page.read_text(), {}
    for one in FENCE.finditer(text):
        if one[1] in SHELLS:
            continue
        first = re.match(r"# ([\w/]+\.\w+)\b", one[2])
        before = re.search(r"`([\w/]+\.\w+)`:\s*$", text[: one.start()])
        if name := (first or before):
            out[name[1]] = one[2]
    return out


def run_folder() -> list[str]:
    """The names in the run folder that the README shows."""
    (text,) = re.findall(r"^```\nruns/sft-001/\n(.*?)^```", PAGES[0].read_text(encoding="utf-8"), re.S | re.M)
    return [line.split()[0] for line in text.splitlines()]


def rows() -> dict[str, list[dict]]:
    """A few rows of each kind under the names that pages use."""
    chats = [
        {"messages": [{"role": "user", "content": f"{i} + 1?"}, {"role": "assistant", "content": f"It is {i + 1}."}]} for i in range(12)
    ]
    pairs = [{"prompt": f"{i} + 1 =", "chosen": f" {i + 1}", "rejected": f" {i}!"} for i in range(12)]
    prompts = [{"prompt": [{"role": "user", "content": f"{i} + 1?"}], "answer": str(i + 1)} for i in range(8)]
    texts = [{"text": f"Line {i}. " + "The cat sat on the mat and looked at the moon. " * 4} for i in range(8)]
    judged = [{"prompt": f"{i // 2} + 1 =", "completion": f" {i // 2 + 1}" if i % 2 else f" {i}!", "label": bool(i % 2)} for i in range(12)]
    sums = [{"question": f"{i} + 1 is", "choices": [f" {i + 1}", f" {i}"], "label": 0} for i in range(4)]
    answers = [{"prompt": f"{i} + 1?", "ground_truth": f"It is {i + 1}."} for i in range(8)]
    return {
        "chats": chats, "rows": chats, "test": chats[:4], "held_out": chats[:3], "pairs": pairs, "prompts": prompts, "corpus": texts,
        "judged": judged, "sums": sums, "questions_and_answers": answers,
    }  # fmt: skip


def write_scene(folder: Path, page: Path, model: Path) -> None:
    """What a page takes for granted: rows, a reward, a run file, the examples, a folder MODEL, and then the files of the page itself."""
    for name, some in rows().items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    (folder / "MODEL").symlink_to(model)
    (folder / "examples").symlink_to(ROOT / "examples")
    (folder / "rewards.py").write_text(files(ROOT / "docs" / "online.md")["rewards.py"])
    theirs = "base_model: Qwen/Qwen3-0.6B\ndatasets: [{path: chats.jsonl, type: chat_template}]\nadapter: lora\noutput_dir: out\n"
    ours = "method: sft\nmodel: Qwen/Qwen3-0.6B\ndata: [chats.jsonl]\n"
    (folder / "run.yaml").write_text(theirs if page.stem == "axolotl" else ours)
    for name, text in files(page).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def write_models(home: Path, model: Path) -> None:
    """A cache of the hub with a tiny model under each id, and the known model of `treetune fetch`."""
    for name in MODELS:
        entry = home / "hub" / f"models--{name.replace('/', '--')}"
        (entry / "refs").mkdir(parents=True)
        (entry / "refs" / "main").write_text("tiny")
        (entry / "snapshots").mkdir()
        (entry / "snapshots" / "tiny").symlink_to(model)
    (home / "models").mkdir()
    (home / "models" / "smollm2-135m-instruct").symlink_to(model)
