"""Every option that names something has a mark that says what, and each kind is checked before anything is loaded.

A text option without a mark stands in TEXTS, so that a new one is decided on: a path without a mark would be read, and written over,
unchecked.
"""

import pytest

from treetune.cli import main, requirements
from treetune.core.config import marks, places, table
from treetune.core.config.table import Option

PLACES = {
    "rows": {"data", "val_data", "datasets", "test_datasets"},
    "model": {"model", "ref_model", "tokenizer_config"},
    "model shape": {"from_config"},
    "adapter": {"lora_model_dir", "adapter"},
    "checkpoint": {"resume"},
    "template": {"chat_template"},
    "function": {
        "format", "prompt_transform", "reward_funcs", "eval_reward_funcs", "rollout_func", "optimizer", "lr_scheduler", "loss", "advantage",
        "observer",
    },
    "program": {"vllm_python", "python"},
    "anything": {"file", "include_path", "merged", "path", "paths", "topic"},
    "run folder": {"output_dir"},
    "prepared rows": {"dataset_prepared_path"},
    "new folder": {"dest", "output"},
    "new file": {"output", "output_path"},
    "page": {"html"},
    "log": {"log"},
}  # fmt: skip
TEXTS = {
    # hub: branches, splits, ids
    "revision", "split", "name", "hub_model_id", "hub_revision", "repo", "push_dataset_to_hub",
    # rows: columns, roles, texts
    "text_column", "field_prompt", "roles_to_train", "default_system_message", "step_separator", "prompt", "system", "sample_prompt",
    # weights: regular expressions over paths of leaves; tokens
    "lora_target_modules", "lora_modules_to_save", "unfrozen_parameters", "tokens",
    # metrics.jsonl
    "field", "metric",
    # names of lm-eval's tasks, and what its chats begin with; names of metrics
    "tasks", "system_instruction", "lm_eval_tasks", "eval_causal_lm_metrics",
    # names, ids and keys in trackers
    "wandb_project", "wandb_entity", "wandb_name", "wandb_run_id", "mlflow_tracking_uri", "mlflow_experiment_name", "mlflow_run_name",
    "rendezvous",
    "comet_api_key", "comet_workspace", "comet_project_name", "comet_experiment_key", "trackio_project_name", "trackio_run_name",
    "trackio_space_id", "swanlab_project", "swanlab_workspace", "swanlab_experiment_name", "swanlab_description", "swanlab_api_key",
    # the server
    "vllm_server_host", "vllm_server_urls", "vllm_guided_decoding_regex", "host", "vllm_args",
}  # fmt: skip
OPTIONS = [(command, option) for command, one in main.COMMANDS.items() for option in table.options(one.config).values()]


def _of_texts(option: Option) -> bool:
    """Whether the option holds texts of any form, or mappings with such."""
    return option.of_mappings or option.single is str and option.pairs is None and (option.door is not None or not option.choices)


@pytest.mark.parametrize("command", main.COMMANDS)
def test_every_option_of_a_text_says_what_it_names_or_names_nothing(command):
    for option in table.options(main.COMMANDS[command].config).values():
        assert (option.place is not None) == (_of_texts(option) and option.name not in TEXTS), option.name


def test_every_place_is_that_of_the_table():
    found = {}
    for _, option in OPTIONS:
        if option.place is not None:
            found.setdefault(option.place.kind, set()).add(option.name)
    assert found == PLACES
    known = {option.name for _, option in OPTIONS}
    assert TEXTS <= known and {option.place.instead for _, option in OPTIONS if option.place is not None} - {""} <= known


def test_every_kind_is_checked():
    kinds = {option.place.kind for _, option in OPTIONS if option.place is not None}
    assert kinds - {*places.CHECKS, *requirements.MODELS} == {marks.ROW_SETS.kind, marks.ANY_PATH.kind}, "rows are checked with their split"
    outputs = {place for place in places.WRITTEN if place != marks.RUN_FOLDER}
    assert outputs == requirements.OUTPUTS.keys()
