"""Rows longer than a model's table of positions: one line that names the settings, before any long work."""

import json
from pathlib import Path

import pytest
import yaml
from models import problems, save_tiny_model

from trl_sgpo.cli import bootstrap, train, warmstart
from trl_sgpo.cli import eval as evaluation
from trl_sgpo.cli import solve as solving
from trl_sgpo.data import warmstart as supervised
from trl_sgpo.data.trace_files import write_traces
from trl_sgpo.data.worked import Trace
from trl_sgpo.errors import ConfigError, DataError
from trl_sgpo.inference.model import TwoPhaseModel


KEYS = r"and the model has 350 positions: .*`max_strategy_length`.*`max_completion_length`"
LONG = "What is 1 + 2? " * 40


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return save_tiny_model(tmp_path_factory.mktemp("model"), "gpt2", n_positions=350)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Problems of which the last one is long."""
    path, rows = tmp_path / "problems.jsonl", problems(8).to_list()
    rows[-1] = rows[-1] | {"prompt": [{"role": "user", "content": LONG}]}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def recipe(model: str, data: Path, tmp_path: Path) -> str:
    path = tmp_path / "recipe.yaml"
    values = {
        "model_name_or_path": model,
        "dataset_name": str(data),
        "reward_funcs": ["models.evenness"],
        "max_strategy_length": 4,
        "max_completion_length": 8,
        "num_generations": 4,
        "per_device_train_batch_size": 8,
        "max_steps": 1,
        "use_bank": False,
        "bf16": False,
        "report_to": "none",
        "output_dir": str(tmp_path / "run"),
    }
    path.write_text(yaml.safe_dump(values))
    return str(path)


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is generated or trained."""

    def refuse(*args, **kwargs):
        raise AssertionError("long work has begun")

    def generate(self, prompts, *args):
        return first_token(self, prompts, *args) if prompts == [[0]] else refuse()  # of a model that is loaded

    first_token = TwoPhaseModel._generate_batch
    monkeypatch.setattr(TwoPhaseModel, "_generate_batch", generate)
    monkeypatch.setattr(supervised, "SFTTrainer", refuse)
    monkeypatch.setattr(train, "warmstart_model", refuse)


def traces(path: Path, execution: str) -> str:
    write_traces([Trace([{"role": "user", "content": "What is 1 + 2?"}], "Add them.", execution, "sums")], path)
    return str(path)


def test_train_says_it_before_the_warm_start(recipe, tmp_path, no_work):
    file = traces(tmp_path / "traces.jsonl", "3 #### 3")
    with pytest.raises(ConfigError, match=KEYS):
        train.main(["--config", recipe, "--warmstart_file", file])


ROTARY = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
LONG_ROTARY = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 4,
    "long_factor": [4.0] * 4,
    "original_max_position_embeddings": 128,
}


@pytest.mark.parametrize(("rope", "said"), [(ROTARY, 96), (LONG_ROTARY, 128), ({"rope_type": "default"}, None)])
def test_train_warns_of_rotary_frequencies_that_follow_the_longest_row(tmp_path, recipe, rope, said, caplog):
    parameters = {"rope_theta": 1e4} | rope
    model = save_tiny_model(tmp_path / "model", "llama", max_position_embeddings=96, rope_parameters=parameters)
    with caplog.at_level("WARNING"):
        train.main(["--config", recipe, "--model_name_or_path", model])
    warnings = [record.message for record in caplog.records if "rotary frequencies" in record.message]
    if said is None:
        assert warnings == []
    else:
        (warning,) = warnings
        assert (
            f"Above {said} tokens" in warning and "Lower `max_strategy_length` or `max_completion_length`" in warning
        )


def test_train_says_it_of_the_problems_that_it_reports_on(recipe, data, tmp_path, no_work):
    short, unseen = data.read_text().splitlines()[:7], data.read_text().splitlines()[7:]
    folder = tmp_path / "splits"
    folder.mkdir()
    (folder / "train.jsonl").write_text("\n".join(short) + "\n")
    (folder / "test.jsonl").write_text("\n".join(unseen) + "\n")
    file = traces(tmp_path / "traces.jsonl", "3 #### 3")
    arguments = ["--config", recipe, "--dataset_name", str(folder), "--warmstart_file", file]
    with pytest.raises(ConfigError, match=KEYS):
        train.main([*arguments, "--report_problems", "1"])
    with pytest.raises(AssertionError, match="long work has begun"):
        train.main([*arguments, "--report_problems", "0"])


def test_traces_are_checked_before_the_warm_start(recipe, tmp_path, no_work):
    file = traces(tmp_path / "traces.jsonl", "step " * 300 + "#### 3")
    with pytest.raises(
        DataError, match=r"A trace.* has \d+ tokens, and the model has 350 positions.*`warmstart_file`"
    ):
        warmstart.main(["--config", recipe, "--traces", file])


@pytest.mark.parametrize("form", ["two_phase", "plain"])
def test_eval(model, data, tmp_path, no_work, form):
    lengths = ["--max_strategy_length", "4", "--max_completion_length", "8" if form == "two_phase" else "300"]
    arguments = ["--model", model, "--suites", f"id_sums={data}", "--verifier", "models.evenness", "--form", form]
    keys = KEYS if form == "two_phase" else r"and the model has 350 positions: .*Lower `max_completion_length`, or"
    with pytest.raises(ConfigError, match=keys):
        evaluation.main([*arguments, *lengths, "--output_dir", str(tmp_path / "out")])


def test_plain_answers_need_no_room_for_strategies(model, data, tmp_path):
    lengths = ["--max_strategy_length", "340", "--max_completion_length", "4"]
    arguments = ["--model", model, "--suites", f"id_sums={data}", "--verifier", "models.evenness", "--no_plots"]
    assert evaluation.main([*arguments, *lengths, "--form", "plain", "--output_dir", str(tmp_path / "out")]) == 0


@pytest.mark.parametrize("single", [True, False])
def test_solve(model, data, tmp_path, no_work, single):
    what = [LONG] if single else ["--input", str(data), "--output", str(tmp_path / "out.jsonl")]
    lengths = ["--max_strategy_length", "4", "--max_completion_length", "8"]
    with pytest.raises(ConfigError, match=r"the model has 350 positions: .*`max_completion_length`"):
        solving.main([*what, "--model", model, *lengths])


@pytest.mark.parametrize("source", ["model", "worked"])
def test_bootstrap(recipe, data, tmp_path, no_work, source):
    arguments = ["--config", recipe, "--source", source, "--output_dir", str(tmp_path / "out")]
    if source == "worked":
        rows = [
            json.loads(line) | {"solution": "3", "worked_solution": "#### 3"} for line in data.read_text().splitlines()
        ]
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        arguments += ["--writer", "model"]
    with pytest.raises(ConfigError, match=r"and the model has 350 positions: .*`max_strategy_length`"):
        bootstrap.main(arguments)


def test_shorter_problems_are_solved(model, tmp_path, data):
    data.write_text("".join(f"{line}\n" for line in data.read_text().splitlines()[:7]))
    arguments = ["--input", str(data), "--output", str(tmp_path / "out.jsonl"), "--model", model]
    assert solving.main([*arguments, "--max_strategy_length", "4", "--max_completion_length", "8"]) == 0
