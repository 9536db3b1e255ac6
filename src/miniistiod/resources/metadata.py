"""`apiVersion`, `kind`, `metadata`, and the label and annotation rules that every kind shares."""

from __future__ import annotations

import datetime
import ipaddress
import re
from typing import TYPE_CHECKING

from miniistiod.resources.model import LabelSelector, Metadata, Requirement

if TYPE_CHECKING:
    from miniistiod.resources.reader import IpAddress, IpInterface, IpNetwork, Reader

__all__ = [
    "host_name",
    "ip_address",
    "ip_interface",
    "ip_or_network",
    "is_namespace",
    "is_object_name",
    "label_selector",
    "metadata",
    "selector",
]

_OBJECT = re.compile(r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?")
_NAMESPACE = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
_HOST_LABEL = re.compile(r"[A-Za-z0-9_]([-A-Za-z0-9_]{0,61}[A-Za-z0-9_])?")
_BOOKKEEPING = ("uid", "resourceVersion", "generation", "managedFields", "ownerReferences", "finalizers", "selfLink")
_OPERATORS = ("In", "NotIn", "Exists", "DoesNotExist")
DEFAULT_NAMESPACE = "default"


def is_object_name(text: str) -> bool:
    """Whether a text can name an object or a service account."""
    return bool(_OBJECT.fullmatch(text)) and ".." not in text


def is_namespace(text: str) -> bool:
    """Whether a text can name a namespace."""
    return bool(_NAMESPACE.fullmatch(text))


def metadata(reader: Reader, kind: str, path: str, position: int, *, namespaced: bool = True) -> Metadata | None:
    """Read `metadata`; None when it names nothing usable."""
    meta = reader.required_mapping("metadata", "add metadata with a name")
    if meta is None:
        return None
    meta.ignore(*_BOOKKEEPING)
    name, namespace = meta.text("name"), meta.text("namespace")
    labels, annotations = meta.string_map("labels"), meta.string_map("annotations")
    created_text = meta.text("creationTimestamp")
    meta.finish()
    if name is None:
        meta.require("name", "give the object a name")
        return None
    if not is_object_name(name):
        meta.error(meta.line, f"metadata.name is {name!r}", "use lower case letters, digits, '-' and '.' (at most 253)")
        return None
    if not namespaced:
        if namespace is not None:
            meta.error(meta.line, f"a {kind} has no namespace, but {namespace!r} is given", "remove metadata.namespace")
        namespace = ""
    elif namespace is None:
        namespace = DEFAULT_NAMESPACE
    elif not is_namespace(namespace):
        meta.error(
            meta.line, f"metadata.namespace is {namespace!r}", "use lower case letters, digits and '-' (at most 63)"
        )
        return None
    created = None
    if created_text is not None:
        try:
            created = datetime.datetime.fromisoformat(created_text)
            created = (created if created.tzinfo else created.replace(tzinfo=datetime.UTC)).astimezone(datetime.UTC)
        except (ValueError, OverflowError):
            meta.error(meta.line, f"metadata.creationTimestamp is {created_text!r}", "write it as 2026-01-31T12:00:00Z")
    return Metadata(
        kind=kind,
        namespace=namespace,
        name=name,
        labels=labels,
        annotations=annotations,
        created=created,
        path=path,
        line=meta.line,
        position=position,
    )


def label_selector(reader: Reader) -> LabelSelector:
    """The rest of a mapping as Kubernetes' selector of namespaces: `matchLabels` and `matchExpressions`."""
    labels = reader.string_map("matchLabels")
    expressions: list[Requirement] = []
    for item in reader.readers("matchExpressions") or ():
        key, operator = item.text("key"), item.choice("operator", _OPERATORS)
        values = item.texts("values", str) or ()
        item.finish()
        if key is None or operator is None:
            item.require("key and operator", "write {key: env, operator: In, values: [prod]}")
            continue
        if (operator in ("In", "NotIn")) is not bool(values):
            item.error(item.line, f"{item.path} has {len(values)} values for {operator}", "In and NotIn need values")
        expressions.append(Requirement(key=key, operator=operator, values=values))
    reader.finish()
    return LabelSelector(labels=labels, expressions=tuple(expressions))


def selector(reader: Reader, name: str, labels_field: str) -> dict[str, str] | None:
    """A selector by labels. None when it is absent; an empty one is an error, because it selects nothing."""
    inner = reader.mapping(name)
    if inner is None:
        return None
    labels = inner.string_map(labels_field)
    inner.finish()
    if not labels:
        inner.error(
            inner.line,
            f"{inner.path} names no label, so it would select nothing",
            f"name labels under {labels_field}, or remove {name} to mean the whole namespace",
        )
    for key, value in labels.items():
        if "*" in value or "*" in key:
            inner.error(inner.line, f"{inner.path} has the wildcard {key}: {value}", "name each label in full")
    return labels


def ip_address(text: str) -> IpAddress:
    """An IP address without zone or IPv4-in-IPv6 notation.

    Raises:
        ValueError: it is none.
    """
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        raise ValueError("not an IP address; write one as 10.0.0.7 or fd00::7") from None
    if isinstance(address, ipaddress.IPv6Address):
        if address.scope_id is not None:
            raise ValueError("an address with a zone means something on one host only; remove the part from '%'")
        if address.ipv4_mapped is not None:
            raise ValueError(f"an IPv4 address written as IPv6; write {address.ipv4_mapped}")
    return address


def ip_or_network(text: str) -> IpNetwork:
    """An IP address or a network; bits beyond the prefix are cleared.

    Raises:
        ValueError: it is neither.
    """
    return ip_interface(text).network


def ip_interface(text: str) -> IpInterface:
    """An IP address or a network, as it was written.

    Raises:
        ValueError: it is neither.
    """
    host, slash, prefix = text.partition("/")
    address = ip_address(host)
    if slash and not (prefix.isascii() and prefix.isdigit() and int(prefix) <= address.max_prefixlen):
        raise ValueError(f"not a network; write the prefix as a number from 0 to {address.max_prefixlen}")
    return ipaddress.ip_interface((address, int(prefix) if slash else address.max_prefixlen))


def host_name(text: str, *, wildcard: bool = False) -> str:
    """A DNS name, in lower case.

    Raises:
        ValueError: it is none.
    """
    rest = text.removeprefix("*.") if wildcard else text
    if len(text) > 253 or not all(_HOST_LABEL.fullmatch(label) for label in rest.split(".")):
        raise ValueError("not a host name; use letters, digits, '-' and '.', with labels of at most 63")
    return text.lower()
