"""The laboratory's model: who builds it, its tokenizer, its training data."""

from pathlib import Path

import datasets
import huggingface_hub.constants
import pytest

from trl_sgpo import SGPOPipeline
from trl_sgpo.cli.main import main
from trl_sgpo.compare.lab import model as lab
from trl_sgpo.compare.lab.list_functions import NUMBER_WORDS, compositions, problems, strategy
from trl_sgpo.compare.lab.model import lab_tokenizer, lab_traces
from trl_sgpo.data.warmstart import two_phase_examples
from trl_sgpo.data.worked import traces
from trl_sgpo.errors import ModelError
from trl_sgpo.inference.weights import lab_seed, local_weights, require_model
from trl_sgpo.sgpo_config import SGPOConfig
from trl_sgpo.vram.architectures import architectures


def test_every_word_of_problems_and_solutions_is_known() -> None:
    from datasets import Dataset

    tokenizer = lab_tokenizer()
    rows = [row for part in ("seen", "longer") for row in problems(part, "train", 64, 0, shortcuts=0.5)]
    for trace in [*traces(Dataset.from_list(rows), 2, seed=0), *lab_traces(200, seed=0)]:
        for text in (trace.prompt[0]["content"], trace.strategy, trace.execution):
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            assert tokenizer.unk_token_id not in ids
            assert tokenizer.decode(ids) == text


def test_training_data_holds_no_held_out_composition() -> None:
    found = {trace.strategy for trace in lab_traces(4000, seed=1)}
    assert found.isdisjoint(strategy(program) for program in compositions()["held_out"])


def test_a_given_strategy_is_executed_even_where_it_is_the_answer_of_another_problem() -> None:
    given = [trace for trace in lab_traces(4000, seed=1) if trace.given]
    assert len(given) == 2000
    shortcuts = [trace for trace in given if trace.execution.startswith("####")]
    assert 400 < len(shortcuts) < 600
    for trace in shortcuts:
        answer = trace.execution.removeprefix("#### ")
        words = " ".join(NUMBER_WORDS[int(digit)] for digit in answer.split())
        assert trace.strategy.endswith((f"write {answer}", f"answer {words}"))


def test_a_given_strategy_is_not_trained_and_plain_answers_are_as_frequent_as_asked_for() -> None:
    tokenizer, config = lab_tokenizer(), SGPOConfig("unused", execution_prompt="apply", use_bank=False, bf16=False)
    made = lab_traces(400, seed=2)
    examples = two_phase_examples(made, tokenizer, config, seed=0, plain_share=0.5)
    apply = tokenizer.convert_tokens_to_ids("apply")
    plain = [apply not in example["input_ids"] for example in examples]
    assert not any(p for p, trace in zip(plain, made, strict=True) if trace.given)
    assert 70 < sum(plain) < 130  # half of the 200 that are not given
    for example, trace in zip(examples, made, strict=True):
        trained = tokenizer.decode([token for token in example["labels"] if token != -100], skip_special_tokens=True)
        assert trained.startswith(trace.execution if trace.given else trace.strategy)


def test_commands_build_the_model_once_and_the_lookup_of_weights_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HOME", str(tmp_path))
    built: list[Path] = []

    def build(directory: Path, seed: int) -> None:
        directory.mkdir(parents=True)
        built.append(directory)

    monkeypatch.setattr(lab, "build_lab_model", build)
    assert local_weights("trl-sgpo/lab") == "trl-sgpo/lab"
    for look_up in (require_model, SGPOPipeline.from_pretrained):
        with pytest.raises(ModelError, match="`trl-sgpo solve --model trl-sgpo/lab"):
            look_up("trl-sgpo/lab")
    assert built == []
    assert lab.fetch_model("trl-sgpo/lab") == lab.fetch_model("trl-sgpo/lab") == str(built[0])
    assert require_model("trl-sgpo/lab") == local_weights("trl-sgpo/lab") == str(built[0])
    assert len(built) == 1
    assert lab.fetch_model("trl-sgpo/lab-7") == str(built[1]) == f"{built[0]}-7"  # from another seed
    assert [lab_seed(name) for name in ("trl-sgpo/lab", "trl-sgpo/lab-7", "trl-sgpo/lab-07")] == [0, 7, None]
    with pytest.raises(ModelError, match=r"no folder ./no/such/directory"):
        lab.fetch_model("./no/such/directory")


def test_a_directory_of_that_name_is_used_and_nothing_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lab, "build_lab_model", None)
    Path("trl-sgpo/lab").mkdir(parents=True)
    assert lab.fetch_model("trl-sgpo/lab") == local_weights("trl-sgpo/lab") == "trl-sgpo/lab"


def test_an_estimate_needs_no_model(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The table of configurations has that of the laboratory's model, which is not trained for an estimate."""
    monkeypatch.setattr(lab, "build_lab_model", None)
    known = architectures()["trl-sgpo/lab"]
    config = lab.lab_config(lab.lab_tokenizer()).to_dict()
    assert {name: config[name] for name in known} == known
    assert main(["estimate", "--config", RECIPE]) == 0


RECIPE = str(Path(__file__).parents[1] / "recipes" / "lab" / "sgpo.yaml")


@pytest.mark.parametrize(
    "command",
    [
        "train --config RECIPE",
        "warmstart --config RECIPE",
        "bootstrap --config RECIPE --output_dir out",
        "compare --config COMPARE --arms grpo --seeds 1",
        "bench step --config RECIPE",
        "bench fit --config RECIPE --output out",
        "eval --model trl-sgpo/lab --suites seen=list_functions/seen?size=8 --no_plots",
        "solve --model trl-sgpo/lab --no_bank problem",
        "export --model trl-sgpo/lab --output_dir out --merge",
        "init --model trl-sgpo/lab --data lcm --vram 0",
    ],
    ids=lambda command: command.split(" --")[0],
)
def test_every_command_that_takes_a_model_builds_it(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def build(directory: Path, seed: int) -> None:
        raise ModelError(f"it is built in {directory.name}")

    monkeypatch.setattr(lab, "build_lab_model", build)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HOME", str(tmp_path))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.chdir(tmp_path)
    comparison = Path("compare.yaml")
    comparison.write_text(
        f"recipe: {RECIPE}\noutput_dir: runs\nseeds: [1]\nbudget: 100\narms:\n  grpo: {{method: grpo}}\n"
        "suites:\n  - {name: seen, path: 'list_functions/seen?size=192'}\n"
        "transfer: {suite: seen, classes: 2, problems: 2}\n"
    )
    arguments = command.replace("RECIPE", RECIPE).replace("COMPARE", str(comparison)).split()
    assert main(arguments) == 2
    assert "it is built in lab-" in capsys.readouterr().err
