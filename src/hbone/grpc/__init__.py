"""gRPC for the control plane: hyper-h2 behind a guard, without I/O.

```python
connection = ClientConnection(authority="istiod.example:15012")
connection.start(now)
call = connection.start_call("/package.Service/Method", [("authorization", "Bearer ...")])
connection.send_message(call, request)
connection.end(call)
transport.write(connection.data_to_send())
connection.receive_data(transport.read(), now)
answer = call.receive()
```

`hbone.trio.grpc` runs it over TLS.
"""

from hbone.grpc.call import Call
from hbone.grpc.client import ClientConnection
from hbone.grpc.config import GrpcConfig
from hbone.grpc.connection import GrpcConnection
from hbone.grpc.metadata import Metadata
from hbone.grpc.server import ServerConnection
from hbone.grpc.status import GrpcError, GrpcUnavailable, StatusCode

__all__ = [
    "Call",
    "ClientConnection",
    "GrpcConfig",
    "GrpcConnection",
    "GrpcError",
    "GrpcUnavailable",
    "Metadata",
    "ServerConnection",
    "StatusCode",
]
