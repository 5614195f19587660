"""The table of a page: which prompts and evaluations it has, and what it shows of an answer."""

from treetune.core.run import answer_table, page


def answer(step, row, **more):
    return {"step": step, "row": row, "prompt": f"p{row}", "answer": f"a{row} at {step}", "tokens": 4, "stopped": True} | more


def test_a_prompt_is_a_row_and_an_evaluation_a_column_the_last_one_first():
    records = [answer(step, row, reference=f"r{row}") for step in (0, 4, 8) for row in (3, 7)]
    table = answer_table.build([{"step": 0, "prompt": "p", "answer": "a sample answer"}, *records], [0, 4, 8])
    assert table is not None and table.steps == [8, 4, 0] and [(row.number, row.reference) for row in table.rows] == [(3, "r3"), (7, "r7")]
    assert [one and one["answer"] for one in table.rows[1].answers] == ["a7 at 8", "a7 at 4", "a7 at 0"]
    assert answer_table.build([{"step": 0, "prompt": "p", "answer": "a"}], [0]) is None


def test_of_much_the_first_prompts_and_evaluations_all_through_the_run_are_shown():
    steps = range(0, 200, 10)
    table = answer_table.build((answer(step, row) for step in steps for row in range(60)), steps)
    assert table is not None and len(table.rows) == 50 and table.more_prompts == 10
    assert len(table.steps) == 8 and table.steps[0] == 190 and table.steps[-1] == 0 and table.more_evaluations == 12
    assert all(None not in row.answers for row in table.rows)


def test_the_page_escapes_texts_and_says_what_was_cut_off():
    table = answer_table.build([answer(0, 1, answer="<b>", stopped=False), answer(0, 2, answer="")], [0])
    html = page.part("{{ asked_table(asked) }}", asked=table)
    assert "&lt;b&gt;" in html and "<b>" not in html and "cut off after 4 tokens" in html and "no text at all" in html
    assert page.part("{{ asked_table(asked) }}", asked=None).strip() == ""
