"""`trl-sgpo eval`: files, resume after real kills, and messages."""

import json
import subprocess
import sys
import time
from pathlib import Path

import processes
import pytest
import word_problems
import yaml
from bank_helpers import hashed_words, make
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results
from models import problems, save_tiny_model

from trl_sgpo.bank import StrategyBank
from trl_sgpo.bank.strategy import problem_id
from trl_sgpo.cli.eval import main
from trl_sgpo.errors import BankError, ConfigError, DataError, ModelError
from trl_sgpo.hub.card_results import results as card_section
from trl_sgpo.inference.model import TwoPhaseModel


ROOT = Path(__file__).parents[2]
GSM8K = [{"question": f"What is {i} + 1?", "answer": f"It is {i + 1}.\n#### {i + 1}"} for i in range(6)]
COMMAND = "trl_sgpo.cli.eval"


@pytest.fixture
def data(tmp_path):
    """A directory with local copies of two suites."""
    for name, rows in (
        ("gsm8k", GSM8K),
        ("math500", [{"problem": f"{i}?", "solution": rf"$\boxed{{{i}}}$", "answer": str(i)} for i in range(4)]),
    ):
        path = tmp_path / "data" / name / "test.jsonl"
        path.parent.mkdir(parents=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sums = tmp_path / "data" / "sums.jsonl"
    sums.write_text("".join(json.dumps(row) + "\n" for row in problems(24).to_list()))
    return tmp_path / "data"


@pytest.fixture
def arguments(tiny, data, tmp_path):
    return [
        "--model", tiny, "--data_dir", str(data), "--suites", "gsm8k", f"ood={data / 'sums.jsonl'}",
        "--output_dir", str(tmp_path / "out"), "--batch_size", "4", "--samples", "2",
        "--max_strategy_length", "6", "--max_completion_length", "6", "--verifier", "models.evenness",
        "--transfer", "ood", "--transfer_problems", "3", "--pairs_per_cell", "2", "--transfers", "1",
    ]  # fmt: skip


def test_help_loads_no_heavy_module():
    code = (
        "import sys\nfrom trl_sgpo.cli.eval import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit as end:\n    assert end.code == 0\n"
        "heavy = {'torch', 'trl', 'transformers', 'chromadb', 'datasets', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, cwd=ROOT)


def test_what_an_evaluation_leaves(arguments, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(arguments) == 0
    first = (out / "results.json").read_bytes()
    results = json.loads(first)
    assert set(results) == {"settings", "suites", "kinds", "transfer"}
    assert results["suites"]["gsm8k"]["problems"] == results["suites"]["gsm8k"]["available"] == 6
    assert set(results["kinds"]) == {"in_distribution", "out_of_distribution"}
    assert results["transfer"]["ood"]["classes"] == ["kind-0", "kind-1"]
    assert not [word for word in ("seconds", "time", "date") if f'"{word}' in first.decode()]
    for name in ("accuracy.png", "transfer_ood.png", "matrix_ood.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    markdown = (out / "results.md").read_text()
    assert "| gsm8k | in_distribution | 6 |" in markdown and "transfer - none" in markdown
    shown = capsys.readouterr().out
    assert "Transfer on ood" in shown and str(out / "results.json") in shown
    # the same command again computes nothing, and a new directory gives the same
    assert main(arguments) == 0 and (out / "results.json").read_bytes() == first
    again = [*arguments, "--output_dir", str(tmp_path / "again")]
    assert main(again) == 0 and (tmp_path / "again" / "results.json").read_bytes() == first


def test_plain_answers_are_measured_beside_two_phases(arguments, tmp_path, capsys, monkeypatch):
    arguments, out = [*arguments[: arguments.index("--transfer")], "--no_plots"], tmp_path / "out"
    assert main([*arguments, "--no_plain"]) == 0
    before = json.loads((out / "results.json").read_text())["suites"]
    chunks = (out / "rows.jsonl").read_bytes()
    assert all("plain" not in suite and suite["own"]["accuracy"] == suite["accuracy"] for suite in before.values())
    with monkeypatch.context() as patch:
        patch.setattr(TwoPhaseModel, "write_strategies", None)  # what was finished without plain answers counts
        assert main(arguments) == 0
    assert (out / "rows.jsonl").read_bytes().startswith(chunks)
    suites = json.loads((out / "results.json").read_text())["suites"]
    for name, suite in suites.items():
        plain = suite.pop("plain")
        assert suite == before[name] and plain["accuracy"]["problems"] == suite["problems"]
        assert plain["sampled"]["samples"] == 2 and plain["generated_tokens"] > 0
    told = capsys.readouterr().out
    assert "Plain answers, own strategies, bank" in told and "gsm8k, sampled" in told
    assert "| accuracy | plain | own strategy | bank |" in (out / "results.md").read_text()
    # as the form alone, with as many tokens
    length = ["--form", "plain", "--max_completion_length", "12", "--output_dir", str(tmp_path / "plain")]
    assert main([*arguments, *length]) == 0
    alone = json.loads((tmp_path / "plain" / "results.json").read_text())["suites"]["gsm8k"]
    assert plain.keys() < alone.keys() and "plain" not in alone
    plain = json.loads((out / "results.json").read_text())["suites"]["gsm8k"]["plain"]
    assert plain == {key: alone[key] for key in plain}


def test_suite_that_names_its_columns(tiny, tmp_path):
    word_problems.write(tmp_path / "svamp.jsonl", word_problems.svamp(6))
    suite = {"name": "words", "path": str(tmp_path / "svamp.jsonl"), "prompt_template": "{body} {question}"}
    config = {
        "model": tiny,
        "suites": [suite | {"answer_column": "ANSWER"}, suite | {"name": "own", "prompt_template": None}],
        "prompt_column": "question",
        "output_dir": str(tmp_path / "out"),
        "max_strategy_length": 6,
        "max_completion_length": 6,
        "no_plots": True,
    }
    (tmp_path / "eval.yaml").write_text(yaml.safe_dump(config))
    assert main(["--config", str(tmp_path / "eval.yaml")]) == 0
    suites = json.loads((tmp_path / "out" / "results.json").read_text())["settings"]["suites"]
    assert (
        suites["words"]["prompt_template"] == "{body} {question}" and suites["words"]["rows"] != suites["own"]["rows"]
    )
    assert suites["own"]["prompt_template"] is None
    problem = problem_id([{"role": "user", "content": " ".join(word_problems.story(0)[:2])}])
    assert problem in (tmp_path / "out" / "rows.jsonl").read_text()


def test_results_for_the_hub(arguments, tmp_path):
    assert main([*arguments, "--form", "plain", "--no_plots"]) == 0
    hub = tmp_path / "out" / "hub"
    (entry,) = yaml.safe_load((hub / ".eval_results" / "gsm8k.yaml").read_text())
    accuracy = json.loads((tmp_path / "out" / "results.json").read_text())["suites"]["gsm8k"]["accuracy"]["value"]
    assert entry == {
        "dataset": {"id": "openai/gsm8k", "task_id": "gsm8k"},
        "value": round(100 * accuracy, 2),
        "notes": "plain answer, greedy, zero-shot",
    }
    assert not list(hub.glob(".eval_results/ood*")) and not list((tmp_path / "out").glob("*.png"))
    card = ModelCard(f"---\n{(hub / 'model_index.yaml').read_text()}---\n")
    found = {result.dataset_name: result for result in card.data.eval_results}
    assert found["gsm8k"].metric_value == round(accuracy, 4) and found["gsm8k"].dataset_config == "main"
    assert found["ood"].dataset_type == "sums.jsonl"  # not the full path, which is published with a card
    name, _ = model_index_to_eval_results(yaml.safe_load((hub / "model_index.yaml").read_text())["model-index"])
    assert name


def test_a_part_of_a_benchmark_is_no_result_for_the_hub(arguments, tmp_path, capsys):
    assert main([*arguments, "--limit", "5", "--no_plots", "--transfer_problems", "1"]) == 0
    assert not (tmp_path / "out" / "hub" / ".eval_results").exists()
    assert "gsm8k: no file for the Hub, 5 of 6 problems measured" in capsys.readouterr().out


def half(completions, solution, **_):
    return [1.0 if int(str(answer).split()[-1]) % 2 else None for answer in solution]


def test_a_benchmark_that_is_half_verified_is_no_whole_one(arguments, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("models.half", half, raising=False)
    command = [*arguments, "--form", "plain", "--no_plots", "--verifier", "models.half"]
    assert main(command) == 0
    suite = json.loads((tmp_path / "out" / "results.json").read_text())["suites"]["gsm8k"]
    count = suite["problems"] - suite["unverified"]
    assert 0 < count < suite["problems"] == suite["available"] == 6
    assert not (tmp_path / "out" / "hub" / ".eval_results" / "gsm8k.yaml").exists()
    assert f"gsm8k: no file for the Hub, {count} of 6 problems measured" in capsys.readouterr().out
    shown = f"| {count} ({suite['unverified']} unverified) |"
    assert shown in (tmp_path / "out" / "results.md").read_text()
    assert f"{shown[:-2]} of 6 |" in card_section(tmp_path, tmp_path / "out")


def test_killed_evaluation_resumes_to_the_same_results(arguments, tmp_path):
    arguments = [*arguments, "--batch_size", "2", "--no_plots"]
    done = processes.run(COMMAND, *arguments, "--output_dir", str(tmp_path / "whole"))
    assert done.returncode == 0, done.stderr[-2000:]
    killed = [*arguments, "--output_dir", str(tmp_path / "killed")]
    process = processes.start(COMMAND, *killed)
    rows = tmp_path / "killed" / "rows.jsonl"
    while not (rows.exists() and b"\n" in rows.read_bytes()):
        assert process.is_alive()
        time.sleep(0.005)  # polls for an event, measures nothing
    process.kill()
    process.join()
    left = rows.read_bytes().count(b"\n")
    assert 0 < left < (tmp_path / "whole" / "rows.jsonl").read_bytes().count(b"\n")
    assert not (tmp_path / "killed" / "results.json").exists()
    with rows.open("ab") as file:
        file.write(b'{"key": "suite/gsm8k/4", "texts"')  # as a kill in the middle of a write would leave it
    resumed = processes.run(COMMAND, *killed)
    assert resumed.returncode == 0, resumed.stderr[-2000:]
    for name in ("results.json", "rows.jsonl"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_changed_settings_are_refused(arguments, tmp_path):
    arguments = [*arguments, "--no_plots"]
    assert main(arguments) == 0
    with pytest.raises(ConfigError, match=r"other settings \(protocol.*--output_dir.*--overwrite"):
        main([*arguments, "--seed", "7"])
    other = save_tiny_model(tmp_path / "other", "qwen2")
    with pytest.raises(ConfigError, match=r"model, .*weights"):
        main([*arguments, "--model", other])
    assert main([*arguments, "--seed", "7", "--overwrite"]) == 0


def test_an_evaluation_of_an_earlier_version_is_refused(arguments, tmp_path):
    """It does not say of which tokenizer, chat template, generation config and version it is."""
    arguments = [*arguments, "--no_plots"]
    assert main(arguments) == 0
    path = tmp_path / "out" / "settings.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({key: settings[key] for key in settings if key not in ("chat_template", "trl_sgpo")}))
    with pytest.raises(ConfigError, match=r"an earlier version recorded no chat_template, trl_sgpo\).*`--overwrite`"):
        main(arguments)


def test_a_suite_is_of_unknown_kind_until_it_is_named(arguments, data, tmp_path, capsys, monkeypatch):
    def results(*suites):
        chosen = [*arguments[:4], "--suites", *suites, *arguments[arguments.index("--output_dir") :]]
        assert main([*chosen[: chosen.index("--transfer")], "--no_plots"]) == 0
        return json.loads((tmp_path / "out" / "results.json").read_text())

    path = data / "sums.jsonl"
    found = results(f"mine={path}")
    assert found["suites"]["mine"]["kind"] == "unknown" and found["kinds"] == {}
    shown = capsys.readouterr().out
    assert "The kind of mine is unknown" in shown and "`kind`" in shown and "Kinds of suites" not in shown
    monkeypatch.setattr(TwoPhaseModel, "write_strategies", None)  # a label changes nothing that was evaluated
    found = results(json.dumps({"name": "mine", "path": str(path), "kind": "in_distribution"}))
    assert found["suites"]["mine"]["kind"] == "in_distribution" and set(found["kinds"]) == {"in_distribution"}
    assert "is unknown" not in capsys.readouterr().out


def test_yaml_and_command_line(arguments, data, tmp_path, tiny):
    config = tmp_path / "eval.yaml"
    config.write_text(
        yaml.safe_dump(
            {
                "model": tiny,
                "data_dir": str(data),
                "suites": ["gsm8k", {"name": "mine", "path": str(data / "sums.jsonl"), "kind": "harder", "limit": 3}],
                "output_dir": str(tmp_path / "from_file"),
                "max_strategy_length": 4,
                "max_completion_length": 4,
                "strategy_prompt": "- {problem}\nA plan:",
                "verifier": "models.evenness",
                "no_plots": True,
                "seed": 1,
            }
        )
    )
    assert main(["--config", str(config), "--seed", "2", "--limit", "5"]) == 0
    settings = json.loads((tmp_path / "from_file" / "settings.json").read_text())
    assert settings["protocol"]["seed"] == 2 and settings["two_phase"]["strategy_prompt"] == "- {problem}\nA plan:"
    results = json.loads((tmp_path / "from_file" / "results.json").read_text())
    assert results["suites"]["mine"]["problems"] == 3 and results["suites"]["mine"]["kind"] == "harder"
    assert results["suites"]["gsm8k"]["problems"] == 5 and results["transfer"] == {}


def test_a_system_prompt_changes_what_is_read(arguments, tmp_path):
    assert main([*arguments, "--no_plots"]) == 0
    with pytest.raises(ConfigError, match=r"other settings \(suites, two_phase\)"):
        main([*arguments, "--no_plots", "--system_prompt", "End with #### and the answer."])
    assert main([*arguments, "--no_plots", "--overwrite", "--system_prompt", "End with #### and the answer."]) == 0


def test_the_system_message_of_training_is_put_before_problems(tmp_path, arguments):
    def rows_read(name, settings, *more):
        model = save_tiny_model(tmp_path / name)
        Path(model, "sgpo.json").write_text(json.dumps(settings))
        output = tmp_path / f"{name}_out"
        assert main([*arguments, "--no_plots", "--model", model, "--output_dir", str(output), *more]) == 0
        return [suite["rows"] for suite in json.loads((output / "settings.json").read_text())["suites"].values()]

    system = "End with #### and the answer."
    saved = rows_read("saved", {"system_prompt": system})
    assert saved == rows_read("given", {}, "--system_prompt", system)
    assert saved != rows_read("none", {})


def test_settings_saved_with_a_model_are_used(tmp_path, arguments):
    model = save_tiny_model(tmp_path / "trained")
    saved = {"strategy_prompt": "{problem} Plan?", "max_strategy_length": 3, "max_completion_length": 5}
    Path(model, "sgpo.json").write_text(json.dumps(saved))
    lengths = arguments.index("--max_strategy_length")
    assert (
        main(
            [
                *arguments[:lengths],
                *arguments[lengths + 4 :],
                "--model",
                model,
                "--no_plots",
                "--max_completion_length",
                "4",
            ]
        )
        == 0
    )
    settings = json.loads((tmp_path / "out" / "settings.json").read_text())["two_phase"]
    assert settings["strategy_prompt"] == "{problem} Plan?"
    assert (settings["max_strategy_length"], settings["max_completion_length"]) == (3, 4)


def test_banks(tmp_path, arguments, capsys, monkeypatch):
    monkeypatch.setattr("trl_sgpo.bank.embedding.load_embedder", lambda name: hashed_words)
    model = save_tiny_model(tmp_path / "trained")
    with StrategyBank(Path(model, "strategy_bank"), hashed_words) as bank:
        bank.add([make("plan", "kind-0", trust="trusted"), make("draft", "kind-1")])
        bank.snapshot(tmp_path / "snapshot")
    snapshot = {path.name: path.read_bytes() for path in (tmp_path / "snapshot").iterdir()}
    arguments = [*arguments, "--model", model, "--no_plots", "--overwrite"]
    assert main(arguments) == 0
    assert "strategy_bank is not used: pass `--bank auto`" in capsys.readouterr().out
    without = json.loads((tmp_path / "out" / "results.json").read_text())["suites"]["ood"]
    assert main([*arguments, "--bank", "auto"]) == 0
    chunks = [json.loads(line) for line in (tmp_path / "out" / "rows.jsonl").read_text().splitlines()]
    main_pass = [chunk for chunk in chunks if chunk["key"].startswith("suite/")]
    shown = {row["class"]: row["shown"] for chunk in main_pass for row in chunk["results"]}
    assert len(shown["kind-0"]) == 1 and shown["kind-1"] == []
    first = (tmp_path / "out" / "results.json").read_bytes()
    assert "own_with_bank" in json.loads(first)["transfer"]["ood"]["conditions"]
    suite = json.loads(first)["suites"]["ood"]
    assert suite["bank"]["accuracy"] == suite["accuracy"]
    assert suite["own"] == without["own"] and suite["plain"] == without["plain"] and "bank" not in without
    assert main([*arguments, "--bank", str(tmp_path / "snapshot")]) == 0
    assert (tmp_path / "out" / "results.json").read_bytes() == first
    assert {path.name: path.read_bytes() for path in (tmp_path / "snapshot").iterdir()} == snapshot


def test_checking_a_verifier(data, tmp_path, capsys):
    given = ["--check_verifier", "--suites", "gsm8k", "math500", "--data_dir", str(data), "--output_dir"]
    assert main([*given, str(tmp_path / "good")]) == 0
    assert "answer_reward accepts 6 of 6 worked solutions and 0 of" in capsys.readouterr().out
    found = json.loads((tmp_path / "good" / "verifier_check.json").read_text())
    assert found["math500"]["gold_accepted"] == 4 and found["math500"]["wrong_accepted"] == 0
    assert main([*given, str(tmp_path / "bad"), "--verifier", "models.evenness"]) == 1


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        (["--suites", "gsm8"], ConfigError, "did you mean gsm8k"),
        (["--suites", "ood=nowhere.jsonl"], DataError, "suite ood cannot be loaded"),
        (["--samples", "-1"], ConfigError, "--samples"),
        (["--temperature", "0"], ConfigError, "--temperature"),
        (["--max_strategy_length", "0"], ConfigError, "--max_strategy_length"),
        (["--transfer", "gsm"], ConfigError, "--transfer gsm"),
        (["--verifier", "nothing"], ConfigError, "answer_reward"),
        (["--model", "no-such-org/no-such-model"], ModelError, "no-such-org/no-such-model"),
        (["--bank", "nowhere"], BankError, "holds no strategy bank"),
        (["--strategy_prompt", "no place"], ConfigError, "{problem}"),
        (["--config", "nowhere.yaml"], ConfigError, "There is no file"),
    ],
)
def test_messages(arguments, changes, error, words):
    with pytest.raises(error, match=words):
        main([*arguments, *changes, "--no_plots"])


def test_unknown_keys_and_missing_choices(tmp_path, tiny):
    config = tmp_path / "eval.yaml"
    config.write_text("sample: 3\n")
    with pytest.raises(ConfigError, match="did you mean `samples`"):
        main(["--config", str(config), "--model", tiny])
    with pytest.raises(ConfigError, match="--suites"):
        main(["--model", tiny])
    with pytest.raises(ConfigError, match="--model"):
        main(["--suites", "gsm8k"])
    with pytest.raises(ConfigError, match="leave out `--no_plain`"):
        main(["--model", tiny, "--suites", "gsm8k", "--form", "plain", "--no_plain"])
    with pytest.raises(ConfigError, match="leave out `--bank`"):
        main(["--model", tiny, "--suites", "gsm8k", "--form", "plain", "--bank", "auto"])


def test_problems_without_solutions(tiny, tmp_path):
    path = tmp_path / "open.jsonl"
    path.write_text('{"prompt": "Why?"}\n')
    with pytest.raises(DataError, match=r"no solutions.*--verifier"):
        main(["--model", tiny, "--suites", f"open={path}", "--output_dir", str(tmp_path / "out")])
