"""Everything that stored results depend on is in their record, and a change of it is named by every command."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import test_cli_compare
import yaml
from bank_helpers import hashed_words, make
from models import problems, save_tiny_model
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from trl_sgpo.bank import Outcome, StrategyBank
from trl_sgpo.cli.main import main
from trl_sgpo.evaluation.digest import changes, depends_on
from trl_sgpo.inference.pretrained import load_model


VERIFIER = """
from helping import vowels


def evenness(completions, **kwargs):
    return [float(vowels(completion) % 2 == 0) for completion in completions]
"""
HELPER = """
def vowels(completion):
    text = completion if isinstance(completion, str) else completion[0]["content"]
    return sum(text.count(vowel) for vowel in "aeiou")
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model, a verifier of one's own that imports a module, and problems."""
    save_tiny_model(tmp_path / "model")
    (tmp_path / "verifying.py").write_text(VERIFIER)
    (tmp_path / "helping.py").write_text(HELPER)
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in problems(16).to_list()))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("verifying", "helping"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path


def edit_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def edit_weights(place: Path) -> None:
    """One value in the middle of an embedding, as of a token that is trained on rarely."""
    path = place / "model" / "model.safetensors"
    weights = load_file(path)
    weights["model.embed_tokens.weight"][150, 7] += 1
    save_file(weights, path, {"format": "pt"})


def edit_template(place: Path) -> None:
    path = place / "model" / "chat_template.jinja"
    path.write_text(path.read_text().replace("<|im_start|>'", "<|im_start|> '"))


def edit_generation_config(place: Path) -> None:
    edit_json(place / "model" / "generation_config.json", repetition_penalty=1.5)


def edit_verifier(place: Path) -> None:
    (place / "verifying.py").write_text(VERIFIER.replace("== 0", "== 1"))


def edit_helper(place: Path) -> None:
    (place / "helping.py").write_text(HELPER.replace("aeiou", "aei"))


def edit_tokenizer(place: Path) -> None:
    path = place / "model" / "tokenizer.json"
    path.write_text(path.read_text().replace('"ignore_merges":false', '"ignore_merges":true'))
    path.write_text(path.read_text() + "\n")


EDITS: dict[str, tuple[Callable[[Path], None], str]] = {
    "verifier": (edit_verifier, "verifier_source"),
    "helper": (edit_helper, "verifier_source"),
    "template": (edit_template, "chat_template"),
    "generation config": (edit_generation_config, "generation_config"),
    "weights": (edit_weights, "weights"),
    "tokenizer": (edit_tokenizer, "tokenizer"),
    "config": (lambda place: edit_json(place / "model" / "config.json", rms_norm_eps=0.1), "config"),
}


def evenness() -> Callable[..., Any]:
    return __import__("verifying").evenness


class TestRecord:
    @pytest.mark.parametrize("name", EDITS)
    def test_names_what_changed(self, place: Path, name: str) -> None:
        before = depends_on("model", [evenness()])
        assert changes(before, depends_on("model", [evenness()])) is None
        edit, key = EDITS[name]
        edit(place)
        assert changes(before, depends_on("model", [evenness()])) == key

    @pytest.mark.parametrize("named_by", ["config", "index"])
    def test_weights_by_another_name(self, place: Path, named_by: str) -> None:
        model = place / "model"
        weights = load_file(model / "model.safetensors")
        (model / "model.safetensors").rename(model / "part.safetensors")
        if named_by == "config":
            edit_json(model / "config.json", transformers_weights="part.safetensors")
        else:
            index = {"metadata": {}, "weight_map": dict.fromkeys(weights, "part.safetensors")}
            (model / "model.safetensors.index.json").write_text(json.dumps(index))
        before = depends_on("model")
        save_file({name: 2 * weight for name, weight in weights.items()}, model / "part.safetensors", {"format": "pt"})
        assert changes(before, depends_on("model")) == "weights"

    def test_a_template_in_the_tokenizers_config(self, place: Path) -> None:
        path = place / "model" / "chat_template.jinja"
        edit_json(place / "model" / "tokenizer_config.json", chat_template=path.read_text())
        path.unlink()
        before = depends_on("model")
        edit_json(place / "model" / "tokenizer_config.json", chat_template="{{ messages }}")
        assert changes(before, depends_on("model")) == "chat_template"

    def test_an_adapter_depends_on_its_base(self, place: Path) -> None:
        lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
        get_peft_model(load_model("model"), lora).save_pretrained(place / "adapter")
        for path in (place / "model").glob("*token*"):
            shutil.copy(path, place / "adapter")
        before = depends_on("adapter")
        edit_weights(place)
        edit_generation_config(place)
        assert changes(before, depends_on("adapter")) == "base_generation_config, base_weights"

    def test_the_version_of_the_package_and_its_sources(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        before = depends_on()
        with monkeypatch.context() as patch:
            patch.setattr("trl_sgpo.evaluation.digest.__version__", "9.9")
            assert changes(before, depends_on()) == "trl_sgpo"
        (tmp_path / "credit.py").write_text("x = 1\n")
        monkeypatch.setattr("trl_sgpo.evaluation.digest._PACKAGE", tmp_path)
        before = depends_on()
        (tmp_path / "credit.py").write_text("x = 2\n")
        assert changes(before, depends_on()) == "trl_sgpo"

    def test_a_bank_with_other_counts(self, tmp_path: Path) -> None:
        """Retrieval ranks by them."""
        with StrategyBank(tmp_path / "bank", hashed_words) as bank:
            (strategy,) = bank.add([make("plan", "kind-0", trust="trusted")])
            before = depends_on(bank=bank)
            bank.update([Outcome(strategy, "elsewhere", 0, 1)])
            assert changes(before, depends_on(bank=bank)) == "bank"

    def test_a_verifier_of_an_installed_package_and_of_this_one(self) -> None:
        from trl.rewards import accuracy_reward

        from trl_sgpo.data.tasks import answer_reward

        sources = {depends_on(rewards=[each])["verifier_source"] for each in (accuracy_reward, answer_reward)}
        assert len(sources) == 2

    def test_what_an_earlier_version_did_not_record_is_named(self) -> None:
        assert changes({"seed": 1}, {"seed": 2, "weights": "ab"}) == (
            "an earlier version recorded no weights, seed was 1, is 2"
        )


def evaluate(place: Path) -> int:
    lengths = ["--max_strategy_length", "4", "--max_completion_length", "4"]
    suites = ["--suites", f"ood={place / 'p.jsonl'}", "--verifier", "verifying.evenness", "--no_plots"]
    return main(["eval", "--model", "model", *suites, *lengths, "--output_dir", "out"])


def solve(place: Path) -> int:
    lengths = ["--max_strategy_length", "4", "--max_completion_length", "4"]
    return main(["solve", "--model", "model", "--no_bank", "--input", "p.jsonl", "--output", "out.jsonl", *lengths])


def bootstrap(place: Path) -> int:
    recipe = {
        "model_name_or_path": "model",
        "dataset_name": "p.jsonl",
        "reward_funcs": ["verifying.evenness"],
        "num_generations": 4,
        "max_strategy_length": 4,
        "max_completion_length": 4,
        "use_cpu": True,
        "bf16": False,
        "output_dir": str(place / "run"),
    }
    (place / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    counts = ["--num_strategies", "2", "--num_answers", "1", "--block_size", "2", "--max_problems", "4"]
    return main(["bootstrap", "--config", "recipe.yaml", "--output_dir", "out", *counts])


COMMANDS = {"eval": evaluate, "solve": solve, "bootstrap": bootstrap}


@pytest.mark.parametrize("name", ["verifier", "template", "generation config", "weights"])
@pytest.mark.parametrize("command", COMMANDS)
def test_commands_refuse_to_continue_what_was_made_otherwise(
    place: Path,
    command: str,
    name: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if (command, name) == ("solve", "verifier"):
        name = "tokenizer"  # it verifies nothing
    monkeypatch.setattr("trl_sgpo.bank.embedding.load_embedder", lambda name: hashed_words)
    run = COMMANDS[command]
    assert run(place) == 0 and run(place) == 0
    edit, key = EDITS[name]
    edit(place)
    assert run(place) == 2
    told = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(told) == 1 and f"({key})" in told[0] and "another `--output" in told[0]


def test_compare_refuses_results_that_were_made_otherwise(
    place: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    config = test_cli_compare._write(place, {"base": {}}, budget=300)
    recipe = yaml.safe_load((place / "recipe.yaml").read_text())
    recipe |= {"reward_funcs": ["verifying.evenness"], "warmstart_traces": 0}
    (place / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    test_cli_compare.run_in_forks(monkeypatch)
    assert main(["compare", "--config", config]) == 0
    result = place / "runs" / "base" / "seed-1" / "result.json"
    before = result.read_bytes()
    files = {path: path.read_bytes() for path in [*place.glob("*.py"), *(place / "model").iterdir()]}

    def refused(*arguments: str) -> str:
        capfd.readouterr()
        assert main(["compare", "--config", config, *arguments]) == 2
        (told,) = [line for line in capfd.readouterr().err.splitlines() if "error:" in line]
        assert "runs/base/seed-1 holds a run" in told and "another `--output_dir`" in told
        return told

    for edit, key in EDITS.values():
        edit(place)
        assert f"({key})" in refused()
        for path, content in files.items():
            path.write_bytes(content)
    with monkeypatch.context() as patch:  # credit and loss are the package's
        patch.setattr("trl_sgpo.evaluation.digest.__version__", "9.9")
        assert "(trl_sgpo)" in refused()
        assert "(trl_sgpo)" in refused("--table_only")
    assert "(budget was 300, is 400)" in refused("--budget", "400")
    assert "coherence_weight" in refused("--coherence_weight", "0.3")
    assert main(["compare", "--config", config]) == 0 and result.read_bytes() == before
    shutil.rmtree(place / "model")
    assert main(["compare", "--config", config, "--table_only"]) == 0
    (result.parent / "depends_on.json").unlink()
    assert "by an earlier version" in refused("--table_only")
