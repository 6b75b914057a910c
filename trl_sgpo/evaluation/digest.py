"""Digests of settings and weights: interrupted work is continued only where they are equal."""

import hashlib
import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from ..inference.model import TwoPhaseModel
    from ..inference.settings import TwoPhaseSettings
    from .suites import Suite


_NEWER = {"chat_template_kwargs": None, "turn_end": None, "plain_text": False, "opens_reasoning": False}

_NEWER_OF_SUITES = ("prompt_column", "prompt_template", "answer_column")


def digest(value: Any) -> str:
    """SHA-256 of a value's JSON form."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def settings_record(settings: "TwoPhaseSettings") -> dict[str, Any]:
    """Settings for a record. Keys that earlier versions lack are left out at their default: their records continue."""
    return {key: value for key, value in asdict(settings).items() if key not in _NEWER or value != _NEWER[key]}


def compared_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings that an evaluation's chunks depend on: all but the kinds of suites, which are labels."""
    suites = settings.get("suites", {})
    chunks = {name: {key: value for key, value in suite.items() if key != "kind"} for name, suite in suites.items()}
    return settings | {"suites": chunks}


def suite_record(suite: "Suite") -> dict[str, Any]:
    """A suite for a record, with the keys that earlier versions lack only where they are set."""
    return {key: value for key, value in asdict(suite).items() if key not in _NEWER_OF_SUITES or value is not None}


def weights_digest(model: "TwoPhaseModel") -> str:
    """SHA-256 of the first 64 values of every parameter, which training changes."""
    values = hashlib.sha256()
    for name, parameter in model.model.named_parameters():
        first = parameter.detach().flatten()[:64].float().cpu().numpy()
        values.update(f"{name} {tuple(parameter.shape)}".encode() + first.tobytes())
    return values.hexdigest()
