"""Which filesystem a URI means and with which options, and what happens where it does not answer.

**Options** (endpoint, profile, anonymous access, …) are fsspec's own, by protocol: `FSSPEC_S3='{"anon": true}'` in the
environment, or `--storage-options`, which `configure` puts there too, so that worker processes read the same. Keys,
secrets and tokens are refused in both a URI and `--storage-options`: they come from the environment or a profile.

**Retries.** A file of this machine is asked once. Of a store, what fails for a reason that may pass (no connection, no
answer, a reset, 429, 500 to 504, an answer that was cut short) is asked again:

1. each request on S3 by botocore, `REQUEST_ATTEMPTS` times in all, within 3 s (mode `standard`); s3fs's own tries, 5
   around each of these and 5 more around each body, are off: together with botocore's they would be 125 (Azure's
   client has 3 more tries of its own, after 15 s and more, Google's 5 in 31 s and more; neither can be changed);
2. each operation of `storage` by `persistently`, after pauses that grow from 0.1 to 10 s, until `--storage-retry-s`
   (60) have passed since it began; after that it ends with a `StorageError`.

So a request that fails now and then costs one more, a store that is gone for less than a minute costs a few for each
operation in flight, and one that stays away ends the job with exit code 75 and the same command goes on. An answer is
waited for 15 s (s3fs's `read_timeout`) before it counts as none; `config_kwargs` among the options changes that, too
(`requests_timeout` for Google's store).
"""

from __future__ import annotations

import errno
import itertools
import json
import os
import random
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar
from urllib.parse import urlsplit

import fsspec
import fsspec.config

REQUESTS_IN_FLIGHT = 32
"""Of one process on a filesystem that is not local."""

ANSWER_S = 15.0
"""For which an answer of Google's store is waited for; s3fs has the same."""

_GOOGLE = ("gs", "gcs")

REQUEST_ATTEMPTS = 3
"""Times that botocore sends one request."""

RETRY_VARIABLE = "UNET_RAY_STORAGE_RETRY_S"
"""Environment variable by which `--storage-retry-s` reaches the workers."""

DEFAULT_RETRY_S = "60.0"

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 10.0

T = TypeVar("T")


class StorageError(OSError):
    """Trouble with storage that may be over when one tries again (exit code 75)."""


class StorageRefused(PermissionError):
    """The store or its client does not do this: missing credentials or rights, a name or a request it does not take."""


class FileChanged(OSError):
    """A file is no longer the version that was asked for."""


# A link to another folder or an unusable disk is not mended by trying again, everything else may be.
_NOT_TRANSIENT = (
    *(FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError, FileExistsError),
    FileChanged,
)

_REFUSALS = {
    getattr(errno, name)
    for name in ("EINVAL", "EPERM", "ENOSYS", "EMSGSIZE", "ENAMETOOLONG", "EREMCHG")
    if hasattr(errno, name)
}
"""What s3fs makes of answers that say that the request itself is wrong."""

_CUT_ON_THE_WAY = ("BadDigest", "IncompleteBody", "XAmzContentSHA256Mismatch", "RequestTimeout")
"""Answers of S3 of which s3fs makes the same, although it was the way there that failed."""

_PASSING_STATUS = (408, 429, 500, 502, 503, 504)


# --- URIs ---


def resolve(uri: str) -> str:
    """Returns the URI in the form that means the same on every process: an absolute path, or a URL without end slash.

    Raises:
        ValueError: empty, an unknown protocol, or with credentials in it (which would end up in logs and outputs).
    """
    if not uri.strip():
        raise ValueError("an empty path was given; give a local path or a URI such as s3://bucket/folder")
    protocol, separator, rest = uri.partition("://")
    if not separator or protocol in ("file", "local"):
        return os.path.abspath(os.path.expanduser(rest if separator else uri))
    _refuse_credentials(uri)
    if protocol.split("::")[0] not in fsspec.available_protocols():
        raise ValueError(
            f"{uri}: unknown protocol {protocol!r}; use a local path, s3://, gs://, abfs:// or another of fsspec's"
        )
    return uri.rstrip("/") if rest.strip("/") else uri


