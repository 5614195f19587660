"""Keys of axolotl's files, one at a time: what they become, what is refused, and what is said."""

import functools
import http.server
import json
import re
import threading

import pytest
import yaml

from treetune.cli import main, run_file
from treetune.cli.axolotl import keys, translate, values
from treetune.cli.methods import METHODS
from treetune.core.config import table


def read(here, text: str, method: str | None = None) -> run_file.RunFile:
    (here / "a.yaml").write_text(text)
    method = method or run_file.method_of(run_file.load("a.yaml"), "a.yaml")
    return run_file.read("a.yaml", method, table.options(METHODS[method].config))


BASE = "base_model: m\n"
CASES = [
    ("adapter: lora\nload_in_4bit: true\n", {"adapter": "lora", "quant": "nf4", "quantize_moe_experts": False}),
    ("adapter: qlora\nload_in_4bit: true\nbnb_config_kwargs: {bnb_4bit_use_double_quant: false, bnb_4bit_quant_type: fp4}\n",
     {"adapter": "qlora", "quant": "fp4", "quant_double": False}),
    ("adapter: lora\nload_in_8bit: true\nquantize_moe_experts: true\n", {"quant": "int8", "quantize_moe_experts": True}),
    ("qat: {weight_dtype: int4, group_size: 64}\n", {"qat": "int4"}),
    ("qat: {weight_dtype: float8_e4m3fn}\n", {"qat": "fp8"}),
    ("learning_rate: 1e-4\n", {"adapter": "none", "sample_packing": False, "val_set_size": 0.0, "micro_batch_size": 1,
                               "gradient_accumulation_steps": 1, "learning_rate": 1e-4}),
    ("bf16: auto\n", {"dtype": "auto"}), ("bf16: true\n", {"dtype": "bfloat16"}), ("bf16: full\n", {"dtype": "bfloat16"}),
    ("fp16: true\nbf16: false\n", {"dtype": "float16"}), ("bf16: false\nfp16: false\n", {"dtype": "float32"}),
    ("torch_dtype: torch.bfloat16\nbf16: auto\n", {"dtype": "bfloat16"}),
    ("optimizer: adamw_torch_fused\n", {"optimizer": "adamw"}), ("optimizer: adamw_bnb_8bit\n", {"optimizer": "adamw_8bit"}),
    ("lr_scheduler: constant_with_warmup\n", {"lr_scheduler": "constant"}),
    ("adapter: lora\nlora_target_linear: true\nlora_target_modules: [q_proj]\n", {"lora_target_modules": ["all-linear"]}),
    ("adapter: lora\nlora_target_modules: 'a.(q|k)_proj'\n", {"lora_target_modules": ["^(?:a.(q|k)_proj)$"]}),
    ("adapter: lora\nlora_target_modules: [q_proj, o_proj]\n", {"lora_target_modules": ["q_proj", "o_proj"]}),
    ("learning_rate: 1e-4\nlr_groups: [{name: a, modules: [q_proj, k.x], lr: 5e-5}]\n", {"lr_rules": [r"q_proj|k\.x=0.5"]}),
    ("learning_rate: 1e-4\nembedding_lr: 1e-5\n", {"embedding_lr": 1e-5}),
    ("learning_rate: 1e-4\nlr_groups: [{modules: [v], lr: 1e-5}]\nembedding_lr_scale: 0.5\n", {"lr_rules": ["v=0.1", "embed=0.5"]}),
    ("rl: ebft\nebft: {mode: strided, temperature: 0.6}\ntrl: {temperature: 0.9}\n", {"temperature": 0.6}),
    ("rl: ebft\ntrl: {temperature: 0.9}\nebft: {temperature: 0.6}\n", {"temperature": 0.9}),
    ("gradient_checkpointing: true\n", {"gradient_checkpointing": "full"}),
    ("gradient_checkpointing: offload_disk\n", {"gradient_checkpointing": "full", "activation_offloading": "disk"}),
    ("activation_offloading: legacy\n", {"activation_offloading": "cpu"}), ("layer_offloading: true\n", {"layer_offloading": "cpu"}),
    ("resize_token_embeddings_to_32x: true\n", {"embedding_multiple": 32}),
    ("excess_length_strategy: raise\n", {"overlong": "error"}), ("data_seed: 7\n", {"data_seed": 7}),
    ("fsdp: [full_shard, auto_wrap]\nfsdp_config: {fsdp_version: 2, activation_checkpointing: true}\n", {"gradient_checkpointing": "full"}),
    ("peft: {loftq_config: {loftq_bits: 4}}\nadapter: qlora\n", {"lora_init": "loftq"}),
    ("peft_use_dora: true\npeft_layers_to_transform: [0, 1]\nadapter: lora\n", {"lora_dora": True, "lora_layers": [0, 1]}),
    ("dataset_shard_num: 4\ndataset_shard_idx: 1\ndatasets: [{path: x.jsonl, type: alpaca, name: null}]\n",
     {"datasets": [{"path": "x.jsonl", "type": "alpaca", "shards": 4, "shard_index": 1}]}),
    ("eval_table_size: 5\neval_max_new_tokens: 64\nval_set_size: 0.1\n", {"eval_table_size": 5, "eval_max_new_tokens": 64}),
    ("eval_table_size: 5\neval_table_max_new_tokens: 9\ntest_datasets: [{path: x.jsonl, type: alpaca}]\n", {"eval_max_new_tokens": 9}),
    ("eval_table_size: 5\neval_max_new_tokens: 64\n", {"eval_table_size": None, "eval_max_new_tokens": None}),
    ("eval_table_size:\neval_max_new_tokens: 64\nval_set_size: 0.1\n", {"eval_max_new_tokens": None}),
    ("do_causal_lm_eval: true\nval_set_size: 0.1\neval_max_new_tokens: 64\n",
     {"eval_causal_lm_metrics": ["sacrebleu", "ter", "chrf"], "eval_max_new_tokens": 64, "eval_table_size": None}),
    ("do_causal_lm_eval: true\nval_set_size: 0.1\neval_causal_lm_metrics: [chrf, perplexity]\n",
     {"eval_causal_lm_metrics": ["chrf", "perplexity"]}),
    ("do_causal_lm_eval: true\neval_causal_lm_metrics: [chrf]\n", {"eval_causal_lm_metrics": None}),
    ("val_set_size: 0.1\neval_causal_lm_metrics: [chrf]\n", {"eval_causal_lm_metrics": None}),
    ("lm_eval_tasks: [piqa]\nlm_eval_batch_size: 4\n", {"lm_eval_tasks": ["piqa"], "lm_eval_batch_size": 4}),
    ("lm_eval_tasks: [piqa]\nlm_eval_batch_size: 4\nlm_eval_post_train: false\n", {"lm_eval_tasks": None, "lm_eval_batch_size": None}),
    ("special_tokens: {pad_token: <pad>}\ntokens: [a]\n", {"special_tokens": ["pad_token=<pad>"], "tokens": ["a"]}),
    ("rl: ipo\n", {"loss": ["ipo"]}), ("rl: gdpo\n", {"advantage": "gdpo"}),
    ("rl: simpo\n", {"rl_beta": 0.1, "cpo_alpha": 1.0}), ("rl: simpo\nrl_beta: 2\ncpo_alpha: 0\n", {"rl_beta": 2.0, "cpo_alpha": 0.0}),
    ("rl: grpo\nmicro_batch_size: 16\ngradient_accumulation_steps: 2\ntrl: {num_generations: 8}\nsequence_len: 99\n",
     {"micro_batch_size": 2, "gradient_accumulation_steps": 2, "max_prompt_len": 99, "epsilon_high": 0.2, "lr_scheduler": "cosine"}),
    ("rl: grpo\nmicro_batch_size: 2\ngradient_accumulation_steps: 3\ntrl: {num_generations: 4}\n",
     {"micro_batch_size": 1, "gradient_accumulation_steps": 2}),
    ("rl: grpo\ntrl: {scale_rewards: false, loss_type: dr_grpo, beta: 0.1}\n", {"advantage": "centered", "loss": "dr_grpo", "beta": 0.1}),
    ("rl: grpo\ntrl: {multi_objective_aggregation: normalize_then_sum, scale_rewards: true}\n", {"advantage": "gdpo"}),
    ("rl: grpo\ntrl: {generation_kwargs: {stop_token_ids: [1], min_tokens: 2}}\n",
     {"stop_token_ids": [1], "generation_kwargs": ["min_tokens=2"]}),
    ("rl: grpo\ntrl: {use_vllm: true, vllm_mode: colocate}\nvllm: {gpu_memory_utilization: 0.4, max_model_len: 64}\n",
     {"vllm_mode": "managed", "vllm_gpu_memory_utilization": 0.4, "vllm_max_model_len": 64}),
    ("rl: ebft\nebft: {mode: strided, stride: 4}\nmicro_batch_size: 2\n", {"mode": "strided", "stride": 4, "micro_batch_size": 2}),
    # names that axolotl has given up, and values as its reader takes them
    ("evaluation_strategy: 'no'\nmodel_revision: r\nbatch_size: 8\nmicro_batch_size: 2\n",
     {"evals_per_epoch": 0, "revision": "r", "gradient_accumulation_steps": 4}),
    ("rl: dpo\ndpo_beta: 0.2\ndpo_loss_type: [sigmoid, bco_pair]\ndpo_loss_weights: [1, 0.5]\nrl_adapter_ref_model: true\n",
     {"rl_beta": 0.2, "loss": ["dpo", "bco_pair"], "loss_weights": [1.0, 0.5]}),
    ("learning_rate: '2e-4'\nmax_steps: '3'\nnum_epochs: 3.0\nsample_packing: 'true'\nload_in_8bit: 'false'\ntf32: 1\n",
     {"learning_rate": 2e-4, "max_steps": 3, "num_epochs": 3, "sample_packing": True, "quant": None, "tf32": True}),
    ("tokens: {pad_token: <pad>}\nspecial_tokens: {eos_token: null, additional_special_tokens: [<a>]}\n",
     {"special_tokens": ["pad_token=<pad>"], "tokens": ["<a>"]}),
    ("adapter: lora\npeft: {backend: bnb, weight_dtype: nf4}\n", {"quant": "nf4", "quantize_moe_experts": False}),
    ("adapter: lora\nmodel_quantization_config: {backend: bnb, weight_dtype: int8}\n", {"quant": "int8"}),
    ("adapter: lora\npeft: {loftq_config: {loftq_bits: 4}}\n", {"lora_init": "loftq", "quant": "nf4", "quant_double": False}),
    ("adapter: lora\npeft_init_lora_weights: true\n", {"lora_init": "default"}),
    ("adapter: qlora\nload_in_4bit: true\nfsdp_config: {fsdp_offload_params: true}\n", {"layer_offloading": "cpu"}),
    ("adapter: lora\ndeepspeed: deepspeed_configs/zero3_bf16_cpuoffload_all.json\n",
     {"layer_offloading": "cpu", "optim_args": ["paged=true"]}),
    ("adapter: lora\ndeepspeed: {zero_optimization: {offload_param: {device: nvme}}}\n", {"layer_offloading": "disk", "optim_args": None}),
    ("deepspeed: {zero_optimization: {offload_optimizer: {device: cpu}}}\n", {"optim_args": ["paged=true"], "layer_offloading": None}),
    ("deepspeed: {zero_optimization: {offload_optimizer: {device: cpu}}}\noptimizer: muon\noptim_args: adjust=original\n",
     {"optim_args": ['adjust="original"', "paged=true"]}),
    ("deepspeed: {zero_optimization: {offload_optimizer: {device: cpu}}}\noptimizer: paged_adamw_8bit\n", {"optim_args": None}),
    ("adapter: lora\ndeepspeed: deepspeed_configs/zero3_bf16_cpuoffload_params.json\n", {"layer_offloading": "cpu", "optim_args": None}),
    ("fsdp_config: {offload_params: 'false'}\ndp_shard_size: 4\ncontext_parallel_size: 1\n", {"sharding": None}),
    ("max_steps: 200\nnum_epochs: 4\npretraining_dataset: [{path: a}]\nsaves_per_epoch: 1\nevals_per_epoch: 2\n",
     {"save_steps": 50, "eval_steps": 25, "saves_per_epoch": None}),
    ("save_steps: 0.25\neval_steps: 0.1\nmax_steps: 99\n", {"save_steps": 25, "eval_steps": 10}),
    ("save_steps: 0.25\nnum_epochs: 2\n", {"saves_per_epoch": 2}), ("warmup_steps: 0.1\n", {"warmup_ratio": 0.1, "warmup_steps": None}),
    ("cosine_constant_lr_ratio: 0\ncosine_min_lr_ratio: 1.0\n", {"cosine_constant_lr_ratio": None, "cosine_min_lr_ratio": 1.0}),
    ("lr_scheduler: polynomial\nlr_scheduler_kwargs: {lr_end: 1e-7}\n", {"lr_scheduler_kwargs": ["lr_end=1e-07"]}),
    ("chat_template_jinja: '{{ a }}'\nchat_template: jinja\n", {"chat_template": "{{ a }}"}),
    ("chat_template: tokenizer_default_fallback_mistral_v2v3\n", {"chat_template": "tokenizer_default_fallback_mistral"}),
    ("datasets: [{path: a, type: 'alpaca:instruct'}, {path: b, type: my.module}]\n",
     {"datasets": [{"path": "a", "type": "alpaca"}, {"path": "b", "type": "my.module"}]}),
    ("datasets: [{path: a, type: chat_template, roles_to_train: null, train_on_eos: null}]\n",
     {"datasets": [{"path": "a", "type": "chat_template", "roles_to_train": None}]}),
    ("tf32: auto\nadapter: ''\nmax_steps: -1\nearly_stopping_patience: 0\neval_steps: 0\nloss_watchdog_threshold: false\n"
     "gradient_checkpointing: 'true'\nrl: false\nwandb_project: ''\n",
     {"tf32": True, "adapter": "none", "max_steps": None, "early_stopping_patience": None, "eval_steps": None,
      "gradient_checkpointing": "full", "wandb_project": None, "loss_watchdog_threshold": None}),
    ("use_dft: true\n", {"loss": "dft"}), ("use_eaft: true\neaft_alpha: 1.0\neaft_k: 20\n", {"loss": "eaft"}),
    ("pretraining_dataset: [{path: a}]\nreinit_weights: true\n", {"from_config": "m"}),
    ("overrides_of_model_config: {output_router_logits: true, router_aux_loss_coef: 0.02}\n", {"router_aux_loss_coef": 0.02}),
    ("curriculum_sampling: true\nshuffle_merged_datasets: false\n", {"shuffle": False}),
    ("chat_template_kwargs: {enable_thinking: false}\ndatasets: [{path: json, data_files: [a.jsonl], type: chat_template, "
     "field_thinking: thinking, template_thinking_key: thought, train_on_eot: all, drop_system_message: true}]\n",
     {"datasets": [{"data_files": ["a.jsonl"], "type": "chat_template", "train_on_eos": "all", "drop_system_message": True,
                    "message_property_mappings": {"thought": "thinking"}, "ds_type": "json",
                    "chat_template_kwargs": {"enable_thinking": False}}]}),
    ("rl: grpo\ntrl: {sync_ref_model: true}\n", {"ref_model_mixup_alpha": 0.9, "ref_model_sync_steps": 64}),
    ("adapter: lora\nmax_memory: {0: 20GiB}\nseed: 1\nseed: 2\nliger_anything: 1\neot_tokens: [x]\n", {"seed": 2}),
    ("rl: ebft\nmicro_batch_size: 4\n", {"temperature": 0.7, "micro_batch_size": 1, "gradient_accumulation_steps": 1}),
]  # fmt: skip


