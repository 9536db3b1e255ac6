"""One response of discovery, into the store: by the process that hears it, and by its workers alike."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import attrs
import trio

from ztunnel.mesh import ADDRESS_TYPE, RejectedResource, decode_address, decode_policy

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from ztunnel.mesh import Store
    from ztunnel.wire import discovery_pb2

__all__ = ["Applied", "apply"]

SLICE = 0.001
"""Seconds of work between two yields to the data path."""


@attrs.frozen(kw_only=True)
class Applied:
    """What became of a response."""

    versions: Mapping[str, str]
    """Of what was accepted, by name."""
    gone: Sequence[str]
    refused: Sequence[RejectedResource]


async def apply(store: Store, response: discovery_pb2.DeltaDiscoveryResponse) -> Applied:
    """Validate in slices that yield after a millisecond, then swap in at once.

    The same response does the same to stores that hold the same: what is refused here is refused everywhere.

    Args:
        store: Gets what is accepted, and what is refused as a refusal.
        response: Of one of the two types.
    """
    url = response.type_url
    decode: Callable[[str, bytes], Any] = decode_address if url == ADDRESS_TYPE else decode_policy
    good: dict[str, Any] = {}
    versions: dict[str, str] = {}
    refused: dict[str, RejectedResource] = {}
    slice_end = time.perf_counter() + SLICE
    for item in response.resources:
        name = item.name
        try:
            good[name] = decode(name, item.resource.value)
            versions[name] = item.version
            refused.pop(name, None)
        except RejectedResource as error:
            refused[name] = error
        if time.perf_counter() >= slice_end:
            await trio.lowlevel.checkpoint()
            slice_end = time.perf_counter() + SLICE
    gone = [name for name in response.removed_resources if name not in good]
    # No await from here on: a cancelled response is applied whole or not at all.
    swap_in = store.apply_addresses if url == ADDRESS_TYPE else store.apply_policies
    rejected = list(refused.values())
    swap_in(list(good.values()), gone, rejected=rejected)
    return Applied(versions=versions, gone=gone, refused=rejected)