def _refuse_credentials(uri: str) -> None:
    if _has_credentials(uri):
        raise ValueError(
            f"{uri.partition('://')[0]}://…: the URI holds credentials; give them by environment variables or a "
            "profile instead"
        )


def _has_credentials(uri: str) -> bool:
    parts = urlsplit(uri)
    user, at, _ = uri.rpartition("://")[2].partition("@")
    # A secret may hold a slash, at which a URI's host ends (s3://AKIA:wJalr/K7MD@bucket/log); a port is a number.
    if at and ":" in user and (user in parts.netloc or re.search(r"^[^/:]*:(?!\d+/)", user)):
        return True
    query = f"?{parts.query}&{parts.fragment}"
    word = "sig|signature|token|secret|password|credential|key|accesskeyid|keyid"
    return bool(re.search(rf"(?i)(^|[?&;])[^=&;]*({word})=", query))


def is_local(uri: str) -> bool:
    """Whether the URI is a path of this machine's own file tree."""
    return "://" not in uri or uri.startswith(("file://", "local://"))


def is_s3(uri: str) -> bool:
    """Whether the URI is read by s3fs."""
    return uri.startswith(("s3://", "s3a://"))


# --- options ---

_SECRET_OPTION = re.compile(
    r"(?i)secret|token|passw|credential|connection_string|signature|customerkey|^(key|username|user|auth)$"
    r"|(account|access|api|private|shared|sas)_?key|_key$|key_?id$"
)
_NO_SECRETS = ("anon", "cache", "cloud", "google_default", "browser")
"""What gcsfs takes for `token` and is none."""


def options_by_protocol(options: Mapping[str, Any] | None, uris: Iterable[str | None]) -> dict[str, dict[str, Any]]:
    """Returns `--storage-options` by protocol.

    Args:
        options: what fsspec's filesystem takes, plain (`{"anon": true}`) or by protocol (`{"s3": {"anon": true}}`).
        uris: the job's; plain options are for the one protocol that they have.

    Raises:
        ValueError: credentials in it, or plain options where it is not clear for what.
    """
    if options is None:
        return {}
    if (where := _find_secret(options)) is not None:
        raise ValueError(
            f"--storage-options has {where}, which may be a credential; give credentials by environment variables or "
            "a profile (they would end up in logs and records)"
        )
    known = {*fsspec.available_protocols()}
    if options and all(name in known and isinstance(value, Mapping) for name, value in options.items()):
        return {name: dict(value) for name, value in options.items()}
    protocols = sorted({uri.partition("://")[0].split("::")[-1] for uri in uris if uri and not is_local(uri)})
    if len(protocols) != 1:
        among = " and ".join(f"{name}://" for name in protocols) or "nothing but local paths"
        raise ValueError(
            f"--storage-options does not say for which protocol, and the job has {among}; "
            'give them by protocol: {"s3": {"anon": true}}'
        )
    return {protocols[0]: dict(options)}


def _find_secret(options: Any, path: str = "") -> str | None:
    """Returns the name of the first option that may hold a credential."""
    if isinstance(options, Mapping):
        for name, value in options.items():
            option = f"{path}.{name}" if path else str(name)
            if _SECRET_OPTION.search(str(name)) and value not in _NO_SECRETS and not isinstance(value, bool):
                return repr(option)
            if (secret := _find_secret(value, option)) is not None:
                return secret
    elif isinstance(options, list | tuple):
        return next((secret for value in options if (secret := _find_secret(value, path)) is not None), None)
    elif isinstance(options, str) and "://" in options and _has_credentials(options):
        return repr(path)
    return None


_before: dict[str, tuple[str | None, dict[str, Any]]] = {}
"""What the environment and fsspec's configuration said of a protocol that `configure` has options of."""


