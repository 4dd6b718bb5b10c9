"""The commands of the command line: their options, and what each does with them.

Parsing comes before importing: what takes seconds to import, such as torch, is imported by the command that needs it.
"""

import contextlib
import dataclasses
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import ArgumentParser, DefaultHelpFormatter, set_parsing_settings
from rich.console import Console
from rich.markup import escape

from lora_dp.errors import IsolationError, TooFewClients
from lora_dp.extras import needing
from lora_dp.fed.advise_options import AdviseConfig
from lora_dp.fed.auditing.options import AuditConfig, read_options
from lora_dp.fed.compare.options import CompareConfig
from lora_dp.fed.config import RunConfig, heading, read_config
from lora_dp.fed.data.options import DataConfig, check_place
from lora_dp.fed.did_you_mean import closest
from lora_dp.fed.interrupts import INTERRUPTED, quiet_interrupts
from lora_dp.fed.methods import get_method
from lora_dp.fed.models.options import ModelConfig, PretrainConfig
from lora_dp.fed.run_options import FederationConfig, OptimizationConfig, PrivacyConfig, RunOptions

PROG = "lora-dp"
RUN_HELP = """\
Fine-tune a model with LoRA over a federation of clients, each of which has an (ε, δ) guarantee for its examples.
Without options: a tiny vision transformer, scikit-learn's digits, 5 clients, la-lora, ε = 8; nothing is downloaded.
Other commands (each has --help): compare runs a grid of methods, budgets and seeds; resume goes on with a run that
was cut short; report makes a page of a run or comparison; inspect says why a method wins; audit tests
whether a run keeps its ε; advise says what to expect of so much data; pretrain makes the model."""
COMPARE_HELP = """\
Run methods × budgets × seeds and write the table (Markdown, CSV, LaTeX) with a plot:
  --methods la-lora,deer --epsilons 1,8,none --seeds 0,1,2
Started again with the same --output it goes on where it stopped. All other options of a run are common to all runs."""
REPORT_HELP = "Write report.html, one self-contained page of a run or a comparison, into its folder."
RESUME_HELP = """\
Go on with a run that was killed or interrupted, from its last checkpoint. With secret noise, the round that was cut
short has been released and counts."""
INSPECT_HELP = """\
Measure a finished run, to see why a method wins: intruder dimensions of the adapted weights, sharpness of the model,
alignment of the clients' updates, the share of noise in them. Only validation data are used."""
AUDIT_HELP = """\
Attack the training that a configuration describes, and say how large its ε must at least be. It trains again, with
canaries; exit code 1 means that the claimed ε is refuted at the stated confidence."""
ADVISE_HELP = """\
Say what accuracy a private head may reach on so much data, from what this project has measured, and how to begin.
It reads no data, and so costs no ε."""
PRETRAIN_HELP = "Make the embedded default model: train a tiny vision transformer on public handwritten digits."
MODEL_HELP = '"default" (the embedded tiny vision transformer), a timm name, a Transformers hub name or folder.'
REPRODUCIBLE_HELP = "Let batches and noise follow the seed too: for research only, such a run must not be released."
_LISTS = ("--methods", "--epsilons", "--seeds", "--tuning_seeds", "--ranks", "--search", "--feature_blocks")
# What jsonargparse says of types, in plain words.
_PLAIN = (
    (r'Parser key "([\w.]+)": ', r"--\1: "),
    (r"Expected a <class '(\w+)'>", r"expected \1"),
    (r"Expected a typing\.Literal\[(.*?)\]", r"expected one of \1"),
    (r"Does not validate .*? Errors: - (.*) Given value type: .* Given value: ?", r"\1. Got value: "),
    (r" - Expected a <class 'NoneType'>| - expected NoneType", ""),
    (r" - expected (one of )?", " or "),
    (
        r"expected str\. Got value: (True|False)",
        "expected text, in quotes where YAML has another meaning for it (yes, no, on, off)",
    ),
)


