"""`SGPOPipeline`: what it shows, writes and votes for, and the code that does the same with transformers alone."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import hash_embedder, save_tiny_model
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from trl_sgpo import SGPOPipeline, StrategyBank
from trl_sgpo.bank import Strategy, problem_id
from trl_sgpo.data.tasks import same_answer
from trl_sgpo.errors import BankError, ConfigError, DataError, ModelError
from trl_sgpo.hub.snippet import plain_snippet, transformers_snippet
from trl_sgpo.inference.model import Decoding, TwoPhaseModel
from trl_sgpo.inference.retrieval import with_retrieved
from trl_sgpo.inference.settings import TwoPhaseSettings
from trl_sgpo.inference.solution import Attempt, vote
from trl_sgpo.method.problem import Problem


PROBLEM = "What is 2 + 3?"
SETTINGS = TwoPhaseSettings(
    max_strategy_length=12, max_completion_length=16, num_retrieved=2, system_prompt="Be short."
)
ASKED = [{"role": "system", "content": "Be short."}, {"role": "user", "content": PROBLEM}]


@pytest.fixture(autouse=True)
def embedder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trl_sgpo.bank.embedding.load_embedder", lambda name: hash_embedder)


def save_model(directory: Path, chat: bool = True) -> str:
    """A tiny model of weights so large that what it writes depends on all that it reads."""
    save_tiny_model(directory, chat=chat)
    model = AutoModelForCausalLM.from_pretrained(directory)
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.4)
    model.save_pretrained(directory)
    return str(directory)


def fill_bank(directory: Path) -> None:
    with StrategyBank(directory, hash_embedder) as bank:
        bank.add(
            [
                Strategy("What is asked is a sum: add the numbers.", "sums", ("s0",), trust="trusted"),
                Strategy("What is a difference: take away.", "differences", ("s1",), trust="trusted"),
                Strategy("What is tried only in training.", "sums", ("s2",)),
                Strategy("What is written for this problem.", "sums", (problem_id(ASKED),), trust="trusted"),
            ]
        )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("run")
    save_model(directory)
    SETTINGS.save(directory)
    fill_bank(directory / "strategy_bank")
    return str(directory)


@pytest.fixture(scope="module")
def adapter(run: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """An adapter with weights that matter, as a run saves it."""
    directory = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(1)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(run), LoraConfig(r=4, target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "sgpo.json"):
        (directory / name).write_bytes(Path(run, name).read_bytes())
    return str(directory)


class TestPipeline:
    def test_shows_trusted_strategies_and_writes_what_the_model_writes(self, run: str) -> None:
        with SGPOPipeline.from_pretrained(run) as pipeline:
            solution = pipeline(PROBLEM)
            assert {s.problem_class for s in solution.retrieved} == {"sums", "differences"}
            assert {s.trust for s in solution.retrieved} == {"trusted"}
            assert "s0" in {s.source_problems[0] for s in solution.retrieved}
            model = TwoPhaseModel.from_pretrained(run)
            assert model.settings == pipeline.model.settings == SETTINGS
            problems = with_retrieved([Problem(ASKED)], pipeline.bank, 2)
            assert problems[0].retrieved == solution.retrieved
            (written,) = model.write_strategies(problems)
            assert solution.strategy == written.text
            assert solution.execution == model.execute(problems, [written])[0]
            one_class = pipeline(PROBLEM, problem_class="sums")
            assert [s.problem_class for s in one_class.retrieved] == ["sums"]
            assert one_class.strategy != solution.strategy

    def test_leaves_the_bank_to_others_and_as_it_is(self, run: str) -> None:
        ledger = Path(run, "strategy_bank", "ledger.sqlite")
        before = ledger.read_bytes()
        with SGPOPipeline.from_pretrained(run) as pipeline, StrategyBank.restore(Path(run, "strategy_bank")) as bank:
            assert len(pipeline(PROBLEM).retrieved) == 2 and len(bank) == 4
            with pytest.raises(BankError, match="in use"):
                SGPOPipeline.from_pretrained(run)
            assert SGPOPipeline.from_pretrained(run, bank=None)(PROBLEM).retrieved == ()
        assert ledger.read_bytes() == before

    def test_snapshot_as_bank(self, run: str, tmp_path: Path) -> None:
        with StrategyBank.restore(Path(run, "strategy_bank")) as bank:
            bank.snapshot(tmp_path / "checkpoint" / "strategy_bank")
        with SGPOPipeline.from_pretrained(run, tmp_path / "checkpoint") as pipeline:
            assert len(pipeline(PROBLEM).retrieved) == 2
        assert sorted(path.name for path in (tmp_path / "checkpoint" / "strategy_bank").iterdir()) == [
            "ledger.sqlite",
            "manifest.json",
        ]

    def test_streams_what_it_returns(self, run: str) -> None:
        heard: list[tuple[str, str]] = []
        with SGPOPipeline.from_pretrained(run) as pipeline:
            solution = pipeline(PROBLEM, watch=lambda *said: heard.append(said))
        assert [said for said in heard if said[1] == ""] == [("strategy", ""), ("execution", "")]
        for phase, text in (("strategy", solution.strategy), ("execution", solution.execution)):
            pieces = [piece for name, piece in heard if name == phase and piece]
            said = "".join(pieces)
            assert pieces and (said.strip() if phase == "strategy" else said) == text

    def test_given_strategy_is_executed_without_the_bank(self, run: str) -> None:
        with SGPOPipeline.from_pretrained(run) as pipeline:
            solution = pipeline(PROBLEM, strategy=" Add them. ")
        model = TwoPhaseModel.from_pretrained(run)
        assert solution.strategy == "Add them." and solution.retrieved == ()
        assert solution.execution == model.execute([Problem(ASKED)], ["Add them."])[0]

    def test_attempts_differ_and_repeat_with_their_seed(self, run: str) -> None:
        with SGPOPipeline.from_pretrained(run, bank=None) as pipeline:
            solution = pipeline(PROBLEM, samples=4)
            assert len({attempt.strategy for attempt in solution.attempts}) == 4
            assert pipeline(PROBLEM, samples=4) == solution
            assert pipeline(PROBLEM, samples=4, decoding=Decoding(greedy=False, seed=1)) != solution
            found = solution.to_dict()
            assert len(found["attempts"]) == 4 and sum(vote["votes"] for vote in found["votes"]) == 4
            with pytest.raises(ConfigError, match="all the same"):
                pipeline(PROBLEM, samples=2, decoding=Decoding())

    def test_plain_answers_are_as_long_as_both_phases(self, run: str) -> None:
        with SGPOPipeline.from_pretrained(run) as pipeline:
            heard: list[tuple[str, str]] = []
            solution = pipeline(PROBLEM, plain=True, watch=lambda *said: heard.append(said))
            assert solution.execution == pipeline.model.answer([ASKED], limit=28)[0]
            assert solution.strategy == "" and not solution.retrieved and pipeline(PROBLEM).retrieved
            assert heard[0] == ("plain answer", "") and "".join(text for _, text in heard) == solution.execution
            sampled = pipeline(PROBLEM, plain=True, samples=3)
            assert len({attempt.execution for attempt in sampled.attempts}) == 3
            with pytest.raises(ConfigError, match="leave out the strategy"):
                pipeline(PROBLEM, strategy="Add.", plain=True)

    def test_plain_answers_need_no_room_for_the_request_of_a_strategy(self, tmp_path: Path) -> None:
        SETTINGS.save(tmp_path)
        model = TwoPhaseModel.from_pretrained(save_tiny_model(tmp_path, "gpt2", n_positions=128))
        pipeline = SGPOPipeline(model)
        pipeline.check_room([PROBLEM], plain=True)
        with pytest.raises(ConfigError, match="and the model has 128 positions"):
            pipeline.check_room([PROBLEM])
        with pytest.raises(ConfigError, match="28 of `max_completion_length`"):
            pipeline.check_room([PROBLEM * 12], plain=True)

    def test_adapter_and_what_it_merges_to(self, adapter: str, run: str, tmp_path: Path) -> None:
        merged = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(run), adapter).merge_and_unload()
        merged.save_pretrained(tmp_path)
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            (tmp_path / name).write_bytes(Path(run, name).read_bytes())
        base, tuned = SGPOPipeline.from_pretrained(run, None), SGPOPipeline.from_pretrained(adapter)
        assert tuned.bank is None and tuned(PROBLEM).strategy != base(PROBLEM).strategy
        with SGPOPipeline.from_pretrained(str(tmp_path), run=run) as pipeline:
            assert pipeline.bank is not None and pipeline.model.settings == SETTINGS
            prepared = pipeline.prepare([PROBLEM], retrieve=False)
            assert pipeline.solve(prepared)[0].to_dict() == tuned(PROBLEM).to_dict()
        assert SGPOPipeline.from_pretrained(str(tmp_path)).model.settings == TwoPhaseSettings()

    def test_messages(self, run: str, tmp_path: Path) -> None:
        (tmp_path / "checkpoint-4").mkdir()
        (tmp_path / "checkpoint-10").mkdir()
        with pytest.raises(ModelError, match="checkpoint-10"):
            SGPOPipeline.from_pretrained(str(tmp_path))
        with pytest.raises(ConfigError, match="`--run`"):
            SGPOPipeline.from_pretrained(run, run="nowhere")
        pipeline = SGPOPipeline.from_pretrained(run, bank=None)
        with pytest.raises(DataError, match="empty"):
            pipeline("  ")
        with pytest.raises(ConfigError, match="empty"):
            pipeline(PROBLEM, strategy=" ")


answers = st.lists(st.sampled_from([None, "1", "1.0", "2", "3"]), min_size=1, max_size=9)


@given(answers)
def test_votes_count_every_attempt_and_the_most_frequent_answer_wins(given_answers: list[str | None]) -> None:
    attempts = [Attempt("s", "e", answer) for answer in given_answers]
    solution = vote(Problem("p"), attempts)
    assert sum(count for _, count in solution.votes) == len(attempts)
    counts = [count for answer, count in solution.votes if answer is not None]
    assert counts == sorted(counts, reverse=True)
    if counts:
        assert solution.answer is not None
        agree = [answer for answer in given_answers if answer is not None and same_answer(answer, solution.answer)]
        assert len(agree) == counts[0] == solution.votes[0][1]
    else:
        assert solution.answer is None and solution.votes == ((None, len(attempts)),)


def run_snippet(code: str, **changes: Any) -> dict[str, Any]:
    names: dict[str, Any] = {}
    exec(compile(code, "snippet", "exec"), names)
    return names


class TestSnippet:
    @pytest.mark.parametrize(
        "template", [SETTINGS.strategy_prompt, "First {strategies}then {problem}: how?", "About {problem} What to do?"]
    )
    @pytest.mark.parametrize("chat", [True, False])
    def test_writes_what_the_pipeline_writes(
        self, chat: bool, template: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        directory = save_model(tmp_path, chat)
        settings = TwoPhaseSettings(
            strategy_prompt=template, max_strategy_length=12, max_completion_length=16, system_prompt="Be short."
        )
        settings.save(tmp_path)
        fill_bank(tmp_path / "strategy_bank")
        names = run_snippet(transformers_snippet(directory, settings, PROBLEM, chat))
        with SGPOPipeline.from_pretrained(directory) as pipeline:
            prepared = pipeline.prepare([PROBLEM], retrieve=False)
            (alone,) = pipeline.solve(prepared)
            shown = pipeline(PROBLEM)
        assert capsys.readouterr().out == f"{alone.strategy}\n\n{alone.execution}\n"
        pairs = [(strategy.problem_class, strategy.text) for strategy in shown.retrieved]
        assert pairs and names["solve"](PROBLEM, pairs) == (shown.strategy, shown.execution)
        assert shown.strategy != alone.strategy

    @pytest.mark.parametrize("system", [None, "Be short."])
    @pytest.mark.parametrize("chat", [True, False])
    def test_plain_one_answers_as_the_pipeline_does(
        self, chat: bool, system: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        directory = save_model(tmp_path, chat)
        settings = TwoPhaseSettings(max_strategy_length=12, max_completion_length=16, system_prompt=system)
        settings.save(tmp_path)
        run_snippet(plain_snippet(directory, settings, PROBLEM, chat))
        told = capsys.readouterr().out
        assert told == SGPOPipeline.from_pretrained(directory)(PROBLEM, plain=True).execution + "\n"

    def test_adapter(self, adapter: str, capsys: pytest.CaptureFixture[str]) -> None:
        names = run_snippet(transformers_snippet(adapter, SETTINGS, PROBLEM))
        solution = SGPOPipeline.from_pretrained(adapter)(PROBLEM)
        assert names["solve"](PROBLEM) == (solution.strategy, solution.execution)
        capsys.readouterr()
        run_snippet(plain_snippet(adapter, SETTINGS, PROBLEM))
        plain = SGPOPipeline.from_pretrained(adapter)(PROBLEM, plain=True)
        assert capsys.readouterr().out == plain.execution + "\n"


def test_problems_of_merged_classes_are_shown_strategies(run):
    with StrategyBank.restore(f"{run}/strategy_bank", embedding_model=hash_embedder) as bank:
        problem = Problem(ASKED, "totals")
        assert with_retrieved([problem], bank, 1)[0].retrieved == ()
        (shown,) = with_retrieved([problem], bank, 1, merged={"totals": "sums"})
    assert [strategy.problem_class for strategy in shown.retrieved] == ["sums"] and shown.problem_class == "totals"
