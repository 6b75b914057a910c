"""Synthetic data, the pure part and a block with a known writer: acceptance, the rule for annotations, files."""

import json
import os
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_sgpo.data.acceptance import (
    Executed,
    Tried,
    find_flaw,
    kept,
    lift,
    pool,
    rejection,
    summarize,
    to_traces,
)
from trl_sgpo.data.annotations import strategy_from_annotations, worked_execution
from trl_sgpo.data.bootstrap import Block as RecordedBlock
from trl_sgpo.data.bootstrap import Plan, by_rule, by_writer, cut_blocks, open_record, run_blocks, try_block
from trl_sgpo.data.tasks import answer_reward, final_answer
from trl_sgpo.data.trace_files import read_traces, write_traces
from trl_sgpo.data.worked import Trace
from trl_sgpo.errors import ConfigError, DataError
from trl_sgpo.inference.model import Decoding
from trl_sgpo.method.prompts import parse_strategy


properties = settings(max_examples=100, deadline=None, derandomize=True)
shares = st.none() | st.floats(0, 1)
executions = st.builds(Executed, st.sampled_from("abcd"), st.just("x"), shares, shares, st.booleans())
tried = st.builds(
    Tried,
    st.sampled_from(["Add.", "add. ", "Guess."]),
    st.sampled_from(["sum", "product"]),
    st.sampled_from([("a",), ("b",)]),
    st.sampled_from([None, None, "leak"]),
    st.lists(executions, max_size=4).map(tuple),
)

CLIPS = (
    "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May. How many in all?",
    "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\nShe sold 48+24 = <<48+24=72>>72 clips in all.\n#### 72",
)


class TestAcceptance:
    @properties
    @given(tried, st.floats(-1, 1))
    def test_kept_means_flawless_lifting_and_right_somewhere(self, one: Tried, min_lift: float) -> None:
        gained = lift(one)
        assert gained is None or -1 <= gained <= 1
        if rejection(one, min_lift) is None:
            assert one.flaw is None and gained is not None and gained > min_lift
            assert any(execution.outcome == 1 for execution in one.executions)

    @properties
    @given(tried)
    def test_own_problem_does_not_count(self, one: Tried) -> None:
        more = Tried(one.strategy, one.problem_class, one.sources, one.flaw, (
            *one.executions, Executed(one.sources[0], "x", 1.0, 0.0),
        ))  # fmt: skip
        assert lift(more) == lift(one)

    @properties
    @given(st.lists(tried, max_size=6), st.floats(-1, 1))
    def test_every_strategy_is_kept_or_rejected_once(self, many: list[Tried], min_lift: float) -> None:
        summary = summarize(many, problems=4, tokens=0, min_lift=min_lift)
        assert summary.kept + sum(summary.rejected.values()) == summary.written == len(many)
        assert summary.distinct == len(kept(many, min_lift)) <= summary.kept
        assert sum(len(one.executions) for one in pool(many)) == sum(len(one.executions) for one in many)

    @properties
    @given(tried)
    def test_record_keeps_everything(self, one: Tried) -> None:
        assert Tried.from_dict(json.loads(json.dumps(one.to_dict()))) == one

    @pytest.mark.parametrize(
        ("text", "flaw"),
        [
            ("To add, sum the ones and the tens.", None),
            ("", "malformed (empty)"),
            ("To add, note that it is 42.", "leak"),
            ("To add, take 17 and what is bought.", "copied literals"),
        ],
    )
    def test_flaws(self, text: str, flaw: str | None) -> None:
        assert find_flaw(parse_strategy(text), "Tom has 17 apples and buys 25.", "42") == flaw

    def test_no_trace_of_a_strategy_that_has_the_siblings_answer(self) -> None:
        prompts = {key: [{"role": "user", "content": f"Problem {key}"}] for key in "ab"}
        one = Tried(
            "Always take 5.", "sum", ("a",), None, (Executed("a", "#### 4", 1, 0), Executed("b", "#### 5", 1, 0))
        )
        assert [trace.execution for trace in to_traces([one], prompts, {"a": "4", "b": "5"})] == ["#### 4"]


