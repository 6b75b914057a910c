"""The ladder of the answer checker: each rung, what it must not accept, and its limits."""

import json
import os
import sys
import threading
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_sgpo.checks import process as checking
from trl_sgpo.checks.process import CheckProcess
from trl_sgpo.data import expressions
from trl_sgpo.data.answers import answer_reward, check_answer, same_answer, same_answer_text
from trl_sgpo.data.final_answers import final_answer
from trl_sgpo.data.numbers import read_number, same_number
from trl_sgpo.data.plain_text import plain_text
from trl_sgpo.data.tasks import load_problems
from trl_sgpo.errors import DataError


CASES = [json.loads(line) for line in Path(__file__).with_name("answer_cases.jsonl").read_text().splitlines()]
DATA_DIR = os.environ.get("TRL_SGPO_DATA_DIR")
# fmt: off
ONES = [
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
]
TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
# fmt: on


def in_words(number):
    """An integer below a million in English."""
    if number < 20:
        return ONES[number]
    if number < 100:
        return TENS[number // 10 - 2] + (f"-{ONES[number % 10]}" if number % 10 else "")
    if number < 1000:
        return f"{ONES[number // 100]} hundred" + (f" and {in_words(number % 100)}" if number % 100 else "")
    rest = number % 1000
    return f"{in_words(number // 1000)} thousand" + (f" {in_words(rest)}" if rest else "")


FORMS = {
    "unit": lambda n: f"#### {n} apples",
    "unit in a sentence": lambda n: f"So the answer is {n} red apples.",
    "currency": lambda n: f"#### ${n:,}.00",
    "currency behind": lambda n: f"#### {n} €",
    "words": lambda n: f"#### {in_words(n)} apples",
    "boxed": lambda n: rf"Thus \boxed{{{n}\text{{ apples}}}}.",
    "tags": lambda n: f"<answer>\n{n}\n</answer>",
    "bold": lambda n: f"**Final answer:** **{n:,}**",
    "exponent": lambda n: f"#### {n / 10 ** (len(str(n)) - 1)}e{len(str(n)) - 1}",
    "fraction": lambda n: rf"#### \frac{{{2 * n}}}{{2}}",
}


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['solution']}|{case['completion']}")
def test_cases(case):
    assert answer_reward([case["completion"]], [case["solution"]]) == [case["right"]]


@settings(deadline=None)
@given(number=st.integers(0, 999_999), other=st.integers(0, 999_999), form=st.sampled_from(sorted(FORMS)))
def test_numbers_in_every_form(number, other, form):
    text = FORMS[form](number)
    assert answer_reward([text, text], [str(number), f"{number} (apples)"]) == [1.0, 1.0]
    assert answer_reward([text], [str(other)]) == [float(number == other)]


@pytest.mark.skipif(DATA_DIR is None, reason="TRL_SGPO_DATA_DIR names no directory with gsm8k/ and math500/")
@pytest.mark.parametrize("form", FORMS)
def test_forms_of_real_solutions(form):
    solutions = load_problems(str(Path(DATA_DIR) / "gsm8k" / "test.jsonl"))["solution"]
    whole = [int(solution.replace(",", "")) for solution in solutions if solution.replace(",", "").isdecimal()]
    assert len(whole) >= 0.99 * len(solutions)
    accepted = answer_reward([FORMS[form](number) for number in whole], list(map(str, whole)))
    assert sum(accepted) >= 0.98 * len(solutions)


