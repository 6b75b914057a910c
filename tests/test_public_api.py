"""The public interface: signatures as committed, and a docstring for everything."""

import inspect
import re

import public_api
import pytest

import trl_sgpo
import trl_sgpo.bank


ITEMS = [item for items in public_api.PUBLIC.values() for item in items.values()]


def test_signatures_are_those_committed() -> None:
    assert public_api.signatures() == public_api.SIGNATURES.read_text(), (
        "The public interface has changed. If it is meant to, run `make signatures` and add a line to CHANGELOG.md."
    )


def test_what_the_package_exports_is_public() -> None:
    assert set(trl_sgpo.__all__) - {"__version__"} <= {item.__name__ for item in ITEMS}
    assert set(trl_sgpo.bank.__all__) <= {item.__name__ for item in ITEMS}


@pytest.mark.parametrize("item", ITEMS, ids=lambda item: item.__name__)
def test_every_argument_is_described(item: type) -> None:
    assert item.__doc__ and item.__doc__.strip()
    text = inspect.getdoc(item) or ""
    entries = re.findall(r"^ {4}([\w*, ]+?)(?: \(.+\))?:$", text, re.MULTILINE)
    described = {name for entry in entries for name in entry.split(", ")} | set(re.findall(r"`(\w+)`", text))
    given = [] if public_api.is_error(item) else public_api.arguments(item)
    assert {argument.split("=")[0] for argument in given} - {"*"} - described == set()