@pytest.mark.parametrize(("text", "expected"), CASES, ids=[case[0].replace("\n", " ")[:60] for case in CASES])
def test_keys_become_options(here, text, expected):
    file = read(here, BASE + text)
    assert {name: file.values.get(name) for name in expected} == expected
    assert file.values["model"] == "m"


PLACED = {
    "": (None, None), "fsdp: [full_shard, auto_wrap]\n": ("full", None), "fsdp_version: 2\n": ("full", None),
    "fsdp: shard_grad_op auto_wrap\n": ("gradients", None), "fsdp: [no_shard]\n": ("none", None),
    "fsdp: [hybrid_shard]\n": ("full", ["data=4"]), "fsdp_config: {fsdp_sharding_strategy: HYBRID_SHARD}\n": ("full", ["data=4"]),
    "fsdp_config: {sharding_strategy: 2}\n": ("gradients", None), "fsdp_config: {sharding_strategy: NO_SHARD}\n": ("none", None),
    "fsdp_version: 2\nfsdp_config: {reshard_after_forward: false}\n": ("gradients", None),
    "fsdp_version: 2\nfsdp_config: {reshard_after_forward: true}\ndp_shard_size: 4\ndp_replicate_size: 2\n":
        ("full", ["data=4", "replicate=2"]),
    "context_parallel_size: 2\n": ("none", ["context=2"]), "tensor_parallel_size: 4\n": ("none", ["tensor=4"]),
    "dp_shard_size: 4\nsequence_parallel_degree: 2\n": ("full", ["data=4", "context=2"]),
    "dp_shard_size: 8\n": ("full", None), "dp_shard_size: 2\n": ("full", ["data=2"]), "dp_replicate_size: 8\n": ("none", None),
    "deepspeed: deepspeed_configs/zero1.json\n": ("moments", None), "deepspeed: configs/zero2_torch_compile.json\n": ("gradients", None),
    "deepspeed: {zero_optimization: {stage: 3}}\n": ("full", None), "deepspeed: {zero_optimization: {stage: 1}}\n": ("moments", None),
    "deepspeed: {zero_optimization: {stage: 0}}\n": ("none", None), "deepspeed: ours.json\ndp_shard_size: 4\n": ("gradients", ["data=4"]),
}  # fmt: skip


