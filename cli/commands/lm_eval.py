"""`treetune lm-eval`: benchmarks of lm-eval's harness over our own forward pass and sampler."""

import contextlib
import json
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from treetune.cli.counter import Count
from treetune.cli.options.commands import LmEval
from treetune.cli.options.model import AdapterPath, ModelOptions
from treetune.cli.screen import Screen
from treetune.core.config import suggestions
from treetune.core.run import folder, memory
from treetune.core.run.errors import checking_input
from treetune.models import Model, loading, target
from treetune.models.target import Target

MISSING = "lm-eval needs the package lm_eval: pip install 'treetune[eval]'"
PROBE = "Qx7vZkWe"  # a text that no chat template has of itself


def run(config: LmEval, given: frozenset[str]) -> int:
    """Ask, print lm-eval's table, and write; the exit code."""
    screen = Screen()
    with checking_input():
        harness = _harness()
        tasks, manager = _tasks(config)
        chosen = target.choose(config.adapter.adapter, named="model" in given, **asdict(config.model))
        tokenizer = target.load_tokenizer(chosen, say=screen.line)
        if config.apply_chat_template and not tokenizer.chat_template:
            raise ValueError("the tokenizer has no chat template: leave out --apply-chat-template, or take a chat model")
        if config.system_instruction is not None:
            _check_system(tokenizer)
        model, lora = target.load_model(chosen, say=screen.line)
    start = time.perf_counter()
    with screen.counting("requests") as progress, checking_input("a task of lm-eval"):
        lm = _lm(config, chosen, tokenizer, model, lora, progress)
        results = harness(
            model=lm,
            tasks=tasks,
            task_manager=manager,
            num_fewshot=config.num_fewshot,
            limit=config.limit,
            apply_chat_template=config.apply_chat_template,
            system_instruction=config.system_instruction,
            log_samples=config.log_samples,
            **dict.fromkeys(("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed"), config.seed),
        )
    _print(results, screen)
    device = loading.select_device(config.model.device)
    rows = {"model": chosen.name, "time": f"{time.perf_counter() - start:.1f} s, peak memory {memory.peak_gib(device):.1f} GiB"}
    if config.output_path is not None:
        with checking_input():
            rows["saved"] = str(folder.write_new(Path(config.output_path), _text(results, config, chosen)))
    screen.table("", rows)
    return 0


def check(tasks: Sequence[str]) -> None:
    """Raise ValueError for the first task that lm-eval does not know, and where it is not installed."""
    _harness()
    _tasks(LmEval(tasks=tuple(tasks)))


def after_training(saved: Path, tasks: Sequence[str], batch_size: int, model: ModelOptions) -> int:
    """Ask the adapter or model that a run has saved; the exit code. Results replace lm_eval.json of the run folder."""
    output = saved.parent / "lm_eval.json"
    output.unlink(missing_ok=True)
    adapter = str(saved) if saved.name == "adapter" else None
    chosen = ModelOptions(device=model.device) if adapter else ModelOptions(model=str(saved), device=model.device)
    asked = LmEval(chosen, AdapterPath(adapter), tasks=tuple(tasks), batch_size=batch_size, output_path=str(output))
    return run(asked, frozenset() if adapter else frozenset({"model"}))


def _check_system(tokenizer: Any) -> None:
    """Raise ValueError where the chat template does not write a system message, which chats would be asked without."""
    from jinja2.exceptions import TemplateError

    messages = [{"role": "system", "content": PROBE}, {"role": "user", "content": "a"}]
    with contextlib.suppress(TemplateError):
        if PROBE in tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True):
            return
    raise ValueError("the chat template writes no system message: leave out --system-instruction, or take another model")


def _harness() -> Callable[..., Any]:
    """Errors: ValueError where lm-eval is not installed."""
    try:
        from lm_eval import evaluator  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ValueError(f"{MISSING} ({error})") from error
    evaluator.get_git_commit_hash = _commit  # lm-eval's lets git complain on the screen where the folder is no repository
    return evaluator.simple_evaluate


def _commit() -> str | None:
    """The commit of the working folder, as results hold it; None outside of a repository."""
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        return subprocess.check_output(["git", "describe", "--always"], stderr=subprocess.DEVNULL, text=True).strip()
    return None


def _tasks(config: LmEval) -> tuple[list[str], Any]:
    """The names of the tasks, and lm-eval's index of them. Errors: ValueError for none, and for one that is not there."""
    from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

    if not config.tasks:
        raise ValueError("nothing to ask: name at least one task, as in --tasks hellaswag arc_easy")
    if config.include_path is not None and not Path(config.include_path).is_dir():
        raise ValueError(f"include_path: {config.include_path} is no folder; expected one of YAML files of tasks")
    asked = [name for text in config.tasks for name in text.split(",") if name]
    if config.include_path is not None:
        # lm-eval's own index takes seconds to read; groups of a folder may hold tasks of it.
        own = TaskManager(include_path=config.include_path, include_defaults=False)
        if set(asked) <= set(own.all_subtasks):
            return asked, own
    manager = TaskManager(include_path=config.include_path)
    for name in asked:
        if not manager.match_tasks([name]):
            raise ValueError(f"lm-eval knows no task {name!r}{suggestions.nearest(name, manager.all_tasks)}; --include-path names more")
    return manager.match_tasks(asked), manager


def _lm(config: LmEval, chosen: Target, tokenizer: Any, model: Model, lora: Any, progress: Count) -> Any:
    from treetune.cli import lm_eval_model
    from treetune.core.config import table

    settings = table.record(lm_eval_model.Settings, config)
    stop = target.stop_ids(chosen, tokenizer)
    return lm_eval_model.PolicyLM(model, tokenizer, lora=lora, stop=stop, settings=settings, progress=progress)


def _print(results: dict[str, Any], screen: Screen) -> None:
    from lm_eval.utils import make_table  # pyright: ignore[reportMissingImports]

    for part in ("results", *(("groups",) if "groups" in results else ())):
        screen.line(make_table(results, part))


def _text(results: dict[str, Any], config: LmEval, chosen: Target) -> str:
    """The results as JSON; what was asked instead of lm-eval's own words for a model that it does not know."""
    from lm_eval.utils import handle_non_serializable  # pyright: ignore[reportMissingImports]

    asked = results["config"] | {"model": "treetune", "model_args": {"model": chosen.model, "adapter": chosen.adapter}}
    asked["model_args"] |= {"dtype": config.model.dtype, "quant": config.model.quant, "max_length": config.max_length}
    asked["batch_size"] = config.batch_size
    return json.dumps(results | {"config": asked}, indent=2, ensure_ascii=False, default=handle_non_serializable) + "\n"
