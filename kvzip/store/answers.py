"""What a server answers that does not do as it is asked, in words."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from kvzip.errors import KVZipError, StoreError, UsageError, first_line, is_panic
from kvzip.store.urls import AZURE, WEB, without_secrets

_NO_BUCKET = "there is no such bucket"
_REGION = "the bucket is in another region: set AWS_REGION, or the option region, to its own"
_KEYS = "the keys ({keys}) give no permission for that"
_OLD = "the session's token ({token}) is not valid, or not any more"
_BUSY = "the server is busy"
_OF_CODE = {
    "NoSuchBucket": _NO_BUCKET,
    "ContainerNotFound": _NO_BUCKET,
    "InvalidBucketName": "no bucket can have that name",
    "InvalidAccessKeyId": "the access key ({access}) is not known there",
    "InvalidClientTokenId": "the access key ({access}) is not known there",
    "SignatureDoesNotMatch": "the secret key ({secret}) is not that of the access key",
    "AccessDenied": _KEYS,
    "AllAccessDisabled": _KEYS,
    "AccountProblem": _KEYS,
    "ExpiredToken": _OLD,
    "InvalidToken": _OLD,
    "TokenRefreshRequired": _OLD,
    "PermanentRedirect": _REGION,
    "AuthorizationHeaderMalformed": _REGION,
    "IllegalLocationConstraintException": _REGION,
    "RequestTimeTooSkewed": "the clock of this machine is wrong",
    "SlowDown": _BUSY,
    "ServiceUnavailable": _BUSY,
    "NoSuchUpload": "an upload was ended by somebody else",
    "InvalidObjectState": "the object is in an archive, and must be restored before it is read",
    "QuotaExceeded": "the bucket is full",
}
"""By the code that S3 and what is like it name in their answers."""
_OF_STATUS = {
    "301": _REGION,
    "400": "the server does not understand what it is asked, which a wrong region may cause, too",
    "401": "the server asks who this is: there are no keys, or wrong ones",
    "403": _KEYS,
    "503": _BUSY,
    "507": "the server's disk is full",
}
"""By the status, for answers without a body."""
_OF_WEB = {
    "401": "the server asks who this is: give a URL that is signed, or has a password",
    "403": "the server does not give it to everybody: a signed URL may be wrong, or too old",
}
"""By the status, of web servers, which know no keys."""
_OF_TEXT = {
    "169.254.169.254": "there are no keys: set {missing}",
    "Account must be specified": "whose is it? Set AZURE_STORAGE_ACCOUNT_NAME",
    "incorrectly configured region": _REGION,
}
"""By what the client says, where no server has answered. The address is where a machine in a cloud
asks for the keys of its own."""


class _Client(NamedTuple):
    """How a kind of store is told its keys, in variables of the environment."""

    keys: str
    access: str
    secret: str
    token: str
    missing: str


_S3 = _Client(
    "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY",
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY; for a bucket that is open to all, "
    "AWS_SKIP_SIGNATURE=true",
)
_GOOGLE = _Client(
    "GOOGLE_APPLICATION_CREDENTIALS",
    "GOOGLE_APPLICATION_CREDENTIALS",
    "GOOGLE_APPLICATION_CREDENTIALS",
    "GOOGLE_BEARER_TOKEN",
    "GOOGLE_APPLICATION_CREDENTIALS to the file of a service account's key, or log in (gcloud auth "
    "application-default login); for a bucket that is open to all, GOOGLE_SKIP_SIGNATURE=true",
)
_AZURE = _Client(
    "AZURE_STORAGE_ACCOUNT_NAME, AZURE_STORAGE_ACCOUNT_KEY",
    "AZURE_STORAGE_ACCOUNT_NAME",
    "AZURE_STORAGE_ACCOUNT_KEY",
    "AZURE_STORAGE_SAS_KEY",
    "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY; for a container that is open to "
    "all, AZURE_SKIP_SIGNATURE=true",
)


def _client(scheme: str) -> _Client:
    if scheme == "gs":
        return _GOOGLE
    return _AZURE if scheme in AZURE else _S3


@contextmanager
def as_store_errors(what: str, scheme: str) -> Iterator[None]:
    """Errors of obstore as StoreError, in a line without what gives access; that an object is not
    there stays a FileNotFoundError. `scheme`: of the URL, which says who is asked."""
    from obstore.exceptions import BaseError

    try:
        yield
    except FileNotFoundError as error:
        words = told(error, scheme)
        if _NO_BUCKET in words and scheme not in WEB:
            raise StoreError(f"{what}: {words}") from None
        raise
    except (BaseError, OSError) as error:
        cause = error if without_secrets(str(error)) == str(error) else None
        raise StoreError(f"{what}: {told(error, scheme)}") from cause
    except (ValueError, TypeError, OverflowError) as error:
        if isinstance(error, KVZipError):
            raise
        raise UsageError(f"{what}: {without_secrets(first_line(error))}") from None
    except BaseException as error:
        # A panic of the client's, on settings that it did not check: no Exception.
        if not is_panic(error):
            raise
        why = without_secrets(first_line(error))
        raise StoreError(f"{what}: the client gave up ({why})") from None


def told(error: BaseException, scheme: str) -> str:
    """An error of the client's in words of a line: what the server's answer means, where that is
    known, and else what it says."""
    text, web = str(error), scheme in WEB
    names = _client(scheme)._asdict()
    for found, words in _OF_TEXT.items():
        if found in text:
            return words.format(**names)
    status, code = _one(r"status code: (\d+)", text), _one(r"<Code>([\w.]+)</Code>", text)
    message, region = _one(r"<Message>([^<]*)", text), _one(r"<Region>([\w-]+)", text)
    name = " ".join(filter(None, [status, code]))
    if web and status in _OF_WEB:
        return " ".join(filter(None, [_OF_WEB[status], f"({name})", without_secrets(message)]))
    if code in _OF_CODE or (not code and status in _OF_STATUS and not web):
        words = _OF_CODE[code] if code else _OF_STATUS[status]
        if words is _REGION and region:
            words += f", {region}"
        return f"{words.format(**names)} ({name})"
    if message:
        return without_secrets(f"{message.strip().rstrip('.')} ({name})")
    return without_secrets(first_line(error).partition("<?xml")[0].rstrip(" :"))


def _one(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    return found[1] if found else ""
