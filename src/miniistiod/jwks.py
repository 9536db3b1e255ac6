"""The keys of an issuer of tokens: from a file, a URL, or the URL that the issuer itself names; kept and bounded.

Source: RFC 7517; OpenID Connect Discovery 1.0 §4.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import math
import socket
import ssl
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias
from urllib.parse import urlsplit

import attrs
from cryptography.exceptions import UnsupportedAlgorithm
from joserfc.errors import JoseError
from joserfc.jwk import ECKey, OKPKey, RSAKey

from hbone.daemon.logs import get_logger
from hbone.errors import HboneError

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Discovered", "Jwks", "Key", "KeysError", "check_url", "parse_keys"]

_log = get_logger("miniistiod.issuers")
MAX_JWKS = 1 << 20
"""Bytes of a set of keys, or of what an issuer says of itself."""
MAX_KEYS = 100
REFRESH = 600.0
"""Seconds after which keys are fetched again."""
RETRY = 30.0
"""Seconds between two fetches, however many tokens name a key that is not known."""
STALE = 86_400.0
"""Seconds for which keys are used while they cannot be fetched again."""
FETCH_SECONDS = 5.0
MIN_RSA_BITS = 2048
_JSON = "application/json"
_LATE = "it takes longer than {:g} s"
_KINDS: dict[str, type[RSAKey | ECKey | OKPKey]] = {"RSA": RSAKey, "EC": ECKey, "OKP": OKPKey}

Key: TypeAlias = RSAKey | ECKey | OKPKey


class KeysError(HboneError):
    """An issuer's keys cannot be had."""


@attrs.frozen
class Discovered:
    """Keys whose place the issuer tells at its own. Source: OpenID Connect Discovery 1.0 §4."""

    issuer: str

    @property
    def url(self) -> str:
        """Where the issuer describes itself."""
        return f"{self.issuer.rstrip('/')}/.well-known/openid-configuration"

    def place(self, data: bytes) -> str:
        """The URL of the keys, by what the issuer says of itself.

        Raises:
            KeysError: it is another issuer's, or names no place that may be asked.
        """
        try:
            found = json.loads(data)
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict):
            raise KeysError("it is no description of an issuer")
        if found.get("issuer") != self.issuer:
            raise KeysError(f"it describes the issuer {found.get('issuer')!r:.200}, not {self.issuer!r:.200}")
        place = found.get("jwks_uri")
        if not isinstance(place, str):
            raise KeysError("it names no jwks_uri")
        # An issuer elsewhere must not make us ask this host's own servers without TLS.
        return check_url(place, local=_is_local(urlsplit(self.issuer).hostname or ""))


def _is_local(host: str) -> bool:
    return host == "localhost" or host == "::1" or host.startswith("127.")


def check_url(text: str, *, local: bool = True) -> str:
    """A URL that keys may come from.

    Args:
        text: the URL.
        local: http:// is good for this host's own addresses.

    Raises:
        KeysError: it is none, or anybody on the way could change what comes.
    """
    try:
        parts = urlsplit(text)
        host = parts.hostname or ""
        parts.port  # noqa: B018 - it is looked at now, and may be none
    except ValueError:
        host = ""
    if not host or not text.isascii() or any(character <= " " for character in text):
        raise KeysError(f"{text!r:.200} is no URL")
    if parts.scheme != "https" and not (parts.scheme == "http" and local and _is_local(host)):
        raise KeysError(f"{text!r:.200} is not safe; keys come by https:// only, or from this host")
    return text


