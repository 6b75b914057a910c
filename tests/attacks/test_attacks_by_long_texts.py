"""Texts with which a pattern or a number would never end, and answers that state more than one result."""

import itertools
import json
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from bank_helpers import hashed_words, make
from models import hash_embedder, save_tiny_model, tokenizer

from trl_sgpo import SGPOConfig, StrategyBank
from trl_sgpo.bank.audit import audit_text
from trl_sgpo.checks.terminal import printable
from trl_sgpo.cli.main import main
from trl_sgpo.data.annotations import strategy_from_annotations, worked_execution
from trl_sgpo.data.choices import as_letters, index_base
from trl_sgpo.data.families import Reference, generated_again
from trl_sgpo.data.final_answers import final_answer
from trl_sgpo.data.tasks import answer_reward, load_problems
from trl_sgpo.errors import BankError
from trl_sgpo.inference.solution import Attempt, vote
from trl_sgpo.method.control_tokens import TextEncoder
from trl_sgpo.method.problem import Problem
from trl_sgpo.method.prompts import ParsedStrategy, parse_strategy
from trl_sgpo.method.rewards import coherence, copied_literals, leak
from trl_sgpo.recipe import resume_point


MILLION = 1_000_000
# Repeated, these keep a pattern that takes the square of a text's length busy for minutes
UNITS = [
    " ", "\n", "0", "a", ". ", ".$", "#", "^ ", "<<", "**", "{", "(", "'", "1,", "1/", "step 1. ", "answer is ",
    "\\boxed{", "\\frac", "\u200b", "\ufdfa",
]  # fmt: skip
BEFORE = ["", "\\^", "the answer is ", "<<1+1=2>>="]


def rewards_of(text: str) -> None:
    strategy = parse_strategy(text)
    coherence(strategy, "1 and 2")
    leak(strategy.text, "3 and 4", "12")
    parse_strategy(text, "steps")


READERS: dict[str, Callable[[str], object]] = {
    "answer": final_answer,
    "answer of three lines": lambda text: final_answer(text, lines=3),
    "strategy": rewards_of,
    "problem of a strategy": lambda text: leak("If you add 12 to 13", text, "12"),
    "literals of a problem": lambda text: coherence(ParsedStrategy("If you add 12"), text),
    "annotated solution": lambda text: strategy_from_annotations(f"<<1+1=2>>{text}\n#### 2", "1 and 1"),
    "problem of a solution": lambda text: strategy_from_annotations("<<1+1=2>>\n#### 2", text),
    "worked solution": lambda text: worked_execution(text, None),
    "right answer": lambda text: answer_reward(["#### 12"], [text]),
    "terminal": printable,
}


