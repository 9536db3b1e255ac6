"""The generated messages against what real programs sent, and against the compiler that is to make them again."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from google.protobuf import descriptor_pool, json_format, message_factory
from google.protobuf.unknown_fields import UnknownFieldSet

from ztunnel.wire import authorization_pb2, ca_pb2, discovery_pb2, workload_pb2

if TYPE_CHECKING:
    from google.protobuf.message import Message

ROOT = Path(__file__).parents[3]
WIRE = ROOT / "src" / "ztunnel" / "wire"
RECORDS = [json.loads(line) for line in (ROOT / "tests" / "data" / "wire-messages.jsonl").read_text().splitlines()]


def new_message(name: str) -> Message:
    descriptor = descriptor_pool.Default().FindMessageTypeByName(name)
    return message_factory.GetMessageClass(descriptor)()


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: record["message"].rpartition(".")[2])
def test_recorded_messages_are_read_and_written_unchanged(record: dict[str, Any]) -> None:
    expected = json_format.ParseDict(record["body"], new_message(record["message"]))
    raw = base64.b64decode(record["bytes"]) if "bytes" in record else expected.SerializeToString()
    read = new_message(record["message"])
    read.ParseFromString(raw)
    assert read == expected
    assert not unknown_fields(read)
    again = new_message(record["message"])
    again.ParseFromString(read.SerializeToString())
    assert again == read
    assert len(read.SerializeToString()) == len(raw)  # maps have no order, so the bytes may differ


def unknown_fields(message: Message) -> list[int]:
    fields: Any = UnknownFieldSet(message)  # its stub lacks __iter__
    return [field.field_number for field in fields]


def test_resources_are_packed_under_istios_type_names() -> None:
    resource = discovery_pb2.Resource(name="a")
    resource.resource.Pack(workload_pb2.Address(workload=workload_pb2.Workload(uid="a")))
    assert resource.resource.type_url == "type.googleapis.com/istio.workload.Address"
    resource.resource.Pack(authorization_pb2.Authorization(name="p"))
    assert resource.resource.type_url == "type.googleapis.com/istio.security.Authorization"


@pytest.mark.parametrize(
    ("file", "method"),
    [
        (
            discovery_pb2.DESCRIPTOR,
            "envoy.service.discovery.v3.AggregatedDiscoveryService.DeltaAggregatedResources",
        ),
        (ca_pb2.DESCRIPTOR, "istio.v1.auth.IstioCertificateService.CreateCertificate"),
    ],
)
def test_services_have_istios_names(file: Any, method: str) -> None:
    found = [
        f"{service.full_name}.{name}" for service in file.services_by_name.values() for name in service.methods_by_name
    ]
    assert method in found


def test_presence_is_told_from_zero() -> None:
    assert not workload_pb2.NetworkAddress().HasField("length")
    assert workload_pb2.NetworkAddress(length=0).HasField("length")
    assert not workload_pb2.Workload().HasField("capacity")
    assert authorization_pb2.StringMatch(exact="").WhichOneof("match_type") == "exact"


def test_generated_code_is_what_the_compiler_makes_of_the_proto_files(tmp_path: Path) -> None:
    protos = sorted(WIRE.glob("*.proto"))
    command = [sys.executable, "-m", "grpc_tools.protoc", "-I", str(ROOT / "src")]
    command += [f"--python_out={tmp_path}", f"--pyi_out={tmp_path}", *map(str, protos)]
    subprocess.run(command, check=True, timeout=60)
    made = {path.name: path.read_text() for path in (tmp_path / "ztunnel" / "wire").iterdir()}
    kept = {path.name: path.read_text() for path in WIRE.iterdir() if "_pb2" in path.name}
    assert made == kept, "run 'make proto'"
    assert len(made) == 2 * len(protos)
