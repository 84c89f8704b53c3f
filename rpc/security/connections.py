"""Ends a connection that gRPC keeps: it has no call for that, but what it reads from is a socket of this process."""

import contextlib
import os
import socket
import stat
from urllib.parse import unquote

DESCRIPTORS = "/dev/fd"
"""Folder of this process's open descriptors, on Linux and macOS."""


def close_connection(peer: str) -> bool:
    """Shuts the connection of a peer down, so that gRPC reads its end and gives it up.

    Args:
        peer: as `ServicerContext.peer` names it, "ipv4:127.0.0.1:40000" or "ipv6:%5B::1%5D:40000".

    Returns:
        Whether it was found. Takes a few microseconds for each open descriptor.
    """
    host, _, port = unquote(peer.partition(":")[2]).rpartition(":")
    address = (host.strip("[]"), int(port))
    for name in os.listdir(DESCRIPTORS):
        with contextlib.suppress(OSError):  # closed meanwhile, or of something that has no peer
            if stat.S_ISSOCK(os.fstat(int(name)).st_mode) and _shut_down(int(name), address):
                return True
    return False


def _shut_down(descriptor: int, address: tuple[str, int]) -> bool:
    """Shuts a socket down if this is its peer. Raises OSError where it has none."""
    # A copy: gRPC may close its own meanwhile, and another socket get the number.
    with socket.socket(fileno=os.dup(descriptor)) as connection:
        if connection.family not in (socket.AF_INET, socket.AF_INET6):
            return False
        host, port = connection.getpeername()[:2]
        # gRPC listens for IPv4 with a socket of IPv6 where it can.
        found = (host.removeprefix("::ffff:"), port) == address
        if found:
            connection.shutdown(socket.SHUT_RDWR)
        return found
