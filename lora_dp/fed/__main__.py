"""Command line: ``python -m lora_dp.fed [run | pretrain] [options]``."""

import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from jsonargparse import ArgumentParser, DefaultHelpFormatter, set_parsing_settings
from rich.console import Console

from lora_dp.fed.config import FederationConfig, OptimizationConfig, PrivacyConfig, RunConfig, RunOptions
from lora_dp.fed.data import DataConfig
from lora_dp.fed.models import ModelConfig
from lora_dp.fed.pretrain import PretrainConfig, pretrain
from lora_dp.fed.runner import run
from lora_dp.isolation import IsolationError

PROG = "python -m lora_dp.fed"
RUN_HELP = """\
Fine-tune a model with LoRA over a federation of clients, each with an (ε, δ) guarantee of its own for its examples.
Without options: a tiny vision transformer on scikit-learn's digits, 5 clients, la-lora, ε = 8; nothing is downloaded.
Another command, pretrain, makes that vision transformer: pretrain --help."""
PRETRAIN_HELP = "Make the embedded default model: train a tiny vision transformer on public handwritten digits."
INTERRUPTED = 130  # the shell's code for Ctrl-C


class _Formatter(DefaultHelpFormatter):
    """Room for the texts, line breaks of the description kept, "[default]" in place of types and nulls."""

    def __init__(self, prog: str, **_: Any) -> None:
        super().__init__(prog, width=112, max_help_position=32)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "\n".join(indent + line for line in text.splitlines())

    def _get_help_string(self, action: Any) -> str:
        text = str(action.help or "").rstrip()
        if action.default is None or "==" in str(action.default) or "%(default)" in text:
            return text
        default = str(action.default).lower() if isinstance(action.default, bool) else action.default
        return f"{text} [{default}]"


class _Parser(ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        sys.stderr.write(f"error: {' '.join(message.split())} ({self.prog} --help lists the options)\n")
        sys.exit(2)


def _parser(prog: str, description: str, usage: str) -> ArgumentParser:
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = _Parser(prog=prog, usage=usage, description=description, formatter_class=_Formatter)
    parser.add_argument("--config", action="config", help="YAML file with any of these options.")
    return parser


def run_parser() -> ArgumentParser:
    """Options of a run: flat, in groups, as in the config.yaml that a run writes."""
    parser = _parser(PROG, RUN_HELP, f"{PROG} [run] [--option value ...]")
    for group in (FederationConfig, PrivacyConfig, OptimizationConfig, DataConfig):
        parser.add_class_arguments(group)
    added = parser.add_class_arguments(ModelConfig, skip={"name"})
    group = next(g for g in parser._action_groups if any(a.dest == added[0] for a in g._group_actions))
    group.add_argument("--model", type=str, default=ModelConfig.name, help=_attribute_help(ModelConfig, "name"))
    parser.add_class_arguments(RunOptions)
    return parser


def pretrain_parser() -> ArgumentParser:
    """Options of pretrain."""
    prog = f"{PROG} pretrain"
    parser = _parser(prog, PRETRAIN_HELP, f"{prog} [--option value ...]")
    parser.add_class_arguments(PretrainConfig)
    return parser