def configure(options: Mapping[str, Mapping[str, Any]], retry_s: float) -> None:
    """Makes options by protocol count in this process and in those that it starts, over what the environment says.

    What an earlier call said counts no more: a protocol without options is left as it was before it had any.
    """
    for protocol in {*_before, *options}:
        variable = f"FSSPEC_{protocol.upper()}"
        text, known = _before.setdefault(
            protocol, (os.environ.get(variable), dict(fsspec.config.conf.get(protocol, {})))
        )
        if settings := options.get(protocol):
            os.environ[variable] = json.dumps({**_read_json(text or ""), **settings})
            fsspec.config.conf[protocol] = {**known, **settings}
            continue
        del _before[protocol]
        fsspec.config.conf[protocol] = known
        if text is None:
            os.environ.pop(variable, None)
        else:
            os.environ[variable] = text
    os.environ[RETRY_VARIABLE] = str(float(retry_s))


def _read_json(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def worker_environment(*, inherited: bool) -> dict[str, str]:
    """Returns the variables by which workers mean the same by a URI as this process; none holds a credential.

    Args:
        inherited: the workers have this process's environment anyway, so what holds a credential stays as it is there.
    """
    handed = {"AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_DEFAULT_REGION"}
    environment = {RETRY_VARIABLE: os.environ.get(RETRY_VARIABLE, DEFAULT_RETRY_S)}
    for name, value in os.environ.items():
        if name not in handed and not name.startswith("FSSPEC_"):
            continue
        options = _read_json(value) if name.count("_") == 1 else {name.partition("_")[2].partition("_")[2]: value}
        if _find_secret(options if name.startswith("FSSPEC_") else {"": value}) is None:
            environment[name] = value
        elif not inherited and name.count("_") == 1:
            without = {key: kept for key, kept in options.items() if _find_secret({key: kept}) is None}
            environment[name] = json.dumps(without)
    return environment


# --- filesystems ---


def filesystem(uri: str) -> tuple[Any, str]:
    """Returns the fsspec filesystem of a URI and the path within it.

    Nothing of what a listing said is kept: what another process writes would not be seen.
    """
    try:
        if is_local(uri):
            return fsspec.core.url_to_fs(uri)
        if uri.partition("://")[0] in _GOOGLE:
            return fsspec.core.url_to_fs(uri, use_listings_cache=False, **_google_options())
        if not is_s3(uri):
            return fsspec.core.url_to_fs(uri, use_listings_cache=False)
        config_kwargs = {**fsspec.config.conf.get("s3", {}), **fsspec.config.conf.get("s3a", {})}.get(
            "config_kwargs", {}
        )
        retries = {"total_max_attempts": REQUEST_ATTEMPTS, "mode": "standard"}
        config = {"retries": retries, "max_pool_connections": REQUESTS_IN_FLIGHT, **config_kwargs}
        fs, path = fsspec.core.url_to_fs(uri, use_listings_cache=False, config_kwargs=config)
        fs.retries = 1
        return fs, path
    except ImportError as error:
        extra = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "abfs": "azure", "abfss": "azure", "az": "azure"}
        hint = extra.get(uri.partition("://")[0])
        remedy = f"pip install 'unet-ray[{hint}]'" if hint else str(error)
        raise ValueError(f"{uri}: the package that reads it is not installed; {remedy}") from error


def _google_options() -> dict[str, Any]:
    """How long gcsfs waits for an answer, as s3fs does; its own limit is 300 s, body included, six times."""
    if any("requests_timeout" in fsspec.config.conf.get(protocol, {}) for protocol in _GOOGLE):
        return {}
    import aiohttp

    return {"requests_timeout": aiohttp.ClientTimeout(total=None, sock_connect=ANSWER_S, sock_read=ANSWER_S)}


# --- trouble ---


