"""Tells which hosts are IP addresses, and which can be reached from this machine only. Torch-free."""

from __future__ import annotations

import ipaddress


def is_loopback(host: str) -> bool:
    """Whether `host` can be reached from this machine only."""
    found = address(host)
    return host == "localhost" or (found is not None and found.is_loopback)


def address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """`host` as an IP address; None if it is a name."""
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None
