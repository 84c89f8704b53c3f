"""The committed stubs are those of the committed proto."""

import ast
from pathlib import Path

import pytest
from google.protobuf import descriptor_pb2
from serving import ROOT

from rpc.jetstream import orchestrator_pb2, orchestrator_pb2_grpc
from rpc.v1 import jaxserve_pb2, jaxserve_pb2_grpc

STUBS = {
    "rpc/v1/jaxserve": (jaxserve_pb2, jaxserve_pb2_grpc),
    "rpc/jetstream/orchestrator": (orchestrator_pb2, orchestrator_pb2_grpc),
}

protoc = pytest.importorskip("grpc_tools.protoc")


@pytest.mark.parametrize("name", STUBS)
def test_stubs_are_up_to_date_with_the_proto(name: str, tmp_path: Path) -> None:
    # Compared by what they mean, so that any version of the generator can check what the pinned one wrote.
    described = tmp_path / "descriptors"
    arguments = ["protoc", f"-I{ROOT}", f"--descriptor_set_out={described}", f"{name}.proto"]
    assert protoc.main(arguments) == 0
    (proto,) = descriptor_pb2.FileDescriptorSet.FromString(described.read_bytes()).file
    for message in _messages(proto.message_type):
        for field in message.field:
            field.ClearField("json_name")
    committed = descriptor_pb2.FileDescriptorProto()
    STUBS[name][0].DESCRIPTOR.CopyToProto(committed)
    assert committed == proto, "run scripts/generate_protos"


def _messages(messages: object) -> list[descriptor_pb2.DescriptorProto]:
    found = []
    for message in messages:  # pyright: ignore[reportGeneralTypeIssues]
        found += [message, *_messages(message.nested_type)]
    return found


@pytest.mark.parametrize("name", STUBS)
def test_type_stubs_know_every_field(name: str) -> None:
    tree = ast.parse((ROOT / f"{name}_pb2.pyi").read_text())
    fields = {
        node.name: {ast.literal_eval(item.value) for item in node.body if isinstance(item, ast.Assign)}
        for node in tree.body
        if isinstance(node, ast.ClassDef)
    }
    expected = {
        message_name: {tuple(field.name for field in message.fields)}
        for message_name, message in STUBS[name][0].DESCRIPTOR.message_types_by_name.items()
    }
    assert fields == expected, "run scripts/generate_protos"


@pytest.mark.parametrize("name", STUBS)
def test_service_stubs_know_every_method_and_what_is_said_of_it(name: str, tmp_path: Path) -> None:
    described = tmp_path / "descriptors"
    arguments = ["protoc", f"-I{ROOT}", "--include_source_info", f"--descriptor_set_out={described}", f"{name}.proto"]
    assert protoc.main(arguments) == 0
    (proto,) = descriptor_pb2.FileDescriptorSet.FromString(described.read_bytes()).file
    comments = {tuple(place.path): place.leading_comments.split() for place in proto.source_code_info.location}
    for number, service in enumerate(proto.service):
        servicer = getattr(STUBS[name][1], f"{service.name}Servicer")
        stubs = {key: (method.__doc__ or "").split() for key, method in vars(servicer).items() if key[0] != "_"}
        # A path in a descriptor: field 6 of a file is its services, field 2 of a service its methods.
        said = {method.name: comments[6, number, 2, index] for index, method in enumerate(service.method)}
        assert {key: words for key, words in said.items() if words} == {
            key: words for key, words in stubs.items() if said[key]
        }, "run scripts/generate_protos"
        assert stubs.keys() == said.keys(), "run scripts/generate_protos"