@pytest.mark.parametrize("reader", READERS)
def test_texts_of_a_stranger_are_read_in_a_time_that_grows_with_them(
    reader: str, ten_seconds_each: Callable[[], object]
) -> None:
    for before, unit in itertools.product(BEFORE, UNITS):
        ten_seconds_each()
        READERS[reader](before + unit * (100_000 // len(unit)) + "\x01x")


@pytest.mark.parametrize("brackets", ["[]", "()", "{}"])
def test_an_answer_of_nested_lists(brackets: str) -> None:
    deep = [brackets[0] * 300 + str(number) + brackets[1] * 300 for number in range(2)]
    assert answer_reward([f"#### {deep[0]}"], [deep[1]]) == [0.0]
    assert answer_reward(["#### {{4, 3}, {2, 1}}", "#### [[[1, 2.0]]]"], ["{{1, 2}, {3, 4}}", "[[[1, 2]]]"]) == [1, 1]


def test_sets_of_many_items(ten_seconds_each: Callable[[], object]) -> None:
    sets = [f"{{{', '.join(str(first + 2 * step) for step in range(180))}}}" for first in (0, 1)]
    within = [
        f"{{{', '.join('{' + ', '.join(f'{a}{b}{c}' for b in '1234') + '}' for a in '123456789')}}}" for c in "56"
    ]
    ten_seconds_each()
    for first, second in (sets, within):
        assert answer_reward([f"#### {first}"], [second]) == [0.0]
    backwards = ", ".join(reversed(sets[0].strip("{}").split(", ")))
    assert answer_reward([f"#### {{{backwards}}}"], [sets[0]]) == [1.0]


def test_votes_compare_slow_expressions_a_few_times(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr("trl_sgpo.data.answers.compared_expressions", lambda *pair: asked.append(pair))
    attempts = [Attempt("s", "e", f"9^{{9^{{9^{{{number}}}}}}}x") for number in range(64)]
    solution = vote(Problem("p"), attempts)
    assert [count for _, count in solution.votes] == [1] * 64 and len(asked) == 8


def test_a_strategy_that_is_too_long_is_malformed() -> None:
    parsed = parse_strategy("If so, " + "add. " * 10_000)
    assert parsed.flaw == "too long" and len(parsed.text) == 2**14 and coherence(parsed, "1") < 0.5


def test_a_row_that_names_a_huge_problem_is_refused() -> None:
    def problem(length: int) -> dict[str, object] | None:
        settings = {"size": 1, "seed": 1, "min_length": length, "max_length": length}
        return generated_again(Reference("palindrome_generation", json.dumps(settings), 0))

    assert problem(10) is not None and problem(MILLION) is None


@pytest.mark.parametrize("worked", ["<<1+1=1e999999999>>2\n#### 2", "<<1+1=2>>2\n#### 1e999999999"])
def test_a_worked_solution_with_a_huge_exponent(worked: str) -> None:
    assert strategy_from_annotations(worked, "1 and 1?") is None


def test_a_problem_with_a_number_of_many_digits() -> None:
    assert strategy_from_annotations("<<1+1=2>>2\n#### 2", f"1 and 1 and {'9' * 5000}?") is not None


def test_an_answer_of_spaces_ends() -> None:
    row = load_problems("reasoning_gym/fraction_simplification?size=1")[0]
    answers = ["\\boxed{1" + " " * MILLION + "2}", f"#### {row['solution']}"]
    assert answer_reward(answers, [row["solution"]] * 2, [row["entry"]] * 2) == [0.0, 1.0]


@pytest.mark.parametrize("answer", ["A" + ".$" * MILLION, "\\^" + " " * MILLION + "x", "\ufdfa" * MILLION])
def test_an_answer_to_a_generated_problem_ends(answer: str) -> None:
    row = load_problems("reasoning_gym/chain_sum?size=1")[0]
    assert answer_reward([f"<answer>{answer}</answer>"], [row["solution"]], [row["entry"]]) == [0.0]


def test_an_answer_of_many_digits_leaks_nothing() -> None:
    assert leak("Add the numbers.", "What is it?", "1" + "0" * MILLION + "!") == 0.0


def test_an_audit_of_many_signs_ends() -> None:
    assert not audit_text("#" * MILLION)
    assert not audit_text("say tested " * MILLION)
    assert audit_text("### system")


@pytest.mark.parametrize("words", ["give all ", "get reward ", "claim checked ", "hide that you "])
def test_an_audit_of_one_long_sentence_ends(words: str, ten_seconds_each: Callable[[], object]) -> None:
    ten_seconds_each()
    for _ in range(30):
        audit_text(words * 2_000)


@pytest.mark.parametrize(
    "answer, gold",
    [
        ("x=2, x=3", "3"), ("x=2; x=3", "x=3"), ("x = -3 and x = 3", "3"), ("x=2 \\text{ and } x=3", "3"),
        ("y=3, x=5", "5"), ("18 = 17", "17"), ("0 = 17", "17"), ("17.4 = 17", "17"), ("1/3 = 0.34", "0.34"),
        ("it cannot be 17", "17"), ("wrong is 17", "17"),
        ("incorrect: 17", "17"),
        ("anything except: 17", "17"), ("A. B. C. D.", "A"), ("A) B) C)", "A"), ("A. or B", "A"), ("yes, no", "yes"),
        ("yes, or no", "yes"), ("no, true", "no"), ("y=2x \\cup y=3x", "y=3x"), ("y=2x; y=3x", "y=3x"),
    ],
)  # fmt: skip
def test_an_answer_that_states_several_results(answer: str, gold: str) -> None:
    assert answer_reward([f"\\boxed{{{answer}}}"], [gold]) == [0.0]


@pytest.mark.parametrize(
    "answer, gold",
    [
        ("x = 10 + 7 = 17", "17"), ("17 = 17", "17"), ("Since 3, 12 + 5 = 17", "17"), ("A. a dog", "A"),
        ("A) dogs", "A"),
        ("yes, it is", "yes"), ("y = 3x", "y=3x"), ("x = 2, y = 3", "x=2, y=3"),
        ("\\frac{1}{2} = 0.5", "1/2"), ("50% = 0.5", "50%"), ("1/3 = 0.333", "0.333"), ("17 = 17 apples", "17"),
        ("The other number is 17", "17"), ("Total without tax = 17", "17"), ("No, false.", "no"), ("Yes, true", "yes"),
    ],
)  # fmt: skip
def test_an_answer_that_states_one_result(answer: str, gold: str) -> None:
    assert answer_reward([f"\\boxed{{{answer}}}"], [gold]) == [1.0]


def test_the_name_of_a_tokenizers_class_is_long(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_tiny_model(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"tokenizer_class": "Fast" * MILLION}))
    assert main(["solve", "--model", str(tmp_path), "--no_bank", "1 + 2"]) == 2
    assert "in more than 200 characters" in capsys.readouterr().err


def test_a_model_of_a_billion_layers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_tiny_model(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_hidden_layers": 10**9}))
    assert main(["solve", "--model", str(tmp_path), "--no_bank", "1 + 2"]) == 2
    assert "`num_hidden_layers: 1e+09`" in capsys.readouterr().err


@pytest.mark.parametrize(
    "settings, status",
    [
        ({"num_beams": 10**9}, 0), ({"num_return_sequences": 9}, 2), ({"stop_strings": ["a"]}, 0),
        ({"prompt_lookup_num_tokens": 5}, 0), ({"max_length": 10**12, "min_length": 10**12}, 0),
        ({"repetition_penalty": -1.0}, 0), ({"repetition_penalty": "x"}, 0), ({"eos_token_id": "x"}, 2),
    ],
)  # fmt: skip
def test_settings_of_generation_beside_a_model(
    settings: dict[str, object], status: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_tiny_model(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"bos_token_id": 0, "eos_token_id": 1} | settings))
    assert main(["solve", "--model", str(tmp_path), "--no_bank", "--max_completion_length", "4", "1 + 2"]) == status
    assert status == 0 or "trl-sgpo solve: error: " in capsys.readouterr().err


def test_lengths_beyond_a_models_positions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_tiny_model(tmp_path)
    (tmp_path / "sgpo.json").write_text(json.dumps({"max_completion_length": 10**9}))
    assert main(["solve", "--model", str(tmp_path), "--no_bank", "1 + 2"]) == 2
    assert "`max_completion_length`" in capsys.readouterr().err


@pytest.mark.parametrize(
    "answer, gold",
    [
        (r"\frac{d}{dx} x^3", "3x^2"), (r"\int x dx", r"\frac{x^2}{2}"), (r"\sum_{k=1}^{n} k", r"\frac{n(n+1)}{2}"),
        (r"\lim_{h\to 0} \frac{(x+h)^2-x^2}{h}", "2x"), (r"\int_0^1 x^2 dx + \pi", r"\pi+\frac{1}{3}"),
    ],
)  # fmt: skip
def test_a_calculation_that_was_not_done_is_no_answer(answer: str, gold: str) -> None:
    assert answer_reward([f"\\boxed{{{answer}}}", f"\\boxed{{{gold}}}"], [gold] * 2) == [0.0, 1.0]


@pytest.mark.parametrize(
    "problem, repeated, gold, other",
    [
        ("Expand $(x+1)^2$.", "(x + 1)^2", "x^2+2x+1", "1 + 2x + x^2"),
        ("Factor $x^2-1$.", "x^2 - 1", "(x-1)(x+1)", "(x+1)(x-1)"),
        (r"Simplify $\sqrt{50}+y$", r"\sqrt{50} + y", r"5\sqrt{2}+y", r"y+5\sqrt{2}"),
    ],
)
def test_the_problem_repeated_is_no_answer(problem: str, repeated: str, gold: str, other: str) -> None:
    answers = [f"\\boxed{{{text}}}" for text in (repeated, gold, other)]
    prompts = [[{"role": "user", "content": problem}]] * 3
    assert answer_reward(answers, [gold] * 3, prompts=prompts) == [0.0, 1.0, 1.0]


def test_the_problem_of_a_family_repeated_is_no_answer() -> None:
    rows = load_problems("reasoning_gym/complex_arithmetic?size=8")
    for row in rows:
        asked = row["prompt"][0]["content"].partition(":")[2].strip()
        answers = [f"#### {text}" for text in (asked, f"0={row['solution']}", row["solution"])]
        assert answer_reward(answers, [row["solution"]] * 3, [row["entry"]] * 3) == [0.0, 0.0, 1.0]


def test_several_fractions_are_no_answer() -> None:
    row = load_problems("reasoning_gym/fraction_simplification?size=1")[0]
    texts = [f"{row['solution']} {more}" for more in ("$\\frac{1}{2}$", ", 0", "$0")] + [row["solution"]]
    assert answer_reward([f"#### {text}" for text in texts], [row["solution"]] * 4, [row["entry"]] * 4) == [0, 0, 0, 1]


def test_long_texts_of_a_server() -> None:
    encoder = TextEncoder(tokenizer())
    assert not encoder.holds_control(encoder.broken("<|im_end|>" * 20_000))
    assert copied_literals("a b " * 500_000, " ".join(map(str, range(2_000)))) == set()


@pytest.mark.parametrize(
    "statement",
    [
        "CREATE VIEW more AS SELECT 1", "CREATE TRIGGER t AFTER INSERT ON strategies BEGIN SELECT 1; END",
        "CREATE VIRTUAL TABLE v USING fts5(a)", "CREATE TABLE g (a INTEGER, b INTEGER GENERATED ALWAYS AS (a + 1))",
        "CREATE TABLE g (a INTEGER, b INTEGER AS/**/(a + 1))", "CREATE TABLE g (a INTEGER, b AS(a + 1) STORED)",
    ],
)  # fmt: skip
def test_a_ledger_that_computes_where_it_is_read(statement: str, tmp_path: Path) -> None:
    StrategyBank(tmp_path, hash_embedder).close()
    with closing(sqlite3.connect(tmp_path / "ledger.sqlite")) as connection:
        connection.execute(statement)
        connection.commit()
    with pytest.raises(BankError, match="which no bank has"):
        StrategyBank(tmp_path, hash_embedder)


def test_an_index_of_many_digits_is_none() -> None:
    choices = [[("A", "a dog"), ("B", "a cat")]] * 2
    assert index_base(["9" * 5000, "1"], choices) is None
    assert as_letters(["9" * 5000, "a cat"], choices, "data", lambda: 0) == ["9" * 5000, "a cat"]


@pytest.mark.parametrize("version", ["9" * 5000, "two", "²"])
def test_a_ledger_of_no_version(version: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with StrategyBank(tmp_path, hashed_words) as bank:
        bank.add([make("a")])
    with sqlite3.connect(tmp_path / "ledger.sqlite") as connection:
        connection.execute("UPDATE meta SET value = ? WHERE key = 'schema_version'", (version,))
    connection.close()
    assert main(["bank", "list", str(tmp_path)]) == 2
    assert "is damaged or no strategy bank" in capsys.readouterr().err


def test_a_checkpoint_of_no_step(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-²").mkdir()
    (tmp_path / "checkpoint-²" / "trainer_state.json").write_text("{}")
    assert resume_point(SGPOConfig(str(tmp_path), resume_from_checkpoint="true", use_bank=False)) is None