@pytest.mark.parametrize(
    ("text", "value", "measure"),
    [
        ("−1,234.50", "-1234.5", None),
        ("1 234 567", "1234567", None),
        ("1½ cups", "1.5", "cups"),
        (r"1\frac{1}{2}", "1.5", None),
        (r"-\dfrac34", "-0.75", None),
        (r"1{,}234\text{ cm}^2", "1234", "length^2"),
        ("6 square centimeters", "6", "length^2"),
        ("60 miles per hour", "60", "length/time"),
        ("$1.2 million", "1200000", "money-usd"),
        ("Rs. 50", "50", "money-inr"),
        (r"90^\circ", "90", "angle"),
        (r"1.2 \times 10^{3}", "1200", None),
        ("10^-2", "0.01", None),
        ("minus twenty-one", "-21", None),
        ("two thousand three hundred and five dollars", "2305", "money-usd"),
        ("a dozen eggs", "12", None),
        ("x = 5", "5", None),
        ("**9** apples", "9", None),
        ("5-year-old", "5", None),
        ("two and a half hours", "2.5", "time"),
        ("two thirds", "2/3", None),
        (r"0.1\overline{6}", "1/6", None),
        ("2 hundred thousand", "200000", None),
        ("50% of the students", "50", None),
        ("٣", "3", None),
    ],
)
def test_read_number(text, value, measure):
    number, wanted = read_number(plain_text(text)), read_number(value)
    assert number is not None and wanted is not None
    assert (number.value, number.unit.dimension) == (wanted.value, measure)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "5x",
        "5m",
        "5xy",
        "5 sin x",
        "3*4",
        "5-3",
        "3/4/2024",
        "10:30",
        "5 out of 10",
        "5 or 6",
        "five twenty",
        "1,23",
        "2 5 9",
        "(1,2)",
        "1/0",
        "1e999999",
        "9" * 500,
        "5 ft 3 in",
        "eat",
        "5!",
        "--5",
    ],
)
def test_texts_that_are_no_number(text):
    assert read_number(plain_text(text)) is None


@pytest.mark.parametrize(
    ("answer", "gold", "right", "rung"),
    [
        ("Tea", "tea", True, "text"),
        ("(B)", "B", True, "text"),
        ("x+1", "x + 1", True, "text"),
        ("eat", "tea", False, "text"),
        ("cat-dog", "dog-cat", False, "text"),
        ("no/on", "on/no", False, "text"),
        ("9 oranges", "9", True, "number"),
        ("5 cents", "5 dollars", False, "number"),
        ("$5", "5 dollars", True, "number"),
        ("10 pm", "10 am", False, "number"),
        ("50%", "0.5", True, "number"),
        ("50", "50%", True, "number"),
        ("0.333333", r"\frac{1}{3}", True, "number"),
        ("0.33", r"\frac{1}{3}", False, "number"),
        ("12*13", "156", False, "number"),
        ("[2, 5, 9]", "2 5 9", True, "list"),
        ("2, 5 and nine", "2 5 9", True, "list"),
        ("259", "2 5 9", False, "list"),
        ("[1, 2]", "(1, 2)", False, "list"),
        (r"\{2, 1\}", r"\{1, 2\}", True, "list"),
        ("[[1,2],[3,4]]", "[[1, 2], [4, 3]]", False, "list"),
        ("[]", "[]", True, "text"),
        (r"(\sqrt{12}, 1)", r"(2\sqrt{3}, 1)", True, "list"),
        (r"\sqrt{12}", r"2\sqrt{3}", True, "mathematics"),
        ("2", r"\sqrt{4}", True, "mathematics"),
        ("1+x", "x + 1", True, "mathematics"),
        ("x", "y", False, "mathematics"),
        (r"2√3", r"\sqrt{12}", True, "mathematics"),
        ("60 minutes", "1 hour", True, "number"),
        ("60 km", "60 miles", False, "number"),
        ("60 miles", "60 mph", False, "number"),
        ("$5", "$5 per hour", True, "number"),
        ("5%", "5 dollars", False, "number"),
        ("5 May", "5 June", False, "number"),
        ("$5 loss", "$5 profit", False, "number"),
        ("5 (five apples)", "5", True, "number"),
        ("y = 5", "x = 5", False, "number"),
        ("0.000000", "1/3000000", False, "number"),
        ("40_9", "40_5", False, "number"),
        ("40", "40_{5}", True, "number"),
        ("three eighths", "3", False, "number"),
        ("x = 1, y = 2", "y = 2, x = 1", True, "list"),
        ("x = 2, y = 1", "y = 2, x = 1", False, "list"),
        ("x = 1 or x = 2", "1, 2", True, "list"),
        (r"x \in (1, 2)", "(1, 2)", True, "list"),
        ("1,000", "1, 0", False, "list"),
        ("2024-01-02", "2024-02-01", False, "text"),
        ("2:30", "1:15", False, "text"),
        ("5-6", "6-7", False, "text"),
        ("4B", "B4", False, "text"),
        ("10:30am", "10:30 AM", True, "text"),
        ("3 PM", "3:00 PM", True, "text"),
        ("10:30 PM", "10:30 AM", False, "text"),
        ("A. Paris", "A", True, "text"),
        ("Option (A)", "A", True, "text"),
        ("B", "A", False, "mathematics"),
        ("Yes, because 3 > 2", "yes", True, "text"),
        ("5x", "5", False, "number"),
        ("12 + 5 = 17", "17", True, "number"),
        ("12 + 5 = 17 shells", "17 (shells)", True, "number"),
        ("Noor has 17 shells left", "17 (shells)", True, "number"),
        ("shells = 17", "17", True, "number"),
        ("shells: 17", "17", True, "number"),
        ("She needs $17", "17", True, "number"),
        ("12 + 5 = 18", "17", False, "number"),
        ("Noor has 18 shells", "17", False, "number"),
        ("it is not 17", "17", False, "number"),
        ("there are more than 17", "17", False, "number"),
        ("Step 17", "17", False, "number"),
        ("it is 17 or 18", "17", False, "list"),
        ("17 != 17", "17", False, "number"),
        ("5", "5x", False, "mathematics"),
    ],
)
def test_rungs(answer, gold, right, rung):
    found = check_answer(answer, gold)
    assert (found.right, found.rung) == (right, rung)
    assert same_answer(answer, gold) == right