class TestAnnotations:
    @pytest.mark.parametrize(
        ("problem", "worked", "strategy"),
        [
            (
                *CLIPS,
                "To solve a word problem in two steps, first divide a given number by an implied number; finally add "
                "a given number and the last result.",
            ),
            (
                "Ann has $1,500, Bob three times as much, and they spend 15 and 30.",
                "1500*3 = <<1500*3=4500>>4500\n1500+4500-15-30 = <<1500+4500-15-30=5955>>5955\n#### 5,955",
                "To solve a word problem in two steps, first multiply two given numbers; finally subtract two given "
                "numbers from the sum of a given number and the last result.",
            ),
            (
                "A box of 4 by 5 is 20% full.",
                "It is .20*(4*5) = <<.20*(4*5)=4>>4.\n#### 4",
                "To solve a word problem in one step, multiply three given numbers.",
            ),
            ("He has 5.", "5-5 = <<5-5=0>>0\n5+1 = <<5+1=7>>7\n#### 7", None),  # wrong
            ("He has 5.", "5+1 = <<5+1=6>>6\n#### 7", None),  # not the answer
            ("He has 5.", "5+77 = <<5+77=82>>82\n#### 82", None),  # 77 is from nowhere
            ("He has 5.", "5*2=10\n10+5 = <<10+5=15>>15\n#### 15", None),  # a calculation without annotation
            ("He has 5.", "x = <<x=5>>5\n#### 5", None),
            ("He has 5.", "<<5/0=5>>5\n#### 5", None),
            ("He has 5.", "<<5**9=5>>5\n#### 5", None),
            ("He has 5.", "It is 5.\n#### 5", None),
        ],
    )  # fmt: skip
    def test_rule(self, problem: str, worked: str, strategy: str | None) -> None:
        assert strategy_from_annotations(worked, problem) == strategy

    @properties
    @given(st.text(alphabet="<>=+-*/().0123456789 \n#ab", max_size=60), st.text(max_size=20))
    def test_any_text_gives_a_strategy_without_digits_or_none(self, worked: str, problem: str) -> None:
        strategy = strategy_from_annotations(worked, problem)
        assert strategy is None or not re.search(r"\d", strategy)

    @properties
    @given(st.integers(13, 99), st.integers(13, 99), st.integers(13, 99))
    def test_strategy_does_not_depend_on_the_numbers(self, a: int, b: int, c: int) -> None:
        total = a + b
        worked = f"<<{a}+{b}={total}>>{total}\n<<{total}*{c}={total * c}>>{total * c}\n#### {total * c}"
        strategy = strategy_from_annotations(worked, f"{a}, {b} and {c}")
        assert strategy == (
            "To solve a word problem in two steps, first add two given numbers; finally multiply the last result and "
            "a given number."
        )

    def test_execution_forms(self) -> None:
        assert worked_execution(CLIPS[1], "72") == (
            "Natalia sold 48/2 = 24 clips in May.\nShe sold 48+24 = 72 clips in all.\n#### 72"
        )
        assert worked_execution("So \\boxed{\\frac12}.", None) == "So \\boxed{\\frac12}.\n#### \\frac12"
        assert worked_execution("No answer.", None) is None

    @pytest.mark.skipif("TRL_SGPO_DATA_DIR" not in os.environ, reason="TRL_SGPO_DATA_DIR names no data")
    def test_share_of_gsm8k(self) -> None:
        path = Path(os.environ["TRL_SGPO_DATA_DIR"], "gsm8k", "train.jsonl")
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        good = 0
        for row in rows:
            strategy = strategy_from_annotations(row["answer"], row["question"])
            if strategy is not None:
                answer = final_answer(row["answer"])
                assert find_flaw(parse_strategy(strategy), row["question"], answer) is None
                assert answer_reward([worked_execution(row["answer"], answer)], [answer]) == [1.0]
                good += 1
        assert good / len(rows) > 0.7


class TestFiles:
    def test_round_trip(self, tmp_path: Path) -> None:
        traces = [Trace([{"role": "user", "content": "1 + 1?\u2028"}], "To add, add.", "2\n#### 2", "sum é")]
        write_traces(traces, tmp_path / "traces.jsonl")
        assert read_traces(tmp_path / "traces.jsonl") == traces

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({"strategy": " "}, "`strategy`"),
            ({"execution": 7}, "`execution`"),
            ({"problem_class": None}, "`problem_class`"),
            ({"prompt": []}, "`prompt`"),
            ({"prompt": [{"role": "assistant", "content": "x"}]}, "`prompt` must end"),
            ({"prompt": [{"role": "user"}]}, "`prompt`"),
        ],
    )
    def test_bad_row_is_named(self, tmp_path: Path, change: dict, words: str) -> None:
        good = {"prompt": "1 + 1?", "strategy": "Add.", "execution": "#### 2", "problem_class": "sum"}
        path = tmp_path / "traces.jsonl"
        path.write_text("\n".join(json.dumps(row) for row in (good, good | change)))
        with pytest.raises(DataError, match=f"line 2: .*{words}"):
            read_traces(path)

    def test_no_json_no_object_no_rows_no_file(self, tmp_path: Path) -> None:
        path = tmp_path / "traces.jsonl"
        for content, words in (("{", "line 1: no JSON"), ("[]", "line 1: not an object"), ("\n", "no traces")):
            path.write_text(content)
            with pytest.raises(DataError, match=words):
                read_traces(path)
        with pytest.raises(DataError, match="cannot be read"):
            read_traces(tmp_path / "none.jsonl")

    def test_record_continues_after_a_torn_line_and_refuses_other_settings(self, tmp_path: Path) -> None:
        path, calls = tmp_path / "bootstrap.jsonl", []

        def do(indices: list[int], number: int) -> RecordedBlock:
            calls.append(number)
            return RecordedBlock([str(index) for index in indices], [], 3)

        blocks = [[0, 1], [2, 3], [4, 5]]
        ids = [str(index) for index in range(6)]
        whole = run_blocks(path, {"seed": 1}, blocks, ids, do)
        content = path.read_bytes()
        path.write_bytes(content[:-7])
        assert run_blocks(path, {"seed": 1}, blocks, ids, do) == whole and path.read_bytes() == content
        assert calls == [0, 1, 2, 2]
        with pytest.raises(ConfigError, match="seed was 1, is 2"):
            open_record(path, {"seed": 2})
        path.write_bytes(content.replace(b'"tried"', b'"tired"', 1))
        with pytest.raises(DataError, match="damaged"):
            open_record(path, {"seed": 1})


