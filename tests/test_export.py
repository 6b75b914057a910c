"""`trl-sgpo export`: what is written has the logits that were trained, or nothing is written."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader, GGUFWriter
from models import evenness, hash_embedder, problems, save_tiny_model
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraModel
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from trl_sgpo import SGPOConfig, SGPOTrainer, StrategyBank
from trl_sgpo.bank import Strategy
from trl_sgpo.bank.exchange import import_bank
from trl_sgpo.cli.main import main
from trl_sgpo.errors import ConfigError, ModelError
from trl_sgpo.export.export import TOLERANCES, ExportPlan, export
from trl_sgpo.export.gguf_tokenizer import _SPLITS
from trl_sgpo.export.parity import compare, logits_on, probes
from trl_sgpo.inference.loading import load_base
from trl_sgpo.inference.model import TwoPhaseModel
from trl_sgpo.inference.settings import TwoPhaseSettings


NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}


def lora() -> LoraConfig:
    return LoraConfig(r=4, lora_alpha=32, target_modules="all-linear", lora_dropout=0.0, task_type="CAUSAL_LM")


def save_adapter(
    directory: Path, architecture: str = "llama", scale: float = 0.1, trained_on: Any = None, **config: Any
) -> str:
    """A tiny model with a random adapter beside it, as a run leaves them."""
    sizes = {"head_dim": 128} if architecture == "qwen3" else {}  # transformers reads no other from GGUF
    base = save_tiny_model(directory / "base", architecture, **sizes)
    if config:
        path = directory / "base" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | config))
    torch.manual_seed(1)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora())
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=scale)
    model.save_pretrained(directory / "run")
    AutoTokenizer.from_pretrained(base).save_pretrained(directory / "run")
    trained_on = trained_on or {"dtype": "float32"}
    TwoPhaseSettings(max_completion_length=8, trained_on=trained_on).save(directory / "run")
    return str(directory / "run")


@pytest.mark.parametrize("quantized", [False, True], ids=["float32", "4bit"])
def test_after_training_logits_are_the_same_merged_and_unmerged(tmp_path: Path, quantized: bool) -> None:
    trainer = SGPOTrainer(
        save_tiny_model(tmp_path / "base"),
        evenness,
        SGPOConfig(
            str(tmp_path / "run"),
            per_device_train_batch_size=8,
            num_generations=4,
            max_strategy_length=8,
            max_completion_length=8,
            max_steps=2,
            learning_rate=1e-2,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            bf16=False,
            use_bank=False,
        ),
        train_dataset=problems(),
        quantization_config=BitsAndBytesConfig(**NF4, bnb_4bit_compute_dtype=torch.float32) if quantized else None,
        peft_config=lora(),
    )
    trainer.train()
    trainer.save_model()
    sequences = probes(trainer.processing_class, TwoPhaseSettings.load(tmp_path / "run"))
    for name, parameter in trainer.model.named_parameters():
        if "lora_" in name:  # TRL keeps adapters of quantized models in bfloat16: the same values, computed in float32
            parameter.data = parameter.data.float()
    trained = logits_on(trainer.model.eval(), sequences)
    with trainer.model.disable_adapter():
        assert compare(trained, logits_on(trainer.model, sequences)).error > 0.05

    report = export(ExportPlan(str(tmp_path / "run"), str(tmp_path / "out"), merge=True, dtype="float32"))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert "quantization_config" not in vars(merged.config)
    assert compare(trained, logits_on(merged, sequences)).error < 1e-4
    assert report["forms"][0]["parity"]["error"] < 1e-4
    assert TwoPhaseSettings.load(tmp_path / "out").trained_on is None

    loaded = TwoPhaseModel.from_pretrained(str(tmp_path / "run"), dtype="auto")
    assert compare(trained, logits_on(loaded.model, sequences)).error < 1e-4
    if quantized:
        other = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "run")
        assert compare(trained, logits_on(other.eval(), sequences)).error > 0.01


@pytest.mark.parametrize("file_type", ["f16", "bf16", "q8_0"])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_gguf(tmp_path: Path, architecture: str, file_type: str) -> None:
    run = save_adapter(tmp_path, architecture)
    report = export(ExportPlan(run, str(tmp_path / "out"), gguf=file_type))
    (form,) = report["forms"]
    assert form["name"] == f"run-{file_type}.gguf"
    assert form["parity"]["error"] < form["tolerance"] < report["effect_of_adapter"] / 2
    reader = GGUFReader(tmp_path / "out" / form["name"])
    tokenizer = AutoTokenizer.from_pretrained(run)
    assert reader.fields["general.architecture"].contents() == architecture
    assert reader.fields["tokenizer.ggml.pre"].contents() == ("qwen2" if architecture == "qwen2" else "gpt-2")
    assert (
        len(reader.fields["tokenizer.ggml.tokens"].contents())
        == AutoConfig.from_pretrained(tmp_path / "base").vocab_size
    )
    assert reader.fields["tokenizer.ggml.eos_token_id"].contents() == tokenizer.eos_token_id
    assert reader.fields["tokenizer.chat_template"].contents() == tokenizer.chat_template
    stored = {tensor.tensor_type.name.lower() for tensor in reader.tensors if len(tensor.shape) > 1}
    assert stored == {file_type}


def test_gguf_names_the_end_of_a_turn_that_is_not_eos(tmp_path: Path) -> None:
    run = save_adapter(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(run)
    tokenizer.eos_token = "<|pad|>"
    tokenizer.save_pretrained(run)
    export(ExportPlan(run, str(tmp_path / "out"), gguf="f32"))
    fields = GGUFReader(tmp_path / "out" / "run-f32.gguf").fields
    found = [fields[f"tokenizer.ggml.{name}_token_id"].contents() for name in ("eos", "eot")]
    assert tokenizer.convert_ids_to_tokens(found) == ["<|pad|>", "<|im_end|>"]


def test_gguf_with_scaled_positions(tmp_path: Path) -> None:
    """The factors in the file turn unscaled frequencies into those of the model."""
    rope = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    run = save_adapter(tmp_path, rope_parameters=rope)
    report = export(ExportPlan(run, str(tmp_path / "out"), merge=True, gguf="f32"))
    assert [form["parity"]["error"] < 1e-3 for form in report["forms"]] == [True, True]
    tensors = {tensor.name: tensor.data for tensor in GGUFReader(tmp_path / "out" / "run-f32.gguf").tensors}
    unscaled = 10000.0 ** -(torch.arange(0, 8, 2) / 8)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    factors = torch.tensor(tensors["rope_freqs.weight"])
    assert factors[0] == 1 and factors[-1] == pytest.approx(8)
    torch.testing.assert_close(unscaled / factors, model.model.rotary_emb.inv_freq)


@pytest.mark.parametrize(
    ("architecture", "config", "words"),
    [
        ("phi", {}, "not of phi"),
        ("gemma", {}, "not of gemma"),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "scaled by linear"),
        ("qwen2", {"use_sliding_window": True}, "sliding window"),
    ],
)
def test_what_has_no_gguf_is_refused_by_name(tmp_path: Path, architecture: str, config: Any, words: str) -> None:
    run = save_adapter(tmp_path, architecture, **config)
    with pytest.raises(ModelError, match=words):
        export(ExportPlan(run, str(tmp_path / "out"), gguf="f16"))
    assert not (tmp_path / "out").exists()


LLAMA3 = _SPLITS["llama-bpe"]
QWEN2 = _SPLITS["qwen2"]
DIGITS = {"type": "Digits", "individual_digits": True}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def sequence(*steps: dict[str, Any], key: str = "pretokenizers") -> dict[str, Any]:
    return {"type": "Sequence", key: list(steps)}


def template(*names: str | None) -> dict[str, Any]:
    """A post-processor that puts tokens around a text, which is `None`."""
    ids = {"<|im_end|>": 0, "<|im_start|>": 1, "<|pad|>": 2}
    single = [
        {"Sequence": {"id": "A", "type_id": 0}} if name is None else {"SpecialToken": {"id": name, "type_id": 0}}
        for name in names
    ]
    pair = [{"Sequence": {"id": name, "type_id": 0}} for name in "AB"]
    tokens = {name: {"id": name, "ids": [ids[name]], "tokens": [name]} for name in names if name is not None}
    return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": tokens}


def export_tokenizer(tmp_path: Path, parts: dict[str, Any], model: dict[str, Any]) -> None:
    run = Path(save_tiny_model(tmp_path / "run"))
    saved = json.loads((run / "tokenizer.json").read_text())
    saved["model"] |= model
    (run / "tokenizer.json").write_text(json.dumps(saved | parts))
    config = json.loads((run / "tokenizer_config.json").read_text())
    (run / "tokenizer_config.json").write_text(json.dumps(config | {"bos_token": "<|im_start|>"}))
    export(ExportPlan(str(run), str(tmp_path / "out"), gguf="f32"))


@pytest.mark.parametrize(
    ("parts", "model", "words"),
    [
        ({"normalizer": {"type": "Lowercase"}}, {}, "normalizer Lowercase"),
        ({"normalizer": sequence({"type": "NFC"}, {"type": "NFKC"}, key="normalizers")}, {}, "normalizer NFKC"),
        ({"normalizer": {"type": "Replace", "pattern": {"String": "+"}, "content": "plus"}}, {}, "normalizer Replace"),
        ({"post_processor": template("<|pad|>", None)}, {}, r"adds <\|pad\|>"),
        ({"post_processor": template("<|im_end|>", "<|im_start|>", None)}, {}, "not just BOS first"),
        ({"post_processor": {"type": "RobertaProcessing", "sep": ["<|im_end|>", 0], "cls": ["<|im_start|>", 1],
          "trim_offsets": True, "add_prefix_space": False}}, {}, "post-processor RobertaProcessing"),
        ({}, {"dropout": 0.5}, "dropout"),
        ({"pre_tokenizer": sequence(QWEN2[0] | {"behavior": "Removed"}, QWEN2[1])}, {}, "is not written as GGUF"),
        ({"pre_tokenizer": sequence(QWEN2[0] | {"invert": True}, QWEN2[1])}, {}, "is not written as GGUF"),
        ({"post_processor": template("<|im_start|>", None) | {"special_tokens": {
            "<|im_start|>": {"id": "<|im_start|>", "ids": [5], "tokens": ["x"]}}}}, {}, "other tokens than the model"),
    ],
)  # fmt: skip
def test_gguf_of_a_tokenizer_that_it_does_not_hold(
    parts: dict[str, Any], model: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=words):
        export_tokenizer(tmp_path, parts, model)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("parts", "model"),
    [
        ({"normalizer": {"type": "NFC"}, "pre_tokenizer": sequence(*QWEN2), "post_processor": BYTES}, {}),
        ({"pre_tokenizer": sequence(DIGITS, BYTES)}, {}),
        ({"pre_tokenizer": sequence(*LLAMA3)}, {"ignore_merges": True}),
        (
            {
                "pre_tokenizer": sequence(*LLAMA3),
                "post_processor": sequence(BYTES, template("<|im_start|>", None), key="processors"),
            },
            {"ignore_merges": True},
        ),
        ({"post_processor": template("<|im_start|>", None, "<|im_end|>")}, {}),
        ({"post_processor": template(None)}, {"unk_token": "<|pad|>"}),
    ],
    ids=["qwen2", "smollm2", "llama3-no-bos", "llama3", "bos-eos", "unk"],
)
def test_gguf_of_usual_tokenizers(parts: dict[str, Any], model: dict[str, Any], tmp_path: Path) -> None:
    export_tokenizer(tmp_path, parts, model)


@pytest.mark.parametrize("lost", ["merges", "pre"])
def test_gguf_that_splits_text_otherwise_is_refused(
    lost: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = {"merges": "add_token_merges", "pre": "add_tokenizer_pre"}[lost]
    write = vars(GGUFWriter)[name]
    monkeypatch.setattr(GGUFWriter, name, lambda self, value: write(self, value[:1] if lost == "merges" else "qwen2"))
    with pytest.raises(ModelError, match=r"run-f32\.gguf has other tokens than the model for .*Nothing was written"):
        export_tokenizer(tmp_path, {}, {})
    assert not (tmp_path / "out").exists()


def test_an_export_that_is_not_what_was_trained_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = save_adapter(tmp_path)
    monkeypatch.setattr(LoraModel, "merge_and_unload", lambda self: self.unload())  # the adapter is lost
    with pytest.raises(ModelError, match="failed its check"):
        export(ExportPlan(run, str(tmp_path / "out"), merge=True))
    assert {path.name for path in tmp_path.iterdir()} == {"base", "run"}


def test_an_export_that_rounds_training_away_is_refused(tmp_path: Path) -> None:
    run = save_adapter(tmp_path, scale=1e-5)
    with pytest.raises(ModelError, match="all that training changed"):
        export(ExportPlan(run, str(tmp_path / "out"), merge=True, dtype="bfloat16"))
    report = export(ExportPlan(run, str(tmp_path / "out"), merge=True, dtype="float32"))
    assert report["forms"][0]["parity"]["error"] < report["effect_of_adapter"] / 2


def test_into_the_original_weights(tmp_path: Path) -> None:
    run = save_adapter(tmp_path, trained_on={"dtype": "float32", "quantization_config": NF4})
    report = export(ExportPlan(run, str(tmp_path / "out"), merge=True, base="original"))
    assert report["forms"][0]["parity"]["error"] < TOLERANCES["float32"] < report["difference_to_trained"]["error"]
    whole = save_tiny_model(tmp_path / "whole")
    with pytest.raises(ConfigError, match="leave out `--base original`"):
        export(ExportPlan(whole, str(tmp_path / "other"), merge=True, base="original"))


def test_a_whole_model_in_another_dtype(tmp_path: Path) -> None:
    whole = save_tiny_model(tmp_path / "whole")
    report = export(ExportPlan(whole, str(tmp_path / "out"), merge=True, dtype="bfloat16"))
    assert AutoConfig.from_pretrained(tmp_path / "out").dtype == torch.bfloat16
    assert report["merged_into"] is None and 0 < report["forms"][0]["parity"]["error"] < TOLERANCES["bfloat16"]


def test_what_goes_with_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, out = save_adapter(tmp_path), tmp_path / "out"
    settings = replace(TwoPhaseSettings.load(run), system_prompt="Be short.")
    settings.save(run)
    with StrategyBank(Path(run) / "strategy_bank", hash_embedder) as bank:
        bank.add([Strategy("Add from left to right.", "sums", ("",))])
    command = ["export", "--model", run, "--output_dir", str(out), "--merge", "--gguf", "q8_0"]
    assert main(command) == 0
    shown = capsys.readouterr().out
    report = json.loads((out / "export.json").read_text())
    for form in report["forms"]:
        assert form["name"] in shown and f"{form['parity']['error']:.2g}" in shown
    assert TwoPhaseSettings.load(out) == replace(settings, trained_on=None)
    with StrategyBank(tmp_path / "other", hash_embedder) as bank:
        assert import_bank(bank, out / "strategies").added == 1
    model = TwoPhaseModel.from_pretrained(str(out))
    assert model.answer([[{"role": "user", "content": "What is 1 + 2?"}]])

    assert main(command) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main([*command, "--overwrite"]) == 0
    assert main(["export", "--model", run, "--output_dir", str(tmp_path / "base"), "--merge", "--overwrite"]) == 2
    assert "no export" in capsys.readouterr().err
    assert main(["export", "--model", run, "--output_dir", str(tmp_path / "new")]) == 2
    assert "--merge" in capsys.readouterr().err


class TestFourBitLayout:
    """On some CPUs bitsandbytes repacks 4-bit weights in the first forward without gradients: never here."""

    @pytest.fixture
    def repacked(self, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        import bitsandbytes.nn.modules as modules

        calls: list[str] = []

        def repack(weight: torch.Tensor, quant_state: Any) -> tuple[torch.Tensor, Any]:
            calls.append("repacked")
            return weight, quant_state

        monkeypatch.setattr(modules, "has_avx512bf16", lambda: True)
        monkeypatch.setattr(modules, "_convert_weight_packed_for_cpu", repack)
        return calls

    @pytest.fixture
    def run(self, tmp_path: Path) -> str:
        return save_adapter(tmp_path, trained_on={"dtype": "float32", "quantization_config": NF4})

    def test_it_happens_without_the_guard(self, repacked: list[str], run: str, tmp_path: Path) -> None:
        model = AutoModelForCausalLM.from_pretrained(
            tmp_path / "base", quantization_config=BitsAndBytesConfig(**NF4), device_map={"": "cpu"}
        )
        logits_on(model.eval(), [[1, 2, 3]])
        assert repacked

    def test_not_outside_training(self, repacked: list[str], run: str, tmp_path: Path) -> None:
        logits_on(load_base(str(tmp_path / "base"), {"quantization_config": NF4}).eval(), [[1, 2, 3]])
        TwoPhaseModel.from_pretrained(run).answer(["What is 1 + 2?"])
        assert not repacked

    def test_not_in_training(self, repacked: list[str], run: str, tmp_path: Path) -> None:
        trainer = SGPOTrainer(
            str(tmp_path / "base"),
            evenness,
            SGPOConfig(
                str(tmp_path / "new"),
                per_device_train_batch_size=8,
                num_generations=4,
                max_strategy_length=4,
                max_completion_length=4,
                max_steps=1,
                report_to="none",
                save_strategy="no",
                disable_tqdm=True,
                bf16=False,
                use_bank=False,
            ),
            train_dataset=problems(),
            quantization_config=BitsAndBytesConfig(**NF4),
            peft_config=lora(),
        )
        trainer.train()
        assert trainer.state.global_step == 1 and not repacked
