"""Model repositories, adapters, their settings and recipes run no code, ask for nothing and load no pickles."""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from models import hash_embedder, problems, save_tiny_model
from peft import LoraConfig, VeraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from trl import GRPOConfig

from trl_sgpo import SGPOConfig, SGPOPipeline, SharedPromptGRPOTrainer, StrategyBank
from trl_sgpo.bank import Strategy
from trl_sgpo.bank.embedding import load_embedder
from trl_sgpo.bank.exchange import export_bank
from trl_sgpo.bank.snapshot import embed_with
from trl_sgpo.checks.repositories import check_model_settings
from trl_sgpo.cli.main import main
from trl_sgpo.errors import BankError, ConfigError, ModelError
from trl_sgpo.inference.model import TwoPhaseModel
from trl_sgpo.inference.pretrained import load_adapter, load_model, load_tokenizer
from trl_sgpo.inference.settings import SETTINGS_FILE, TwoPhaseSettings


CONFIG, TOKENIZER = "config.json", "tokenizer_config.json"


class Touch:
    """Its pickle makes a file where it is read."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.path,)


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "owned"


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    save_tiny_model(tmp_path / "tiny")
    return tmp_path / "tiny"


def with_code(directory: Path, marker: Path, *parts: str) -> str:
    """Gives a model's config or tokenizer a class in a file of the repository."""
    code = (
        f"from pathlib import Path\nPath({str(marker)!r}).touch()\n"
        "from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast\n"
        "class EvilConfig(LlamaConfig):\n    model_type = 'evil'\n"
        "class EvilModel(LlamaForCausalLM):\n    config_class = EvilConfig\n"
        "class EvilTokenizer(PreTrainedTokenizerFast):\n    pass\n"
    )
    (directory / "evil.py").write_text(code)
    if CONFIG in parts:
        classes = {"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.EvilModel"}
        change(directory / CONFIG, model_type="evil", architectures=["EvilModel"], auto_map=classes)
    if TOKENIZER in parts:
        classes = {"AutoTokenizer": [None, "evil.EvilTokenizer"]}
        change(directory / TOKENIZER, tokenizer_class="EvilTokenizer", auto_map=classes)
    return str(directory)


def adapter_of(base: Path, directory: Path) -> Path:
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(target_modules=["q_proj"]))
    model.save_pretrained(directory)
    for name in (TOKENIZER, "tokenizer.json"):
        shutil.copy(base / name, directory / name)
    return directory


def recipe(directory: Path, model: str, **keys: Any) -> str:
    path = directory / "recipe.yaml"
    content = {
        "model_name_or_path": model, "dataset_name": "reasoning_gym/gcd?size=8", "reward_funcs": ["answer_reward"],
        "output_dir": str(directory / "out"), "per_device_train_batch_size": 8, "num_generations": 4, "max_steps": 1,
        "max_strategy_length": 4, "max_completion_length": 4, "report_problems": 0, "report_to": "none",
        "bf16": False, "use_cpu": True, "use_bank": False, "warmstart_traces": 4, **keys,
    }  # fmt: skip
    path.write_text(yaml.safe_dump(content))
    return str(path)


def arguments(command: str, model: str, directory: Path) -> list[str]:
    out = str(directory / "result")
    return {
        "solve": ["solve", "--model", model, "1 + 2"],
        "eval": ["eval", "--model", model, "--suites", "id_gcd=reasoning_gym/gcd?size=2", "--output_dir", out],
        "export": ["export", "--model", model, "--merge", "--output_dir", out],
        "train": ["train", "--config", recipe(directory, model, warmstart_traces=0)],
        "warmstart": ["warmstart", "--config", recipe(directory, model)],
        "bootstrap": ["bootstrap", "--config", recipe(directory, model), "--output_dir", out],
    }[command]


@pytest.fixture
def refused(marker: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs a command that must refuse: no code, no question, one line and status 2."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked for permission to run code"))

    def run(arguments: list[str]) -> str:
        capsys.readouterr()
        status = main(arguments)
        printed = capsys.readouterr().err.strip()
        error = printed[printed.find(f"trl-sgpo {arguments[0]}: error: ") :]
        assert not marker.exists() and status == 2, printed
        assert error.startswith(f"trl-sgpo {arguments[0]}: error: ") and "trust_remote_code=True" not in error
        return error

    return run


COMMANDS = ("solve", "eval", "export", "train", "warmstart", "bootstrap")


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("parts", [(CONFIG,), (TOKENIZER,), (CONFIG, TOKENIZER)], ids="+".join)
def test_a_repository_with_code(
    command: str, parts: tuple[str, ...], tiny: Path, marker: Path, refused: Any, tmp_path: Path
) -> None:
    assert "code" in refused(arguments(command, with_code(tiny, marker, *parts), tmp_path))


