"""Values of a model's config with which it is built, but cannot be used: one line, or it works."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.errors import StrictDataclassError
from models import save_tiny_model
from transformers import CONFIG_MAPPING

from trl_sgpo.checks.repositories import check_model_settings
from trl_sgpo.cli.main import main
from trl_sgpo.errors import ModelError


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    save_tiny_model(tmp_path / "tiny")
    return tmp_path / "tiny"


def run(command: str, model: Path, values: dict[str, Any]) -> int:
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    if command == "export":
        return main(["export", "--model", str(model), "--merge", "--output_dir", str(model.parent / "out")])
    limits = ["--max_strategy_length", "4", "--max_completion_length", "4"]
    return main(["solve", "--model", str(model), "--no_bank", *limits, "1 + 2"])


QUANTIZED = {"quant_method": "bitsandbytes", "load_in_4bit": True}
REFUSED = [
    ("solve", {"pad_token_id": 10**9}),
    ("solve", {"sliding_window": "x"}),
    ("solve", {"sliding_window": 1.5}),
    ("solve", {"layer_types": ["sliding_attention"] * 2}),
    ("solve", {"quantization_config": QUANTIZED}),
    ("solve", {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}),
    ("export", {"quantization_config": QUANTIZED}),
    ("export", {"pad_token_id": 10**9}),
    ("export", {"generator": {}}),
    ("export", {"decoder": {"a": 1}}),
    ("export", {"text_config": {"a": 1}}),
    ("export", {"dtype": {"a": "float16"}}),
]


@pytest.mark.parametrize(("command", "values"), REFUSED, ids=[f"{name}-{value}" for name, value in REFUSED])
def test_one_line_and_status_2(
    command: str, values: dict[str, Any], tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if "quantization_config" in values:
        pytest.importorskip("bitsandbytes")
    assert run(command, tiny, values) == 2
    *_, line = capsys.readouterr().err.strip().split("\n")
    assert line.startswith(f"trl-sgpo {command}: error: ") and "cannot be loaded" in line


@pytest.mark.parametrize("command", ["solve", "export"])
@pytest.mark.parametrize("values", [{"return_dict": False}, {"is_encoder_decoder": True}], ids=str)
def test_values_that_change_only_a_form(command: str, values: dict[str, Any], tiny: Path) -> None:
    assert run(command, tiny, values) == 0


def test_defaults_of_transformers() -> None:
    defaults = {}
    for kind, made in CONFIG_MAPPING.items():
        with suppress(ValueError, StrictDataclassError):  # a few have none
            defaults[kind] = made().to_dict()
    del defaults["rag"]  # its tokenizer loads others
    assert len(defaults) > 300
    for kind, settings in defaults.items():
        check_model_settings(kind, settings)


def test_a_head_without_positions_is_no_head_of_size_0() -> None:
    with pytest.raises(ModelError, match="`head_dim: 0`"):
        check_model_settings("evil", {"head_dim": 0})
