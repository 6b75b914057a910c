"""Tokenizers whose settings say where files are, or whose class loads others. Only checked files are read."""

import inspect
import json
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import transformers.utils.hub
from hub_server import HubServer
from models import save_tiny_model
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.models.auto import modeling_auto
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES, tokenizer_class_from_name
from transformers.utils.hub import cached_file, cached_files

from trl_sgpo.bank.index import Index
from trl_sgpo.checks import opening
from trl_sgpo.checks.repositories import check_model_folder, check_model_settings, check_tokenizer_settings
from trl_sgpo.cli.main import main
from trl_sgpo.errors import ModelError
from trl_sgpo.evaluation.plots import draw_bars
from trl_sgpo.inference import checked, pretrained
from trl_sgpo.inference import model as inference_model
from trl_sgpo.inference.model import TwoPhaseModel
from trl_sgpo.inference.pretrained import load_config, load_model, load_tokenizer


REPO = "user/model"
SETTINGS, TOKENS = "tokenizer_config.json", "special_tokens_map.json"


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    save_tiny_model(tmp_path / "tiny")
    return tmp_path / "tiny"


def put(path: Path, **values: Any) -> None:
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | values))


def write_gguf(path: Path, tiny: Path) -> None:
    gguf = pytest.importorskip("gguf")
    model = json.loads((tiny / "tokenizer.json").read_text())["model"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*sorted(model["vocab"], key=model["vocab"].get), "PRIVATE"])
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]])
    writer.add_eos_token_id(0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("place", [{"gguf_file": "secret.gguf", "subfolder": ".."}, {"gguf_file": "../secret.gguf"}])
def test_a_vocabulary_in_another_folder_is_not_exported(
    place: dict[str, str], tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_gguf(tmp_path / "secret.gguf", tiny)
    (tiny / "tokenizer.json").unlink()
    (tiny / SETTINGS).write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<|pad|>"} | place)
    )
    assert main(["export", "--model", str(tiny), "--merge", "--output_dir", str(tmp_path / "out")]) == 2
    assert "`gguf_file`" in capsys.readouterr().err and not (tmp_path / "out").exists()


WRITTEN_BY_TRANSFORMERS = {"local_files_only"}  # and overwritten when they are read
PLACES = [
    name
    for function in (cached_file, cached_files)
    for name, argument in inspect.signature(function).parameters.items()
    if argument.default is not inspect.Parameter.empty and not name.startswith("_")
]


@pytest.mark.parametrize("file", [SETTINGS, TOKENS])
@pytest.mark.parametrize("key", sorted({*PLACES, "gguf_file", "tokenizer_object"} - WRITTEN_BY_TRANSFORMERS))
def test_every_setting_that_says_where_files_are(key: str, file: str, tiny: Path) -> None:
    put(tiny / file, **{key: "x"})
    with pytest.raises(ModelError, match=f"`{key}`"):
        check_model_folder(tiny, "user/evil")
    put(tiny / file, **{key: None})
    if not (file == TOKENS and key.endswith("_file")):
        check_model_folder(tiny, "user/good")


@pytest.mark.parametrize("value", ["../secret.txt", "sub/vocab.txt"])
def test_a_path_from_the_folder(value: str, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "secret.txt").touch()
    (tiny / "sub").mkdir()
    (tiny / "sub" / "vocab.txt").touch()
    with pytest.raises(ModelError, match="`some_path`"):
        check_tokenizer_settings("user/evil", {"some_path": value}, tiny)


def test_a_file_where_a_command_runs(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".env").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match="`vocab_file`"):
        check_tokenizer_settings("user/evil", {"vocab_file": ".env"}, tiny)
    (tiny / "vocab.json").touch()
    monkeypatch.chdir(tiny)
    check_tokenizer_settings("user/good", {"vocab_file": "vocab.json", "bos_token": "vocab.json"}, tiny)


OTHERS = ["RagTokenizer", "RagTokenizerFast", "AutoTokenizer", "AutoModel", "AutoProcessor", "LlavaProcessor"]


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("file", [SETTINGS, "config.json"])
def test_a_class_that_loads_others(name: str, file: str, tiny: Path) -> None:
    put(tiny / file, tokenizer_class=name)
    with pytest.raises(ModelError, match=f"{name} as its tokenizer, which loads other files"):
        check_model_folder(tiny, "user/evil")


def test_the_tokenizers_of_all_types_of_models() -> None:
    """One that is no tokenizer loads others, unless it stands for a package that is not installed."""
    by_name = {name: kind for kind, name in TOKENIZER_MAPPING_NAMES.items()}  # importing a class is slow
    for name, kind in by_name.items():
        found = tokenizer_class_from_name(name) if name is not None else None
        if found is None or issubclass(found, PreTrainedTokenizerBase) or "from_pretrained" not in vars(found):
            check_tokenizer_settings(kind, {"tokenizer_class": name}, Path())
            check_model_settings(kind, {"model_type": kind})
        else:
            with pytest.raises(ModelError, match="loads other"):
                check_model_settings(kind, {"encoder": {"model_type": kind}})