def test_ranks_wait_as_long_as_a_file_says(here, monkeypatch):
    assert "rank_timeout" not in read(here, BASE + "ddp_timeout: 900\n").values
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert read(here, BASE + "ddp_timeout: 900\n").values["rank_timeout"] == 900


def test_workers_of_ray_are_processes(here):
    values = read(here, BASE + "use_ray: true\nray_num_workers: 4\n").values
    assert (values["use_ray"], values["nproc"]) == (True, 4)


@pytest.mark.parametrize("text", PLACED)
def test_sections_of_other_launchers_say_what_is_split_among_several_processes(here, monkeypatch, text):
    """On two machines of four processes; alone they say nothing."""
    (here / "ours.json").write_text('{"zero_optimization": {"stage": 2}}')
    assert read(here, BASE + text).values.keys().isdisjoint({"sharding", "shard"})
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    found = read(here, BASE + text).values
    assert (found.get("sharding"), found.get("shard")) == PLACED[text]


METHOD_OF = {"rl: kto": "kto", "rl: null": "sft", "reward_model: true": "reward", "process_reward_model: true": "prm",
             "pretraining_dataset: [{path: a}]": "pretrain", "trl: {beta: 1}": "grpo",
             "datasets: [{path: a, type: ebft_x.transform}]": "ebft",
             "ebft: {stride: 2}": "ebft"}  # fmt: skip


