"""What can go wrong, by kind. Every error a caller can meet is a :class:`KVZipError`."""


class KVZipError(Exception):
    """Base of all errors of this library; its message says what to do."""


class FormatError(KVZipError):
    """Not a file of this kind, an unknown version, or a header out of bounds."""


class CorruptError(KVZipError):
    """A checksum does not match, or data is cut short."""


class ProfileError(KVZipError):
    """A profile is missing, or it is not the one that the file names."""


class UnsupportedError(KVZipError):
    """A dtype, a cache layer kind or an option that the library does not handle."""


class UsageError(KVZipError, ValueError):
    """An argument that makes no sense: of the wrong kind, out of range, or beside another one."""


class StoreError(KVZipError):
    """A store does not answer, not in time, or not as it should."""
