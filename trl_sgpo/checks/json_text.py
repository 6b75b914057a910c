"""Reading JSON that others wrote."""

import json
from typing import Any


def parse_json(text: str | bytes) -> Any:
    """
    Reads a JSON document.

    Raises:
        `ValueError`: It is none, or nested too deeply. The message is a clause without a full stop.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
