"""Text of a peer on one line: what is shown, what is escaped, and where it is cut, to the character."""

import pytest

from lora_dp.fed.safe_text import described, harmless


@pytest.mark.parametrize(
    "text, shown",
    [
        ("", ""),
        ("abcdefghij", "abcdefghij"),
        ("äöü é 漢字", "äöü é 漢字"),
        ("abcdefghijk", "abcdefghi…"),
        ("abcdefghij" * 100, "abcdefghi…"),
        ("abcdefgh\n", r"abcdefgh\n"),
        ("abcdefghi\n", "abcdefghi…"),
        ("abcdefgh\nk", "abcdefgh…"),
        ("abcdef\0", r"abcdef\x00"),
        ("abcdef\0k", "abcdef…"),
        ("abcdefg\0", "abcdefg…"),
        ("ab\u202ec", r"ab\u202ec"),
        ("a\ud800", r"a\ud800"),
        ("\U000e0001", r"\U000e0001"),
        ("\x1b\x1b\x1b", r"\x1b\x1b…"),
    ],
)
def test_what_fits_is_shown_whole_and_what_does_not_ends_in_a_sign_of_it(text, shown):
    assert harmless(text, 10) == shown and harmless(shown, 10) == shown


def test_a_line_has_300_characters_unless_said_otherwise():
    assert harmless("x" * 300) == "x" * 300 and harmless("x" * 301) == "x" * 299 + "…"
    assert [harmless("ab", most) for most in (1, 2, 3)] == ["…", "ab", "ab"] and harmless("\0", 1) == "…"


def test_what_is_no_text_is_named_by_its_type():
    assert harmless(b"text") == "(bytes)" and harmless(["\x1b"] * 1000, 10) == "(list)"


def test_an_exception_is_described_by_its_type_and_its_words():
    assert described(OSError("disk\nfull")) == r"OSError: disk\nfull" and described(KeyError()) == "KeyError"
    assert described(OSError("disk full"), 10) == "OSError: …" and described(OSError("x" * 400))[-2:] == "x…"
    assert len(described(OSError("x" * 400))) == 300 and described(NotImplementedError(), 10) == "NotImplem…"
