"""The last picture of the mesh as bytes, for the disk: what discovery sent, with a checksum over it."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import attrs
from cryptography.hazmat.primitives.hashes import SHA256, Hash

from ztunnel.mesh.address import RejectedResource
from ztunnel.mesh.decode import ADDRESS_TYPE, AUTHORIZATION_TYPE, decode_address, decode_policy
from ztunnel.wire import discovery_pb2

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Mapping

    from ztunnel.mesh.store import Change

__all__ = ["Contents", "Restored", "SnapshotError", "pack", "unpack"]

_MAGIC = b"ztunnel mesh snapshot 1\n"
_DIGEST = 32
_SLICE = 100
"""Resources between two yields; about half a millisecond."""


class SnapshotError(Exception):
    """A snapshot on disk is cut, damaged or of another version."""


@attrs.frozen
class Contents:
    """What a snapshot holds, of one type."""

    resources: list[Any]
    rejected: list[RejectedResource]
    versions: dict[str, str]
    """By name; empty where discovery gave none."""


@attrs.frozen(kw_only=True)
class Restored:
    """What a snapshot held."""

    address_versions: Mapping[str, str]
    policy_versions: Mapping[str, str]
    change: Change


def pack(
    addresses: Iterable[tuple[str, bytes]],
    policies: Iterable[tuple[str, bytes]],
    address_versions: Mapping[str, str],
    policy_versions: Mapping[str, str],
) -> Generator[None, None, list[bytes]]:
    """Names and serialized resources of both types as pieces of bytes, with a `yield` after every few of them.

    Resources without bytes did not come from discovery, and are left out.
    """
    body: list[bytes] = []
    digest = Hash(SHA256())
    for type_url, resources, versions in (
        (ADDRESS_TYPE, addresses, address_versions),
        (AUTHORIZATION_TYPE, policies, policy_versions),
    ):
        # Serialized messages may be joined: their repeated fields add up.
        parts = [discovery_pb2.DeltaDiscoveryResponse(type_url=type_url).SerializeToString()]
        some = iter(resources)
        while few := list(itertools.islice(some, _SLICE)):
            parts.append(_listing(type_url, few, versions))
            yield
        body.append(sum(map(len, parts)).to_bytes(8, "big"))
        body += parts
    for part in body:
        digest.update(part)
        yield
    return [_MAGIC, digest.finalize(), *body]


def unpack(data: bytes) -> tuple[Contents, Contents]:
    """Addresses and policies of what `pack` gave.

    Raises:
        SnapshotError: it is damaged or of another version.
    """
    head = len(_MAGIC)
    if data[:head] != _MAGIC:
        raise SnapshotError("the snapshot is of another version or no snapshot")
    body = memoryview(data)[head + _DIGEST :]
    digest = Hash(SHA256())
    digest.update(body)
    if digest.finalize() != data[head : head + _DIGEST]:
        raise SnapshotError("the snapshot is damaged: its checksum does not match")
    listings: list[discovery_pb2.DeltaDiscoveryResponse] = []
    at = 0
    while at < len(body):
        size = int.from_bytes(body[at : at + 8], "big")
        listings.append(discovery_pb2.DeltaDiscoveryResponse.FromString(bytes(body[at + 8 : at + 8 + size])))
        at += 8 + size
    by_type = {listing.type_url: listing.resources for listing in listings}
    return (
        _decode_all(by_type.get(ADDRESS_TYPE, ()), decode_address),
        _decode_all(by_type.get(AUTHORIZATION_TYPE, ()), decode_policy),
    )


def _decode_all(resources: Iterable[discovery_pb2.Resource], decode: Callable[[str, bytes], Any]) -> Contents:
    good: list[Any] = []
    bad: list[RejectedResource] = []
    versions: dict[str, str] = {}
    for resource in resources:
        try:
            good.append(decode(resource.name, resource.resource.value))
        except RejectedResource as error:
            bad.append(error)
        # One without a version is named too, or discovery could not be told that it is held.
        versions[resource.name] = resource.version
    return Contents(good, bad, versions)


def _listing(type_url: str, resources: Iterable[tuple[str, bytes]], versions: Mapping[str, str]) -> bytes:
    listing = discovery_pb2.DeltaDiscoveryResponse()
    for name, wire in resources:
        if not wire:
            continue
        resource = listing.resources.add(name=name, version=versions.get(name, ""))
        resource.resource.type_url = type_url
        resource.resource.value = wire
    return bytes(listing.SerializeToString())