def test_the_family_decides_for_its_problems():
    row = load_problems("reasoning_gym/game_of_life?size=1")[0]
    assert check_answer(row["solution"], row["solution"], row["entry"]).right
    assert check_answer("9", row["solution"], row["entry"]) == check_answer("[[9]]", row["solution"], row["entry"])
    assert check_answer("9", row["solution"], row["entry"]).rung == "family"
    number = load_problems("reasoning_gym/gcd?size=1")[0]
    assert check_answer(f"{number['solution']} apples", number["solution"], number["entry"]).right
    assert not check_answer("987654", number["solution"], number["entry"]).right


@pytest.mark.parametrize("family", ["puzzle24", "countdown", "game_of_life_halting", "rotate_matrix", "sudoku", "gcd"])
def test_families_accept_their_solutions_only(family):
    rows = load_problems(f"reasoning_gym/{family}?size=8").to_list()
    columns = {"solution": [row["solution"] for row in rows], "entry": [row["entry"] for row in rows]}
    assert (
        answer_reward([f"#### {solution}\nThat is all." for solution in columns["solution"]], **columns) == [1.0] * 8
    )
    for other in columns["solution"]:
        found = answer_reward([f"#### {other}"] * 8, **columns)
        assert found == [float(solution == other) for solution in columns["solution"]]


@pytest.mark.parametrize("family", ["gsm_symbolic", "coin_flip", "complex_arithmetic", "letter_jumble", "sokoban"])
@pytest.mark.parametrize("form", ["not {}", "{} or 5", "nan", "0"])
def test_families_accept_no_more_than_an_answer(family, form):
    row = load_problems(f"reasoning_gym/{family}?size=1")[0]
    assert answer_reward([f"#### {form.format(row['solution'])}"], [row["solution"]], [row["entry"]]) == [0.0]


def test_solutions_are_texts_or_numbers():
    assert answer_reward(["#### 5", "#### 0.5"], [5, 0.5]) == [1.0, 1.0]
    with pytest.raises(DataError, match="answer_column"):
        answer_reward(["#### 5"])
    for solution in (True, [5], {"a": 5}):
        with pytest.raises(DataError, match="short text or a number"):
            answer_reward(["#### 5"], [solution])


