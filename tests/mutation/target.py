"""The tests that are to notice a mutant: those of its module first, quick ones before slow ones."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Target:
    """The tests of one file, in the order in which they run.

    Attributes:
        tests: files.
        interpreted: files that run after these, with Triton's kernels in its interpreter.
    """

    tests: tuple[str, ...]
    interpreted: tuple[str, ...] = ()