class _Formatter(DefaultHelpFormatter):
    """Room for the texts, line breaks of the description kept, "[default]" in place of types and nulls."""

    def __init__(self, prog: str, **_: Any) -> None:
        super().__init__(prog, width=118, max_help_position=32)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "\n".join(indent + line for line in text.splitlines())

    def _format_action_invocation(self, action: Any) -> str:
        return hyphenated(super()._format_action_invocation(action)).replace("[ITEM,...]", "ITEM,...")

    def _get_default_metavar_for_optional(self, action: Any) -> str:
        return "VALUE"

    def _get_help_string(self, action: Any) -> str:
        text = str(action.help or "").rstrip()
        if action.default is None or "==" in str(action.default) or "%(default)" in text:
            return text
        return f"{text} [{as_given(action.default)}]"


class _Parser(ArgumentParser):
    """Says what is wrong in one line, and what was meant where that can be told."""

    # The file of options that is being read, by itself.
    _file: str | None = None

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        message = " ".join(message.split())
        for pattern, plain in _PLAIN:
            message = re.sub(pattern, plain, message)
        if self._file is not None and self._file not in message:
            message = f"{self._file}: {message.removeprefix('--')}"
        unknown = re.match(r"unrecognized arguments: (--\w+)", message, flags=re.IGNORECASE)
        if unknown and (meant := closest(unknown[1], self.options())):
            message += f", did you mean {meant}?"
        sys.stderr.write(f"error: {hyphenated(message)} ({self.prog} --help lists the options)\n")
        sys.exit(2)

    def options(self) -> list[str]:
        """All options by their long names."""
        return [name for action in self._actions for name in action.option_strings if name.startswith("--")]

    def check_files(self, words: Sequence[str]) -> None:
        """Refuse a file of options that has an unknown one, or a value of another type, naming the file."""
        known = {name[2:] for name in self.options()}
        for path in _files(words):
            for name in _read(path):
                if name.partition(".")[0] not in known:
                    meant = closest(name.replace("-", "_"), known)
                    self.error(f"{path} has no option {name!r}{f', did you mean {meant}?' if meant else ''}")
            self._file = path
            self.parse_args(["--config", path])
            self._file = None


def as_given(default: Any) -> str:
    """A default as it would be given on the command line."""
    if isinstance(default, list):
        return ",".join(f"{value:g}" if isinstance(value, float) else str(value) for value in default)
    return str(default).lower() if isinstance(default, bool) else str(default)


def hyphenated(text: str) -> str:
    """Options in a text as a user reads them: --local-steps, which --local_steps is too."""
    return re.sub(r"(?<![\w./-])--\w+", lambda option: option[0].replace("_", "-"), text)


def _files(words: Sequence[str]) -> Iterator[str]:
    """The values of --config."""
    for word, following in zip(words, (*words[1:], ""), strict=False):
        name, equals, value = word.partition("=")
        if name == "--config":
            yield value if equals else following


def _read(path: str) -> dict[str, Any]:
    """The options in a file, as they stand there; none where the parser itself says what is wrong with the file."""
    try:
        given = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return {str(name): value for name, value in given.items()} if isinstance(given, dict) else {}


def _where(text: str, words: Sequence[str]) -> str:
    """Which files gave the options that a message is about, in parentheses; nothing where none did.

    >>> Path("options.yaml").write_text("rounds: 0\\nclients: 5\\n")
    21
    >>> _where("rounds must be at least 1, not 0.", ["--config", "options.yaml", "--epsilon", "3"])
    ' (options.yaml gives rounds)'
    >>> _where("rounds must be at least 1, not 0.", ["--config", "options.yaml", "--rounds", "0"])
    ''
    """
    given = {name: (path, value) for path in _files(words) for name, value in _read(path).items()}
    overridden = {word.partition("=")[0][2:].partition(".")[0] for word in words if word.startswith("--")}
    about: dict[str, list[str]] = {}
    for name, (path, value) in given.items():
        told = [name, *(value if isinstance(value, dict) else [value] if isinstance(value, str) else [])]
        if name not in overridden and any(re.search(rf"(?<!\w){re.escape(str(part))}(?!\w)", text) for part in told):
            about.setdefault(path, []).append(name)
    parts = [f"{path} gives {' and '.join(names)}" for path, names in about.items()]
    return f" ({', '.join(parts)})" if parts else ""


def _parser(prog: str, description: str, usage: str) -> _Parser:
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = _Parser(prog=prog, usage=usage, description=description, formatter_class=_Formatter)
    parser.add_argument("--config", action="config", help="YAML file with any of these options.")
    return parser