@pytest.mark.parametrize("command", ["solve", "eval", "export"])
def test_an_adapter_whose_base_has_code_and_whose_settings_trust_it(
    command: str, tiny: Path, marker: Path, refused: Any, tmp_path: Path
) -> None:
    adapter = adapter_of(tiny, tmp_path / "adapter")
    with_code(tiny, marker, CONFIG)
    assert "code" in refused(arguments(command, str(adapter), tmp_path))
    (adapter / SETTINGS_FILE).write_text(json.dumps({"trained_on": {"trust_remote_code": True}}))
    assert "trained_on" in refused(arguments(command, str(adapter), tmp_path))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"trained_on": {"trust_remote_code": True}}, "trust_remote_code"),
        ({"trained_on": {"dtype": "float32", "attn_implementation": "evil/kernel"}}, "attn_implementation"),
        ({"trained_on": {"quantization_config": {"load_in_4bit": True, "modules": "evil"}}}, "modules"),
        ({"trained_on": {"quantization_config": ["gptq"]}}, "no JSON object"),
        ({"trained_on": {"dtype": "float32.__class__"}}, "dtype"),
        ({"trained_on": ["dtype"]}, "trained_on"),
        ({"embedding_model": ["evil"]}, "embedding_model"),
        ({"strategy_prompt": {"{problem}": 1}}, "strategy_prompt"),
        ({"max_strategy_length": "9"}, "max_strategy_length"),
        ({"max_completion_length": True}, "max_completion_length"),
        ({"num_retrieved": -1}, "num_retrieved"),
        ({"num_retrieved": 10**9}, "num_retrieved"),
        ({"max_strategy_length": 10**9}, "max_strategy_length"),
        ({"max_completion_length": 131_073}, "max_completion_length"),
        ({"execution_prompt": "x" * 2**18}, "larger than 128 KiB"),
        ({"strategy_prompt": "{problem}" + "{strategies}" * 1000}, "only once"),
        ({"trained_on": {"quantization_config": {"llm_int8_skip_modules": ["(.+)+!"]}}}, "names of modules"),
        ({"plain_text": 1}, "plain_text"),
        ({"chat_template_kwargs": "x"}, "chat_template_kwargs"),
        ({"strategy_format": "code"}, "strategy_format"),
        ({"unknown": 1}, "unknown"),
        ([], "no JSON object"),
    ],
)
def test_settings_beside_a_model(settings: Any, message: str, tmp_path: Path) -> None:
    (tmp_path / SETTINGS_FILE).write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match=message) as error:
        TwoPhaseSettings.load(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "keys",
    [
        {"trust_remote_code": True},
        {"model_init_kwargs": {"trust_remote_code": True}},
        {"model_init_kwargs": {"quantization_config": [{"trust_remote_code": 1}]}},
        {"model_init_kwargs": {"allow_all_kernels": True}},
        {"model_init_kwargs": {"use_safetensors": False}},
        {"chat_template_kwargs": {"a": {"trust_remote_code": "yes"}}},
        {"lr_scheduler_kwargs": {"trust_remote_code": True}},
        {"gradient_checkpointing_kwargs": {"trust_remote_code": True}},
    ],
    ids=str,
)
@pytest.mark.parametrize("command", ["train", "warmstart", "bootstrap"])
def test_a_recipe_that_trusts_code(
    command: str, keys: dict[str, Any], tiny: Path, marker: Path, refused: Any, tmp_path: Path
) -> None:
    config = recipe(tmp_path, with_code(tiny, marker, CONFIG), **keys)
    more = ["--output_dir", str(tmp_path / "result")] if command == "bootstrap" else []
    (name,) = keys
    assert f"`{name}" in refused([command, "--config", config, *more])


@pytest.mark.parametrize("key", ["quiet", "no_python", "cpu", "multi_gpu", "module"])
def test_a_recipe_that_names_a_program(key: str, tiny: Path, marker: Path, refused: Any, tmp_path: Path) -> None:
    program = tmp_path / "evil.sh"
    program.write_text(f"#!/bin/sh\ntouch {marker}\n")
    program.chmod(0o755)
    assert str(program) in refused(["train", "--config", recipe(tmp_path, str(tiny), **{key: str(program)})])


def test_settings_in_python_that_trust_code(tmp_path: Path, tiny: Path) -> None:
    with pytest.raises(ConfigError, match="refused"):
        SGPOConfig(str(tmp_path), model_init_kwargs={"trust_remote_code": True})
    with pytest.raises(ConfigError, match="refused"):
        load_model(tiny, trust_remote_code=True)


