"""Evaluation results in the format of the Hugging Face Hub."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, eval_result_entries_to_yaml
from huggingface_hub.repocard_data import eval_results_to_model_index

from ..files import write_file
from .suites import Suite
from .tables import judged


HUB_DIRECTORY = "hub"


def write_hub_results(
    directory: Path, model_name: str, suites: Sequence[Suite], results: dict[str, dict[str, Any]], setup: str
) -> list[Path]:
    """
    Writes `hub/.eval_results/*.yaml` for suites of which all problems were judged and that are datasets on the Hub,
    and `hub/model_index.yaml`, which is the `model-index` of a model card, for all suites.

    Args:
        directory (`Path`):
            Output directory.
        model_name (`str`):
            Name of the model.
        suites (`Sequence[Suite]`):
            The suites.
        results (`dict[str, dict]`):
            Their results by name, as in `results.json`.
        setup (`str`):
            How it was evaluated, in words.

    Returns:
        `list[Path]`: The files.
    """
    measured = [suite for suite in suites if results[suite.name]["accuracy"] is not None]
    written = []
    for suite in measured:
        result = results[suite.name]
        if suite.hub_id is None or judged(result) < result["available"]:
            continue
        value = round(100 * result["accuracy"]["value"], 2)
        entry = EvalResultEntry(dataset_id=suite.hub_id, task_id=suite.task_id, value=value, notes=setup)
        written.append(directory / HUB_DIRECTORY / ".eval_results" / f"{suite.name}.yaml")
        written[-1].parent.mkdir(parents=True, exist_ok=True)
        write_file(written[-1], yaml.safe_dump(eval_result_entries_to_yaml([entry]), sort_keys=False))
    if measured:
        written.append(directory / HUB_DIRECTORY / "model_index.yaml")
        written[-1].parent.mkdir(parents=True, exist_ok=True)
        entries = [_entry(suite, results[suite.name], setup) for suite in measured]
        model_index = {"model-index": eval_results_to_model_index(model_name, entries)}
        write_file(written[-1], yaml.safe_dump(model_index, sort_keys=False))
    return written


def _entry(suite: Suite, result: dict[str, Any], setup: str) -> EvalResult:
    accuracy = result["accuracy"]
    return EvalResult(
        task_type="text-generation",
        dataset_type=suite.hub_id or (Path(suite.path).name if Path(suite.path).exists() else suite.path),
        dataset_name=suite.name,
        dataset_config=suite.config,
        dataset_split=suite.split or "test",
        metric_type="accuracy",
        metric_value=round(accuracy["value"], 4),
        metric_name=f"accuracy ({setup}, {accuracy['problems']} problems)",
    )
