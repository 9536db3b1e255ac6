"""Resources of discovery: bytes -> workload, service or policy."""

from __future__ import annotations

from typing import TYPE_CHECKING

from google.protobuf.message import DecodeError

from ztunnel.mesh.address import RejectedResource
from ztunnel.mesh.policy import Action, Authorization, PolicyScope
from ztunnel.mesh.service import Service
from ztunnel.mesh.workload import Workload
from ztunnel.wire import authorization_pb2, workload_pb2

if TYPE_CHECKING:
    from collections.abc import Container

__all__ = ["ADDRESS_TYPE", "AUTHORIZATION_TYPE", "decode_address", "decode_policy", "placeholder"]

ADDRESS_TYPE = "type.googleapis.com/istio.workload.Address"
AUTHORIZATION_TYPE = "type.googleapis.com/istio.security.Authorization"


def decode_address(name: str, payload: bytes, aliases: Container[str] = ()) -> Workload | Service:
    """Read an istio.workload.Address, the resource of discovery called `name`.

    Args:
        name: Its own name, or one of its aliases: what was asked for by address may be answered under that.
        payload: The message.
        aliases: Other names that it was sent with.

    Raises:
        RejectedResource: it cannot be used.
    """
    try:
        message = workload_pb2.Address.FromString(payload)
    except DecodeError:
        raise RejectedResource(name, "the payload is no istio.workload.Address", wire=payload) from None
    try:
        kind = message.WhichOneof("type")
        if kind == "workload":
            workload = Workload.from_wire(message.workload, payload)
            return _named(name, workload.uid, workload, payload, aliases)
        if kind == "service":
            service = Service.from_wire(message.service, payload)
            return _named(name, service.key, service, payload, aliases)
    except RejectedResource as error:
        raise RejectedResource(name, error.reason, addresses=error.addresses, wire=payload) from None
    raise RejectedResource(name, "it is neither a workload nor a service", wire=payload)


def _named(
    name: str, own: str, resource: Workload | Service, payload: bytes, aliases: Container[str]
) -> Workload | Service:
    if name != own and name not in aliases:
        raise RejectedResource(name, f"it calls itself {own!r}, and could not be removed by its name", wire=payload)
    return resource


def decode_policy(name: str, payload: bytes) -> Authorization:
    """Read an istio.security.Authorization, the resource of discovery called `name`.

    Raises:
        RejectedResource: it cannot be enforced.
    """
    try:
        message = authorization_pb2.Authorization.FromString(payload)
    except DecodeError:
        namespace = name.partition("/")[0]  # all that is known; denying there is the safe reading
        reason = "the payload is no istio.security.Authorization"
        raise RejectedResource(name, reason, namespace=namespace, wire=payload) from None
    return Authorization.from_wire(message, name, payload)


def placeholder(error: RejectedResource) -> Authorization:
    """A policy that stands for one that could not be read."""
    own_namespace, _, name = error.name.rpartition("/")
    if error.namespace is None:
        scope, namespace = PolicyScope.WORKLOAD_SELECTOR, own_namespace
    elif error.namespace == "":
        scope, namespace = PolicyScope.GLOBAL, own_namespace
    else:
        scope, namespace = PolicyScope.NAMESPACE, error.namespace
    return Authorization(
        name=name,
        namespace=namespace,
        scope=scope,
        action=Action.DENY,
        key=error.name,
        unusable=error.reason,
        wire=error.wire,
    )
