"""Text that a peer, or private data, had a hand in, made fit for a terminal, a log and a file."""

MOST_CHARACTERS = 300
_CUT = "…"


def harmless(text: object, most: int = MOST_CHARACTERS) -> str:
    """One line of printable characters, of at most ``most`` of them; doing it twice changes nothing more.

    Whatever moves a cursor, ends a line, turns the direction of writing or is not seen is written as its escape:
    control characters (C0, C1, DEL), line and paragraph separators, marks of direction, characters of no width, lone
    surrogates.

    Args:
        text: a string; of anything else, which a peer may have made large, the type is named alone.
        most: longest result; what is cut off shows as "…".
    """
    if not isinstance(text, str):
        text = f"({type(text).__name__})"
    shown: list[str] = []
    length = 0
    for character in text[: most + 1]:
        part = character if character.isprintable() else character.encode("unicode_escape").decode("ascii")
        if length + len(part) > most:
            while length > most - len(_CUT):
                length -= len(shown.pop())
            return "".join(shown) + _CUT
        shown.append(part)
        length += len(part)
    return "".join(shown)


def described(error: BaseException, most: int = MOST_CHARACTERS) -> str:
    """An exception's type and words, on one harmless line. For the eyes of those who may see the data."""
    return harmless(f"{type(error).__name__}: {error}" if str(error) else type(error).__name__, most)
