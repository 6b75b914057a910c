"""Addresses of servers and headers of requests, checked before anything is sent. Messages hold no credentials."""

import re
from collections.abc import Mapping
from urllib.parse import urlsplit


def address_problem(url: str, what: str, example: str, variable: str) -> str | None:
    """
    Finds what is wrong with the address of a server.

    Args:
        url (`str`):
            The address.
        what (`str`), example (`str`):
            What it is the address of, and an address that could be one, for the message.
        variable (`str`):
            The environment variable for the server's token.

    Returns:
        `str` or `None`: A message without credentials, `None` if nothing is wrong.
    """
    try:
        parsed = urlsplit(url)
        usable = parsed.scheme in ("http", "https") and bool(parsed.hostname) and parsed.port != 0
    except ValueError:
        usable = False
    if usable and re.fullmatch(r"[!-~]+", url) and not {"@", "?", "#"} & set(url):
        return None
    given = "one with a user" if "@" in url else "one with a query" if {"?", "#"} & set(url) else repr(url)
    return (
        f"The address of {what} must be like {example}, got {given}. A token belongs into the environment variable "
        f"{variable}."
    )


def header_problem(headers: Mapping[str, str], what: str, variable: str) -> str | None:
    """
    Finds what is wrong with the headers of requests.

    Args:
        headers (`Mapping[str, str]`):
            Names and values.
        what (`str`):
            What they are for, for the message.
        variable (`str`):
            The environment variable for the server's token.

    Returns:
        `str` or `None`: A message without the values, `None` if nothing is wrong.
    """
    for name, value in headers.items():
        if not (re.fullmatch(r"[A-Za-z0-9-]+", name) and re.fullmatch(r"[ -~]+", value)):
            return (
                f"The header {name!r} for {what}, or the token in {variable}, is empty or has characters that a "
                "header cannot have: pass it on one line and in ASCII."
            )
    return None
