"""Folders of the modules of an embedding model, and the arguments with which it loads them."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from models import tokenizer
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import BertConfig, BertModel

from trl_sgpo.errors import ModelError
from trl_sgpo.inference.pretrained import load_sentence_transformer


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Written as sentence-transformers did: a folder for each module."""
    directory = tmp_path / "model"
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=400, **sizes)).save_pretrained(directory / "0_Transformer")
    tokenizer().save_pretrained(directory / "0_Transformer")
    (directory / "1_Pooling").mkdir()
    (directory / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 32}))
    modules = [
        {"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.models.{path[2:]}"}
        for number, path in enumerate(["0_Transformer", "1_Pooling"])
    ]
    (directory / "modules.json").write_text(json.dumps(modules))
    return directory


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | values))


@pytest.mark.parametrize(
    "settings",
    [
        {"transformer_task": "text-generation"},
        {"modality_config": {"text": {"method": "generate", "method_output_name": None}}},
        {"modality_config": [{"text": [{"method": "compile"}]}]},
    ],
    ids=str,
)
def test_other_methods_of_a_model(settings: dict[str, Any], model: Path) -> None:
    change(model / "0_Transformer" / "sentence_bert_config.json", **settings)
    with pytest.raises(ModelError, match="calls other methods"):
        load_sentence_transformer(str(model))


def test_a_prompt_of_an_embedding_model(model: Path) -> None:
    change(model / "config_sentence_transformers.json", prompts={"q": "a" * 10**7}, default_prompt_name="q")
    with pytest.raises(ModelError, match="a prompt of more than 2,000 characters"):
        load_sentence_transformer(str(model))


def test_folders_of_modules(model: Path) -> None:
    change(
        model / "0_Transformer" / "sentence_bert_config.json",
        max_seq_length=8,
        model_args={"add_pooling_layer": False},
    )
    assert load_sentence_transformer(str(model)).encode(["1 + 2"]).shape == (1, 32)


def test_folders_of_modules_in_the_cache(model: Path, tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "1", tmp_path / "models--a--b" / "blobs"
    blobs.mkdir(parents=True)
    for number, path in enumerate([path for path in model.rglob("*") if path.is_file()]):
        shutil.copy(path, blobs / str(number))
        link = snapshot / path.relative_to(model)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(blobs / str(number))
    assert load_sentence_transformer(str(snapshot)).encode(["1 + 2"]).shape == (1, 32)


def test_a_vocabulary_that_is_a_file_of_the_user(model: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("[UNK]\n[PAD]\n[CLS]\n[SEP]\n[MASK]\nSECRET\n")
    (model / "0_Transformer" / "tokenizer.json").unlink()
    (model / "0_Transformer" / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "BertTokenizer", "vocab": str(tmp_path / "secret")})
    )
    with pytest.raises(ModelError, match="`vocab`"):
        load_sentence_transformer(str(model))


def test_a_transformer_of_a_billion_layers(model: Path) -> None:
    change(model / "0_Transformer" / "config.json", num_hidden_layers=10**9)
    with pytest.raises(ModelError, match="num_hidden_layers"):
        load_sentence_transformer(str(model))


