"""Marks of a template that a tokenizer does not know."""

from treetune.core.data import chat_templates, template_marks


class Letters:
    """A tokenizer of letters, with some marks of its own."""

    def __init__(self, *marks):
        self.marks = marks

    def encode(self, text, *, add_special_tokens=True):
        return [0] if text in self.marks else list(range(len(text)))


def test_marks_that_fall_apart_are_foreign_and_text_is_none():
    template = "<|im_start|>{{ m.role }}\n### Response: [1] <b> {{ m.content }}<|im_end|><｜end▁of▁sentence｜>[INST]"
    marks = template_marks.foreign(Letters("<|im_end|>"), template)
    assert marks == {"<|im_start|>": 12, "<｜end▁of▁sentence｜>": 19, "[INST]": 6}
    assert template_marks.warning(Letters("<|im_end|>", "<|im_start|>"), "x", "<|im_start|><|im_end|>") == ""


def test_the_warning_names_the_template_a_mark_and_how_many_more():
    text = template_marks.warning(Letters("<|im_end|>"), "mine", "<|im_start|><|a|><|b|>")
    assert text.startswith(
        "chat template mine is not one of this model's: it writes <|im_start|>, which its tokenizer splits into 12 tokens, and 2"
    )


def test_built_in_templates_have_marks_that_are_found():
    for name, mark in (("chatml", "<|im_start|>"), ("llama3", "<|start_header_id|>"), ("gemma", "<start_of_turn>")):
        assert mark in template_marks.foreign(Letters(), chat_templates.builtin_template(name)), name