@pytest.mark.parametrize("command", ["solve", "eval", "export", "train", "warmstart"])
def test_pickled_weights(command: str, tiny: Path, marker: Path, refused: Any, tmp_path: Path) -> None:
    (tiny / "model.safetensors").unlink()
    (tiny / "pytorch_model.bin").write_bytes(pickle.dumps(Touch(marker)))
    assert "safetensors" in refused(arguments(command, str(tiny), tmp_path))


@pytest.mark.parametrize("command", ["solve", "eval", "export"])
def test_pickled_weights_of_an_adapter(command: str, tiny: Path, marker: Path, refused: Any, tmp_path: Path) -> None:
    adapter = adapter_of(tiny, tmp_path / "adapter")
    (adapter / "adapter_model.safetensors").unlink()
    torch.save({"weight": torch.zeros(1)}, adapter / "adapter_model.bin")
    assert "safetensors" in refused(arguments(command, str(adapter), tmp_path))


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    path = tmp_path / "home" / "secret"
    path.parent.mkdir()
    path.write_text("[UNK]\n-----BEGIN KEY-----\nb3BlbnNzaC1rZXk\n")
    return path


@pytest.mark.parametrize("key", ["vocab", "merges", "vocab_file", "more"])
@pytest.mark.parametrize("command", ["solve", "export", "train"])
def test_a_tokenizer_that_names_a_file_of_the_user(
    command: str, key: str, tiny: Path, secret: Path, refused: Any, tmp_path: Path
) -> None:
    (tiny / "tokenizer.json").unlink()
    value = {"nested": [str(secret)]} if key == "more" else str(secret)
    (tiny / TOKENIZER).write_text(json.dumps({"tokenizer_class": "BertTokenizer", "unk_token": "[UNK]", key: value}))
    assert key in refused(arguments(command, str(tiny), tmp_path))
    assert "b3BlbnNzaC1rZXk" not in "".join(
        path.read_text(errors="ignore") for path in tmp_path.rglob("*.json") if path.is_file()
    )


@pytest.mark.parametrize("name", ["added_tokens.json", "additional_chat_templates/tool_use.jinja", CONFIG])
@pytest.mark.parametrize("command", ["solve", "export", "train"])
def test_a_link_out_of_a_model(
    command: str, name: str, tiny: Path, secret: Path, refused: Any, tmp_path: Path
) -> None:
    (tiny / name).parent.mkdir(exist_ok=True)
    (tiny / name).unlink(missing_ok=True)
    (tiny / name).symlink_to(secret)
    assert "link out of" in refused(arguments(command, str(tiny), tmp_path))


def test_a_link_out_of_a_run_is_not_published(tiny: Path, secret: Path, refused: Any, tmp_path: Path) -> None:
    (tiny / "added_tokens.json").symlink_to(secret)
    refused(["push", str(tiny), "user/m", "--no_bank", "--dry_run", str(tmp_path / "pushed")])
    assert not (tmp_path / "pushed" / "added_tokens.json").exists()