def test_another_calculation(monkeypatch):
    monkeypatch.setattr("trl_sgpo.data.families.generated_again", lambda reference: puzzle)
    puzzle = {"answer": "10*(8 - 5) - 6", "metadata": {"numbers": [8, 5, 10, 6]}}
    entry = "reasoning_gym/puzzle24?size=640&seed=1#0"
    answers = ["(8-5)*10 - 6", "6*4", "10*(8 - 5) - 6 + 0", "24", "8 - 5/0 + 10 + 6", "9**9**9**9"]
    answers += ["10*(8 - 5) - 6 + 0.5 - 0.5"]
    assert [check_answer(answer, "10*(8 - 5) - 6", entry).right for answer in answers] == [True] + [False] * 6


def test_a_constant_of_integration_may_only_be_added(monkeypatch):
    problem = {"answer": "x**2 + C", "metadata": {"integrand": "2*x", "variable": "x"}}
    monkeypatch.setattr("trl_sgpo.data.families.generated_again", lambda reference: problem)
    entry = "reasoning_gym/simple_integration?size=640&seed=1#0"
    answers = ["x*x + C", "C + x**2 - 3", "x**2", "x**2 + C*x", "x**2 + C*x**3", "x**3 + C"]
    found = [check_answer(answer, "x**2 + C", entry).right for answer in answers]
    assert found == [True, True, True, False, False, False]


def test_a_problem_that_cannot_be_generated_again_is_told(caplog):
    entry = "reasoning_gym/countdown?size=640&seed=999#0"
    for _ in range(2):
        assert not check_answer("1 + 1", "no solution of it", entry).right
    assert caplog.text.count("is another problem now") == 1


def test_a_comparison_that_passes_a_limit_is_told(caplog, monkeypatch):
    monkeypatch.setitem(checking.SECONDS, "equal", 0.0)
    process = CheckProcess()
    try:
        for _ in range(2):
            assert process.ask("equal", "x+1", "1+x") is None
    finally:
        process.close()
    assert caplog.text.count("counts as not equal") == 1


@given(st.text(alphabet="0123456789+-*/^() .aexlogsin_", max_size=40))
def test_expressions(text):
    try:
        parsed = expressions.parse(text)
        for algebra in (expressions.EXACT, expressions.DIFFERENTIABLE):
            expressions.evaluate(parsed, {"x": algebra.number(2)}, algebra)
    except expressions.NotInGrammar:
        return


@pytest.mark.parametrize(
    ("text", "value"),
    [("2*(3+4)", 14), ("-3 + 10/4", Fraction(-1, 2)), ("2^3", 8), ("0.1 + 0.2", Fraction(3, 10))],
)
def test_exact_values(text, value):
    assert expressions.evaluate(expressions.parse(text), {}, expressions.EXACT) == value


# fmt: off
OUTSIDE = [
    "True+1", "a", "2**0.5", "(" * 90, "9**9**9**9", "2**-1", "1/0", "x.real", "f(1)", "[1]", "1 if 2 else 3",
    "1" * 500, "((2**64)**64)**64", "x := 3", "__import__('os')", "lambda: 1", "+".join("1" * 190), "-" * 100 + "1",
    "1j", "''",
]
# fmt: on


@pytest.mark.parametrize("text", OUTSIDE, ids=lambda text: text[:20])
def test_texts_outside_the_grammar(text):
    with pytest.raises(expressions.NotInGrammar):
        expressions.evaluate(expressions.parse(text), {}, expressions.EXACT)


