"""Licence metadata of a card: `license`, `license_name` and `license_link`, as the Hub names them."""

import re
from collections.abc import Mapping
from typing import Any

from ..bank.export_files import LICENSE
from ..errors import ConfigError


_FORMS = {
    "license": LICENSE,
    "license_name": re.compile(r"[\w][\w .,+()-]{0,127}"),
    "license_link": re.compile(r"https?://[^\s<>\"'`\\]{1,500}|[\w.-]{1,128}"),
}


def check_license(license: Mapping[str, Any]) -> None:
    """
    Checks licence metadata that is published in a card.

    Raises:
        [`ConfigError`]: There is another key, or a value of another form.
    """
    for key, value in license.items():
        if key not in _FORMS:
            raise ConfigError(f"A licence has the keys {', '.join(_FORMS)}, not {key!r}.")
        if not isinstance(value, str) or not _FORMS[key].fullmatch(value):
            raise ConfigError(f"{key} must have the form of one on the Hub, as in apache-2.0 or other, not {value!r}.")


def license_of_card(card: Mapping[str, Any]) -> dict[str, str]:
    """Licence metadata in a card on the Hub, which may be a list. What has no form that is known here is `other`."""
    given = card.get("license")
    named = given if isinstance(given, list) else [given]
    if not any(named):
        return {}
    known = len(named) == 1 and isinstance(named[0], str) and LICENSE.fullmatch(named[0])
    found = {"license": str(named[0]) if known else "other"}
    for key in ("license_name", "license_link"):
        value = card.get(key)
        if isinstance(value, str) and _FORMS[key].fullmatch(value):
            found[key] = value
    return found
