"""`treetune runs`: a list, one run, several side by side, on the terminal and as a page."""

import re
import shutil

import pytest

from treetune.cli.commands import runs as command
from treetune.core import lock, owned


@pytest.fixture
def two(runs, here, kit):
    """Folders all/a and all/b: a finished run, and one with other options and losses whose process is gone."""
    one, other = shutil.copytree(runs / "lora", here / "all/a"), shutil.copytree(runs / "lora", here / "all/b")
    config = (other / "config.yaml").read_text()
    (other / "config.yaml").write_text(config.replace("lora_r: 4", "lora_r: 8"))
    status = (other / "status.json").read_text()
    (other / "status.json").write_text(status.replace('"finished"', '"running"'))
    text = (other / "metrics.jsonl").read_text()
    (other / "metrics.jsonl").write_text(re.sub(r'"eval/loss": [\d.]+', '"eval/loss": 0.5', text))
    return one, other


def test_a_list_has_state_steps_and_best_of_each(two, tune, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    held = lock.Lock(two[0])
    try:
        done = tune("runs", "all")
    finally:
        held.release()
    assert done.code == 0 and done.err == ""
    _, one, other, reason = done.out.splitlines()
    assert re.match(r"a +running +eval/loss \d\.\d+ +\d +2/2 +0:0\d +sft +model ", one)
    assert re.match(r"b +crashed +eval/loss 0.5 +0 +2/2 ", other) and reason.startswith("  b: its process ended between two steps")
    assert tune("runs", "all", "--sort", "best", "--metric", "eval/loss").out.splitlines()[2].startswith("b ")


def test_no_runs_and_no_folder(here, tune, kit):
    (here / "runs").mkdir()
    assert tune("runs").out == "no runs in runs\n"
    kit.refused(tune("runs", "nothing"), "there is no folder nothing")


def test_one_run_shows_the_curve_of_each_metric(two, tune, kit):
    done = tune("runs", "all/a")
    assert done.code == 0 and "finished" in done.out
    rows = {line.split()[0]: line.split() for line in done.out.splitlines() if line}
    losses = [record["train/loss"] for record in kit.metrics(two[0]) if "train/loss" in record]
    assert rows["train/loss"][-4:-2] == [f"{loss:.4g}" for loss in losses]
    assert set("▁█") <= set(rows["train/loss"][1]) and "learning_rate" in rows and "eval/loss" in rows
    kit.refused(tune("runs", "all/a", "--metric", "los"), "no run has the metric los", "train/loss")


def test_two_runs_show_what_differs_and_their_curves_in_one_frame(two, tune):
    done = tune("runs", "all/a", "all/b")
    assert done.code == 0
    assert re.search(r"^lora_r +4 +8 *$", done.out, re.M) and "sequence_len" not in done.out
    assert re.search(r"^eval/loss +a +█+ .* at \d *$\n +b +▁+ +0.5 +0.5 +0.5 at 0 *$", done.out, re.M)


def test_runs_of_two_methods_are_compared_by_the_options_that_both_have(two, here, tune):
    (here / "all/b/config.yaml").write_text("model: m\nmax_steps: 7\nbeta: 0.5\n")
    status = here / "all/b/status.json"
    status.write_text(status.read_text().replace('"sft"', '"grpo"'))
    out = tune("runs", "all/a", "all/b").out
    assert re.search(r"^method +sft +grpo *$", out, re.M) and re.search(r"^max_steps +\S+ +7 *$", out, re.M)
    assert not re.search(r"^(beta|sample_packing) ", out, re.M)


def test_a_terminal_without_unicode_has_curves_too(two, tune, monkeypatch):
    monkeypatch.setattr(command.Screen, "blocks", property(lambda self: False))
    out = tune("runs", "all/a", "all/b").out
    assert out.isascii() and re.search(r"^eval/loss +a +#+ ", out, re.M)


def test_the_page_has_the_table_what_differs_and_a_colour_for_each_run(two, here, tune, kit):
    done = tune("runs", "all/a", "all/b", "--html", "pages/both.html")
    assert done.code == 0 and done.out.endswith("wrote pages/both.html\n")
    text = (here / "pages/both.html").read_text()
    assert text.startswith(owned.PAGE) and "<script" not in text and "https:" not in text
    assert '<td class="state crashed">crashed</td>' in text and "<th>lora_r</th><td>4</td><td>8</td>" in text
    chart = re.search(r"<figcaption>eval/loss</figcaption>.*?</figure>", text, re.S)[0]
    assert len(set(re.findall(r'class="line (\w)"', chart))) == 2 and "> a " in chart and "> b 0.5<" in chart
    (here / "mine.html").write_text("my own")
    kit.refused(tune("runs", "all/a", "--html", "mine.html"), "mine.html exists")
    kit.refused(tune("runs", "all/a", "--html", "all/a/report.html"), "belongs to a run")


def test_a_list_may_be_a_page_too(two, here, tune):
    assert tune("runs", "all", "--html", "list.html").code == 0
    text = (here / "list.html").read_text()
    assert "its process ended" in text and text.count("<tr>") >= 3


def test_what_a_run_leaves_is_listed(run, tune):
    """The journal of a real run: its end, its lines."""
    log = (run / "run.log").read_text()
    assert re.search(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d info    length: 2 steps", log, re.M) and "saved: " in log
    assert re.match(r"r +finished ", tune("runs", ".").out.splitlines()[1])
