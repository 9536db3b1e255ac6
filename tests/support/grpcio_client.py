"""A client of the control plane that has nothing of ours but the .proto files: grpcio, with stubs made by protoc.

Runs as a program of its own. It reads commands as lines of JSON and answers each with a line; messages are protojson.
"""

from __future__ import annotations

import base64
import contextlib
import importlib
import json
import queue
import sys
from typing import Any

import grpc
from google.protobuf import json_format

SECONDS = 30.0
ca, discovery, ca_stubs, discovery_stubs, *_ = (
    importlib.import_module(f"ztunnel.wire.{name}")
    for name in ("ca_pb2", "discovery_pb2", "ca_pb2_grpc", "discovery_pb2_grpc", "workload_pb2", "authorization_pb2")
)
assert not any(name.partition(".")[0] in ("hbone", "miniistiod", "trio") for name in sys.modules)


class Stream:
    """A discovery stream; requests go through a queue."""

    def __init__(self, method: Any, kind: Any, metadata: Any) -> None:
        self.kind = kind
        self.requests: queue.Queue[Any] = queue.Queue()
        self.call = method(iter(self.requests.get, None), metadata=metadata, timeout=SECONDS)

    def next(self) -> dict[str, Any]:
        """The next response, or how the stream ended."""
        try:
            response = next(self.call)
        except StopIteration:
            return {"code": self.call.code().name}
        return {"code": "OK", **json_format.MessageToDict(response)}


class Client:
    """Verbs, by the names of commands."""

    def __init__(self) -> None:
        self.channel: Any = None
        self.streams: dict[str, Stream] = {}

    def connect(self, port: int, roots: str, key: str = "", chain: str = "") -> dict[str, Any]:
        """Use this server from now on, by a certificate if there is one."""
        if self.channel is not None:
            self.channel.close()
        own = {"private_key": key.encode(), "certificate_chain": chain.encode()} if key else {}
        credentials = grpc.ssl_channel_credentials(root_certificates=roots.encode(), **own)
        self.channel = grpc.secure_channel(f"localhost:{port}", credentials)
        return {}

    def create(
        self, request: dict[str, Any], metadata: Any = (), compression: bool = False, padding: int = 0
    ) -> dict[str, Any]:
        """Ask for a certificate."""
        message = ca.IstioCertificateRequest()
        json_format.ParseDict(request, message)
        message.csr += "\n" * padding
        stub = ca_stubs.IstioCertificateServiceStub(self.channel)
        how = grpc.Compression.Gzip if compression else None
        answer = stub.CreateCertificate(message, metadata=metadata, timeout=SECONDS, compression=how)
        return dict(json_format.MessageToDict(answer))

    def raw(self, path: str, data: str, metadata: Any = ()) -> dict[str, Any]:
        """Send bytes to any method."""
        self.channel.unary_unary(path)(base64.b64decode(data), metadata=metadata, timeout=SECONDS)
        return {}

    def open(self, name: str, metadata: Any = (), delta: bool = True) -> dict[str, Any]:
        """Open a discovery stream."""
        stub = discovery_stubs.AggregatedDiscoveryServiceStub(self.channel)
        method = stub.DeltaAggregatedResources if delta else stub.StreamAggregatedResources
        self.streams[name] = Stream(
            method, discovery.DeltaDiscoveryRequest if delta else discovery.DiscoveryRequest, metadata
        )
        return {}

    def send(self, name: str, *requests: dict[str, Any]) -> dict[str, Any]:
        """Send requests on a stream."""
        for request in requests:
            self.streams[name].requests.put(json_format.ParseDict(request, self.streams[name].kind()))
        return {}

    def next(self, name: str) -> dict[str, Any]:
        """Take the next response of a stream."""
        return self.streams[name].next()

    def end(self, name: str) -> dict[str, Any]:
        """End a stream, and say how the server did."""
        stream = self.streams.pop(name)
        stream.requests.put(None)
        found = stream.next()
        while found["code"] == "OK" and "typeUrl" in found:
            found = stream.next()
        return found


def answer(client: Client, line: str) -> dict[str, Any]:
    """Do one command."""
    verb, arguments, keywords = json.loads(line)
    try:
        found: dict[str, Any] = getattr(client, verb)(*arguments, **keywords)
    except grpc.RpcError as error:
        return {"code": error.code().name, "details": error.details()}
    return {"code": "OK", **found}


if __name__ == "__main__":
    ours = Client()
    for text in sys.stdin:
        sys.stdout.write(f"{json.dumps(answer(ours, text))}\n")
        sys.stdout.flush()
    with contextlib.suppress(grpc.RpcError):
        ours.channel.close()
