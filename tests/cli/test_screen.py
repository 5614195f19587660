"""What a person sees: everything fits the terminal, nothing takes long in silence, and plain output stays plain lines."""

import io
import re
import threading
import time

import pytest
from rich.cells import cell_len
from rich.console import Console

from treetune.cli import bar as bar_module
from treetune.cli import counter, screen
from treetune.core.run import lines

ITEMS = ["loss 0.4598", "margins 0.539", "accuracies 1.000", "grad 2.62", "lr 5.0e-05", "7027 tok/s", "0.4 GiB"]


def drawn(width, what):
    console = Console(width=width, record=True, file=io.StringIO(), force_terminal=True, legacy_windows=False)
    console.print(what)
    return console.export_text().rstrip("\n").split("\n")


def bar(done=12, total=400, eta_s=95.0, items=ITEMS):
    one = bar_module.Bar(total, done)
    one.eta_s, one.items = eta_s, items
    return one


@pytest.mark.parametrize("width", [40, 60, 80, 100, 200])
def test_steps_bar_and_both_times_fit_every_width(width):
    lines = drawn(width, bar())
    assert len(lines) == 2 and all(cell_len(line.rstrip()) <= width - 1 for line in lines)
    assert re.match(r"step 12/400 +[━╸╺ ]+ 0:0\d eta 1:35 *$", lines[0])
    assert lines[1].startswith("loss 0.4598")
    assert cell_len(lines[1].rstrip()) <= width - bar_module.ECHO


def test_narrow_screens_show_fewer_metrics_and_never_a_part_of_one():
    for width in range(20, 120):
        shown = drawn(width, bar())[1].rstrip()
        assert shown.split("  ") == ITEMS[: len(shown.split("  "))], width
    assert drawn(140, bar())[1].rstrip().split("  ") == ITEMS


def test_long_runs_still_show_their_times_at_40_columns():
    line = drawn(40, bar(done=123456, total=200000, eta_s=100 * 3600.0))[0]
    assert "123456/200000" in line and "eta 100:00:00" in line


def test_what_is_going_on_takes_the_place_of_the_metrics_with_its_time():
    one = bar()
    one.activity = bar_module.Activity("evaluating what is held out")
    one.activity.start -= 75
    lines = drawn(80, one)
    assert len(lines) == 2 and re.search(r"evaluating what is held out  1:1[56]", lines[1])
    one.activity = bar_module.Activity("评估" * 60)
    assert all(cell_len(line) <= 40 for line in drawn(40, one))


def plain(monkeypatch, patience=10):
    monkeypatch.setattr(screen, "PATIENCE_S", patience)
    one = screen.Screen()
    one.console = Console(file=io.StringIO(), width=80, soft_wrap=True)
    return one


def test_without_a_terminal_only_what_takes_long_is_told(monkeypatch):
    one = plain(monkeypatch)
    with one.busy("sampling"):
        pass
    assert one.console.file.getvalue() == ""
    one, told = plain(monkeypatch, patience=0.0), threading.Event()
    monkeypatch.setattr(one, "line", lambda text: told.set() if text == "sampling ..." else None)
    with one.busy("sampling"):
        assert told.wait(60)


def on_terminal():
    one = screen.Screen()
    one.console = Console(file=io.StringIO(), width=80, force_terminal=True, color_system=None, legacy_windows=False, soft_wrap=True)
    return one


def test_on_a_terminal_a_spinner_stands_alone_or_under_the_bar():
    one = on_terminal()
    with one.busy("answering the sample prompt"):
        assert one.live is not None
    assert one.live is None and "answering the sample prompt" in one.console.file.getvalue()
    one.start(10, 0, {})
    with one.busy("sampling completions"):
        assert one.bar.activity is not None
    one.stop()
    assert one.live is None and one.bar is None and "step 0/10" in one.console.file.getvalue()


def test_a_signal_s_line_stands_above_the_bar():
    one = on_terminal()
    one.start(10, 3, {})
    one.interrupt("SIGINT: saving after this step")
    until = time.monotonic() + 60
    while "saving" not in one.console.file.getvalue() and time.monotonic() < until:
        time.sleep(0.01)
    one.stop()
    text = re.sub(r"\x1b\[[\d?]*[a-zA-Z]", "", one.console.file.getvalue())
    assert "! SIGINT: saving after this step\n" in text
    assert text.rindex("step 3/10") > text.index("SIGINT"), "the bar is drawn again below"


def test_without_a_bar_a_signal_s_line_goes_to_stderr(capfd):
    screen.Screen().interrupt("SIGTERM: saving")
    assert capfd.readouterr().err == "! SIGTERM: saving\n"
    screen.Screen(quiet=True).interrupt("SIGTERM: saving")
    assert capfd.readouterr().err == ""


