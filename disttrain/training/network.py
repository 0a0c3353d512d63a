"""Finds the network interface through which a node reaches the others."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket

import psutil

_ELSEWHERE = "192.0.2.1"  # a reserved address (RFC 5737), reached by the default route


def prepare_gloo(master_addr: str) -> str | None:
    """Sets GLOO_SOCKET_IFNAME if this node's hostname is not routable; returns the interface, or None."""
    if "GLOO_SOCKET_IFNAME" in os.environ or own_hostname_is_routable():
        return None
    interface = interface_to(master_addr)
    if interface is not None:
        os.environ["GLOO_SOCKET_IFNAME"] = interface
    return interface


def own_hostname_is_routable() -> bool:
    """Returns whether this node's hostname resolves to an address that other nodes can reach."""
    try:
        found = socket.getaddrinfo(socket.gethostname(), 1, type=socket.SOCK_STREAM)
    except OSError:
        return False
    return not ipaddress.ip_address(str(found[0][4][0]).partition("%")[0]).is_loopback


def interface_to(host: str) -> str | None:
    """Returns the name of the interface through which this node reaches `host`, without sending anything.

    Without GLOO_SOCKET_IFNAME, gloo listens on the address of this node's hostname. That is the loopback
    interface if the hostname is unknown or /etc/hosts says so, as on Debian. Then no other node can connect.

    Args:
        host: name or address of the first node. If it resolves to a loopback address of this node, the result
            is the interface of the default route, or the only interface.

    Returns:
        None if it cannot be determined.
    """
    interfaces = {
        entry.address.partition("%")[0]: name
        for name, entries in psutil.net_if_addrs().items()
        for entry in entries
        if entry.family in {socket.AF_INET, socket.AF_INET6}
        and not ipaddress.ip_address(entry.address.partition("%")[0]).is_loopback
    }
    for target in (host, _ELSEWHERE):
        with contextlib.suppress(OSError):
            family, _, _, _, address = socket.getaddrinfo(target, 1, type=socket.SOCK_DGRAM)[0]
            with socket.socket(family, socket.SOCK_DGRAM) as probe:
                probe.connect(address)  # finds the route
                if name := interfaces.get(probe.getsockname()[0].partition("%")[0]):
                    return name
    names = set(interfaces.values())
    return names.pop() if len(names) == 1 else None
