"""Rejects secrets and unsafe addresses in configs, which are stored and logged."""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

SECRET = re.compile(
    r"(^|[_-])((api|access|secret|private|auth|hf|openai|azure|account)[_-]?(key|token)|secret|"
    r"pass(word|wd|phrase)|pwd|auth(orization)?|credential|bearer)s?$",
    re.IGNORECASE,
)
"""Names of arguments that hold a secret."""

MAYBE_SECRET = re.compile(r"(^|[_-])(key|token)s?$", re.IGNORECASE)
"""Names that may also be a column's or a marker's; then a secret is a LONG value."""

LONG = re.compile(r"^\S{16,}$")

LOOKS_SECRET = re.compile(r"^(sk-|hf_|ghp_|github_pat_|xox[abp]-|AKIA|eyJ[\w-]+\.)[\w.-]{8,}$")
"""Keys of well-known services."""

TOKEN_INSIDE = re.compile(
    r"(?<![A-Za-z0-9])(?:hf_[A-Za-z0-9]{16,}|sk-[\w-]{16,}|ghp_[A-Za-z0-9]{16,}|github_pat_\w{16,}|"
    r"xox[abp]-[\w-]{10,}|AKIA[A-Z0-9]{12,}|eyJ[\w-]{8,}\.[\w-]{8,})"
)
"""The same within a longer text, such as a header or an address."""


def check_address(address: str, field: str) -> None:
    """Raises ValueError where an address is not a server's, includes a password, or is link-local (where
    clouds serve a machine's credentials)."""
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"{field} ({address}) must be an address such as http://127.0.0.1:8000")
    if parts.username or parts.password:
        raise ValueError(
            f"{field} must not include a user name or password, since it is stored and logged; put the key "
            f"for {parts.hostname} into an environment variable"
        )
    if parts.query or parts.fragment:
        raise ValueError(
            f"{field} must end with its path, without ? or #, since it is stored and logged; put the key for "
            f"{parts.hostname} into an environment variable"
        )
    if _is_link_local(parts.hostname):
        raise ValueError(f"{field} ({address}) is link-local; use the server's own address")


def _is_link_local(host: str) -> bool:
    """Also for numbers in any spelling that a resolver accepts."""
    with suppress(OSError):
        host = socket.inet_ntoa(socket.inet_aton(host))
    try:
        address = ipaddress.ip_address(host)
    except ValueError:  # a host name
        return False
    return (getattr(address, "ipv4_mapped", None) or address).is_link_local


def check_secrets(values: Any, field: str) -> None:
    """Raises ValueError where a name or value in a mapping looks like a secret, at any depth."""
    if isinstance(values, Mapping):
        for name, value in values.items():
            words = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", str(name))
            if isinstance(value, str) and _is_secret(words, value):
                raise ValueError(
                    f"{field}.{name} looks like a secret, and configs are stored with the results; put it "
                    "into an environment variable and pass the variable's name as another argument"
                )
            check_secrets(value, f"{field}.{name}")
    elif isinstance(values, list):
        for number, value in enumerate(values):
            check_secrets({number: value}, field)


def _is_secret(name: str, value: str) -> bool:
    named_so = SECRET.search(name) or (MAYBE_SECRET.search(name) and LONG.match(value))
    return bool(named_so) or _looks_secret(value)


def _looks_secret(value: str) -> bool:
    return bool(LOOKS_SECRET.match(value) or TOKEN_INSIDE.search(value))


def mask_secrets(words: Sequence[str]) -> list[str]:
    """The words of a command line with `***` in place of secrets: after `name=`, after `--name`, and words
    that look like a key."""
    masked, option = [], ""
    for word in words:
        name, equals, value = word.partition("=")
        own = name.rpartition(".")[2].lstrip("-")
        if equals and _is_secret(own, value):
            masked.append(f"{name}=***")
        else:
            masked.append("***" if _is_secret(option, word) else word)
        option = own if word.startswith("-") and not equals else ""
    return masked


def mask_values(values: Any) -> Any:
    """Plain values with `***` in place of those that look like a secret by name or form, at any depth."""
    if isinstance(values, Mapping):
        masked = {
            name: isinstance(value, str) and _is_secret(str(name), value) for name, value in values.items()
        }
        return {name: "***" if masked[name] else mask_values(value) for name, value in values.items()}
    if isinstance(values, list):
        return [mask_values(value) for value in values]
    return "***" if isinstance(values, str) and _looks_secret(values) else values