@pytest.mark.parametrize("text", METHOD_OF)
def test_the_file_names_the_method(here, text):
    (here / "a.yaml").write_text(BASE + text)
    assert run_file.method_of(run_file.load("a.yaml"), "a.yaml") == METHOD_OF[text]


REFUSED = {
    "do_causal_lm_eval: true\nval_set_size: 1\neval_causal_lm_metrics: [chrf, comet]": "sacrebleu, chrf, ter, exact_match and perplexity",
    "rl: ppo\n": "rl must be one of dpo, ipo",
    "push_to_hub: a/b\nrope_scaling: {a: 1}\nbananas: 3\n": "3 keys of axolotl's that are not supported: push_to_hub",
    "model_name_or_path: m\nstage: sft\nlora_rank: 8\n": "3 keys of another tool's that are not supported: model_name_or_path",
    "qat: {weight_dtype: int4, activation_dtype: int8}\n": "qat (nearest: qat: int4, which rounds weights of linear layers alone",
    "qat: {weight_dtype: int4, group_size: 32}\n": "qat (nearest: group_size: 64",
    "qat: {weight_dtype: nvfp4}\n": "qat (nearest: weight_dtype int4, int8 or fp8",
    "quantization: {weight_dtype: int4}\n": "quantization (nearest: treetune quantize MODEL OUTPUT --quant int4",
    "pretraining_dataset: [{path: a}]\nadapter: lora\n": "adapter (nearest: datasets with type: completion",
    "load_in_4bit: true\n": "load_in_4bit (nearest: an adapter beside it",
    "train_on_inptus: false\n": "train_on_inptus (nearest: train_on_inputs)",
    "rl: grpo\nmicro_batch_size: two\n": "micro_batch_size must be a whole number",
    "lr_groups: [1]\nlearning_rate: 1e-4\n": "lr_groups is of another form than axolotl's",
    "load_in_4bit: true\nload_in_8bit: true\n": "either load_in_4bit or load_in_8bit",
    "plugins: [axolotl.integrations.liger.LigerPlugin, x.Y]\n": "x.Y cannot be loaded",
    "fsdp_config: {offload_params: true}\n": "fsdp_config (nearest: a run without offload",
    "deepspeed: {zero_optimization: {offload_param: {device: cpu}}}\n": "deepspeed (nearest: a run without offload",
    "deepspeed: {zero_optimization: {offload_optimizer: {device: nvme}}}\n": "deepspeed (nearest: offload_optimizer with device cpu",
    "push_to_hub: true\noptimizer: lomo\nlora_r: x\nadapter: lora\n": "push_to_hub (nearest: hub_model_id, which names the repository",
    "optimizer: lomo\nlr_scheduler: log_sweep\n": 'got "lomo" (text); and lr_scheduler must be one of',
    "datasets: [{path: a, type: alpaca_w_system.load_open_orca_chatml}]\n": "as there is no alpaca_w_system.load_open_orca_chatml",
    "datasets: [{path: a, type: bananas}]\n": "as there is no bananas",
    "datasets: [{path: a, input_transform: b}]\n": "datasets (nearest: entries without input_transform",
    "dp_shard_size: four\n": "dp_shard_size (nearest: a whole number",
    "fsdp_config: {sharding_strategy: BY_HALVES}\n": "fsdp_config (nearest: sharding_strategy: FULL_SHARD",
    "expert_parallel_size: 2\n": "expert_parallel_size (nearest: tensor_parallel_size",
    "qat: {weight_dtype: int4}\n": "qat (nearest: group_size: 64",
    "save_strategy: best\n": "the best checkpoint is kept besides",
    "adapter: qlora\nload_in_4bit: true\nrelora_steps: 10\n": "relora_steps (nearest: weights that are not quantised",
    "overrides_of_model_config: {rope_scaling: {type: yarn}}\n": "overrides_of_model_config (nearest: the model's config.json",
    "adapter: lora\npeft: {backend: torchao, weight_dtype: int4}\n": "peft (nearest: group_size: 64",
    "chat_template: mistral_v7_tekken\n": "chat_template (nearest: tokenizer_default",
    "pretraining_dataset: [{path: a}]\nlora_target_linear: true\n": "lora_target_linear (nearest: datasets with type: completion",
    "wandb_watch: gradients\n": "wandb_watch (nearest: grad_norm",
    "use_eaft: true\neaft_alpha: 2\n": "eaft_alpha (nearest: eaft_alpha: 1",
    "save_steps: 0.3\n": "save_steps (nearest: saves_per_epoch",
    "bf16: true\nfp16: true\n": "one dtype",
    "rl: grpo\ntrl: [1]\n": "trl must be a mapping",
    "rl: grpo\ntrl: {vllm_enable_sleep_mode: true}\n": "vllm_enable_sleep_mode (nearest: vllm_mode: managed)",
    "lr_groups: [{modules: [a], lr: 1e-5}]\n": "learning_rate beside lr_groups",
    "num_labels: 3\nreward_model: true\n": "num_labels: 1",
    "learning_rate: fast\n": "learning_rate must be a number",
    "lora_rr: 8\nadapter: lora\n": "lora_rr (nearest: lora_r)",
}


