"""The options of ``lora-dp`` as Markdown, from the parsers themselves."""

import re
from argparse import SUPPRESS
from typing import Any, get_args

from lora_dp.fed.commands import COMMANDS, as_given, hyphenated


def markdown() -> str:
    """A section for each command; what compare shares with run is listed once, under run."""
    shared = {action.dest for group in COMMANDS["run"][0]()._action_groups for action in group._group_actions}
    parts = []
    for name, (make_parser, _) in COMMANDS.items():
        parser = make_parser()
        parts.append(f"## {name}\n\n{_escaped(parser.description or '')}\n\n```text\n{parser.usage}\n```\n")
        for group in parser._action_groups:
            actions = [action for action in group._group_actions if action.default != SUPPRESS]
            if name == "compare":
                actions = [action for action in actions if action.dest not in shared - {"config"}]
            if actions:
                if group.title not in _PLAIN_GROUPS:
                    heading = f"### {group.title}" if len(group.title) < _LONGEST_HEADING else f"{group.title}."
                    parts.append(heading + "\n")
                parts.append("| option | default | meaning |\n| --- | --- | --- |")
                parts += [_row(action) for action in actions]
                parts.append("")
        if name == "compare":
            parts.append("All other options are those of [run](#run).\n")
    return "\n".join(parts)


_PLAIN_GROUPS = {"options", "positional arguments"}
_LONGEST_HEADING = 60


def _row(action: Any) -> str:
    name = hyphenated(next((option for option in action.option_strings), action.metavar))
    choices = _choices(getattr(action, "_typehint", None))
    text = _escaped(" ".join(str(action.help or "").split()))
    if choices:
        text += " One of " + ", ".join(f"`{choice}`" for choice in choices) + "."
    default = "" if action.default in (None, {}) else as_given(action.default)
    return f"| `{name}` | {f'`{default}`' if default else ''} | {text} |"


def _choices(hint: Any) -> list[str]:
    """The words that an option takes, where it takes no other value."""
    parts = [part for part in get_args(hint) or () if part is not type(None)]
    if len(parts) == 1 and get_args(parts[0]):
        return _choices(parts[0])
    return parts if parts and all(isinstance(part, str) for part in parts) else []


def _escaped(text: str) -> str:
    """Text without Markdown of its own; words like ``--method`` and files stand as code."""
    text = re.sub(r"([|<*_\[])", r"\\\1", text)
    return re.sub(r"(?<!\w)(--[\w\\-]+(?:\.\w[\w\\]*)*)", lambda word: "`" + word[1].replace("\\", "") + "`", text)