@settings(deadline=None)
@given(st.floats(0.3, 1.7), st.sampled_from(sorted(expressions.DIFFERENTIABLE.functions)))
def test_derivatives(point, name):
    if name in ("asin", "acos"):
        point /= 2
    step = 1e-6
    parsed = expressions.parse(f"{name}(x)**3/x - 2**x + x**1.5")

    def at(value, slope=0.0):
        return expressions.evaluate(parsed, {"x": expressions.Dual(complex(value), slope)}, expressions.DIFFERENTIABLE)

    numeric = (at(point + step).value - at(point - step).value) / (2 * step)
    assert abs(at(point, 1.0).slope - numeric) <= 1e-4 * max(1, abs(numeric))


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("#### 3\nNo:\n\\boxed{4}", "4"),
        ("\\boxed{4}, so\n#### 3", "3"),
        ("#### Step 1\nadd\n**Answer:** 5", "Step 1"),
        ("<answer> 5 </answer>", "5"),
        ("<answer>5", "5"),
        (r"#### $\boxed{5}$", "5"),
        ("#### The answer is 5.", "5"),
        ("The answer is 5. Because 2 + 3 is 5.", "5"),
        ("The answer is St. Louis.", "St. Louis"),
        ("The answer to the question is 3.5.", "3.5"),
        ("**Final Answer**\n\n5", "5"),
        ("(answer: 5)", "5"),
        ("So she has **9 apples**.", "9 apples"),
        ("**Step 1:** add", None),
        ("<think>The answer is 4</think>I do not know", None),
        ("<think>The answer is 4</think>\n#### 5", "5"),
        ("<think>The answer is 4", None),
        ("Use the <think> tag. The answer is 7.", "7"),
        ("\\boxed{" * 10_000, None),
        ("#### ####", None),
        ("##### 12", "12"),
        (r"Thus $\boxed 12$.", "12"),
        (r"\boxed{7}, no: \boxed -3.5", "-3.5"),
        (r"\boxed \frac{1}{2}", r"\frac{1}{2}"),
        (r"\boxed is a command", None),
        ("#### 5 ####", "5"),
        ("#### A# B#", "A# B#"),
        ("The answer is 5. This answer is correct.", "5"),
        ("Answer: 5\nLet me verify the answer: 2+3=5.", "5"),
        ("The answer is 5 because 2+3=5.", "5"),
        ("The answer is 5, not 6.", "5"),
        ("The answer is therefore **5** apples.", "5 apples"),
        ("Answer:\n\\[\n5\n\\]", "5"),
    ],
)
def test_final_answer(text, answer):
    assert final_answer(text) == answer


@settings(deadline=None)
@given(st.text(max_size=60), st.text(max_size=60))
def test_any_text(first, second):
    assert same_answer_text(first, first)
    assert same_answer_text(first, second) in (True, False)
    found = final_answer(first)
    assert found is None or found in first


# fmt: off
PIECES = [
    "5", "1,000", "0.5", "-", "+", "/", "*", "^", "2", "3", "x", "=", "cm", "km", "h", "$", "€", "%", "°", "apples",
    "of", "and", "or", "half", "five", "twenty", "hundred", "third", "per", "square", "(", ")", "[", "]", "{", "}",
    ",", ";", ":", "\\frac", "\\sqrt", "\\text{", "\\pi", "_", "e3", "May", "am", "A", "**", "`", "\\overline{3}",
    ".", "10", "x 10^", " ",
]
# fmt: on


@settings(deadline=None, max_examples=500)
@given(st.lists(st.sampled_from(PIECES), max_size=8), st.lists(st.sampled_from(PIECES), max_size=8))
def test_texts_of_pieces(first, second):
    for join in ("", " "):
        assert same_answer_text(join.join(first), join.join(first))
        assert same_answer_text(join.join(first), join.join(second)) in (True, False)


@given(st.fractions(max_denominator=1000), st.integers(0, 8))
def test_numbers_are_exact(value, places):
    fraction = read_number(f"{value.numerator}/{value.denominator}")
    assert fraction is not None and fraction.value == value
    decimal = read_number(f"{float(value):.{places}f}")
    assert decimal is not None
    assert same_number(decimal, fraction) == (
        decimal.value == value
        or (places >= 6 and abs(decimal.value) >= 10 ** (5 - places) and abs(decimal.value - value) <= 10**-places / 2)
    )


HOSTILE = [
    "9^{9^{9^{9}}}+x",
    "((((9!)!)!)!)+x",
    "(x+1)^{100000}",
    "(" * 20_000 + "x",
    "(" * 400 + "x" + ")" * 400,
    r"\sum_{n=1}^{10^{12}} n^{x}",
    "__import__('os').system('touch owned')",
    "x" * 100_000,
]


@pytest.mark.parametrize("answer", HOSTILE, ids=lambda answer: answer[:20])
def test_hostile_expressions_are_wrong_answers(answer):
    assert answer_reward([f"#### {answer}", r"#### \sqrt{12}"], ["x + 2", r"2\sqrt{3}"]) == [0.0, 1.0]
    assert not Path("owned").exists()


