"""Addresses and secrets that a config, which is stored and logged, must not hold."""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Mapping
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

SECRET = re.compile(
    r"(^|[_-])((api|access|secret|private|auth|hf|openai|azure|account)[_-]?(key|token)|secret|"
    r"pass(word|wd|phrase)|pwd|auth(orization)?|credential|bearer)s?$",
    re.IGNORECASE,
)
"""Names of arguments."""

PERHAPS = re.compile(r"(^|[_-])(key|token)s?$", re.IGNORECASE)
"""Names of those that may also be a column's or a mark; a secret is LONG and has no spaces."""

LONG = re.compile(r"^\S{16,}$")

LOOKS_SECRET = re.compile(r"^(sk-|hf_|ghp_|github_pat_|xox[abp]-|AKIA|eyJ[\w-]+\.)[\w.-]{8,}$")
"""Values of well-known kinds."""


def check_address(address: str, field: str) -> None:
    """Raises ValueError where an address is none of a server, holds a password, or is link-local (where
    clouds keep a machine's credentials)."""
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"{field} ({address}) must be an address such as http://127.0.0.1:8000")
    if parts.username or parts.password:
        raise ValueError(
            f"{field} must not hold a name or password, since it is stored and logged; {parts.hostname} must "
            "take its key from an environment variable"
        )
    if parts.query or parts.fragment:
        raise ValueError(
            f"{field} must end with its path, without ? or #, since it is stored and logged; "
            f"{parts.hostname} must take its key from an environment variable"
        )
    if _is_link_local(parts.hostname):
        raise ValueError(f"{field} ({address}) is link-local; give the server's own address")


def _is_link_local(host: str) -> bool:
    """Whether it is, in any spelling that a resolver takes for a number."""
    with suppress(OSError):
        host = socket.inet_ntoa(socket.inet_aton(host))
    try:
        address = ipaddress.ip_address(host)
    except ValueError:  # a name and no number
        return False
    return (getattr(address, "ipv4_mapped", None) or address).is_link_local


def check_secrets(values: Any, field: str) -> None:
    """Raises ValueError where a mapping holds something that is called a secret: configs are stored, logged
    and passed on."""
    if isinstance(values, Mapping):
        for name, value in values.items():
            words = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", str(name))
            if isinstance(value, str) and _is_secret(words, value):
                raise ValueError(
                    f"{field}.{name} is called a secret or looks like one, and configs are stored beside the "
                    "results; put it into an environment variable and give that variable's name as another "
                    "argument"
                )
            check_secrets(value, f"{field}.{name}")
    elif isinstance(values, list):
        for number, value in enumerate(values):
            check_secrets(value, f"{field}.{number}")


def _is_secret(name: str, value: str) -> bool:
    perhaps = PERHAPS.search(name) and LONG.match(value)
    return bool(SECRET.search(name) or LOOKS_SECRET.match(value) or perhaps)
