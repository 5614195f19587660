"""The `treetune` command: looks up a subcommand, runs it, turns failures into one line and an exit code."""

import importlib
import io
import os
import sys
import traceback
from functools import partial
from typing import Any, NamedTuple

from treetune.cli import file_commands, methods
from treetune.cli.methods import CONFIGS, METHODS
from treetune.cli.options import commands
from treetune.cli.planning import command as planning
from treetune.cli.planning.command import Asked
from treetune.core import fields, masking
from treetune.core import import_path as paths
from treetune.core.run import launch
from treetune.core.run.errors import BadInput, RunFailed, checking_input


class Command(NamedTuple):
    """A subcommand: the module under treetune.cli whose `run(config, explicit)` does it, its config class, its line in the help."""

    module: str
    config: type
    help: str


COMMANDS = {name: Command("commands.train", method.config, method.help) for name, method in METHODS.items()} | {
    "convert": Command("commands.convert", commands.Convert, "write a file of axolotl's as one of ours"),
    "config-schema": Command("commands.schema", commands.ConfigSchema, "the options of files, as a JSON schema"),
    "rollout": Command("commands.rollout", commands.Rollout, "sample and score without training: try a reward"),
    "serve": Command("commands.serve", commands.Serve, "start a vLLM server for a model"),
    "preprocess": Command("commands.preprocess", commands.Preprocess, "show what a run would read, token by token"),
    "eval": Command("commands.evaluate", commands.Eval, "loss, perplexity and accuracy on a data set"),
    "lm-eval": Command("commands.lm_eval", commands.LmEval, "benchmarks of lm-eval's harness"),
    "score": Command("commands.score", commands.Score, "score answers or steps with a reward model"),
    "generate": Command("commands.generate", commands.Generate, "answer prompts"),
    "chat": Command("commands.chat", commands.Chat, "talk to a model"),
    "merge": Command("commands.merge", commands.Merge, "fold an adapter into its model"),
    "push": Command("commands.push", commands.Push, "upload what a run has left to the Hugging Face hub"),
    "quantize": Command("commands.quantize", commands.Quantize, "write a model in 4 or 8 bits"),
    "export": Command("commands.export", commands.Export, "write a GGUF file for llama.cpp and Ollama"),
    "check": Command("commands.check", commands.Check, "compare a model with transformers, and packed with alone"),
    "fetch": Command("commands.fetch", commands.Fetch, "get a model onto this machine, or the examples and docs"),
    "runs": Command("commands.runs", commands.Runs, "list runs, show one, or compare several"),
    "doctor": Command("commands.doctor", commands.Doctor, "say what is wrong with a run, and what to change"),
    "agent-docs": Command("commands.agent_docs", commands.AgentDocs, "print a page of the documentation"),
    "info": Command("commands.info", commands.Info, "describe this machine, a model, an adapter or a run"),
}

OF_FILES = {"train": file_commands.HELP, "plan": planning.HELP}  # commands of any method, which a file names


def usage() -> str:
    """The text of `treetune --help`."""
    lines = [f"  {name:13} {text}" for name, text in (OF_FILES | {name: one.help for name, one in COMMANDS.items()}).items()]
    return "\n".join(
        ["usage: treetune COMMAND [run.yaml] [options]", "", "Post-training for language models.", "", "commands:", *lines, "",
         "treetune COMMAND --help lists the options of a command.",
         "Exit codes: 0 done, 1 the run failed, 2 bad configuration or input."]
    )  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 done, 1 run failed, 2 bad input, 130 interrupted, 141 nobody reads the output."""
    try:
        code = _main(sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # else Python tries to flush once more at its end, and complains
        return 141


def _main(argv: list[str]) -> int:
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # an answer may hold characters that the terminal has not
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if argv else 2
    if argv[0] == "--version":
        from importlib.metadata import version

        print(f"treetune {version('treetune')}")
        return 0
    return _run(argv[0], argv[1:])


def _start(command: str, chosen: Command, argv: list[str], *, dry: bool, plan: Asked | None = None) -> int:
    """Run a command with its arguments, show what it would do, or run it for each value of a sweep; the exit code."""
    from treetune.cli import parse, requirements
    from treetune.core.config import product, table

    method = CONFIGS.get(chosen.config)
    ignored = partial(requirements.ignored, method=method)

    def resolve(argv: list[str]) -> Any:
        parsed, given = parse.parse(command, chosen.config, argv, ignored=ignored)
        return requirements.complete(parsed, method, given, parse.config_file(argv))

    if method is not None and product.asked(argv):
        if dry:
            raise BadInput("--dry-run shows one run: leave out --sweep, and give one value of each option")
        from treetune.cli import sweep

        return sweep.run(command, argv, table.options(chosen.config), resolve)
    with checking_input("the command line or its config file"):
        file = parse.config_file(argv)
        parsed, given = parse.parse(command, chosen.config, argv, ignored=ignored, say=file_commands.say)
        if plan is not None:
            return file_commands.plan(plan, parsed, method, given, file)
        if dry:
            return file_commands.dry_run(parsed, method, given, file)
        parsed = requirements.complete(parsed, method, given, file)
    return importlib.import_module(f"treetune.cli.{chosen.module}").run(parsed, given) or 0


def _run(command: str, argv: list[str]) -> int:
    from treetune.cli import invocation
    from treetune.core.config import suggestions

    invocation.remember(command, argv)
    try:
        with checking_input("the config file"):
            plan = None
            if command == "plan":
                command, argv, plan = file_commands.resolve_plan(argv)
            command, argv, dry = file_commands.resolve(command, argv)
        if command not in COMMANDS and paths.is_path(command):
            with checking_input(command):
                method = methods.load(command)
            COMMANDS[command] = Command("commands.train", method.config, method.help)
        if command not in COMMANDS:
            raise BadInput(f"unknown command {command!r}{suggestions.of_command(command, [*OF_FILES, *COMMANDS])}; see treetune --help")
        chosen = COMMANDS[command]
        return _start(command, chosen, argv, dry=dry, plan=plan)
    except BadInput as error:
        if os.environ.get(fields.TRACEBACK):
            traceback.print_exc()
        _say(f"treetune: error: {masking.one_line(str(error))}")
        return 2
    except RunFailed as error:
        if os.environ.get(fields.TRACEBACK):
            traceback.print_exc()
        _say(f"treetune: failed: {masking.one_line(str(error))}")
        return 1
    except KeyboardInterrupt:
        print("treetune: interrupted", file=sys.stderr)
        return 130


def _say(line: str) -> None:
    if launch.first_to_say(line):
        print(line, file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