def record(step, **more):
    return {
        "step": step,
        "train/loss": 0.5,
        "grad_norm": 1.0,
        "learning_rate": 2e-5,
        "supervised_tokens_per_second": 10.0,
        "memory_gib": 0.4,
        "step_seconds": 5.0,
    } | more


def test_plain_lines_hold_all_metrics_in_one_line_each(monkeypatch):
    one = plain(monkeypatch)
    one.start(2, 0, {})
    one.step(record(1))
    one.step(record(2, reward=0.25, memory_gib=float("nan")))
    assert one.console.file.getvalue().splitlines() == [
        "step    1/2  loss 0.5000  grad 1.00  lr 2.0e-05  10 tok/s  0.4 GiB  eta 0:05",
        "step    2/2  grad 1.00  lr 2.0e-05  10 tok/s  eta 0:00",
    ]
    assert "\x1b" not in one.console.file.getvalue()


def test_escape_sequences_in_lines_and_tables_are_written_out(monkeypatch):
    one = plain(monkeypatch)
    one.line("\x1b[2J gone")
    one.table("", {"saved": "\x1b]0;x\x07"})
    assert "\\x1b[2J gone" in one.console.file.getvalue() and not set("\x1b\x07") & set(one.console.file.getvalue())


def test_a_table_of_facts_stands_before_the_first_step_and_commands_alone_in_their_lines(monkeypatch):
    one = plain(monkeypatch)
    one.start(2, 0, {"model": "tiny"})
    one.summary({"done": "step 2 of 2", "try it": "treetune chat --adapter " + "long/" * 30}, [])
    lines = [line.split() for line in one.console.file.getvalue().splitlines()]
    assert lines == [["model", "tiny"], ["done", "step", "2", "of", "2"], ["try", "it", "treetune", "chat", "--adapter", "long/" * 30]]


def test_an_evaluation_shows_its_goal_and_the_method_s_own_metrics(monkeypatch):
    one = plain(monkeypatch)
    one.metrics = lines.Metrics(("rewards/margins", "reward"), goal="reward")
    one.evaluation({"step": 3, "eval/seconds": 1.0, "eval/reward": 0.25, "eval/rewards/margins": 2.0})
    assert one.console.file.getvalue() == "held out, step 3: reward 0.2500  margins 2.000\n"


def traced(width, height=40, count=300, plain=False):
    console = Console(width=width, height=height, record=True, file=io.StringIO(), force_terminal=True, legacy_windows=False)
    one = bar()
    for step in range(count):
        one.trace("loss", step, 300.0 - step)
        if step % 100 == 0:
            one.trace("held out loss", step, float(step))
    console.print(one)
    return console.export_text().rstrip("\n").split("\n")


def test_curves_stand_under_the_metrics_where_there_is_room():
    lines = traced(100)
    assert len(lines) == 3 and re.match(r"loss █[█▇▆▅▄▃▂▁]{22}▁ 1  held out loss ▁▅█ 200 *$", lines[2])
    assert len(traced(59)) == 2 and len(traced(100, height=11)) == 2, "a small terminal keeps its lines for the run's"
    assert all(cell_len(line.rstrip()) <= width - bar_module.ECHO for width in range(60, 120, 7) for line in traced(width)[1:])


def test_a_curve_keeps_few_points_of_a_long_run():
    one = bar_module.Trace("loss")
    for step in range(100_000):
        one.add(step, float(step))
    assert len(one.points) <= bar_module.POINTS and one.points[-1][0] > 99_000
    assert sorted(one.points) == one.points
    assert re.fullmatch(r"loss ▁+▂+▃+▄+▅+▆+▇+█+ 9\.\d+e\+04", one.draw(plain=False))


def test_a_run_on_a_terminal_draws_its_curve():
    one = on_terminal()
    one.start(10, 0, {})
    for step in (1, 2, 3):
        one.step({"step": step, "train/loss": 3.0 - step, "grad_norm": 1.0, "learning_rate": 1e-4, "step_seconds": 1.0, "memory_gib": 0.1})
    assert "".join(drawn(100, one.bar)).count("loss █▅▁ 0") == 1
    one.stop()


def test_a_count_without_a_terminal_is_a_line_that_comes_ever_more_rarely():
    times, said = iter([0, 0, 9, 10, 15, 19, 200, 219, 250]), []
    count = counter.by_lines(said.append, "requests", lambda: next(times))
    count(0, 40)
    for _ in range(7):
        count(5)
    assert said == ["10 of 40 requests", "25 of 40 requests", "35 of 40 requests"]


def test_a_count_on_a_terminal_says_of_how_many():
    console = Console(width=80, file=io.StringIO(), force_terminal=True, legacy_windows=False)
    with counter.on_terminal(console, "requests") as count:
        count(0, 30)
        count(12)
    assert "12 of 30 requests" in console.file.getvalue()