def _add_run_options(parser: ArgumentParser, skip: set[str]) -> None:
    """Options of a run: flat, in groups, as in the config.yaml that a run writes."""
    for kind in (FederationConfig, PrivacyConfig, OptimizationConfig, DataConfig, ModelConfig, RunOptions):
        group = parser.add_argument_group(heading(kind))
        if kind is ModelConfig:
            group.add_argument("--model", default=ModelConfig.name, help=MODEL_HELP)
        named = {field.name for field in dataclasses.fields(kind)}
        group.add_class_arguments(kind, as_group=False, skip=({"name", "reproducible"} | skip) & named)
        if kind is RunOptions:
            group.add_argument("--reproducible", action="store_true", help=REPRODUCIBLE_HELP)


def run_parser() -> _Parser:
    """Options of a run."""
    parser = _parser(PROG, RUN_HELP, f"{PROG} [run] [--option value ...]")
    _add_run_options(parser, set())
    return parser


def compare_parser() -> _Parser:
    """Options of a comparison: the grid's, and those that all its runs have in common."""
    prog = f"{PROG} compare"
    parser = _parser(prog, COMPARE_HELP, f"{prog} [--option value ...]")
    group = parser.add_argument_group(heading(CompareConfig))
    group.add_class_arguments(CompareConfig, as_group=False)
    _add_run_options(parser, {"method", "epsilon", "seed", "output"})
    return parser


def pretrain_parser() -> _Parser:
    """Options of pretrain."""
    prog = f"{PROG} pretrain"
    parser = _parser(prog, PRETRAIN_HELP, f"{prog} [--option value ...]")
    parser.add_class_arguments(PretrainConfig)
    return parser


def advise_parser() -> _Parser:
    """Options of advise."""
    prog = f"{PROG} advise"
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = _Parser(prog=prog, usage=f"{prog} --examples N", description=ADVISE_HELP, formatter_class=_Formatter)
    parser.add_class_arguments(AdviseConfig)
    return parser


def _advise(options: dict[str, Any], console: Console, began: float) -> int:
    chosen = AdviseConfig(**options)
    from lora_dp.fed.advice import in_words

    print(in_words(chosen))
    return 0


def _on_a_run(command: str, description: str) -> _Parser:
    """Options of a command that takes the folder of a run."""
    prog = f"{PROG} {command}"
    parser = _Parser(prog=prog, usage=f"{prog} RUN", description=description, formatter_class=_Formatter)
    parser.add_argument("folder", type=Path, metavar="RUN", help="Folder of the run, as in runs/<time>-la-lora-eps8.")
    return parser


def report_parser() -> _Parser:
    """Options of report."""
    return _on_a_run("report", REPORT_HELP)


def resume_parser() -> _Parser:
    """Options of resume."""
    return _on_a_run("resume", RESUME_HELP)


def _resume(options: dict[str, Any], console: Console, began: float) -> int:
    read_config(options["folder"])
    with opening(console, f"run {options['folder']}"):
        from lora_dp.fed.launch import resume
    outcome = resume(options["folder"], console, began)
    return INTERRUPTED if outcome.interrupted else 0


def inspect_parser() -> _Parser:
    """Options of inspect."""
    return _on_a_run("inspect", INSPECT_HELP)


def _inspect(options: dict[str, Any], console: Console, began: float) -> int:
    read_config(options["folder"])
    with opening(console, f"run {options['folder']}"):
        from lora_dp.fed.diagnostics.inspect import inspect_run
    inspect_run(options["folder"], console)
    return 0


def audit_parser() -> _Parser:
    """Options of audit."""
    prog = f"{PROG} audit"
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = _Parser(
        prog=prog, usage=f"{prog} CONFIG [--option value ...]", description=AUDIT_HELP, formatter_class=_Formatter
    )
    parser.add_argument("target", type=Path, metavar="CONFIG", help="A run's folder or config.yaml, or a YAML file.")
    parser.add_argument_group(heading(AuditConfig)).add_class_arguments(AuditConfig, as_group=False, skip={"target"})
    return parser


def _audit(options: dict[str, Any], console: Console, began: float) -> int:
    chosen = AuditConfig(**options)
    read_options(chosen.target)
    with opening(console, f"{chosen.target} to be audited"):
        from lora_dp.fed.auditing.command import audit_config
    return int(audit_config(chosen, console).violated)


