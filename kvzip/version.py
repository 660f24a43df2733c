"""The library's version, as its package states it, and what is said of files of other versions."""

from importlib.metadata import version

from kvzip.errors import FormatError

__version__ = version("kvzip")


def newer(what: str) -> str:
    """The words for something in a file that this version of the library does not know."""
    return f"{what}, which kvzip {__version__} does not know: a newer kvzip may"


def check_format(what: str, found: object, known: int, instead: str) -> None:
    """Raise FormatError unless the format version that a file states is the one that is read.

    `what`: what kind of file it is. `instead`: what to do with one from before the first release.
    """
    if found == known:
        return
    if isinstance(found, int) and found < known:
        raise FormatError(
            f"{what} is of format version {found}, from before the first release of kvzip, and can "
            f"no longer be read: {instead}"
        )
    raise FormatError(newer(f"{what} is of format version {found}"))