def test_links_within_the_cache_of_the_hub(tiny: Path, tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "1", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in tiny.iterdir():
        path.rename(blobs / path.name)
        (snapshot / path.name).symlink_to(blobs / path.name)
    assert load_model(snapshot) and load_tokenizer(snapshot)


@pytest.mark.parametrize(
    "keys",
    [
        {"peft_type": "SHADOW", "shadow_model": "other"},
        {"peft_type": "XLORA", "adapters": {"0": "other"}},
        {"peft_type": "MULTITASK_PROMPT_TUNING", "prompt_tuning_init_state_dict_path": "x.pt"},
        {"megatron_core": "evil", "megatron_config": {"a": 1}},
    ],
    ids=lambda keys: keys.get("peft_type", "megatron"),
)
@pytest.mark.parametrize("command", ["solve", "eval", "export"])
def test_an_adapter_that_names_other_models(
    command: str, keys: dict[str, Any], tiny: Path, refused: Any, tmp_path: Path
) -> None:
    adapter = adapter_of(tiny, tmp_path / "adapter")
    change(adapter / "adapter_config.json", **keys)
    assert list(keys)[-1] in refused(arguments(command, str(adapter), tmp_path))


@pytest.mark.parametrize(
    "keys",
    [
        {"target_modules": "(.+)+!"}, {"target_modules": "((.|.|.)*)*\\.q_projx"}, {"exclude_modules": "(.+)+!"},
        {"layers_pattern": ["(.+)+"], "layers_to_transform": [0]}, {"rank_pattern": {"(.+)+!": 3}},
        {"alpha_pattern": {".*.*.*.*.*.*.*.*.*!": 3}}, {"target_modules": ".?" * 40 + "zz"},
        {"rank_pattern": {".*.*.*.*.*.*.*.*q" + str(i): 4 for i in range(200)}}, {"modules_to_save": ["(.+)+!"]},
        {"target_modules": "(?i)(.+)+!"}, {"target_parameters": ["(.+)+!"]},
        {"rank_pattern": {str(i): 4 for i in range(10**4)}},
        {"init_lora_weights": "pissa_niter_999999999"}, {"r": 10**8}, {"rank_pattern": {"q_proj": 10**8}},
        {"layer_replication": [[0, 100_000]]},
    ],
    ids=str,
)  # fmt: skip
def test_an_adapter_that_never_ends(keys: dict[str, Any], tiny: Path, refused: Any, tmp_path: Path) -> None:
    adapter = adapter_of(tiny, tmp_path / "adapter")
    change(adapter / "adapter_config.json", **keys)
    error = refused(arguments("solve", str(adapter), tmp_path))
    assert f"`{next(iter(keys))}`" in error or "names more than 2,000 modules" in error


@pytest.mark.parametrize(
    ("pattern", "is_refused"),
    [("(.+)+!", True), (".*.*.*.*.*q", True), ("model.layers.*.self_attn", False), ("lm_head", False)],
)
def test_patterns_in_the_settings_of_quantization(pattern: str, is_refused: bool) -> None:
    settings = {"quantization_config": {"quant_method": "bitsandbytes", "modules_to_not_convert": [pattern]}}
    with pytest.raises(ModelError, match="may match for ever") if is_refused else nullcontext():
        check_model_settings("model", settings)


def test_an_adapter_nested_deeply(tiny: Path, refused: Any, tmp_path: Path) -> None:
    adapter = adapter_of(tiny, tmp_path / "adapter")
    path = adapter / "adapter_config.json"
    path.write_text(
        path.read_text().rstrip().removesuffix("}") + ', "rank_pattern": ' + '{"a": ' * 900 + "1" + "}" * 901
    )
    assert "adapter_config.json cannot be read" in refused(arguments("solve", str(adapter), tmp_path))


def test_what_others_leave_in_folders(tiny: Path, tmp_path: Path) -> None:
    """An adapter without a tokenizer, as peft saves it, and after a long training; a README that is a link."""
    adapter = adapter_of(tiny, tmp_path / "adapter")
    for path in [*adapter.glob("tokenizer*"), *adapter.glob("special_tokens*"), *adapter.glob("chat_template*")]:
        path.unlink()
    change(adapter / "adapter_config.json", tinit=5_000_000, tfinal=5_000_000)
    (tmp_path / "README.md").write_text("notes")
    (adapter / "README.md").unlink(missing_ok=True)
    (adapter / "README.md").symlink_to(tmp_path / "README.md")
    assert TwoPhaseModel.from_pretrained(str(adapter)).tokenizer.chat_template


def test_a_seed_of_an_adapter_is_no_size(tiny: Path, tmp_path: Path) -> None:
    seed = 2**31 - 1
    config = VeraConfig(target_modules=["q_proj"], projection_prng_key=seed)
    get_peft_model(AutoModelForCausalLM.from_pretrained(tiny), config).save_pretrained(tmp_path / "adapter")
    loaded = load_adapter(AutoModelForCausalLM.from_pretrained(tiny), tmp_path / "adapter")
    assert loaded.peft_config["default"].projection_prng_key == seed


@pytest.mark.parametrize(
    "pattern",
    [
        r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?(?:q_proj|k_proj).*?)|"
        r"(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|attn|mlp)\.(?:(?:q_proj|k_proj)))",
        r"^(?!.*vision).*\.(q|k|v|o)_proj$",
        r"^(?:.*\.)*q_proj$",
        r"(?:layers\.){0,1}.*q_proj",
        r"^(model(?=\.).*\.(q_proj|v_proj))$",
        r"model(\.\w+)+\.(q_proj|v_proj)",
        ["q_proj", "v_proj"],
        "all-linear",
    ],
    ids=str,
)
def test_an_adapter_with_a_pattern_of_a_real_one(pattern: Any, tiny: Path, tmp_path: Path) -> None:
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny), LoraConfig(target_modules=pattern))
    model.save_pretrained(tmp_path / "adapter")
    assert load_adapter(AutoModelForCausalLM.from_pretrained(tiny), tmp_path / "adapter")