def _report(options: dict[str, Any], console: Console, began: float) -> int:
    if not options["folder"].is_dir():
        raise ValueError(f"{options['folder']} is no folder: name the one that a run or a comparison has left.")
    with quiet_interrupts():
        from lora_dp.fed.page import write_page
    print(f"page written to {write_page(options['folder'])}")
    return 0


def _compare(options: dict[str, Any], console: Console, began: float) -> int:
    names = [field.name for field in dataclasses.fields(CompareConfig) if field.name in options]
    chosen = CompareConfig(**{name: options.pop(name) for name in names})
    for method in chosen.methods:
        get_method(method, options.get("method_options"))
    check_place(options.get("dataset", DataConfig.dataset))
    rows = len(chosen.methods) + len(chosen.variants)
    with opening(console, f"a grid of {rows} rows at {len(chosen.epsilons)} budgets"):
        from lora_dp.fed.compare.comparison import compare
        from lora_dp.fed.compare.outcomes import read_failures
    return 1 if read_failures(compare(chosen, options, console)) else 0


def _run(options: dict[str, Any], console: Console, began: float) -> int:
    config = RunConfig.from_flat(options)
    check_place(config.data.dataset)
    with opening(console, f"{config.data.dataset} and the model {config.model.name}"):
        from lora_dp.fed.launch import run
    outcome = run(config, console, began)
    return INTERRUPTED if outcome.interrupted else 0


def _pretrain(options: dict[str, Any], console: Console, began: float) -> int:
    chosen = PretrainConfig(**options)
    with opening(console, chosen.dataset):
        from lora_dp.fed.models.pretrain import pretrain
    print(f"weights written to {pretrain(chosen)}")
    return 0


@contextlib.contextmanager
def opening(console: Console, what: str) -> Iterator[None]:
    """Says what is about to happen before the imports inside, which take seconds."""
    console.print(f"opening {escape(what)} …", highlight=False, soft_wrap=True)
    with quiet_interrupts():
        yield


Action = Callable[[dict[str, Any], Console, float], int]
COMMANDS: dict[str, tuple[Callable[[], _Parser], Action]] = {
    "run": (run_parser, _run),
    "compare": (compare_parser, _compare),
    "resume": (resume_parser, _resume),
    "report": (report_parser, _report),
    "inspect": (inspect_parser, _inspect),
    "audit": (audit_parser, _audit),
    "pretrain": (pretrain_parser, _pretrain),
    "advise": (advise_parser, _advise),
}


def main(command: str, arguments: Sequence[str], began: float) -> int:
    """Runs a command and returns the exit code: 2 for a wrong option or input.

    Args:
        command: one of those above.
        arguments: the words after it.
        began: when the process did, by ``time.monotonic``.
    """
    make_parser, action = COMMANDS[command]
    # Names of options are those of Python; --local-steps is how a user reads and writes them.
    words = _as_lists([_underscored(word) for word in arguments])
    parser = make_parser()
    parser.check_files(words)
    # Those given alone: what is left out, the method may choose.
    options = parser.parse_args(words, defaults=False).as_dict()
    options.pop("config", None)
    try:
        with needing("lora_dp.fed", "fed"):
            return action(options, Console(), began)
    except (ValueError, OSError, ImportError, IsolationError, TooFewClients) as error:
        text = error.in_full if isinstance(error, TooFewClients) else str(error)
        where = _where(text, words) if isinstance(error, ValueError) else ""
        sys.stderr.write(f"error: {' '.join(text.split())}{where}\n")
        return 2


def _as_lists(words: list[str]) -> list[str]:
    """--seeds 0,1,2 is --seeds [0,1,2]."""
    for index, word in enumerate(words):
        name, equals, value = word.partition("=")
        is_list = name in _LISTS or name.startswith("--search.")
        if is_list and equals:
            words[index] = f"{name}={_bracketed(value)}"
        elif is_list and index + 1 < len(words):
            words[index + 1] = _bracketed(words[index + 1])
    return words


def _bracketed(value: str) -> str:
    if value.startswith("{"):
        return re.sub(r":(?=\S)", ": ", value)  # YAML takes 4:0.5 for a number of base 60
    return value if value.startswith("[") else f"[{value}]"


def _underscored(word: str) -> str:
    name, equals, value = word.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value if name.startswith("--") else word
