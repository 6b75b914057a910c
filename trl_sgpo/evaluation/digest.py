"""Digests of settings and weights: interrupted work is continued only where they are equal."""

import hashlib
import json
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from ..inference.model import TwoPhaseModel


def digest(value: Any) -> str:
    """SHA-256 of a value's JSON form."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def weights_digest(model: "TwoPhaseModel") -> str:
    """SHA-256 of the first 64 values of every parameter, which training changes."""
    found = hashlib.sha256()
    for name, parameter in model.model.named_parameters():
        first = parameter.detach().flatten()[:64].float().cpu().numpy()
        found.update(f"{name} {tuple(parameter.shape)}".encode() + first.tobytes())
    return found.hexdigest()
