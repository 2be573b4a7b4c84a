"""What a URL is, which file system reads it, and what its errors mean to a user."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import Any, TypeVar

from pymerge.errors import InputError, MergeError

T = TypeVar("T")
_SCHEME = r"[a-zA-Z][a-zA-Z0-9]*(?:::[a-zA-Z][a-zA-Z0-9]*)*"
_URL = re.compile(rf"{_SCHEME}://.+", re.DOTALL)
_PASSWORD = re.compile(r"://[^/@]*:[^/@]*@")
_SECRET_IN_HTTP = re.compile(r"(?:^|::)https?://(?:[^?]*\?|[^/]*@)", re.IGNORECASE)  # a query, or a token for a name
_LOCAL = re.compile(r"(?:file|local)://", re.IGNORECASE)
ATTEMPTS = 5  # at one request
BACKOFF = 0.5  # seconds before the second attempt; twice as long before each further one
PERMANENT = (
    FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, ImportError, ValueError, TypeError,
    AttributeError, LookupError, NotImplementedError, MergeError,
)  # fmt: skip
NO_CREDENTIALS = ("NoCredentialsError", "PartialCredentialsError", "TokenRetrievalError", "ProfileNotFound")
PLACES = {
    "s3": "AWS's usual ones: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, ~/.aws, the machine's role",
    "gs": "Google's usual ones: GOOGLE_APPLICATION_CREDENTIALS, gcloud auth application-default login",
    "hf": "HF_TOKEN, hf auth login",
}
PACKAGES = {"s3": "'pymerge[remote]'", "gs": "gcsfs", "az": "adlfs", "hf": "'pymerge[hf]'", "http": "aiohttp requests"}
SAME = {"s3a": "s3", "gcs": "gs", "abfs": "az", "abfss": "az", "adl": "az", "https": "http"}


def is_url(text: str) -> bool:
    """Whether a reference is a URL: `s3://bucket/model`."""
    return _URL.fullmatch(text) is not None


def is_collapsed(path: str) -> bool:
    """Whether a path is a URL, or what pathlib makes of one (`s3:/bucket/model`)."""
    return re.match(rf"{_SCHEME}:/", path) is not None


def local_path(text: str) -> str:
    """The path of a file:// URL; other text as it is."""
    return _LOCAL.sub("", text, count=1) if _LOCAL.match(text) else text


def file_system(url: str) -> tuple[Any, str]:
    """The fsspec file system of a URL, and the path in it.

    Raises   InputError: no such protocol, a package that is missing, a URL that holds a secret."""
    if _PASSWORD.search(url) or _SECRET_IN_HTTP.search(url):
        raise InputError(
            f"{url.partition('//')[0]}//...: a URL must hold no password, signature or query, since recipes are "
            "copied into merge.json. Give credentials where the protocol's library looks for them (environment, "
            "configuration files)"
        )
    try:
        from fsspec.core import url_to_fs

        return url_to_fs(url)
    except ImportError as e:
        package = PACKAGES.get(protocol(url), "the package of this protocol")
        fsspec = "" if package.startswith("'") else " 'pymerge[remote]'"
        raise InputError(f"{url[:400]}: {protocol(url)}:// needs a package ({e}): pip install {package}{fsspec}") from e
    except Exception as e:
        raise explained(e, url) from e


def protocol(url: str) -> str:
    name = url.partition("://")[0].rpartition("::")[2].lower()
    return SAME.get(name, name)


def asked(call: Callable[[], T], url: str, attempts: int | None = None, alive: Callable[[], bool] = lambda: True) -> T:
    """What a request answers; asked again, with growing waits, after what may pass.

    alive    whether anybody still waits for the answer
    Raises   InputError, caused by an OSError where the file system failed."""
    last = attempts or ATTEMPTS
    for attempt in range(1, last + 1):
        try:
            return call()
        except Exception as e:  # of any file system's library
            if isinstance(e, MergeError):
                raise
            if attempt == last or is_permanent(e) or not alive():
                raise explained(e, url) from (e if isinstance(e, OSError) else OSError(str(e)))
        time.sleep(BACKOFF * 2 ** (attempt - 1))
    raise AssertionError


def is_permanent(error: BaseException) -> bool:
    return isinstance(error, PERMANENT) or type(error).__name__ in NO_CREDENTIALS


def explained(error: BaseException, url: str) -> InputError:
    """What happened, where, and what to do."""
    said = " ".join(str(error).split())[:300]
    where = PLACES.get(protocol(url), "where the library of this protocol looks for them")
    if isinstance(error, FileNotFoundError):
        text = f"no such bucket, folder or file ({said})"
    elif isinstance(error, PermissionError):
        text = f"permission denied ({said}). Credentials come from {where}"
    elif type(error).__name__ in NO_CREDENTIALS:
        text = f"no credentials ({said}). They come from {where}"
    elif isinstance(error, ValueError) and "rotocol" in said:
        text = f"{said}: pymerge reads what fsspec reads: s3://, gs://, hf://, https://, ..."
    elif isinstance(error, ConnectionError) or "onnect" in f"{type(error).__name__} {said}":
        text = f"cannot be reached ({type(error).__name__}: {said}). Is the network up, the endpoint right?"
    else:
        text = f"cannot be read ({type(error).__name__}: {said})"
    return InputError(f"{url[:400]}: {text}")
