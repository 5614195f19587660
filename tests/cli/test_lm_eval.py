"""`treetune lm-eval` on local tasks: the numbers of lm-eval's own backend on the merged model, and what it refuses."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from treetune.cli.commands import lm_eval as command

installed = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason=command.MISSING)

QUESTIONS = [
    {
        "question": f"{i} + {i * 7 % 11} is" + " surely" * (i % 4),
        "choices": [f" {i + j}" + "!" * (j * i % 3) for j in range(4)],
        "label": i % 4,
    }
    for i in range(10)
]
TASKS = {
    "choices": """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: label
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "letters": """
output_type: multiple_choice
doc_to_text: "{{question * 40}}\\n"
doc_to_choice: ["A", "B", "C", "D"]
doc_to_target: label
target_delimiter: ""
fewshot_split: test
metric_list: [{metric: acc}]
""",
    "unconditional": """
output_type: multiple_choice
doc_to_text: ""
doc_to_choice: "{{choices}}"
doc_to_target: label
target_delimiter: ""
metric_list: [{metric: acc}]
""",
    "rolling": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question * 40}}"
metric_list: [{metric: word_perplexity}]
""",
    "answers": """
output_type: generate_until
doc_to_text: "{{question * 9}}"
doc_to_target: "{{choices[label]}}"
generation_kwargs: {until: ["e", "\\u00e4", "!!"], max_gen_toks: 24, do_sample: false}
metric_list: [{metric: exact_match}]
""",
}


class Judged(NamedTuple):
    """What both backends say: results and samples by task."""

    ours: dict
    theirs: dict


@pytest.fixture(scope="module")
def tasks(kit, tmp_path_factory):
    """A folder of tasks over local rows."""
    root = tmp_path_factory.mktemp("tasks")
    rows = kit.write_rows(root / "rows.jsonl", QUESTIONS)
    for name, text in TASKS.items():
        data = f"task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {rows}}}}}\ntest_split: test\n"
        (root / f"{name}.yaml").write_text(data + text)
    return root


def theirs(path, tasks, names, *, max_length=None, **options):
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    backend = HFLM(str(path), device="cpu", dtype="float32", batch_size=1, max_length=max_length)
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    return lm_eval.simple_evaluate(backend, tasks=names, task_manager=manager, bootstrap_iters=0, **options)


@pytest.fixture(scope="module")
def judged(tiny, kit, tasks, tmp_path_factory):
    """All tasks by both: ours on an adapter over its base, theirs on the merged model."""
    from treetune.cli import main

    root = tmp_path_factory.mktemp("judged")
    adapter, merged, ours = (str(root / name) for name in ("run", "merged", "ours.json"))
    train = ("--model", tiny.untied, "--learning-rate", "0.03", "--warmup-steps", 0, "--sample-prompt=", "--output-dir", adapter)
    assert main.main(["sft", *kit.basics(tiny, *train)]) == 0
    assert main.main(["merge", adapter, merged]) == 0
    args = ["--tasks", ",".join(TASKS), "--include-path", str(tasks), "--adapter", adapter, "--batch-size", "3"]
    assert main.main(["lm-eval", *args, "--dtype", "float32", "--log-samples", "--output-path", ours]) == 0
    with open(ours) as file:
        return Judged(json.load(file), theirs(merged, tasks, list(TASKS)))


def flat(values):
    for value in values:
        if isinstance(value, list | tuple):
            yield from flat(value)
        else:
            yield value


@installed
@pytest.mark.more
@pytest.mark.parametrize("task", list(TASKS))
def test_numbers_are_those_of_the_merged_model_in_lm_evals_backend(judged, task):
    ours, theirs = judged
    numbers = {name: value for name, value in theirs["results"][task].items() if isinstance(value, float) and "stderr" not in name}
    assert numbers
    for name, value in numbers.items():
        assert ours["results"][task][name] == pytest.approx(value, rel=1e-5, abs=1e-5), name


@installed
@pytest.mark.more
@pytest.mark.parametrize("task", list(TASKS))
def test_each_answer_is_that_of_lm_evals_backend(judged, task):
    pairs = list(zip(judged.ours["samples"][task], judged.theirs["samples"][task], strict=True))
    assert len(pairs) == len(QUESTIONS)
    for ours, theirs in pairs:
        for mine, other in zip(flat(ours["resps"]), flat(theirs["resps"]), strict=True):
            if isinstance(other, float):
                assert float(mine) == pytest.approx(other, rel=2e-6, abs=2e-5)
            else:
                assert mine in (other, str(other))


@installed
@pytest.mark.more
def test_chats_examples_and_quantised_bases_without_merging(judged, tiny, tasks, tune, tmp_path):
    asked = ("--tasks", "letters", "choices", "--include-path", tasks, "--limit", 4, "--log-samples", "--output-path")
    chat = ("--apply-chat-template", "--system-instruction", "Add.", "--num-fewshot", 1, "--max-length", 200, "--dtype", "float32")
    assert tune("lm-eval", "--model", tiny.untied, *asked, "chat.json", *chat).code == 0
    other = theirs(
        tiny.untied, tasks, ["letters", "choices"], limit=4, apply_chat_template=True, system_instruction="Add.", num_fewshot=1,
        fewshot_random_seed=1234, max_length=200,
    )  # fmt: skip
    ours = json.loads((tmp_path / "chat.json").read_text())
    for task in ("letters", "choices"):
        assert len(ours["samples"][task]) == 4
        for mine, their in zip(ours["samples"][task], other["samples"][task], strict=True):
            assert mine["arguments"] == json.loads(json.dumps(their["arguments"], default=str))
            assert [float(v) for v in flat(mine["resps"]) if v not in ("True", "False", True, False)] == pytest.approx(
                [v for v in flat(their["resps"]) if not isinstance(v, bool)], rel=2e-6, abs=2e-5
            )
    assert tune("lm-eval", "--model", tiny.untied, "--quant", "nf4", *asked, "nf4.json").code == 0
    rough = json.loads((tmp_path / "nf4.json").read_text())
    assert rough["samples"]["choices"] != ours["samples"]["choices"] and rough["config"]["model_args"]["quant"] == "nf4"


@installed
def test_git_is_silent_where_the_folder_is_no_repository(here, capfd):
    command._harness()
    from lm_eval import evaluator

    assert evaluator.get_git_commit_hash() is None and capfd.readouterr().err == ""
    subprocess.run(["git", "init", "-q"], check=True)
    commit = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "commit", "-q", "--allow-empty", "-m", "a"]
    subprocess.run(commit, check=True)
    assert re.fullmatch("[0-9a-f]{7,}", evaluator.get_git_commit_hash() or "")


@installed
def test_requests_are_counted_before_they_are_done(tiny, kit):
    from lm_eval.api.instance import Instance

    from treetune.cli import lm_eval_model
    from treetune.models import policy

    start, told = policy.load(str(tiny.model), adapter=None), []
    lm = lm_eval_model.PolicyLM(policy.current(start)[0], kit.tokenizer(), progress=lambda more, expected=0: told.append((more, expected)))
    asked = [Instance("loglikelihood", {}, ("a b", text), 0) for text in (" a", " b", " a b")]
    lm.loglikelihood(asked)
    lm.generate_until([Instance("generate_until", {}, ("a b", {"max_gen_toks": 2}), 0)])
    assert told[0] == (0, 3) and (0, 1) in told and sum(more for more, _ in told) == 4 == sum(expected for _, expected in told)


@installed
def test_an_answer_ends_before_any_token_that_ends_it(tiny, kit):
    """Also where that is a plain token, whose text decoding keeps."""
    from types import SimpleNamespace

    from treetune.cli.lm_eval_model import PolicyLM
    from treetune.models import decode, hf

    tokenizer = kit.tokenizer()
    ids = tokenizer.encode("yes!", add_special_tokens=False)
    lm = PolicyLM(hf.load(tiny.model), tokenizer, stop=[ids[-1]])
    request = SimpleNamespace(args=("a", {"until": ["zz"], "max_gen_toks": 8}))
    with pytest.MonkeyPatch.context() as patch:
        samples = SimpleNamespace(tokens=torch.tensor([ids]), lens=torch.tensor([len(ids)]))
        patch.setattr(decode, "sample", lambda *args, **options: samples)
        assert lm.generate_until([request]) == ["yes"]


@installed
def test_a_system_message_that_no_chat_would_have_is_refused(kit):
    tokenizer = kit.tokenizer()
    chat = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    tokenizer.chat_template = chat
    command._check_system(tokenizer)
    silent = chat.replace("messages %}{{", "messages if m.role != 'system' %}{{")
    for template in (silent, "{{ raise_exception('no system role') }}"):
        tokenizer.chat_template = template
        with pytest.raises(ValueError, match="writes no system message: leave out --system-instruction"):
            command._check_system(tokenizer)


@installed
@pytest.mark.slow  # reads lm-eval's index of all tasks
def test_unknown_tasks_are_named(tune, tiny, tasks):
    done = tune("lm-eval", "--model", tiny.model, "--include-path", tasks, "--tasks", "choises")
    assert done.code == 2 and "lm-eval knows no task 'choises' (did you mean choices?)" in done.err


@installed
def test_texts_stop_where_a_stop_text_is_written(kit):
    from treetune.cli.lm_eval_model import StopTexts

    tokenizer = kit.tokenizer()
    stops, rows = StopTexts(tokenizer, ["ab", ""], 2), torch.tensor([0, 1])
    drawn = zip(*(tokenizer.encode(text) for text in ("xab", "abb")), strict=True)
    assert [stops(rows, torch.tensor(pair)).tolist() for pair in drawn] == [[False, False], [False, True], [True, True]]


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ((), "name at least one task"),
        (("--tasks", "a", "--include-path", "nowhere"), "nowhere is no folder"),
        (("--tasks", "a", "--log-samples"), "output_path is not given"),
    ],
)
@installed
def test_what_cannot_be_asked_is_refused(tune, args, said):
    done = tune("lm-eval", *args)
    assert done.code == 2 and said in done.err


def test_without_the_package_one_line_names_the_extra(tune, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.evaluator", None)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    done = tune("lm-eval", "--tasks", "a")
    assert done.code == 2 and "pip install 'treetune[eval]'" in done.err


def test_benchmarks_after_training_are_those_of_the_command_on_the_run(kit, sft, tune, here, monkeypatch):
    """Found before training where a task is not there; asked of what was saved, into the run folder."""
    kit.refused(sft("--lm-eval-tasks", "nothing", "--output-dir", "run"), "lm-eval knows no task 'nothing'")
    assert not (here / "run").exists()
    asked = []
    monkeypatch.setattr(command, "check", lambda tasks: asked.append(tasks))
    monkeypatch.setattr(command, "run", lambda config, given: asked.append((config, given)) or 0)
    assert sft("--lm-eval-tasks", "piqa", "--lm-eval-batch-size", 3, "--output-dir", "run").code == 0
    assert asked[0] == ("piqa",)
    config, given = asked[1]
    assert (config.adapter.adapter, config.tasks, config.batch_size) == (str(Path("run") / "adapter"), ("piqa",), 3)
    assert config.output_path == str(Path("run") / "lm_eval.json") and not given