def test_the_process_is_started_again():
    process = CheckProcess()
    try:
        assert process.ask("equal", "x+1", "1+x")
        process._process.kill()
        process._process.wait()
        assert process.ask("equal", "x+1", "1+x") and not process.ask("equal", "x+1", "x+2")
    finally:
        process.close()


class Interrupted:
    def __init__(self, pipe):
        self.close = pipe.close

    def readline(self):
        raise KeyboardInterrupt


def test_an_interrupted_request_gives_no_later_one_its_reply(monkeypatch):
    process = CheckProcess()
    try:
        assert process.ask("equal", "x+1", "1+x")
        monkeypatch.setattr(process._process, "stdout", Interrupted(process._process.stdout))
        with pytest.raises(KeyboardInterrupt):
            process.ask("equal", "x+1", "x+2")
        monkeypatch.undo()
        assert process.ask("equal", "x+1", "1+x") and not process.ask("equal", "x+1", "x+2")
    finally:
        process.close()


@pytest.mark.skipif(sys.platform != "linux", reason="limits of another process are set on Linux only")
@pytest.mark.parametrize("loaded", [True, False])
def test_memory_that_earlier_requests_took_fails_no_request(loaded):
    import resource

    messages, template = [{"role": "user", "content": "2+2"}], {"chat_template": "{{ 'x' * 4000000 }}"}
    process = CheckProcess()
    try:
        if loaded:
            assert process.ask("render", messages, template)[0] == "text"
        assert process.ask("equal", "x+1", "1+x")
        taken = int(Path(f"/proc/{process._process.pid}/statm").read_text().split()[0]) * resource.getpagesize()
        resource.prlimit(process._process.pid, resource.RLIMIT_AS, (taken, taken))
        assert process.ask("render", messages, template)[0] == "text"
    finally:
        process.close()


def test_a_comparison_that_does_not_end(monkeypatch):
    monkeypatch.setitem(checking.SECONDS, "equal", 0.0)
    process = CheckProcess()
    try:
        assert process.ask("equal", "x+1", "1+x") is None
        monkeypatch.undo()
        assert process.ask("equal", "x+1", "1+x") is True
    finally:
        process.close()


def test_a_process_that_ended_before_it_read_a_request():
    process = CheckProcess()
    assert process.ask("equal", "x+1", "1+x") is True
    process._process.kill()
    process._process.wait()
    process._process.stdin.write(b"[]\n")
    process.close()


def test_comparisons_from_threads():
    found = {}

    def compare(number):
        found[number] = same_answer(f"x+{number}", f"{number}+x"), same_answer(f"x+{number}", "x+1000")

    threads = [threading.Thread(target=compare, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == dict.fromkeys(range(8), (True, False))


def test_a_package_is_missing(monkeypatch):
    monkeypatch.setattr(checking.importlib.util, "find_spec", lambda name: None)
    process = CheckProcess()
    try:
        with pytest.raises(DataError, match=r"trl-sgpo\[math\]"):
            process.ask("equal", "x+1", "1+x")
        with pytest.raises(DataError, match=r"trl-sgpo\[gym\]"):
            process.ask("entry", "lcm", "{}", 0)
    finally:
        process.close()


@pytest.mark.parametrize("answer", ["9 apples", "five", "1 1/2", "eat", "[1, 2]"])
def test_numbers_and_words_need_no_mathematics(answer, monkeypatch):
    monkeypatch.setattr("trl_sgpo.data.answers.compared_expressions", lambda gold, answer: pytest.fail("mathematics"))
    assert answer_reward([f"#### {answer}"], ["12"]) == [0.0]


@pytest.mark.parametrize("item", ["{0}.0", "{0}.00", "${0}$"])
def test_sets_of_many_numbers_are_compared_as_numbers(item):
    first = [str(number) for number in range(10, 30)]
    second = [item.format(number) for number in reversed(first)]
    assert answer_reward([f"#### {{{', '.join(second)}}}"], [f"{{{', '.join(first)}}}"]) == [1.0]
    second[0] = "99"
    assert answer_reward([f"#### {{{', '.join(second)}}}"], [f"{{{', '.join(first)}}}"]) == [0.0]