@pytest.mark.parametrize("text", REFUSED)
def test_what_is_not_there_is_one_line(tune, here, text):
    (here / "a.yaml").write_text(BASE + text)
    done = tune("train", "a.yaml", "--dry-run")
    assert done.code == 2 and done.err.count("\n") == 1 and REFUSED[text] in done.err, done.err
    assert {path.name for path in here.iterdir()} == {"a.yaml"}


ODD = ("[]", "{}", "''", "5", "-1.5", "x", "[1, {a: 2}]", "{a: {b: [null]}}", "true", "false", "2024-01-01", "[[]]")


@pytest.mark.sampled(4)
@pytest.mark.parametrize("key", sorted({*values.FUNCTIONS, "datasets", "pretraining_dataset", "trl", "ebft", "vllm", "rl"}))
def test_odd_values_are_read_or_refused_in_a_line(here, key):
    for rest in ("", "rl: grpo\n", "rl: ebft\n", "adapter: qlora\nlearning_rate: 1e-4\n"):
        for odd in ODD:
            text = f"{BASE}{rest}{key}: {odd}\n" if f"{key}:" not in rest else f"{BASE}{key}: {odd}\n"
            try:
                read(here, text)
            except ValueError as error:
                assert "\n" not in str(error) and (key in str(error) or "nearest" in str(error)), text


