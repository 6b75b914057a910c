"""Answers and rows of a dataset run no code, do not end the process, and do not keep it busy."""

import ast
import inspect
import json
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from trl_sgpo.data.families import EVALUATING
from trl_sgpo.data.generated import gym
from trl_sgpo.data.tasks import answer_reward, load_problems


# Calls by which a module may run a text as code. `parse_expr` and `sympify` of SymPy evaluate it.
RUNS_TEXT = {"eval", "exec", "__import__", "parse_expr", "sympify", "lambdify", "system", "popen", "Popen"}
CODE = "__import__('pathlib').Path('owned').touch()"
MATRIX, STRING, BOARD = f"[[{CODE}]]", f"[str({CODE})]", f"[[str({CODE})]]"
# fmt: off
ANSWERS = {
    "spiral_matrix": MATRIX, "string_insertion": STRING, "binary_matrix": MATRIX, "n_queens": BOARD,
    "countdown": CODE, "puzzle24": CODE, "simple_integration": CODE, "intermediate_integration": CODE,
    "polynomial_multiplication": CODE, "bitwise_arithmetic": CODE, "number_sorting": MATRIX, "codeio": f"{{{CODE}}}",
}
# fmt: on


@pytest.mark.parametrize("family", sorted(ANSWERS))
def test_an_answer_runs_no_code(family):
    row = load_problems(f"reasoning_gym/{family}?size=1")[0]
    assert answer_reward([f"#### {ANSWERS[family]}"], [row["solution"]], [row["entry"]]) == [0.0]
    assert not Path("owned").exists()


@pytest.mark.parametrize("family", sorted(ANSWERS))
def test_an_answer_does_not_end_the_process(family):
    row = load_problems(f"reasoning_gym/{family}?size=1")[0]
    assert answer_reward(["#### exit(6)", "#### quit()"], [row["solution"]] * 2, [row["entry"]] * 2) == [0.0, 0.0]


@pytest.mark.parametrize("answer", ["9**9**9**9", "(x+1)**100000", "factorial(10**8)", "(" * 20_000, "1," * 5_001])
@pytest.mark.parametrize("family", ["countdown", "simple_integration", "polynomial_multiplication", "number_sorting"])
def test_an_answer_ends(family, answer):
    row = load_problems(f"reasoning_gym/{family}?size=1")[0]
    assert answer_reward([f"#### {answer}"], [row["solution"]], [row["entry"]]) == [0.0]


MATHEMATICS = ["9^{9^{9^{9}}}", "((((9!)!)!)!)", "(x+1)**100000"]


@pytest.mark.parametrize("answer", MATHEMATICS)
def test_mathematics_ends(answer: str) -> None:
    assert answer_reward([f"\\boxed{{{answer}}}", "\\boxed{2+x}"], ["x+2"] * 2) == [0.0, 1.0]


def test_mathematics_ends_in_threads() -> None:
    """A limit by the alarm of the main thread has no effect there."""
    answers = [*MATHEMATICS, "2+x"]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda answer: answer_reward([f"\\boxed{{{answer}}}"], ["x+2"]), answers))
    assert found == [[0.0], [0.0], [0.0], [1.0]]


ENTRIES = {
    "simple_integration": ("1", {"variable": "x", "integrand": CODE}),
    "intermediate_integration": ("1", {"variable": "x", "integrand": CODE}),
    "polynomial_multiplication": (CODE, {}),
    "number_sorting": (CODE, {"direction": "ascending"}),
    "bitwise_arithmetic": ("1", {"problem": CODE}),
}


@pytest.mark.parametrize("family", sorted(ENTRIES))
def test_a_row_runs_no_code(family):
    answer, metadata = ENTRIES[family]
    entry = json.dumps({"answer": answer, "metadata": {"source_dataset": family, **metadata}})
    assert answer_reward(["#### [2]", "#### x"], ["3", "3"], [entry, entry]) == [0.0, 0.0]
    assert not Path("owned").exists()


# fmt: off
COLUMNS = [
    "", "no JSON", "{", "[" * 100_000, "null", "3", '{"metadata": 3}', '{"metadata": {"source_dataset": "lcm"}}',
    "reasoning_gym/lcm#0", "reasoning_gym/no_such?size=1#0", "reasoning_gym/lcm?size=1#999999999",
    "reasoning_gym/lcm?max_numbers=999999999&min_numbers=999999998#0", "reasoning_gym/lcm?size=-1#0",
    "reasoning_gym/spell_backward?data_file=../../etc/passwd#0", "reasoning_gym/../os?x=1#0",
]
# fmt: on


@pytest.mark.parametrize("entry", COLUMNS, ids=lambda entry: entry[:50])
def test_a_column_entry_of_ones_own_is_just_a_column(entry):
    assert answer_reward(["#### 7", "#### seven", "#### 8"], ["7"] * 3, [entry] * 3) == [1.0, 1.0, 0.0]


def test_every_family_that_evaluates_text_is_known():
    gym()
    from reasoning_gym.factory import DATASETS

    found = set()
    for family, (kind, _) in DATASETS.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(inspect.getsource(inspect.getmodule(kind)))
        called = {
            node.func.id if isinstance(node.func, ast.Name) else node.func.attr
            for node in ast.walk(tree)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute)
        }
        if called & RUNS_TEXT:
            found.add(family)
    assert found == EVALUATING
