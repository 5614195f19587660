"""The Python and the files that pages show beside their commands run and are read as they stand."""

import json
import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
# Who runs the Python blocks of a page.
PYTHON = {
    "README": "tests/cli/test_readme.py", "data": "tests/cli/test_page_blocks.py", "evaluation": "tests/cli/test_pages.py",
    "extending": "tests/test_extending.py", "models": "tests/cli/test_page_blocks.py", "online": "tests/cli/test_online_docs.py",
    "python": "tests/cli/test_python_page.py",
    "runs": "tests/test_extending.py", "start": "tests/cli/test_start_page.py",
}  # fmt: skip
# Who reads the YAML blocks of a page; `page_commands.files` gives those with a name to tests/cli/test_pages.py.
YAML = {
    "data": "tests/cli/test_page_blocks.py", "evaluation": "tests/cli/test_pages.py", "extending": "tests/test_extending.py",
    "from_others": "tests/cli/test_page_blocks.py", "start": "tests/cli/test_start_page.py",
}  # fmt: skip


def blocks(stem: str, language: str) -> list[str]:
    page = ROOT / "README.md" if stem == "README" else ROOT / "docs" / f"{stem}.md"
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.S | re.M)


@pytest.mark.parametrize(("language", "known"), [("python", PYTHON), ("yaml", YAML)])
def test_every_block_has_a_test(language, known):
    stems = {page.stem for page in (ROOT / "docs").glob("*.md")} | {"README"}
    assert {stem for stem in stems if blocks(stem, language)} - {"recipes"} == known.keys()
    assert all((ROOT / name).is_file() for name in known.values())


def talk(name: str, *rows) -> None:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.more
def test_the_list_of_data_sets_trains(tune, tiny, here):
    (text,) = blocks("data", "yaml")
    turns = [{"who": "system", "said": "Be brief."}, {"who": "user", "said": "1 + 1?"}, {"who": "assistant", "said": "2"}]
    talk("chats.jsonl", {"talk": turns}, {"talk": turns[1:]})
    talk("notes.jsonl", {"text": "The cat sat."}, {"text": "It slept."})
    talk("held_out.jsonl", {"messages": [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "b"}]})
    Path("faq.csv").write_text("question,reply\nWhere?,Here.\n")
    Path("run.yaml").write_text(f"method: sft\nmodel: {tiny.model}\nsequence_len: 128\nlora_r: 4\nmax_steps: 2\noutput_dir: run\n{text}")
    done = tune("train", "run.yaml", "--sample-prompt=")
    assert done.code == 0 and (here / "run/adapter").is_dir(), done.err


def test_the_transform_reads_rows(tune, tiny, here):
    (text,) = blocks("data", "python")
    (here / "folder").mkdir()
    (here / "folder/file.py").write_text(text)
    talk("rows.jsonl", {"ask": "1 + 1?", "reply": "2"})
    entry = {"path": "rows.jsonl", "type": "folder/file.py:transform"}
    Path("run.yaml").write_text(yaml.safe_dump({"model": str(tiny.model), "sequence_len": 128, "datasets": [entry]}))
    done = tune("preprocess", "--config", "run.yaml", "--debug", 1)
    assert done.code == 0 and "[[2<|im_end|>]]" in done.out, (done.out, done.err)


def test_the_code_of_models_runs(tiny, here, monkeypatch):
    (text,) = blocks("models", "python")
    (here / "models").mkdir()
    (here / "models/smollm2-135m-instruct").symlink_to(tiny.model)
    monkeypatch.setenv("TREETUNE_HOME", str(here))
    exec(text, names := {})
    assert (here / "out/adapter_config.json").is_file() and callable(names["logprob"]) and callable(names["sample"])
    assert names["model"] is not None and names["lora"] is not None and names["ref"] is not None


@pytest.mark.more
def test_the_file_of_llama_factory_trains(tune, tiny, here):
    text = blocks("from_others", "yaml")[0]
    names = yaml.safe_load(text)
    talk("rows", *[{"instruction": f"Who is {i}?", "input": "", "output": f"I am {i}."} for i in range(4)])
    Path(names["data"][0]).write_text(json.dumps([json.loads(line) for line in Path("rows").read_text().splitlines()]))
    Path("run.yaml").write_text(text.replace(names["model"], str(tiny.long)))
    done = tune("train", "run.yaml", "--max-steps", 1)
    assert done.code == 0 and (here / names["output_dir"] / "adapter").is_dir(), done.err
