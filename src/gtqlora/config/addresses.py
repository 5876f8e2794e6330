"""Addresses of servers that models run behind: which are any, which are of this machine, which hold a key."""

from __future__ import annotations

from urllib.parse import SplitResult, urlsplit

from gtqlora.config.values import as_typed, require

SERVER_KEY = "GTQLORA_SERVER_KEY"
"""The environment variable that holds the key of a server that says answers, where it wants one."""


def is_loopback(url: str) -> bool:
    """Tell whether an address is of this machine; one that is none is not."""
    try:
        host = urlsplit(url).hostname
    except ValueError:
        return False
    host = host or ""
    # As a whole: 127.evil.example begins like an address of this machine, and is none.
    return host in ("localhost", "::1") or (host.startswith("127.") and host.replace(".", "").isdigit())


def http_address(url: str) -> SplitResult | None:
    """Return the parts of an address of HTTP; None if it is none."""
    try:
        address = urlsplit(url)
        sound = address.scheme in ("http", "https") and address.hostname and (address.port or 1) > 0
    except ValueError:
        return None
    if not sound or any(character.isspace() or not character.isprintable() for character in url):
        return None
    return address


def holds_key(address: SplitResult) -> bool:
    """Tell whether an address holds what may be a password or a key."""
    return bool(address.username or address.password or address.query)


def can_be_read(address: SplitResult) -> bool:
    """Tell whether what goes to an address can be read on the way: by plain HTTP to another machine."""
    return address.scheme == "http" and not is_loopback(address.geturl())


# --- models that answer behind servers


def check_servers(server: str | None, **models: str | None) -> None:
    """Check where answers are to come from.

    Args:
        server: the setting `generate_with`.
        models: the settings that name models there, each `NAME` or, on another server, `URL#NAME`.

    Raises:
        ConfigError: an address that is none, holds a key or sends prompts where they can be read; a model without a
            server, or a server without a model.
    """
    if server is None:
        named = [as_typed(key) for key, name in models.items() if name is not None]
        require(
            not named, f"{' and '.join(named)}: no server to ask; add --generate-with, such as http://127.0.0.1:8000"
        )
        return
    _check_address("generate_with", server)
    missing = " and ".join(as_typed(key) for key, name in models.items() if not name)
    require(not missing, f"{missing} missing: the name that the server of --generate-with has for the model")
    for key, name in models.items():
        url, model = served_at(server, name or "")
        require(bool(model), f"{as_typed(key)} = {name!r}: no model; write NAME or URL#NAME")
        if url != server:
            _check_address(as_typed(key), url)


def served_at(server: str, name: str) -> tuple[str, str]:
    """Return the address of the server that a model's name means, and what it is called there."""
    url, mark, model = name.rpartition("#")
    return (url, model) if mark and url.startswith(("http://", "https://")) else (server, name)


def servers_of(server: str, *names: str) -> list[str]:
    """Return the different servers that models' names mean."""
    return list(dict.fromkeys(served_at(server, name)[0] for name in names))


def _check_address(key: str, url: str) -> None:
    address = http_address(url)
    require(address is not None, f"{key}: no address; write http://127.0.0.1:8000 or https://HOST/v1")
    assert address is not None
    # Without the address: it would show the key.
    require(not holds_key(address), f"{key}: an address is recorded, so a key has no place in it; see {SERVER_KEY}")
    require(
        not can_be_read(address),
        f"{key} = {url!r}: plain HTTP to another machine can be read on the way; use https, or a tunnel to this one",
    )
