"""A one-time token -> a certificate of this host's own, with no trust on first use.

The token carries the SHA-256 of the mesh's root. A first connection only looks at the chain that the server sends;
the root is taken from it by that hash, and the token leaves the host on a second connection, which trusts that root
alone and checks the server's name.
"""

from __future__ import annotations

import datetime
import json
import time
from typing import TYPE_CHECKING

import attrs
import trio
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from OpenSSL import SSL

from hbone.daemon.files import write_private
from hbone.errors import ConfigurationError
from hbone.identity import SpiffeId
from hbone.identity.svid import UNPARSABLE
from ztunnel.config import DEFAULT_STATE_DIR, Config
from ztunnel.control.ca import CaClient, read_answer
from ztunnel.control.transport import (
    ControlPlaneError,
    RootSource,
    TokenSource,
    Unreachable,
    grpc_dialer,
    open_stream,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence
    from pathlib import Path

    from hbone.identity import Identity
    from ztunnel.control.cache import StateDir
    from ztunnel.control.transport import Dial, ServerAddress
    from ztunnel.mesh import IpAddress
    from ztunnel.wire.token import EnrolmentToken

__all__ = ["Enrolment", "enroll", "fetch_chain", "load_enrolment", "pinned_root", "settings"]

HANDSHAKE_TIMEOUT = 5.0
ATTEMPTS = 3
"""The token may be presented again for the same key, should the answer be lost."""
LIFETIME = 86_400
"""Seconds asked for; the daemon then renews for its own `SECRET_TTL`."""
BACKDATE = 120
"""Seconds by which the CA backdates a certificate of that lifetime."""
FILE = "enrolment.json"


@attrs.frozen(kw_only=True)
class Enrolment:
    """What a host became, and where it goes for renewals."""

    server: str
    namespace: str
    name: str
    service_account: str

    @property
    def workload(self) -> str:
        """As `PROXY_WORKLOAD_INFO` has it."""
        return f"{self.namespace}/{self.name}/{self.service_account}"

    def environment(self) -> dict[str, str]:
        """The settings that it stands for, where the environment has none."""
        address = f"https://{self.server}"
        return {"PROXY_WORKLOAD_INFO": self.workload, "XDS_ADDRESS": address, "CA_ADDRESS": address}


def load_enrolment(directory: Path) -> Enrolment | None:
    """The enrolment of this host; None where it was never enrolled.

    Raises:
        ConfigurationError: the file is damaged.
    """
    path = directory / FILE
    try:
        raw = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return None
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be read: {error.strerror}") from None
    try:
        fields = json.loads(raw)
        names = [field.name for field in attrs.fields(Enrolment)]
        return Enrolment(**{name: _text(fields[name]) for name in names})
    except (ValueError, KeyError, TypeError):
        raise ConfigurationError(f"{path} is damaged; enroll this host again, or remove the file") from None


def _text(value: object) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError("expected a text")
    return value


def settings(environ: Mapping[str, str]) -> Config:
    """The settings; those that an enrolment stands for are used where the environment has none.

    Raises:
        ConfigurationError: a variable is wrong.
    """
    config = Config.from_env(environ)
    enrolment = load_enrolment(config.state_dir or DEFAULT_STATE_DIR)
    if enrolment is None:
        return config
    return Config.from_env({**enrolment.environment(), **environ})


async def fetch_chain(
    address: ServerAddress, *, mark: int | None = None, source: IpAddress | None = None
) -> list[x509.Certificate]:
    """Do a TLS handshake that trusts nobody, and return the certificates that the server sent. Nothing else is sent.

    Args:
        address: The server.
        mark: SO_MARK, so that the host's capture rules let the connection pass.
        source: The address to connect from.

    Raises:
        Unreachable: the server cannot be reached, or completes no TLS 1.3 handshake within five seconds.
    """
    async with await open_stream(address, mark=mark, source=source) as stream:
        return await _shake_hands(stream, address.host)


async def _shake_hands(stream: trio.abc.Stream, server_name: str) -> list[x509.Certificate]:
    context = SSL.Context(SSL.TLS_CLIENT_METHOD)
    context.set_min_proto_version(SSL.TLS1_3_VERSION)
    context.set_verify(SSL.VERIFY_NONE)
    context.set_alpn_protos([b"h2"])
    connection = SSL.Connection(context, None)
    connection.set_connect_state()
    if not _is_address(server_name):
        connection.set_tlsext_host_name(server_name.encode("idna"))
    try:
        with trio.fail_after(HANDSHAKE_TIMEOUT):
            while True:
                try:
                    connection.do_handshake()
                    break
                except SSL.WantReadError:
                    await _flush(connection, stream)
                    data = await stream.receive_some(65_536)
                    if not data:
                        raise Unreachable("the server closed the connection during the TLS handshake") from None
                    connection.bio_write(data)
    except trio.TooSlowError:
        raise Unreachable(f"the server did not finish the TLS handshake within {HANDSHAKE_TIMEOUT:g} s") from None
    except trio.BrokenResourceError as error:
        raise Unreachable(f"the connection broke during the TLS handshake: {error}") from None
    except SSL.Error:
        raise Unreachable("the server does not speak TLS 1.3; is this the control plane's port, 15012?") from None
    return [certificate.to_cryptography() for certificate in connection.get_peer_cert_chain() or ()]


async def _flush(connection: SSL.Connection, stream: trio.abc.Stream) -> None:
    try:
        data = connection.bio_read(65_536)
    except SSL.WantReadError:
        return
    await stream.send_all(data)


def _is_address(name: str) -> bool:
    return ":" in name or name.replace(".", "").isdigit()


def pinned_root(chain: Sequence[x509.Certificate], sha256: bytes, server: str) -> x509.Certificate:
    """The certificate of the chain that the token means.

    Raises:
        ControlPlaneError: the server sent another mesh's.
    """
    for certificate in chain:
        if certificate.fingerprint(hashes.SHA256()) == sha256:
            return certificate
    raise ControlPlaneError(
        f"{server} is not the control plane that the token is for: none of the {len(chain)} certificates it sent is the"
        " root named in the token; the token was not sent"
    )


async def enroll(
    address: ServerAddress,
    token: EnrolmentToken,
    state: StateDir,
    *,
    name: str,
    lifetime: float = LIFETIME,
    mark: int | None = None,
    source: IpAddress | None = None,
    look: Callable[[ServerAddress], Awaitable[list[x509.Certificate]]] | None = None,
    dial: Callable[[x509.Certificate], Dial] | None = None,
    wall: Callable[[], float] = time.time,
) -> tuple[Identity, float]:
    """Turn the token into a certificate and keep it.

    Args:
        address: The control plane.
        token: The one-time token.
        state: Where key, certificate, roots and the enrolment are kept.
        name: Name of this host's workload.
        lifetime: Wanted lifetime of the certificate, in seconds.
        mark: SO_MARK of both connections: a host that enrols again has its capture rules in force.
        source: The address to connect from.
        look: Another way to the chain that the server sends, for tests.
        dial: Another way to the CA once its root is known, for tests.
        wall: Wall clock, seconds since 1970.

    Returns:
        The identity, and by how many seconds this host's clock is ahead of the control plane's (about).

    Raises:
        ControlPlaneError: the server is another one, or refuses.
        Unreachable: the server cannot be reached.
        ConfigurationError: the certificate cannot be kept.
    """
    chain = await (fetch_chain(address, mark=mark, source=source) if look is None else look(address))
    root = pinned_root(chain, token.root_sha256, str(address))
    ca = CaClient(
        dial(root) if dial is not None else grpc_dialer(address, RootSource.of(root), mark=mark, source=source),
        lifetime=lifetime,
        token=TokenSource(value=token.secret),
    )
    spiffe_id = SpiffeId.parse(token.spiffe_id)
    key = ec.generate_private_key(ec.SECP256R1())
    for attempt in range(1, ATTEMPTS + 1):
        try:
            answer = await ca.ask(spiffe_id, key)
            break
        except Unreachable:
            if attempt == ATTEMPTS:
                raise
            await trio.sleep(attempt)
    # The CA's clock is what its certificate says; ours is compared with it, and may be wrong.
    issued = _issued_at(answer)
    identity = read_answer(answer, key, spiffe_id, now=issued)
    offset = wall() - issued.timestamp()
    kept = Enrolment(server=str(address), namespace=token.namespace, name=name, service_account=token.service_account)
    try:
        state.save_identity(identity)
        write_private(state.path / FILE, json.dumps(attrs.asdict(kept), indent=2) + "\n")
    except OSError as error:
        raise ConfigurationError(f"{state.path} cannot be written: {error.strerror}; the token is spent") from None
    return identity, offset


def _issued_at(answer: Sequence[str]) -> datetime.datetime:
    try:
        leaf = x509.load_pem_x509_certificate(answer[0].encode())
    except (IndexError, *UNPARSABLE):
        raise ControlPlaneError("the CA's answer holds no certificate") from None
    lifetime = (leaf.not_valid_after_utc - leaf.not_valid_before_utc).total_seconds()
    return leaf.not_valid_before_utc + datetime.timedelta(seconds=min(BACKDATE, lifetime / 11))