@pytest.mark.parametrize("file", [SETTINGS, "config.json", "preprocessor_config.json", "processor_config.json"])
@pytest.mark.parametrize("name", ["BertModel", "RagRetriever", "AutoProcessor", "BarkProcessor", "a.Processor"])
def test_a_processor_that_is_another_class(name: str, file: str, tiny: Path) -> None:
    put(tiny / file, processor_class=name)
    with pytest.raises(ModelError, match="as `processor_class`, which is none"):
        check_model_folder(tiny, "user/evil")


@pytest.mark.parametrize("key", ["image_processor_type", "video_processor_type", "feature_extractor_type"])
def test_a_processor_of_images_that_is_another_class(key: str, tiny: Path) -> None:
    put(tiny / "processor_config.json", part={key: "BertModel"})
    with pytest.raises(ModelError, match=f"as `{key}`, which is none"):
        check_model_folder(tiny, "user/evil")


def test_a_model_that_a_processor_loads(tiny: Path) -> None:
    put(tiny / "audio_tokenizer_config.json", audio_tokenizer_class="LlamaModel", audio_tokenizer_name_or_path="/x")
    with pytest.raises(ModelError, match=r"names another model in audio_tokenizer_config\.json"):
        check_model_folder(tiny, "user/evil")


@pytest.mark.parametrize("name", ["BertTokenizer", "AutoModel", "AutoProcessor", "LlamaConfig", "pipeline"])
def test_a_class_in_place_of_a_model(name: str, tiny: Path) -> None:
    put(tiny / "config.json", architectures=[name])
    with pytest.raises(ModelError, match=f"names '{name}' in `architectures`, which is no model"):
        check_model_folder(tiny, "user/evil")


