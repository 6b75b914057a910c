"""Configs and tokenizers of strangers that never end, fill memory or print control characters when opened."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants
from models import save_tiny_model
from transformers import AutoTokenizer, Mamba2Config, PreTrainedConfig, ProphetNetConfig

from trl_sgpo.checks import opening
from trl_sgpo.checks.process import CheckProcess
from trl_sgpo.checks.repositories import check_model_folder
from trl_sgpo.errors import ModelError


ESCAPE = "\x1b]0;OWNED\x07"
SIGNS = {"ESC": ESCAPE, "C1": "\x9b2J", "right to left": "\u202e"}


def put(path: Path, **values: Any) -> None:
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | values))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process with less memory, whose limit is reached sooner."""
    monkeypatch.setattr(opening, "OPENING", CheckProcess(memory=2))


@pytest.fixture
def unopened() -> None:
    """No records of what other tests opened."""
    Path(constants.HF_HOME, "trl_sgpo").unlink()


@pytest.fixture
def asked(unopened: None, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The folders that the other process would open."""
    folders: list[str] = []
    monkeypatch.setattr(opening.OPENING, "ask", lambda name, directory: folders.append(directory) or (False, 9, 9))
    return folders


def attention_types(model: Path) -> None:
    put(model / "config.json", model_type="gpt_neo", num_layers=2, attention_types=[[["global", "local"], 10**9]])


def labels(model: Path) -> None:
    put(model / "config.json", num_labels=10**9)


def extra_ids(model: Path) -> None:
    (model / "tokenizer.json").unlink()
    put(model / "tokenizer_config.json", tokenizer_class="ByT5Tokenizer", extra_ids=10**9)


def bytes_with_a_prefix(model: Path) -> None:
    vocabulary = json.loads((model / "tokenizer.json").read_text())
    vocabulary["model"] |= {"byte_fallback": True, "continuing_subword_prefix": "a" * 10**6}
    vocabulary["model"]["vocab"] |= {f"<0x{byte:02X}>": 300 + byte for byte in range(256)}
    vocabulary["pre_tokenizer"] = None
    put(model / "tokenizer.json", **vocabulary)


@pytest.mark.parametrize("write", [attention_types, labels, extra_ids, bytes_with_a_prefix], ids=lambda f: f.__name__)
def test_a_model_that_never_opens(write: Any, small: None, tmp_path: Path) -> None:
    save_tiny_model(tmp_path)
    write(tmp_path)
    with pytest.raises(ModelError, match="cannot be opened within 60 seconds and 8 GiB"):
        check_model_folder(tmp_path, "user/evil")


def test_weights_that_a_library_would_make(tmp_path: Path) -> None:
    save_tiny_model(tmp_path)
    put(tmp_path / "config.json", vocab_size=200_000_000)
    with pytest.raises(ModelError, match="of which most are not in its files"):
        check_model_folder(tmp_path, "user/evil")


MASKS = {"model_type": "gpt_neo", "num_layers": 1, "attention_types": [[["global"], 1]], "num_heads": 2}
TABLES = {"model_type": "gptj", "n_layer": 1, "n_head": 2, "rotary_dim": 4, "n_embd": 16, "vocab_size": 300}


@pytest.mark.parametrize(
    "config",
    [
        MASKS | {"hidden_size": 16, "vocab_size": 300, "max_position_embeddings": 60_000},
        TABLES | {"n_positions": 3 * 10**8},
    ],
    ids=lambda config: config["model_type"],
)
def test_buffers_that_a_model_makes(config: dict[str, Any], tmp_path: Path) -> None:
    save_tiny_model(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="GiB beside its weights"):
        check_model_folder(tmp_path, "user/evil")


OTHER_CLASSES = [
    {"architectures": ["BertModel"], "hidden_size": 1024, "max_position_embeddings": 10**6},
    {
        "architectures": ["DebertaV2Model"], "model_type": "deberta-v2", "hidden_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 2, "intermediate_size": 32, "pooler_hidden_size": 30_000,
    },
]  # fmt: skip


@pytest.mark.parametrize("config", OTHER_CLASSES, ids=lambda config: config["architectures"][0])
def test_weights_of_a_class_that_a_library_may_choose(config: dict[str, Any], tmp_path: Path) -> None:
    """TRL loads the class that a config names as the policy, and a sequence classifier as a reward model."""
    save_tiny_model(tmp_path)
    put(tmp_path / "config.json", **config)
    with pytest.raises(ModelError, match="of which most are not in its files"):
        check_model_folder(tmp_path, "user/evil")


@pytest.mark.parametrize("key", ["n_recurrent_loops", "pretraining_tp", "hc_sinkhorn_iters", "loop_num_passes"])
def test_steps_of_a_forward_pass(key: str, tmp_path: Path) -> None:
    save_tiny_model(tmp_path)
    put(tmp_path / "config.json", **{key: 10**9})
    with pytest.raises(ModelError, match=f"`{key}: 1e\\+09`: name a model of real size"):
        check_model_folder(tmp_path, "user/evil")
    put(tmp_path / "config.json", **{key: 1, "train_iters": 500_000, "max_iters": 600_000})  # left by other tools
    check_model_folder(tmp_path, "user/model")


def test_steps_of_a_forward_pass_that_multiply(tmp_path: Path) -> None:
    save_tiny_model(tmp_path)
    put(tmp_path / "config.json", H_cycles=100, L_cycles=11)
    with pytest.raises(ModelError, match=r"`H_cycles: 1e\+02 × L_cycles: 1e\+01`: name a model of real size"):
        check_model_folder(tmp_path, "user/evil")


TENSORS = [
    Mamba2Config(
        hidden_size=32, num_heads=8, head_dim=8, n_groups=1, state_size=8, num_hidden_layers=1, vocab_size=300,
        chunk_size=8000,
    ),
    ProphetNetConfig(
        vocab_size=300, hidden_size=8, num_encoder_layers=1, num_decoder_layers=1, num_encoder_attention_heads=1,
        num_decoder_attention_heads=1, encoder_ffn_dim=8, decoder_ffn_dim=8, max_position_embeddings=1024, ngram=200,
    ),
]  # fmt: skip


@pytest.mark.parametrize("config", TENSORS, ids=lambda config: config.model_type)
def test_tensors_of_a_forward_pass(config: PreTrainedConfig, tmp_path: Path) -> None:
    """A square of the length of chunks, and of the number of positions, for a folder of 100 kB."""
    save_tiny_model(tmp_path)
    config.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"makes 1\.\d GiB beside its weights|makes [2-9]\.\d GiB"):
        check_model_folder(tmp_path, "user/evil")


@pytest.mark.usefixtures("unopened")
def test_a_model_that_earlier_ones_left_no_memory_for_is_opened_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its size was taken for unknown, and was not checked."""
    save_tiny_model(tmp_path)
    put(tmp_path / "config.json", vocab_size=200_000_000)
    ask, replies = opening.OPENING.ask, [(False, None, None)]
    monkeypatch.setattr(opening.OPENING, "ask", lambda *request: replies.pop() if replies else ask(*request))
    with pytest.raises(ModelError, match="of which most are not in its files"):
        check_model_folder(tmp_path, "user/evil")


def of_the_vocabulary(model: Path, unknown: dict[str, Any]) -> None:
    vocabulary = json.loads((model / "tokenizer.json").read_text())
    put(model / "tokenizer.json", added_tokens=[each | unknown for each in vocabulary["added_tokens"]])
    settings = json.loads((model / "tokenizer_config.json").read_text())
    settings.pop("added_tokens_decoder", None)
    (model / "tokenizer_config.json").write_text(json.dumps(settings))


def of_the_map(model: Path, unknown: dict[str, Any]) -> None:
    put(model / "special_tokens_map.json", foo={"content": "<|im_end|>"} | unknown)


def of_the_settings(model: Path, unknown: dict[str, Any]) -> None:
    put(model / "tokenizer_config.json", foo={"content": "<|im_end|>", "__type": "AddedToken"} | unknown)


@pytest.mark.parametrize("sign", SIGNS.values(), ids=SIGNS)
@pytest.mark.parametrize("write", [of_the_vocabulary, of_the_map, of_the_settings], ids=lambda f: f.__name__)
def test_control_characters_that_a_library_prints(write: Any, sign: str, tmp_path: Path) -> None:
    save_tiny_model(tmp_path)
    write(tmp_path, {sign: 1})
    with pytest.raises(ModelError, match="prints control characters of a terminal"):
        check_model_folder(tmp_path, "user/evil")


def test_a_flood_that_a_library_prints(tmp_path: Path) -> None:
    save_tiny_model(tmp_path)
    of_the_vocabulary(tmp_path, {"a" * 2**21: 1})
    with pytest.raises(ModelError, match="or more than 1 MiB"):
        check_model_folder(tmp_path, "user/evil")


@pytest.mark.usefixtures("unopened")
def test_a_torn_record_of_an_opening(tmp_path: Path) -> None:
    save_tiny_model(tmp_path)
    records = Path(constants.HF_HOME, "trl_sgpo", "opened")
    check_model_folder(tmp_path, "user/model")
    for path in records.glob("*"):
        path.write_text("")
    check_model_folder(tmp_path, "user/model")


def test_arguments_of_a_tokenizers_class(tmp_path: Path) -> None:
    save_tiny_model(tmp_path)
    put(tmp_path / "tokenizer_config.json", tokenizer_class="BertTokenizer", init_inputs=[".env"])
    with pytest.raises(ModelError, match="names a file as `init_inputs`"):
        check_model_folder(tmp_path, "user/evil")


def test_a_model_is_opened_once(tmp_path: Path, asked: list[str]) -> None:
    save_tiny_model(tmp_path)
    for _ in range(2):
        check_model_folder(tmp_path, "user/model")
    assert len(asked) == 1
    AutoTokenizer.from_pretrained(tmp_path).save_pretrained(tmp_path)
    put(tmp_path / "config.json", pad_token_id=1)
    check_model_folder(tmp_path, "user/model")
    assert len(asked) == 2


@pytest.mark.parametrize("name", ["prophetnet.tokenizer", "dict.txt", "t.gguf", "additional_chat_templates/a.jinja"])
def test_every_file_but_weights_is_read_again_where_it_changed(name: str, tmp_path: Path, asked: list[str]) -> None:
    save_tiny_model(tmp_path)
    (tmp_path / name).parent.mkdir(exist_ok=True)
    for content in (name, name.upper()):
        (tmp_path / name).write_text(content)
        check_model_folder(tmp_path, "user/model")
    assert len(asked) == 2
    with (tmp_path / "model.safetensors").open("ab") as file:
        file.write(b" ")
    check_model_folder(tmp_path, "user/model")
    assert len(asked) == 2


@pytest.mark.parametrize(("limit", "most"), [("MAX_FILES", 3), ("MAX_BYTES", 2000)])
def test_files_beside_a_model(limit: str, most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny_model(tmp_path)
    check_model_folder(tmp_path, "user/model")
    monkeypatch.setattr(opening, limit, most)
    with pytest.raises(ModelError, match="move the model to a folder of its own"):
        check_model_folder(tmp_path, "user/evil")


def test_what_a_run_adds_to_a_model_does_not_open_it_again(tmp_path: Path, asked: list[str]) -> None:
    save_tiny_model(tmp_path)
    for step in range(2):
        for name in ("sgpo.json", "trainer_state.json", "README.md", "training_args.bin", "optimizer.pt"):
            (tmp_path / name).write_text(json.dumps({"step": step}))
        check_model_folder(tmp_path, "user/model")
    assert len(asked) == 1


def test_a_file_whose_name_is_no_text(tmp_path: Path, asked: list[str]) -> None:
    model = Path(save_tiny_model(tmp_path / "model"))
    Path(os.fsdecode(os.fsencode(model) + b"/\xff.txt")).write_text("left by somebody")
    check_model_folder(model, model)
    assert len(asked) == 1


def test_names_that_hold_others_are_not_taken_for_them(tmp_path: Path, asked: list[str]) -> None:
    """The record is of all names and sizes, however these are written."""
    model = Path(save_tiny_model(tmp_path / "model"))
    (model / "a 1\nb").write_text("")
    check_model_folder(model, model)
    (model / "a 1\nb").unlink()
    (model / "a").write_text("1")
    (model / "b").write_text("")
    check_model_folder(model, model)
    assert len(asked) == 2