def test_values_that_ask_for_nothing_are_no_error(here):
    text = "wandb_project:\nhub_model_id: ''\nload_in_8bit: false\nfp8: false\ngptq: false\ndeepspeed:\nfsdp: []\nspecial_tokens:\n"
    assert read(here, BASE + text).values["model"] == "m"


def test_a_key_given_twice_counts_as_last_written_and_is_told(here):
    lines = read(here, BASE + "seed: 1\nseed: 2\n").lines
    assert "  line 3: key 'seed' is given twice, the first time in line 2; the last one counts" in lines


def test_keys_of_other_names_are_told(here):
    lines = read(here, BASE + "adapter: lora\nbf16: true\nfsdp_config: {offload_params: true}\nseed: 3\n").lines
    assert "  in our names: bf16 is dtype bfloat16; fsdp_config is layer_offloading cpu" in lines


def test_keys_that_need_nothing_are_named_once(here):
    lines = read(here, BASE + "flash_attention: true\nliger_rope: true\nstrict: false\n").lines
    assert [line for line in lines if "needs nothing here" in line] == ["  needs nothing here: flash_attention, liger_rope, strict"]


def test_flags_win_and_options_without_effect_are_left_out(tune, here, tiny):
    (here / "a.yaml").write_text(f"{BASE}lora_r: 4\nlora_dropout: 0.5\nmax_steps: 9\n")
    done = tune("train", "a.yaml", "--dry-run", "--max-steps", 3, "--model", tiny.model, "--data", tiny.chat)
    assert done.code == 0, done.err
    assert "left out, as nothing would look at it: lora_r (adapter is none)" in done.out
    assert re.search(r"^max_steps +3 *$", done.out, re.M) and re.search(r"^memory +\S+ \w+ at the peak of a run", done.out, re.M), done.out