@pytest.mark.parametrize("path", ["..", "../../outside", "absolute", "link"])
def test_a_module_outside(path: str, model: Path, tmp_path: Path) -> None:
    shutil.copytree(model / "0_Transformer", tmp_path / "outside")
    shutil.copytree(model / "0_Transformer", model, dirs_exist_ok=True)
    (model / "link").symlink_to(tmp_path / "outside")
    modules = json.loads((model / "modules.json").read_text())
    modules[0]["path"] = str(tmp_path / "outside") if path == "absolute" else path
    (model / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(ModelError, match="not in its folder"):
        load_sentence_transformer(str(model))


@pytest.mark.parametrize(
    "settings",
    [
        {"tokenizer_args": {"vocab_file": "SECRET"}},
        {"processor_kwargs": {"tokenizer_file": "SECRET"}},
        {"tokenizer_name_or_path": "OUTSIDE"},
        {"model_args": {"adapter_kwargs": {"_adapter_model_path": "OUTSIDE"}}},
        {"model_kwargs": {"device_map": {"": "disk"}, "offload_folder": "OUTSIDE"}},
        {"config_args": {"num_hidden_layers": 10**9}},
        {"model_args": {"attn_implementation": "kernels-community/x"}},
    ],
    ids=str,
)
def test_arguments_that_name_files_or_models(settings: dict[str, Any], model: Path, tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("[UNK]\n[PAD]\n[CLS]\n[SEP]\n[MASK]\nSECRET\n")
    shutil.copytree(model / "0_Transformer", tmp_path / "outside")
    text = json.dumps(settings).replace("SECRET", str(tmp_path / "secret.txt"))
    (model / "0_Transformer" / "sentence_bert_config.json").write_text(
        text.replace("OUTSIDE", str(tmp_path / "outside"))
    )
    with pytest.raises(ModelError, match=r"may name files, models or code|num_hidden_layers|attn_implementation"):
        load_sentence_transformer(str(model))


class Touch:
    """Its pickle makes a file where it is read."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("pickled", ["pytorch_model.bin", "payload.txt"])
@pytest.mark.parametrize("named", [True, False])
def test_a_model_in_place_of_a_processor(pickled: str, named: bool, model: Path, tmp_path: Path) -> None:
    """Transformers takes any of its classes as a processor, and the arguments that the folder gives it."""
    folder, arguments = model / "0_Transformer", {"weights_only": False, "use_safetensors": False, "dtype": "auto"}
    torch.save({"weight": Touch(tmp_path / "ran")}, folder / pickled)
    if pickled == "payload.txt":
        index = {"metadata": {}, "weight_map": {"weight": pickled}}
        (folder / "pytorch_model.bin.index.evil.json").write_text(json.dumps(index))
        arguments["variant"] = "evil"
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({key: config[key] for key in config if key != "dtype"}))
    change(folder / "tokenizer_config.json", processor_class="BertModel")
    if named:
        change(folder / "sentence_bert_config.json", processor_kwargs=arguments)
    with pytest.raises(ModelError, match=r"may name files, models or code|processor_class|files of safetensors"):
        load_sentence_transformer(str(model))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["processor_config.json", "preprocessor_config.json"])
def test_processors_of_other_inputs(name: str, model: Path) -> None:
    change(model / "0_Transformer" / name, processor_class="CLIPProcessor")
    with pytest.raises(ModelError, match=f"has the file {name}"):
        load_sentence_transformer(str(model))


def test_a_type_of_model_with_a_processor(model: Path) -> None:
    """Its `audio_tokenizer_config.json` would name any class of transformers, and its weights anywhere."""
    change(model / "0_Transformer" / "config.json", model_type="clip")
    (model / "0_Transformer" / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="of the type `clip`, which has a processor"):
        load_sentence_transformer(str(model))


@pytest.mark.parametrize("form", ["message", "text"])
def test_texts_that_a_template_would_render(form: str, model: Path) -> None:
    forms = {form: {"method": "forward", "method_output_name": "last_hidden_state"}}
    change(
        model / "0_Transformer" / "sentence_bert_config.json",
        modality_config=forms,
        module_output_name="token_embeddings",
    )
    if form == "text":
        assert load_sentence_transformer(str(model)).encode(["1 + 2"]).shape == (1, 32)
        return
    with pytest.raises(ModelError, match="use one that embeds texts"):
        load_sentence_transformer(str(model))


@pytest.mark.parametrize(
    "settings", [{"processing_kwargs": {"text": {"max_length": 10**9}}}, {"backend": "onnx"}], ids=str
)
def test_settings_that_are_not_known(settings: dict[str, Any], model: Path) -> None:
    change(model / "0_Transformer" / "sentence_bert_config.json", **settings)
    with pytest.raises(ModelError, match="leave it out"):
        load_sentence_transformer(str(model))


def test_the_activation_of_a_module(model: Path) -> None:
    modules = json.loads((model / "modules.json").read_text())
    modules.append({"idx": 2, "name": "2", "path": "2_Dense", "type": "sentence_transformers.models.Dense"})
    (model / "modules.json").write_text(json.dumps(modules))
    (model / "2_Dense").mkdir()
    sizes = {"in_features": 32, "out_features": 8, "bias": False}
    save_file({"linear.weight": torch.ones(8, 32)}, model / "2_Dense" / "model.safetensors")
    settings = model / "2_Dense" / "config.json"
    change(settings, **sizes, activation_function="torch.nn.modules.activation.Tanh")
    assert load_sentence_transformer(str(model)).encode(["1 + 2"]).shape == (1, 8)
    change(settings, activation_function="torch.utils.collect_env.main")  # the library imports it
    with pytest.raises(ModelError, match=r"use one of torch\.nn"):
        load_sentence_transformer(str(model))


def test_a_model_of_another_kind(model: Path) -> None:
    change(model / "config_sentence_transformers.json", model_type="MultiVectorEncoder")
    with pytest.raises(ModelError, match="is no embedding model but a MultiVectorEncoder"):
        load_sentence_transformer(str(model))


@pytest.mark.parametrize("place", ["", "0_Transformer"])
def test_an_adapter(place: str, model: Path) -> None:
    """Transformers would put it on the base that it names, with patterns that may match for ever."""
    adapted = get_peft_model(BertModel.from_pretrained(model / "0_Transformer"), LoraConfig(target_modules=["query"]))
    adapted.save_pretrained(model / place)
    with pytest.raises(ModelError, match="is an adapter: merge it into its base"):
        load_sentence_transformer(str(model))


@pytest.mark.parametrize("sizes", [(200_000, 200_000), ("x", 4)], ids=str)
def test_a_layer_that_is_larger_than_its_weights(sizes: tuple[Any, int], model: Path) -> None:
    modules = json.loads((model / "modules.json").read_text())
    path = "2_Dense"
    modules.append({"idx": 2, "name": "2", "path": path, "type": "sentence_transformers.models.Dense"})
    (model / "modules.json").write_text(json.dumps(modules))
    (model / path).mkdir()
    change(model / path / "config.json", in_features=sizes[0], out_features=sizes[1])
    save_file({"linear.weight": torch.zeros(4, 4)}, model / path / "model.safetensors")
    with pytest.raises(ModelError, match="is larger than its weights"):
        load_sentence_transformer(str(model))


@pytest.mark.parametrize(
    ("kind", "path", "settings"),
    [
        ("LayerNorm", "2_LayerNorm", {"dimension": 300_000_000}),
        ("Dense", "", {"in_features": 24_000, "out_features": 24_000, "bias": False}),
        ("Dense", "2_Dense", {"in_features": 0, "out_features": 300_000_000}),
    ],
)
def test_a_layer_that_is_larger_than_its_weights_by_another_name_or_in_the_folder_itself(
    kind: str, path: str, settings: dict[str, Any], model: Path
) -> None:
    modules = json.loads((model / "modules.json").read_text())
    modules.append({"idx": 2, "name": "2", "path": path, "type": f"sentence_transformers.models.{kind}"})
    (model / "modules.json").write_text(json.dumps(modules))
    (model / path).mkdir(exist_ok=True)
    change(model / path / "config.json", **settings)
    with pytest.raises(ModelError, match="is larger than its weights"):
        load_sentence_transformer(str(model))


def test_many_modules_are_refused(model: Path) -> None:
    modules = json.loads((model / "modules.json").read_text())
    (model / "modules.json").write_text(json.dumps([modules[0], *modules[1:] * 10]))
    with pytest.raises(ModelError, match="has more than 10 modules"):
        load_sentence_transformer(str(model))