@pytest.mark.parametrize(
    "command, name",
    [
        *[
            ("solve", name)
            for name in ("weights.bin", "../outside.safetensors", "/dev/zero", "a/model.safetensors", 3)
        ],
        ("export", "weights.bin"),
        ("train", "weights.bin"),
    ],
)
def test_weights_that_an_index_names(command: str, name: Any, tiny: Path, refused: Any, tmp_path: Path) -> None:
    if name == "weights.bin":
        torch.save({"weight": torch.zeros(1)}, tiny / "weights.bin")
    (tiny / "model.safetensors").rename(tmp_path / "outside.safetensors")
    (tiny / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    assert "weights must be files of safetensors" in refused(arguments(command, str(tiny), tmp_path))


@pytest.mark.parametrize("name", ["tokenizer.json", "model.safetensors", "chat_template.jinja"])
def test_a_pipe_in_a_model(name: str, tiny: Path, refused: Any, tmp_path: Path) -> None:
    (tiny / name).unlink(missing_ok=True)
    os.mkfifo(tiny / name)
    assert "is no file" in refused(arguments("solve", str(tiny), tmp_path))


@pytest.mark.parametrize("name", ["config.json", "sgpo.json", "tokenizer.json", "generation_config.json"])
def test_a_file_of_20_gigabytes(name: str, tiny: Path, refused: Any, tmp_path: Path) -> None:
    with (tiny / name).open("wb") as file:
        file.truncate(20 * 2**30)
    assert "is larger than" in refused(arguments("solve", str(tiny), tmp_path))


def test_weights_with_a_header_of_many_names(tiny: Path, refused: Any, tmp_path: Path) -> None:
    with (tiny / "model.safetensors").open("wb") as file:
        file.write((2**26).to_bytes(8, "little"))
        file.truncate(2**27)
    assert "header" in refused(arguments("solve", str(tiny), tmp_path))


@pytest.mark.parametrize("place", ["added_tokens_decoder", "extra_special_tokens", "eos_token"])
def test_an_added_token_with_a_title_for_the_terminal(place: str, tiny: Path, refused: Any, tmp_path: Path) -> None:
    token = {"content": "<|im_end|>", "\x1b]0;OWNED\x07": 1, "__type": "AddedToken"}
    value = {"added_tokens_decoder": {"0": token}, "extra_special_tokens": [token], "eos_token": token}[place]
    change(tiny / TOKENIZER, **{place: value})
    assert "unknown keys" in refused(arguments("solve", str(tiny), tmp_path))


@pytest.mark.parametrize(
    "file, key, value",
    [
        (CONFIG, "transformers_weights", "sub/x.safetensors.index.json"), (CONFIG, "transformers_weights", "p.bin"),
        (CONFIG, "configuration_files", ["config.4.0.0.json"]),
        (TOKENIZER, "fast_tokenizer_files", ["../../private/tokenizer.4.0.0.json"]),
    ],
)  # fmt: skip
def test_settings_that_name_other_files(
    file: str, key: str, value: Any, tiny: Path, refused: Any, tmp_path: Path
) -> None:
    change(tiny / file, **{key: value})
    assert f"`{key}`" in refused(arguments("solve", str(tiny), tmp_path))


@pytest.mark.parametrize("key", ["vocab_size_per_layer_input", "layer_norm_eps", "experts_hidden_size"])
def test_sizes_that_count_no_layers(key: str, tiny: Path) -> None:
    change(tiny / CONFIG, **{key: 262144})
    assert load_model(tiny)


@pytest.mark.parametrize("place", ["", "text_config"])
@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "experts_implementation"])
def test_a_kernel_that_a_config_names(key: str, place: str, tiny: Path, refused: Any, tmp_path: Path) -> None:
    kernel = {key: {"": "paged|kernels-community/x@v1:f"} if place else "kernels-community/x"}
    change(tiny / CONFIG, **({place: kernel} if place else kernel))
    assert key in refused(arguments("solve", str(tiny), tmp_path))


def test_an_attention_that_a_config_names(tiny: Path) -> None:
    change(tiny / CONFIG, attn_implementation="eager")
    assert load_model(tiny).config._attn_implementation == "eager"


@pytest.mark.parametrize("key", ["name_or_path", "tokenizer_file", "special_tokens_map_file"])
@pytest.mark.parametrize("name", ["tokenizer.json", "model.json"])
def test_files_that_transformers_4_wrote_down_and_none_reads(key: str, name: str, tiny: Path, tmp_path: Path) -> None:
    other = tmp_path / "before" / name
    other.parent.mkdir()
    other.write_text("{")  # what reads it ends with an error
    expected = load_tokenizer(tiny).get_vocab()
    change(tiny / TOKENIZER, **{key: str(other)})
    read = load_tokenizer(tiny)
    read.save_pretrained(tmp_path / "saved")
    assert read.get_vocab() == load_tokenizer(tmp_path / "saved").get_vocab() == expected