def test_a_flag_without_effect_is_still_an_error(tune, here, tiny):
    (here / "a.yaml").write_text(BASE)
    done = tune("train", "a.yaml", "--dry-run", "--lora-r", 4, "--model", tiny.model)
    assert done.code == 2 and "--lora-r would be ignored: adapter is none" in done.err


def test_a_file_of_ours_names_its_method(tune, here, tiny, run):
    done = tune("train", "r/config.yaml", "--output-dir", "again")
    assert done.code == 0, done.err
    assert (here / "again" / "metrics.jsonl").is_file()
    assert yaml.safe_load((here / "again/config.yaml").read_text())["method"] == "sft"
    refused = tune("dpo", "r/config.yaml")
    assert refused.code == 2 and "r/config.yaml is a file of treetune sft: start it with treetune train" in refused.err


@pytest.mark.parametrize("args", [("eval", "r/config.yaml", "--max-rows", 2), ("generate", "r/config.yaml", "--max-new-tokens", 2),
                                  ("preprocess", "r/config.yaml"), ("merge", "r/config.yaml")])  # fmt: skip
def test_other_commands_read_the_file_of_a_run(tune, here, run, args):
    config = yaml.safe_load((here / "r/config.yaml").read_text())
    (here / "r/config.yaml").write_text(yaml.safe_dump(config | {"output_dir": "r"}))
    done = tune(*args)
    assert done.code == 0, done.err
    assert "a file of treetune sft; taken from it" in done.out


