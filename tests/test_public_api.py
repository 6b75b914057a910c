"""The public interface: signatures as committed, a docstring for everything, and the reference made from these."""

import inspect

import api_reference
import pytest

import trl_sgpo


ITEMS = [item for items in api_reference.PUBLIC.values() for item in items]


def test_signatures_are_those_committed() -> None:
    assert api_reference.signatures() == api_reference.SIGNATURES.read_text(), (
        "The public interface has changed. If it is meant to, run `make reference` and add a line to CHANGELOG.md."
    )


def test_reference_is_made_from_the_docstrings() -> None:
    assert api_reference.reference() == api_reference.REFERENCE.read_text(), (
        "docs/api.md is not what the docstrings say: run `make reference`."
    )


def test_what_the_package_exports_is_public() -> None:
    assert set(trl_sgpo.__all__) - {"__version__"} <= {item.__name__ for item in ITEMS}
    assert set(trl_sgpo.bank.__all__) <= {item.__name__ for item in ITEMS}


@pytest.mark.parametrize("item", ITEMS, ids=lambda item: item.__name__)
def test_every_argument_is_described(item: type) -> None:
    lines = "\n".join(api_reference.markdown(inspect.getdoc(item) or ""))
    given = [] if api_reference.is_error(item) else api_reference.arguments(item)
    names = {argument.split("=")[0] for argument in given} - {"*"}
    assert {name for name in names if f"`{name}`" not in lines} == set()