@pytest.mark.parametrize("file", ["beside", "absolute"])
@pytest.mark.parametrize("key", ["vocab_file", "tokenizer_file"])
def test_special_tokens_that_name_a_file(key: str, file: str, tiny: Path, secret: Path) -> None:
    """Their values replace the files that were found. One without a folder is looked for where the command runs."""
    if key == "vocab_file":
        (tiny / "tokenizer.json").unlink()
        (tiny / "vocab.txt").write_text("[UNK]\n")
    else:
        shutil.copy(tiny / "tokenizer.json", secret)
    shutil.copy(secret, "private")
    (tiny / TOKENIZER).write_text(json.dumps({"tokenizer_class": "BertTokenizer", "unk_token": "[UNK]"}))
    value = "private" if file == "beside" else str(secret)
    (tiny / "special_tokens_map.json").write_text(json.dumps({key: value}))
    with pytest.raises(ModelError, match=key):
        load_tokenizer(tiny)


LINKS = ("metrics.json", "report.json", "trainer_state.json", "training.json", "adapter_config.json", SETTINGS_FILE)


@pytest.mark.parametrize("name", LINKS)
def test_no_link_of_a_run_is_published(name: str, tiny: Path, secret: Path, refused: Any, tmp_path: Path) -> None:
    secret.write_text(
        {
            "trainer_state.json": '{"global_step": 1, "epoch": 1, "log_history": [{"loss": 0.1234}]}',
            "training.json": '{"rewards": ["PRIVATE"]}',
            "report.json": "{}",
        }.get(name, secret.read_text())
    )
    (tiny / name).symlink_to(secret)
    assert name in refused(["push", str(tiny), "user/m", "--no_bank", "--dry_run", str(tmp_path / "pushed")])
    assert not (tmp_path / "pushed" / name).exists()


