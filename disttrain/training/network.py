"""Which of a node's networks leads to the other nodes."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket

import psutil

_ELSEWHERE = "192.0.2.1"  # nobody's (RFC 5737): stands for whatever the default route leads to


def prepare_gloo(master_addr: str) -> str | None:
    """Sets GLOO_SOCKET_IFNAME where this node's own name leads nowhere; returns what it set, if anything."""
    if "GLOO_SOCKET_IFNAME" in os.environ or own_name_leads_here():
        return None
    interface = interface_to(master_addr)
    if interface is not None:
        os.environ["GLOO_SOCKET_IFNAME"] = interface
    return interface


def own_name_leads_here() -> bool:
    """Tells whether other nodes reach this one by the address that its own name stands for."""
    try:
        found = socket.getaddrinfo(socket.gethostname(), 1, type=socket.SOCK_STREAM)
    except OSError:
        return False
    return not ipaddress.ip_address(str(found[0][4][0]).partition("%")[0]).is_loopback


def interface_to(host: str) -> str | None:
    """Returns the name of the interface by which this node reaches another, or is reached itself.

    Without GLOO_SOCKET_IFNAME gloo listens where this node's own name points to. That is the loopback
    interface where /etc/hosts says so, as Debian's does, or where the name is unknown: then no other node
    gets through. Nothing is sent.

    Args:
        host: name or address of the first node; where that is this one, by a name of its own, the interface
            with the default route is taken, or the only one.

    Returns:
        None if it cannot be told.
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