def test_the_models_of_all_types() -> None:
    kinds = ["CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "SEQUENCE_CLASSIFICATION", "TOKEN_CLASSIFICATION"]
    names = [name for kind in kinds for name in vars(modeling_auto)[f"MODEL_FOR_{kind}_MAPPING_NAMES"].values()]
    assert len(names) > 400
    check_model_settings("user/good", {"architectures": names})


def test_the_processors_of_all_types_of_models() -> None:
    for name in PROCESSOR_MAPPING_NAMES.values():
        if name.endswith("Processor") and name != "BarkProcessor":
            check_tokenizer_settings("user/good", {"processor_class": name}, Path())


NAMES = ["LlamaTokenizer", "Qwen2TokenizerFast", "PreTrainedTokenizerFast", "TokenizersBackend", "QWenTokenizer", "X"]


@pytest.mark.parametrize("name", [*NAMES, None])
def test_a_usual_class(name: str | None, tiny: Path) -> None:
    check_tokenizer_settings("user/good", {"tokenizer_class": name}, tiny)


# Files of a repository on the Hub


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Any:
    with HubServer() as hub:
        hub.connect(monkeypatch)
        monkeypatch.setattr(transformers.utils.hub, "_hf_api", None)  # it remembers the Hub it was made for
        yield hub


def upload(hub: HubServer, folder: Path) -> None:
    hub.api().create_repo(REPO, exist_ok=True)
    hub.api().upload_folder(repo_id=REPO, folder_path=folder)


@pytest.mark.parametrize("load", [load_config, load_tokenizer, load_model])
def test_nothing_is_downloaded_after_the_check(
    load: Any, hub: HubServer, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tiny / "additional_chat_templates").mkdir()
    (tiny / "additional_chat_templates" / "other.jinja").write_text("{{ messages }}")
    for name in ("t.gguf", "a.bin", "checkpoint-1.txt"):
        (tiny / name).write_text("x")
    upload(hub, tiny)

    check = checked.checked_folder

    def then_nothing(*args: Any, **kwargs: Any) -> Any:
        result = check(*args, **kwargs)
        hub.requests.clear()
        return result

    for module in (checked, pretrained):
        monkeypatch.setattr(module, "checked_folder", then_nothing)
    loaded = load(REPO)
    assert loaded.name_or_path == REPO and not [path for method, path in hub.requests if method == "GET"]
    if load is load_tokenizer:
        assert set(loaded.chat_template) == {"default", "other"}


def exchange_letters(tiny: Path) -> None:
    """Makes another tokenizer."""
    content = json.loads((tiny / "tokenizer.json").read_text())
    words = content["model"]["vocab"]
    words["A"], words["B"] = words["B"], words["A"]
    (tiny / "tokenizer.json").write_text(json.dumps(content))


def test_a_tokenizer_is_of_the_revision_that_is_asked_for(hub: HubServer, tiny: Path, tmp_path: Path) -> None:
    upload(hub, tiny)
    first, before = hub.head(REPO), AutoTokenizer.from_pretrained(tiny)("AB")["input_ids"]
    exchange_letters(tiny)
    upload(hub, tiny)
    place = {"cache_dir": str(tmp_path / "cache"), "token": "hf_read"}
    model = TwoPhaseModel.from_pretrained(REPO, revision=first, **place)
    assert model.tokenizer("AB")["input_ids"] == before
    assert [folder.name for folder in (tmp_path / "cache").glob("models--*/snapshots/*")] == [first]
    assert TwoPhaseModel.from_pretrained(REPO, **place).tokenizer("AB")["input_ids"] == before[::-1]


def test_weights_and_tokenizer_are_of_one_commit(hub: HubServer, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another tokenizer is committed while the weights are loaded."""
    upload(hub, tiny)
    before = AutoTokenizer.from_pretrained(tiny)("AB")["input_ids"]
    load = inference_model.load_model

    def then_commit(*args: Any, **kwargs: Any) -> Any:
        model = load(*args, **kwargs)
        exchange_letters(tiny)
        upload(hub, tiny)
        return model

    monkeypatch.setattr(inference_model, "load_model", then_commit)
    assert TwoPhaseModel.from_pretrained(REPO).tokenizer("AB")["input_ids"] == before


def test_a_repository_without_safetensors_is_one_line(hub: HubServer, tiny: Path) -> None:
    (tiny / "model.safetensors").rename(tiny / "pytorch_model.bin")
    upload(hub, tiny)
    with pytest.raises(ModelError, match=r"has no model\.safetensors"):
        load_model(REPO)
    assert not [path for _, path in hub.requests if "discussions" in path]  # nobody is asked to convert it


def test_a_folder_of_a_repository(hub: HubServer, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "all").mkdir()
    tiny.rename(tmp_path / "all" / "part")
    upload(hub, tmp_path / "all")
    assert load_model(REPO, subfolder="part") and load_tokenizer(REPO, subfolder="part")
    put(tmp_path / "all" / "part" / "config.json", num_hidden_layers=10**9, layer_types=None)
    upload(hub, tmp_path / "all")
    with pytest.raises(ModelError, match="num_hidden_layers"):
        load_model(REPO, subfolder="part")


def test_all_files_of_a_tokenizer_are_downloaded_and_checked() -> None:
    for name in filter(None, TOKENIZER_MAPPING_NAMES.values()):
        kind = tokenizer_class_from_name(name)
        if isinstance(kind, type) and issubclass(kind, PreTrainedTokenizerBase):
            for file in kind.vocab_files_names.values():
                assert any(fnmatch(file, pattern) for pattern in checked._TEXTS), (name, file)
                assert file not in opening.OF_A_RUN and not file.endswith(opening.OF_TRAINING), (name, file)


def test_a_tokenizer_that_was_saved_by_transformers(tiny: Path, tmp_path: Path) -> None:
    AutoTokenizer.from_pretrained(tiny, local_files_only=True, subfolder="", revision="main").save_pretrained(tiny)
    check_model_folder(tiny, "user/good")
    write_gguf(tmp_path / "t.gguf", tiny)
    AutoTokenizer.from_pretrained(tmp_path, gguf_file="t.gguf").save_pretrained(tmp_path / "saved")
    check_model_folder(tmp_path / "saved", "user/good")


@pytest.mark.parametrize("nested", [False, True])
def test_another_model_as_a_part(tiny: Path, nested: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A library asks the Hub for it, with the token of the user, and builds what it answers."""
    asked: list[Any] = []
    monkeypatch.setattr("huggingface_hub.HfApi.repo_exists", lambda *names, **_: asked.append(names))
    part = {"model_type": "detr", "backbone": "attacker/backbone", "use_timm_backbone": False}
    put(tiny / "config.json", **({"vision_config": part} if nested else part))
    with pytest.raises(ModelError, match="names another model as `backbone`: use one whose parts are in its own"):
        load_config(tiny)
    assert asked == []


def test_settings_where_a_command_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """chromadb would take a server and its own modules from `.env`, and matplotlib have LaTeX set its texts."""
    monkeypatch.chdir(tmp_path)
    server = "chroma_api_impl=chromadb.api.fastapi.FastAPI\nchroma_server_host=127.0.0.1\nchroma_server_http_port=9\n"
    (tmp_path / ".env").write_text(f"{server}chroma_sysdb_impl=evil.Module\n")
    index = Index.rebuild(tmp_path / "index", 4, ["a"], np.eye(4, dtype=np.float32)[:1], [{"problem_class": "x"}])
    assert index.query(np.eye(4, dtype=np.float32)[:1], 1)
    index.close()
    monkeypatch.setitem(matplotlib.rcParams, "text.usetex", True)  # as read from `matplotlibrc`
    draw_bars(tmp_path / "bars.png", "title", {"a": {"value": 0.5, "low": 0.4, "high": 0.6}})
    assert (tmp_path / "bars.png").stat().st_size > 1000 and not matplotlib.rcParams["text.usetex"]
