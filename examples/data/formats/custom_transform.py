"""A transform of one's own: rows of custom.jsonl to preference rows. Named custom_transform.pairs, or custom_transform.py:pairs."""


def pairs(cfg, **kwargs):
    """Called once; gives the function for the rows, and which columns go."""

    def transform_fn(example, tokenizer=None):
        return {"prompt": example["question"] + "\n", "chosen": example["good"], "rejected": example["bad"]}

    return transform_fn, {"remove_columns": "__all__"}
