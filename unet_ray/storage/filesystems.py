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
from functools import partial
from typing import Any, TypeVar
from urllib.parse import urlsplit

import fsspec
import fsspec.config
from fsspec.implementations.local import LocalFileSystem

from unet_ray.frames import is_text
from unet_ray.storage.local_files import NotAFile

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
    *(FileChanged, NotAFile),
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
    if not is_text(uri):
        raise ValueError(f"{uri}: a name that is not UTF-8, or has NUL in it; rename it, or give a link to it")
    protocol, rest = _split(uri)
    if is_local(uri):
        return os.path.abspath(os.path.expanduser(rest))
    _refuse_credentials(uri)
    *before, last = protocol.split("::")
    unknown = [name for name in (*before, last) if name not in fsspec.available_protocols()]
    if unknown:
        raise ValueError(
            f"{uri}: unknown protocol {unknown[0]!r}; use a local path, s3://, gs://, abfs:// or another of fsspec's"
        )
    if last in _IN_ANOTHER or not set(before) <= set(_CACHES):
        raise ValueError(f"{uri}: only {', '.join(_CACHES)} may stand before another protocol; give the file itself")
    return uri.rstrip("/") if rest.strip("/") else uri


_PROTOCOL = re.compile(r"([\w+.-]+(?:::[\w+.-]+)*)://", re.ASCII)
"""How a URI begins: `s3://`, or with what reads another filesystem before it, `simplecache::s3://`."""


def beside(folder: str, entry: str) -> str:
    """Returns the URI that a file in a folder names: a URI or an absolute path as it is, another from the folder on."""
    return entry if entry.startswith("/") or _split(entry)[0] else f"{folder.rstrip('/')}/{entry}"


_CACHES = ("simplecache", "filecache", "blockcache")
_IN_ANOTHER = ("zip", "tar", "libarchive", "rar", "reference", "dir", "generic", *_CACHES)
"""Protocols of fsspec that mean something only where another filesystem is named with them."""


def _split(uri: str) -> tuple[str, str]:
    """Protocol (`""` for a path) and the name behind it, in which nothing means anything: `::` and `?` are letters."""
    match = _PROTOCOL.match(uri) if "://" in uri else None
    return (match[1], uri[match.end() :]) if match else ("", uri)


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
    return "://" not in uri or _split(uri)[0] in ("", "file", "local")


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


def names_secret(name: str) -> bool:
    """Whether an option or a variable of this name may hold a credential."""
    return _SECRET_OPTION.search(name) is not None


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
            if names_secret(str(name)) and value not in _NO_SECRETS and not isinstance(value, bool):
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
    protocol, name = _split(uri)
    if is_local(uri):
        return LocalFileSystem(), (name if name.startswith("/") else os.path.abspath(name)).rstrip("/") or "/"
    try:
        *wrappers, store = protocol.split("::")
        fs, path = _store(store, f"{store}://{name}")
        for wrapper in reversed(wrappers):  # a cache keeps the names of what it reads
            fs = fsspec.filesystem(wrapper, fs=fs)
        return fs, path
    except ImportError as error:
        extra = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "abfs": "azure", "abfss": "azure", "az": "azure"}
        hint = extra.get(uri.partition("://")[0])
        remedy = f"pip install 'unet-ray[{hint}]'" if hint else str(error)
        raise ValueError(f"{uri}: the package that reads it is not installed; {remedy}") from error


def _store(protocol: str, uri: str) -> tuple[Any, str]:
    """As `filesystem` of one protocol. fsspec's own `url_to_fs` takes `::` in a name for another protocol."""
    kind = fsspec.get_filesystem_class(protocol)
    options = {"use_listings_cache": False}
    if protocol not in ("s3", "s3a"):
        options |= kind._get_kwargs_from_urls(uri) | (_google_options() if protocol in _GOOGLE else {})
        return fsspec.filesystem(protocol, **options), kind._strip_protocol(uri)
    config_kwargs = {**fsspec.config.conf.get("s3", {}), **fsspec.config.conf.get("s3a", {})}.get("config_kwargs", {})
    retries = {"total_max_attempts": REQUEST_ATTEMPTS, "mode": "standard"}
    config = {"retries": retries, "max_pool_connections": REQUESTS_IN_FLIGHT, **config_kwargs}
    fs = fsspec.filesystem(protocol, **options, config_kwargs=config)
    fs.retries = 1
    fs.split_path = partial(_split_s3, fs)
    return fs, kind._strip_protocol(uri)


def _split_s3(fs: Any, path: str) -> tuple[str, str, None]:
    """Bucket and key; s3fs's own takes what follows `?versionId=` from the key, also where nobody asked for it."""
    end = path[len(path.rstrip("/")) :]
    path = fs._strip_protocol(path).lstrip("/")
    if "/" not in path:
        return path, "", None
    bucket, key = fs._find_bucket_key(path)
    return bucket, key + end, None


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
        if (trouble := _trouble_behind(error)) is not None:
            raise _named(trouble, uri) from error
        if error.filename is None and not is_local(uri):
            code = errno.EACCES if isinstance(error, PermissionError) else errno.ENOENT
            text = error.strerror or str(error) or os.strerror(code)
            raise type(error)(error.errno or code, text, uri) from error
        raise
    except OSError as error:
        if error.errno == errno.EROFS:
            raise StorageRefused(error.errno, error.strerror or os.strerror(errno.EROFS), uri) from error
        if error.errno == errno.EMFILE:
            text = f"{error.strerror}; raise the limit of this process (ulimit -n)"
            raise StorageError(error.errno, text, uri) from error
        nothing = "no answer" if isinstance(error, TimeoutError) else type(error).__name__
        text = error.strerror or str(error) or nothing
        if not is_local(uri) and _is_refusal(error) and not _was_cut_on_the_way(error):
            raise StorageRefused(error.errno or errno.EACCES, text, uri) from error
        raise StorageError(error.errno or errno.EIO, f"{text}; trying again may help", uri) from error
    except _client_errors_wrapped() as error:
        cause = error if isinstance(error, client_errors()) else error.__cause__
        if not isinstance(cause, client_errors()):
            raise
        raise _named(cause, uri) from error


def _named(cause: BaseException, uri: str) -> OSError:
    """What a store's client says, as an error of ours that names the URI."""
    text = " ".join(re.split("RequestId:|Content:", str(cause))[0].split())  # Azure's go on for many lines
    if not _may_pass(cause):
        remedy = "; set them in the environment or a profile" if "Credentials" in type(cause).__name__ else ""
        return StorageRefused(errno.EACCES, f"{text}{remedy}", uri)
    return StorageError(errno.EIO, f"{text or 'no answer'}; trying again may help", uri)


def _trouble_behind(error: OSError) -> BaseException | None:
    """What kept fsspec from asking a web server for a file that it says is not there; None where the server said so."""
    cause = error.__cause__
    if not isinstance(error, FileNotFoundError) or not isinstance(
        cause, (*_loaded("aiohttp:ClientError"), TimeoutError)
    ):
        return None
    return None if getattr(cause, "status", None) in (404, 410) else cause


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
    if isinstance(error, _loaded("aiohttp:ClientResponseError", "aiohttp:InvalidURL")):
        return getattr(error, "status", None) in _PASSING_STATUS
    status = getattr(error, "status_code", None) or getattr(error, "code", None)  # Azure's and Google's
    return isinstance(error, (*_passing_errors(), TimeoutError)) or status in _PASSING_STATUS


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