def test_without_a_file_or_a_method_train_says_what_it_needs(tune, here):
    assert "treetune train needs a config file" in tune("train").err
    (here / "a.yaml").write_text("model: m\n")
    assert "a.yaml does not say how to train: write method: sft into it" in tune("train", "a.yaml").err
    (here / "a.yaml").write_text("method: ppo\nmodel: m\n")
    assert "method must be one of sft" in tune("train", "a.yaml").err
    assert "config file none.yaml does not exist" in tune("train", "none.yaml").err


def test_a_file_may_be_an_address(tune, here):
    (here / "a.yaml").write_text("base_model: m\nadapter: lora\nlora_r: 8\n")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(here)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        address = f"http://127.0.0.1:{server.server_address[1]}"
        assert "read as treetune sft" in tune("train", f"{address}/a.yaml", "--dry-run").out
        missing = tune("train", f"{address}/b.yaml", "--dry-run")
        assert missing.code == 2 and "b.yaml cannot be read" in missing.err and "404" in missing.err
    finally:
        server.shutdown()
        server.server_close()


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format, *args):
        pass


def test_convert_writes_a_file_of_ours(tune, here, tiny):
    (here / "a.yaml").write_text(f"base_model: {tiny.model}\ndatasets: [{{path: {tiny.chat}, type: chat_template}}]\nadapter: lora\n"
                                 "sequence_len: 128\nmax_steps: 2\nlora_r: 4\nflash_attention: true\noutput_dir: one\n")  # fmt: skip
    done = tune("convert", "a.yaml", "--output", "b.yaml")
    assert done.code == 0 and "treetune train b.yaml" in done.out, done.err
    ours = yaml.safe_load((here / "b.yaml").read_text())
    assert ours["method"] == "sft" and ours["sample_packing"] is False and ours["lora_r"] == 4 and "flash_attention" not in ours
    assert tune("train", "a.yaml").code == 0 and tune("train", "b.yaml", "--output-dir", "two").code == 0
    assert (here / "one/adapter/adapter_model.safetensors").read_bytes() == (here / "two/adapter/adapter_model.safetensors").read_bytes()
    assert tune("convert", "b.yaml").code == 2


def test_the_schema_knows_every_key_of_the_documents(tune):
    whole = json.loads(tune("config-schema", "--dialect", "axolotl").out)["properties"]
    assert {"trl", "vllm", "bf16", "lora_target_linear", "flash_attention"} <= set(whole) and "beta" in whole["trl"]["properties"]
    one = json.loads(tune("config-schema", "--field", "lora-dropout").out)["lora-dropout"]
    assert one["type"] == "number" and one["default"] == 0.0 and "Dropout" in one["description"]
    assert "did you mean lora_dropout?" in tune("config-schema", "--field", "lora_dropot").err


def test_tables_hold_no_option_of_ours_and_no_key_twice():
    ours = {name for method in METHODS.values() for name in table.options(method.config)}
    assert not keys.RENAMED.keys() & ours
    assert set(keys.RENAMED.values()) <= ours
    assert not keys.MISSING.keys() & (ours | values.FUNCTIONS.keys() | keys.NOTHING.keys())
    assert set(translate.METHODS.values()) <= set(METHODS) and main.COMMANDS["convert"]


def test_keys_of_the_hub_are_options_of_the_same_name(here):
    keys = {"hub_model_id": "me/sums", "hub_strategy": "all_checkpoints", "hub_revision": "dev"}
    values = read(here, BASE + "".join(f"{name}: {value}\n" for name, value in keys.items())).values
    assert {name: values[name] for name in keys} == keys
    assert not read(here, BASE + "hub_model_id: ''\nhub_strategy:\n").values.keys() & keys.keys()