class Jwks:
    """The keys of an issuer, from a file or a URL; kept, and read again when they may have changed.

    Args:
        source: a file, a URL, or an issuer that is asked for the URL.
        ca_file: roots of the URL's server.
        monotonic: seconds, for the age of what was fetched.
    """

    def __init__(
        self,
        source: Path | str | Discovered,
        ca_file: Path | None = None,
        *,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._source = source
        self._ca_file = ca_file
        self._monotonic = monotonic
        self._lock = threading.Lock()
        self._keys: tuple[Key, ...] = ()
        self._good = -math.inf
        self._tried = -math.inf
        self._stamp: tuple[int, int, int] | None = None

    def keys(self, key_id: str | None) -> list[Key]:
        """Keys that may have signed a token that names `key_id`, or no key.

        Raises:
            KeysError: there are none, and none can be had.
        """
        if isinstance(self._source, Path):
            with self._lock:
                self._read_file(self._source)
        elif self._due(key_id) and self._lock.acquire(blocking=not self._keys):  # who has keys need not wait for others
            try:
                if self._due(key_id):
                    self._fetch(self._source)
            finally:
                self._lock.release()
        if not isinstance(self._source, Path) and self._monotonic() - self._good > STALE:
            raise KeysError(f"the keys at {_where(self._source)} cannot be fetched; the log says why")
        return self._matching(key_id)

    def _matching(self, key_id: str | None) -> list[Key]:
        return [key for key in self._keys if key_id is None or key.kid == key_id]

    def _read_file(self, path: Path) -> None:
        try:
            status = path.stat()
            stamp = (status.st_ino, status.st_size, status.st_mtime_ns)
            if stamp == self._stamp:
                return
            with path.open("rb") as file:
                self._keys = parse_keys(file.read(MAX_JWKS + 1))
            self._stamp = stamp
        except (OSError, KeysError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            if not self._keys:
                raise KeysError(f"the keys in {str(path)!r} cannot be read: {reason}") from None
            _log.warning("keys of an issuer not read again", path=str(path), reason=reason)

    def _due(self, key_id: str | None) -> bool:
        now = self._monotonic()
        fresh = now - self._good < REFRESH and bool(self._matching(key_id))
        return not fresh and now - self._tried >= RETRY

    def _fetch(self, source: str | Discovered) -> None:
        self._tried = now = self._monotonic()
        url = _where(source)
        try:
            if isinstance(source, Discovered):
                url = source.place(_get(url, self._ca_file))
            self._keys, self._good = parse_keys(_get(url, self._ca_file)), now
        except (OSError, ValueError, http.client.HTTPException, KeysError) as error:
            _log.warning("keys of an issuer not fetched", url=url, reason=str(error))


def _where(source: str | Discovered) -> str:
    return source.url if isinstance(source, Discovered) else source


def _get(url: str, ca_file: Path | None) -> bytes:
    """What a URL answers. No proxy, no redirection, and an end in time however slowly it comes.

    Raises:
        OSError: the server cannot be reached, or is another one.
        HTTPException: it does not speak HTTP.
        KeysError: another status than 200, or too much or too slow.
    """
    parts = urlsplit(url)
    connection: http.client.HTTPConnection
    if parts.scheme == "https":
        context = ssl.create_default_context(cafile=None if ca_file is None else str(ca_file))
        connection = http.client.HTTPSConnection(
            parts.hostname or "", parts.port, timeout=FETCH_SECONDS, context=context
        )
    else:
        connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=FETCH_SECONDS)
    late = threading.Event()

    def cut() -> None:
        late.set()
        if connection.sock is not None:
            with contextlib.suppress(OSError):  # it is over already
                socket.socket.shutdown(connection.sock, socket.SHUT_RDWR)  # TLS or not; wakes who reads

    timer = threading.Timer(2 * FETCH_SECONDS, cut)
    timer.daemon = True
    timer.start()
    try:
        path = parts.path or "/"
        connection.request("GET", f"{path}?{parts.query}" if parts.query else path, headers={"accept": _JSON})
        answer = connection.getresponse()
        if answer.status != 200:
            what = "redirects; name the place itself" if 300 <= answer.status < 400 else f"answers {answer.status}"
            raise KeysError(f"it {what}")
        body = answer.read(MAX_JWKS + 1)
    except (OSError, http.client.HTTPException):
        if late.is_set():
            raise KeysError(_LATE.format(2 * FETCH_SECONDS)) from None
        raise
    finally:
        timer.cancel()
        connection.close()
    if late.is_set():
        raise KeysError(_LATE.format(2 * FETCH_SECONDS))
    if len(body) > MAX_JWKS:
        raise KeysError(f"it sends more than {MAX_JWKS} bytes")
    return body


def parse_keys(data: bytes) -> tuple[Key, ...]:
    """The public keys of a JWKS that may verify signatures; others are passed over. RFC 7517 §5.

    Raises:
        KeysError: it is none, or has no such key.
    """
    if len(data) > MAX_JWKS:
        raise KeysError(f"a set of keys has more than {MAX_JWKS} bytes")
    try:
        items = json.loads(data)["keys"]
        if not isinstance(items, list) or len(items) > MAX_KEYS:
            raise KeysError(f"a set of keys must have a list of at most {MAX_KEYS} keys")
    except (ValueError, KeyError, TypeError, RecursionError):
        raise KeysError("it is no set of keys (JWKS)") from None
    found: list[Key] = []
    for item in items:
        if not isinstance(item, dict) or item.get("use", "sig") != "sig":
            continue
        operations = item.get("key_ops")
        if operations is not None and not (isinstance(operations, list) and "verify" in operations):
            continue
        kind = item.get("kty")
        modulus = item.get("n")
        if not isinstance(kind, str) or kind not in _KINDS:
            continue
        if kind == "RSA" and not (isinstance(modulus, str) and len(modulus) * 6 >= MIN_RSA_BITS):
            continue
        try:
            key = _KINDS[kind].import_key(item)
            key.public_key  # noqa: B018 - it is made at first use, and may turn out to be none
        except (JoseError, ValueError, TypeError, KeyError, AttributeError, OverflowError, UnsupportedAlgorithm):
            continue  # of a kind that is not known here
        found.append(key)
    if not found:
        raise KeysError("the set has no key that could verify a signature")
    return tuple(found)
