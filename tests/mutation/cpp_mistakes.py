"""Mistakes in C++: regular expressions on lines of code, outside of comments, strings and the preprocessor."""

import re
from collections.abc import Iterator

from tests.mutation.mutant import Mutant, numbered

# Operator, what it looks for, what it puts in its place.
_MISTAKES: tuple[tuple[str, str, str], ...] = (
    ("compare", r"(?<= )<(?= )", "<="),
    ("compare", r"(?<= )<=(?= )", "<"),
    ("compare", r"(?<= )>(?= )", ">="),
    ("compare", r"(?<= )>=(?= )", ">"),
    ("compare", r"==", "!="),
    ("compare", r"!=", "=="),
    ("arithmetic", r"(?<= )\+(?= )", "-"),
    ("arithmetic", r"(?<= )-(?= )", "+"),
    ("arithmetic", r"(?<= )\*(?= )", "/"),
    ("arithmetic", r"(?<= )/(?= )", "*"),
    ("arithmetic", r"\+=", "-="),
    ("arithmetic", r"-=", "+="),
    ("arithmetic", r"\^=", "|="),
    ("arithmetic", r"\|=", "&="),
    ("arithmetic", r"&=", "|="),
    ("arithmetic", r"(?<= )<<(?= )", ">>"),
    ("arithmetic", r"(?<= )>>(?= )", "<<"),
    ("arithmetic", r"(?<= )\|(?= )", "&"),
    ("arithmetic", r"(?<= )&(?= )", "|"),
    ("arithmetic", r"(?<= )\^(?= )", "|"),
    ("and/or", r"&&", "||"),
    ("and/or", r"\|\|", "&&"),
    ("negate", r"(?<=[ (])!(?=[\w(])", ""),
    ("extreme", r"\bmin\b", "max"),
    ("extreme", r"\bmax\b", "min"),
    ("constant", r"\btrue\b", "false"),
    ("constant", r"\bfalse\b", "true"),
)
_STATEMENT = re.compile(
    r"^\s+(?!return|throw|using|const|static|auto|else|if|for|while|struct|case)[\w:.>\[\]*()-]+"
    r"(?:\(.*\)| [-+*/|&^]?= .*);$"
)
_NUMBER = re.compile(r"(?<![\w.])(0x[0-9a-fA-F']+|\d+\.\d*(?:e-?\d+)?|\d[\d']*)(?![\w.]*\w{2})")
_FUNCTION = re.compile(r"^(?: {0,4}(?!return|else|throw)[A-Za-z].*?)?\b([A-Za-z_]\w*)\([^;]*$")
_LEFT = re.compile(r"^\s*(#|//|static_assert|using |template|typedef|extern|throw )")


def cpp_mutants(path: str, source: str) -> list[Mutant]:
    """All mutants of a file, in its order."""
    return numbered(_find(path, source))


def _find(path: str, source: str) -> Iterator[Mutant]:
    at, function, throwing = 0, "", False
    for line in source.splitlines(keepends=True):
        begin, at = at, at + len(line.encode())
        if _LEFT.match(line) or throwing:
            throwing = "throw " in line or (throwing and not line.rstrip().endswith(";"))
            throwing = throwing and not line.rstrip().endswith(";")
            continue
        code = re.sub(r'"(?:[^"\\]|\\.)*"', lambda m: "\0" * len(m.group()), line.split("//")[0].rstrip())
        indent = len(code) - len(code.lstrip())
        if indent <= 4 and (named := _FUNCTION.match(code)) and named.group(1) not in ("if", "for", "while", "switch"):
            function = named.group(1)
        if "throw " in code:
            code = code[: code.index("throw ")]
            throwing = not line.rstrip().endswith(";")

        def mutant(
            operator: str,
            start: int,
            end: int,
            after: str,
            begin: int = begin,
            line: str = line,
            function: str = function,
        ) -> Mutant:
            offset = begin + len(line[:start].encode())
            return Mutant(
                path,
                function,
                operator,
                offset,
                offset + len(line[start:end].encode()),
                line[start:end],
                after,
                line.strip(),
            )

        for operator, looked_for, after in _MISTAKES:
            for found in re.finditer(looked_for, code):
                yield mutant(operator, found.start(), found.end(), after)
        for found in _NUMBER.finditer(code):
            for after in _numbers(found.group()):
                yield mutant("constant", found.start(), found.end(), after)
        if _STATEMENT.match(code):
            yield mutant("drop statement", indent, len(code), ";")


def _numbers(text: str) -> list[str]:
    digits = text.replace("'", "")
    if "." in digits:
        return [repr(float(digits) * factor) for factor in (1.02, 0.5)] if float(digits) else ["1.0"]
    return [hex(int(digits, 16) ^ 1)] if digits.startswith("0x") else [str(int(digits) + 1)]