@pytest.mark.parametrize("place", ["strategy_bank", "strategy_bank/ledger.sqlite", "ledger.sqlite"])
@pytest.mark.parametrize("command", ["push", "export", "report", "bank"])
def test_a_bank_that_is_a_link(command: str, place: str, tiny: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """The strategies of another bank of the user are not published with a run."""
    monkeypatch.setattr("trl_sgpo.bank.embedding.load_embedder", lambda name: hash_embedder)
    with StrategyBank(tmp_path / "mine", "user/embedder") as bank:
        bank.add([Strategy("PRIVATE strategy: add both.", "sums", ())])
    (tiny / place).parent.mkdir(exist_ok=True)
    (tiny / place).symlink_to(tmp_path / "mine" / ("" if place == "strategy_bank" else "ledger.sqlite"))
    state = {"global_step": 1, "epoch": 1, "log_history": [{"loss": 0.5, "step": 1}]}
    (tiny / "trainer_state.json").write_text(json.dumps(state))
    out = tmp_path / "out"
    out.mkdir()
    main(
        {
            "push": ["push", str(tiny), "user/m", "--dry_run", str(out / "x")],
            "export": ["export", "--model", str(tiny), "--merge", "--output_dir", str(out / "x")],
            "report": ["report", str(tiny), "--output", str(out / "report.html")],
            "bank": ["bank", "export", str(tiny), str(out / "x")],
        }[command]
    )
    assert not [path for path in out.rglob("*") if path.is_file() and "PRIVATE" in path.read_text(errors="ignore")]


def test_a_bank_on_another_disk(tiny: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("trl_sgpo.bank.embedding.load_embedder", lambda name: hash_embedder)
    with StrategyBank(tmp_path / "disk" / "strategy_bank", "user/embedder") as bank:
        bank.add([Strategy("Add both.", "sums", ())])
    shutil.copytree(tiny, tmp_path / "disk", dirs_exist_ok=True)
    (tmp_path / "run").symlink_to(tmp_path / "disk")
    (tmp_path / "bank").symlink_to(tmp_path / "disk" / "strategy_bank")
    assert main(["push", str(tmp_path / "run"), "user/m", "--dry_run", str(tmp_path / "out")]) == 0
    assert "Add both." in (tmp_path / "out" / "strategy_bank" / "strategies.jsonl").read_text()
    assert main(["bank", "list", str(tmp_path / "bank")]) == 0


def test_a_processor_that_names_a_model(tiny: Path, marker: Path, refused: Any, tmp_path: Path) -> None:
    shutil.copytree(tiny, tmp_path / "other")
    with_code(tmp_path / "other", marker, CONFIG)
    tokenizer = {"audio_tokenizer_class": "AutoModel", "audio_tokenizer_name_or_path": str(tmp_path / "other")}
    settings = {"processor_class": "DiaProcessor", "audio_tokenizer": tokenizer}
    (tiny / "processor_config.json").write_text(json.dumps(settings))
    assert "audio_tokenizer" in refused(arguments("train", str(tiny), tmp_path))


def test_an_adapter_as_the_base_of_an_adapter(tiny: Path, marker: Path, refused: Any, tmp_path: Path) -> None:
    adapter = adapter_of(tiny, tmp_path / "adapter")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(adapter / name, tiny / name)
    (tiny / "adapter_model.safetensors").unlink()
    torch.save({"weight": torch.zeros(1)}, tiny / "adapter_model.bin")
    assert "safetensors" in refused(arguments("solve", str(adapter), tmp_path))


def test_an_adapter_is_no_base(tiny: Path, refused: Any, tmp_path: Path) -> None:
    """transformers would put it on its own base, whose files nothing has checked, and lose it to the other one."""
    below = adapter_of(tiny, tmp_path / "below")
    adapter = adapter_of(tiny, tmp_path / "adapter")
    change(adapter / "adapter_config.json", base_model_name_or_path=str(below))
    for name in (CONFIG, "generation_config.json"):
        shutil.copy(tiny / name, below / name)
    for command in ("solve", "export"):
        assert "whole model is needed" in refused(arguments(command, str(adapter), tmp_path))
    args = GRPOConfig(str(tmp_path), per_device_train_batch_size=2, num_generations=2, bf16=False, use_cpu=True)
    with pytest.raises(ModelError, match="whole model is needed"):
        SharedPromptGRPOTrainer(str(below), lambda **_: [0.0], args=args, train_dataset=problems())


# Embedding models


def embedding_model(directory: Path, **module: str) -> str:
    save_tiny_model(directory)
    modules = [{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}]
    modules.append({"idx": 1, "name": "1", "path": "1", "type": "sentence_transformers.models.Dense"} | module)
    (directory / "modules.json").write_text(json.dumps(modules))
    (directory / "1").mkdir()
    (directory / "1" / CONFIG).write_text(json.dumps({"in_features": 32, "out_features": 8, "bias": False}))
    return str(directory)


def test_an_embedding_model_with_code(tmp_path: Path, marker: Path) -> None:
    name = embedding_model(tmp_path / "model", type="evil.EvilModule")
    with_code(tmp_path / "model", marker)
    with pytest.raises(ModelError, match=r"evil\.EvilModule"):
        load_embedder(name)(["text"])
    assert not marker.exists()


@pytest.mark.parametrize("kind", ["models.WordEmbeddings", "models.Router", "models.tokenizer.TransformersTokenizer"])
def test_an_embedding_model_with_modules_that_load_others(kind: str, tmp_path: Path) -> None:
    name = embedding_model(tmp_path / "model", type=f"sentence_transformers.{kind}")
    with pytest.raises(ModelError, match=kind.rpartition(".")[2]):
        load_embedder(name)(["text"])


def test_an_embedding_model_whose_transformer_has_code(tmp_path: Path, marker: Path) -> None:
    name = embedding_model(tmp_path / "model")
    with_code(tmp_path / "model", marker, CONFIG)
    trusting = {"model_args": {"trust_remote_code": True}, "config_args": {"trust_remote_code": True}}
    (tmp_path / "model" / "sentence_bert_config.json").write_text(json.dumps(trusting))
    with pytest.raises(ModelError):
        load_embedder(name)(["text"])
    assert not marker.exists()


@pytest.mark.parametrize("place", ["", "1"])
def test_an_embedding_model_with_pickled_weights(place: str, tmp_path: Path, marker: Path) -> None:
    name = embedding_model(tmp_path / "model")
    directory = tmp_path / "model" / place
    (directory / "model.safetensors").unlink(missing_ok=True)
    (directory / "pytorch_model.bin").write_bytes(pickle.dumps(Touch(marker)))
    with pytest.raises(ModelError, match=r"safetensors|pickled"):
        load_embedder(name)(["text"])
    assert not marker.exists()


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the embedding models that are loaded."""
    names: list[str] = []
    monkeypatch.setattr("trl_sgpo.bank.embedding.load_embedder", lambda name: names.append(name) or hash_embedder)
    return names


def test_the_embedding_model_of_a_pulled_run(tiny: Path, tmp_path: Path, loaded: list[str]) -> None:
    """`sgpo.json` names one beside the export of a bank."""
    (tiny / SETTINGS_FILE).write_text(json.dumps({"embedding_model": "evil/embedder"}))
    with StrategyBank(tmp_path / "bank", hash_embedder) as bank:
        bank.add([Strategy("Add both.", "sums", ())])
        export_bank(bank, tiny / "strategy_bank")
    for named, expected in ((None, "sentence-transformers/all-MiniLM-L6-v2"), ("evil/embedder", "evil/embedder")):
        with SGPOPipeline.from_pretrained(str(tiny), embedding_model=named) as pipeline:
            pipeline.prepare(["1 + 2"])
        assert loaded.pop() == expected and not loaded


def test_the_embedding_model_of_a_bank(tiny: Path, tmp_path: Path, loaded: list[str]) -> None:
    """The ledger names one that is not on this machine."""
    with StrategyBank(tiny / "strategy_bank", "evil/embedder") as bank:
        bank.add([Strategy("Add both.", "sums", ())])
    loaded.clear()
    with pytest.raises(BankError, match="--embedding_model evil/embedder"):
        SGPOPipeline.from_pretrained(str(tiny))
    with StrategyBank.restore(tiny / "strategy_bank") as bank, pytest.raises(BankError, match="evil/embedder"):
        embed_with(bank)
    assert loaded == []
    with SGPOPipeline.from_pretrained(str(tiny), embedding_model="evil/embedder") as pipeline:
        pipeline.prepare(["1 + 2"])
    assert set(loaded) == {"evil/embedder"}


def one_line(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert main(list(argv)) == 2
    errors = capsys.readouterr().err
    assert "Traceback" not in errors
    return errors


@pytest.mark.parametrize("key", ["num_hidden_layers", "num_key_value_heads", "head_dim", "vocab_size"])
@pytest.mark.parametrize("value", [0, -1])
@pytest.mark.parametrize("command", ["solve", "estimate"])
def test_sizes_below_1(
    key: str, value: int, command: str, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change(tiny / CONFIG, **{key: value})
    argv = ["estimate", "--config", recipe(tmp_path, str(tiny))]
    errors = one_line(capsys, *(argv if command == "estimate" else arguments(command, str(tiny), tmp_path)))
    assert f"`{key}: {value}`" in errors


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"pad_token_id": 10**6}, "Padding_idx must be within num_embeddings"),
        ({"generator": {}}, "the config of its language model is dict"),
        ({"sliding_window": "x"}, "`sliding_window: 'x'`"),
        ({"sliding_window": -5}, "`sliding_window: -5`"),
    ],
)
@pytest.mark.parametrize("command", ["train", "estimate"])
def test_values_that_no_model_has(
    changes: dict[str, Any], said: str, command: str, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change(tiny / CONFIG, **changes)
    assert said in one_line(capsys, command, "--config", recipe(tmp_path, str(tiny)))


@pytest.mark.parametrize("command", ["train", "estimate"])
def test_a_model_that_returns_tuples(command: str, tiny: Path, tmp_path: Path) -> None:
    change(tiny / CONFIG, return_dict=False)
    assert main([command, "--config", recipe(tmp_path, str(tiny))]) == 0


@pytest.mark.parametrize("value", [[0, 1e99], -3])
def test_tokens_of_a_generation_config(
    value: Any, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change(tiny / "generation_config.json", eos_token_id=value)
    errors = one_line(capsys, "train", "--config", recipe(tmp_path, str(tiny), warmstart_traces=0))
    assert "`eos_token_id:" in errors and "must be a token" in errors


def test_values_that_are_refused_when_the_model_is_saved(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change(tiny / CONFIG, output_attentions=True)
    errors = one_line(capsys, "train", "--config", recipe(tmp_path, str(tiny)))
    assert "cannot be saved with its `config.json`" in errors and not list(tmp_path.rglob("checkpoint-*"))


def test_weights_that_are_no_numbers(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny)
    for weight in model.parameters():
        weight.data.fill_(float("nan"))
    model.save_pretrained(tiny)
    errors = one_line(capsys, "solve", "--model", str(tiny), "--no_bank", "--n", "3", "1 + 2")
    assert "logits are not finite" in errors and "learning_rate" in errors


def test_tokens_beyond_the_embedding(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = json.loads((tiny / "tokenizer.json").read_text())
    content["model"]["vocab"]["1"] = 4_000_000_000
    (tiny / "tokenizer.json").write_text(json.dumps(content))
    assert "no embedding" in one_line(capsys, "solve", "--model", str(tiny), "--no_bank", "1 + 2")


@pytest.mark.parametrize("key", ["lora_target_modules", "lora_target_parameters"])
def test_patterns_of_a_recipe_that_may_match_for_ever(
    key: str, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = recipe(tmp_path, str(tiny), use_peft=True, **{key: ["((.|.|.)*)*q_projx"]})
    assert f"`{key}` has a pattern that may match for ever" in one_line(capsys, "train", "--config", path)
