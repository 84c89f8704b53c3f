"""Fields of requests that are newer than this server: refused, for protobuf alone would drop them in silence."""

from google.protobuf.message import Message
from google.protobuf.unknown_fields import UnknownFieldSet

from jaxserve.request_errors import InvalidRequest


def refuse_unknown(message: Message) -> None:
    """Raises InvalidRequest where a request has a field, at any depth, that its message here does not have."""
    known = type(message)()
    known.CopyFrom(message)
    known.DiscardUnknownFields()  # to compare sizes is quick where a walk over thousands of chat messages is not
    if known.ByteSize() != message.ByteSize():
        _refuse_first(message, "")


def _refuse_first(message: Message, path: str) -> None:
    """Names the first unknown field, which has a number alone, in a message that lies at this path."""
    for unknown in UnknownFieldSet(message):
        number, kind = unknown.field_number, message.DESCRIPTOR.full_name
        raise InvalidRequest(f"{path}{number}", f"field {number} of {kind} is not known to this server")
    for descriptor, value in message.ListFields():
        if descriptor.message_type is not None and not descriptor.message_type.GetOptions().map_entry:
            for part in value if descriptor.is_repeated else (value,):
                _refuse_first(part, f"{path}{descriptor.name}.")
