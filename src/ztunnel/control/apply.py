"""One response of discovery, into the store: by the process that hears it, and by its workers alike."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs

from ztunnel.mesh import ADDRESS_TYPE, RejectedResource, Workload, compile_policy, decode_address, decode_policy

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ztunnel.control.pace import Pace
    from ztunnel.control.response import Response
    from ztunnel.mesh import Authorization, Store

__all__ = ["Applied", "apply"]

FEW = 100
"""Resources that are put in force at once, and not as a layer: under a millisecond."""


@attrs.frozen(kw_only=True)
class Applied:
    """What became of a response."""

    versions: dict[str, str]
    """Of what was accepted, by name."""
    gone: Sequence[str]
    refused: Sequence[RejectedResource]
    nbytes: int
    """Of resources."""
    aliases: Sequence[str]
    """Other names that resources came with."""


async def apply(store: Store, response: Response, pace: Pace) -> Applied:
    """Read the resources in slices, then put all of them in force at once.

    The same response does the same to stores that hold the same: what is refused here is refused everywhere.

    Args:
        store: Gets what is accepted, and what is refused as a refusal.
        response: Of one of the two types.
        pace: Cuts the work.

    Raises:
        DecodeError: it is no response; nothing is in force of it.
    """
    with pace.quiet(response.count):
        if response.type_url == ADDRESS_TYPE:
            return await _apply_addresses(store, response, pace)
        return await _apply_policies(store, response, pace)


async def _apply_addresses(store: Store, response: Response, pace: Pace) -> Applied:
    slices = pace.begin()
    push = None
    if response.count + len(response.removed) > FEW:
        while store.settle(1):  # what is left of the one before, or it would be done at once
            if slices.due():
                await slices.rest()
        push = store.prepare()
    good: list[Any] = []
    found = _Found()
    for item in response.resources():
        name, payload = item.name, item.resource.value
        try:
            resource = decode_address(name, payload, item.aliases)
        except RejectedResource as error:
            found.refuse(error, payload)
            if push is not None:
                push.reject(error)
        else:
            found.aliases.extend(item.aliases)
            own = resource.uid if isinstance(resource, Workload) else resource.key
            found.accept(own if own == name else name, item.version, payload)  # so that one string is kept, not two
            if push is not None:
                push.upsert(resource)
            else:
                good.append(resource)
        if slices.due():
            await slices.rest()
    gone: list[str] = []
    for name in response.removed:
        if name not in found.versions:
            gone.append(name)
            if push is not None:
                push.remove(name)
        if slices.due():
            await slices.rest()
    # No await from here on: a cancelled response is applied whole or not at all.
    if push is not None:
        push.commit()
    else:
        store.apply_addresses(good, gone, rejected=found.refused.values())
    return found.result(gone)


async def _apply_policies(store: Store, response: Response, pace: Pace) -> Applied:
    good: dict[str, Authorization] = {}
    matchers: dict[str, Callable[..., bool]] = {}
    found = _Found()
    slices = pace.begin()
    for item in response.resources():
        name, payload = item.name, item.resource.value
        try:
            policy = decode_policy(name, payload)
        except RejectedResource as error:
            found.refuse(error, payload)
        else:
            good[name] = policy
            matchers[name] = compile_policy(policy.rules)
            found.accept(name, item.version, payload)
        if slices.due():
            await slices.rest()
    gone = [name for name in response.removed if name not in good]
    store.apply_policies(good.values(), gone, rejected=found.refused.values(), matchers=matchers)
    return found.result(gone)


class _Found:
    def __init__(self) -> None:
        self.versions: dict[str, str] = {}
        self.refused: dict[str, RejectedResource] = {}
        self.nbytes = 0
        self.aliases: list[str] = []

    def accept(self, name: str, version: str, payload: bytes) -> None:
        self.versions[name] = version
        self.refused.pop(name, None)
        self.nbytes += len(payload)

    def refuse(self, error: RejectedResource, payload: bytes) -> None:
        self.refused[error.name] = error
        self.nbytes += len(payload)

    def result(self, gone: Sequence[str]) -> Applied:
        return Applied(
            versions=self.versions,
            gone=gone,
            refused=list(self.refused.values()),
            nbytes=self.nbytes,
            aliases=self.aliases,
        )