GOOD = "To add, sum the ones, then the tens."
GUESS = "To add, guess a number."
BOUND = "For just this sum, recall what it gave before."
LEAK = "To add, know that the answer is 999."


class KnownWriter:
    """Writes four strategies in turn. The good one works everywhere, the bound one on its own problem only."""

    def __init__(self) -> None:
        self.generated_tokens = 0
        self.bound: set[str] = set()
        self.executed: set[str] = set()

    def write_strategies(self, problems, decoding=None):
        self.generated_tokens += len(problems)
        return [
            parse_strategy((GOOD, GUESS, f"{BOUND} {p.text.split()[-1]}", LEAK)[i % 4]) for i, p in enumerate(problems)
        ]

    def execute(self, problems, strategies, decoding=None):
        self.executed |= set(strategies)
        texts = []
        for problem, strategy in zip(problems, strategies, strict=True):
            right = strategy == GOOD or strategy == f"{BOUND} {problem.text.split()[-1]}"
            texts.append(f"#### {problem.answer if right else -1}")
        return texts

    def answer(self, prompts, decoding=None):
        """Right every second time."""
        answers = []
        for index, prompt in enumerate(prompts):
            a, b = map(int, re.findall(r"\d+", prompt[-1]["content"])[:2])
            answers.append(f"#### {a + b if index % 2 else -1}")
        return answers


NAMES = ["alpha", "beta", "gamma", "delta"]
ROWS = [
    {"prompt": [{"role": "user", "content": f"What is {i + 20} + {i + 30}? {name}"}], "solution": str(2 * i + 50)}
    for i, name in enumerate(NAMES)
]


class TestBlock:
    def test_only_lifting_strategies_without_leak_are_kept(self) -> None:
        writer = KnownWriter()
        block = try_block(writer, ROWS, ["sum"] * 4, answer_reward, Plan(Decoding(greedy=False)))
        assert LEAK not in writer.executed and block.tokens == 16
        good = kept(block.tried, min_lift=0.1)
        assert [one.strategy for one in good] == [GOOD] and len(good[0].sources) == 4
        summary = summarize(block.tried, 4, block.tokens, 0.1)
        assert summary.rejected == {"no lift": 8, "leak": 4} and summary.kept == 4
        assert summary.baseline == 0.5

    def test_lift_is_on_siblings_against_answers_without_a_strategy(self) -> None:
        block = try_block(KnownWriter(), ROWS, ["sum"] * 4, answer_reward, Plan(Decoding(greedy=False)))
        by_text = {one.strategy: one for one in block.tried if one.sources == (block.problems[0],)}
        assert lift(by_text[GOOD]) == 0.5
        assert lift(by_text[GUESS]) == lift(by_text[f"{BOUND} alpha"]) == -0.5
        assert by_text[f"{BOUND} alpha"].executions[0].outcome == 1

    def test_what_cannot_be_verified_is_not_kept(self) -> None:
        rows = [row | {"solution": None} for row in ROWS]
        block = try_block(KnownWriter(), rows, ["sum"] * 4, answer_reward, Plan(Decoding(greedy=False)))
        assert kept(block.tried, -1.0) == []
        assert summarize(block.tried, 4, 0, -1.0).rejected["not verified"] > 0

    def test_worked_rows(self) -> None:
        prompt = [{"role": "user", "content": CLIPS[0]}]
        rows = [{"prompt": prompt, "solution": "72", "worked_solution": worked} for worked in (CLIPS[1], None)]
        (pair,), none = by_rule(rows, ["a", "a"], draws=2, seed=0)
        assert none == [] and pair[0].text.startswith("To solve a word problem in two steps")
        written, none = by_writer(KnownWriter(), rows, ["a", "a"], Plan(Decoding(), num_strategies=3))
        assert none == [] and len(written) == 3
        assert {execution for _, execution in written} == {worked_execution(CLIPS[1], "72")}

    @properties
    @given(st.lists(st.sampled_from("abc"), min_size=1, max_size=20), st.integers(2, 4), st.integers(0, 9))
    def test_blocks_are_of_one_class_and_cover_all(self, classes: list[str], size: int, seed: int) -> None:
        classes = [name for name in classes for _ in range(size)]
        blocks = cut_blocks(classes, None, size, seed)
        assert {index for block in blocks for index in block} == set(range(len(classes)))
        assert all(len(block) == size and len({classes[index] for index in block}) == 1 for block in blocks)