@contextmanager
def naming(uri: str) -> Iterator[None]:
    """Turns what a filesystem raises into errors that name the URI; without a remedy in our hands a `StorageError`."""
    try:
        yield
    except StorageError:
        raise
    except _NOT_TRANSIENT as error:
        if error.filename is None and not is_local(uri):
            code = errno.EACCES if isinstance(error, PermissionError) else errno.ENOENT
            text = error.strerror or str(error) or os.strerror(code)
            raise type(error)(error.errno or code, text, uri) from error
        raise
    except OSError as error:
        nothing = "no answer" if isinstance(error, TimeoutError) else type(error).__name__
        text = error.strerror or str(error) or nothing
        if not is_local(uri) and _is_refusal(error) and not _was_cut_on_the_way(error):
            raise StorageRefused(error.errno or errno.EACCES, text, uri) from error
        raise StorageError(error.errno or errno.EIO, f"{text}; trying again may help", uri) from error
    except _client_errors_wrapped() as error:
        cause = error if isinstance(error, client_errors()) else error.__cause__
        if not isinstance(cause, client_errors()):
            raise
        text = " ".join(re.split("RequestId:|Content:", str(cause))[0].split())  # Azure's go on for many lines
        if not _may_pass(cause):
            remedy = "; set them in the environment or a profile" if "Credentials" in type(cause).__name__ else ""
            raise StorageRefused(errno.EACCES, f"{text}{remedy}", uri) from error
        raise StorageError(errno.EIO, f"{text}; trying again may help", uri) from error


def _is_refusal(error: OSError) -> bool:
    return error.errno in _REFUSALS or (error.errno is None and str(error).startswith("Forbidden: "))  # gcsfs's 403


def _was_cut_on_the_way(error: OSError) -> bool:
    return any(code in str(error.__cause__) for code in _CUT_ON_THE_WAY)


def _loaded(*names: str) -> tuple[type[Exception], ...]:
    """Classes of modules that are loaded, given as `module:class`."""
    places = (name.split(":") for name in names)
    return tuple(getattr(sys.modules[module], kind) for module, kind in places if module in sys.modules)


def client_errors() -> tuple[type[Exception], ...]:
    """What the clients of object stores raise that is no OSError."""
    clients = (
        "botocore.exceptions:BotoCoreError",
        "azure.core.exceptions:AzureError",
        "gcsfs.retry:HttpError",
        "google.auth.exceptions:GoogleAuthError",
    )
    return (*_loaded(*clients), *_passing_errors())


def _client_errors_wrapped() -> tuple[type[Exception], ...]:
    return (*client_errors(), RuntimeError)  # adlfs wraps some


def _passing_errors() -> tuple[type[Exception], ...]:
    return _loaded(
        "botocore.exceptions:HTTPClientError",
        "botocore.exceptions:ConnectionError",
        "botocore.exceptions:IncompleteReadError",
        "botocore.exceptions:ResponseStreamingError",
        "botocore.parsers:ResponseParserError",
        "azure.core.exceptions:ServiceRequestError",
        "azure.core.exceptions:ServiceResponseError",
        "azure.core.exceptions:IncompleteReadError",
        "azure.core.exceptions:DecodeError",
        "aiohttp:ClientError",
        "gcsfs.retry:ChecksumError",
    )


def _may_pass(error: BaseException) -> bool:
    status = getattr(error, "status_code", None) or getattr(error, "code", None)  # Azure's and Google's
    return isinstance(error, _passing_errors()) or status in _PASSING_STATUS


def persistently(uri: str, act: Callable[[], T]) -> T:
    """Does what can be repeated until it works, or `--storage-retry-s` have passed; a local file's error is final."""
    deadline = time.monotonic() + float(os.environ.get(RETRY_VARIABLE, DEFAULT_RETRY_S))
    for attempt in itertools.count():
        try:
            with naming(uri):
                return act()
        except StorageError:
            pause_s = min(_FIRST_PAUSE_S * 2**attempt, _LONGEST_PAUSE_S) * random.uniform(0.5, 1)
            if is_local(uri) or time.monotonic() + pause_s > deadline:
                raise
        time.sleep(pause_s)
    raise AssertionError("unreachable")


def at_once(act: Callable[[Any], T], items: Sequence[Any], uris: Sequence[str]) -> list[T]:
    """As `map`, with many requests in flight where something of it is not local."""
    if all(is_local(uri) for uri in uris):
        return list(map(act, items))
    with ThreadPoolExecutor(min(REQUESTS_IN_FLIGHT, len(items))) as pool:
        return list(pool.map(act, items))
