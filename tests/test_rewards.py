"""Coherence and leak: examples, properties, and how well they separate labelled strategies."""

from collections import defaultdict
from statistics import median

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_sgpo.method.prompts import ParsedStrategy, parse_strategy
from trl_sgpo.method.rewards import coherence, copied_literals, distinct, leak, literals, repetition


properties = settings(max_examples=100, deadline=None, derandomize=True)
texts = st.text(alphabet=st.sampled_from("aI 12.,'\"\n{}-/$\\#é"), max_size=60) | st.text(max_size=60)

APPLES = "Tom has 17 apples and buys 25 more. How many apples does he have?"
TRAIN = "A train covers 240 miles in 4 hours. What is its average speed?"
EQUATION = "Solve for x: 3 * x + 8 = 29."
DISCOUNT = "A coat costs $80 and is sold at 15% off. What does it cost now?"
LETTERS = "How many times does the letter 'r' occur in \"strawberry\"?"
CHICKENS = "A farm has chickens and cows, 30 heads and 84 legs in all. How many cows are there?"
ANSWERS = {APPLES: "42", TRAIN: "60", EQUATION: "7", DISCOUNT: "68", LETTERS: "3", CHICKENS: "12"}

# (problem, strategy)
GOOD = [
    (APPLES, "When someone gains more of what they already have, add the amount gained to the amount at the start."),
    (APPLES, "If things are joined, add: line up the ones and the tens, add from the right, carry where needed."),
    (APPLES, "To find a total after a gain, add {gained} to {start} and check that it is larger than both."),
    (APPLES, "1. To find a total, name {start} and {gained}.\n2. Add them.\n3. Check that the total exceeds both."),
    (APPLES, "For joining problems: identify both amounts, make sure the units agree, then sum them."),
    (TRAIN, "When distance and time are known, divide the distance by the time to get the speed."),
    (TRAIN, "For average speed, write down the distance and the time, then divide the first by the second."),
    (TRAIN, "If a rate is asked, find which quantity comes per which, and divide in that order. Keep the units."),
    (TRAIN, "1. Given {distance} and {time}, check their units.\n2. Divide {distance} by {time}.\n3. Name the unit."),
    (TRAIN, "To find a rate, split the whole evenly over the hours. Multiply back to check the result."),
    (EQUATION, "To solve a linear equation, undo the addition first, then the multiplication, on both sides."),
    (EQUATION, "When one unknown occurs once, move the constants to the other side and divide by its coefficient."),
    (EQUATION, "In a linear equation, subtract {constant} from both sides. Then divide both sides by {coefficient}."),
    (
        EQUATION,
        "1. If it is linear, subtract {constant} from both sides.\n2. Divide by {coefficient}.\n3. Substitute.",
    ),
    (EQUATION, "For equations with one variable: isolate it by inverse operations, then put the value back to check."),
    (DISCOUNT, "When a price is reduced by a percentage, take that share of the price and subtract it."),
    (DISCOUNT, "For a discount, multiply the price by one minus the rate, written as a decimal."),
    (DISCOUNT, "To apply a reduction: turn the percentage into a fraction of 100, multiply, subtract from the price."),
    (DISCOUNT, "1. Given {price} and {rate}, divide {rate} by 100.\n2. Multiply by {price}.\n3. Subtract that."),
    (DISCOUNT, "If something is sold cheaper, find what remains in percent and take that part of the old price."),
    (LETTERS, "To count a letter, spell the word out one letter a line and mark each match, then count the marks."),
    (LETTERS, "When letters are counted, go through the word from left to right and keep a running tally."),
    (LETTERS, "For counting inside words: list the letters, compare each with the wanted one, add up the matches."),
    (LETTERS, "1. Given {word} and {letter}, spell {word} out.\n2. Mark each {letter}.\n3. Count the marks."),
    (LETTERS, "If a word is long, split it into syllables and count the letter in each. Add the counts."),
    (CHICKENS, "When two kinds share two totals, assume all are of one kind and correct by the surplus."),
    (CHICKENS, "For heads and legs, write two equations, one a total, and eliminate one of the unknowns."),
    (CHICKENS, "If every animal had the fewest legs, how many would be missing? Divide by what each swap adds."),
    (CHICKENS, "1. Given {heads} and {legs}, double {heads}.\n2. Subtract it from {legs}.\n3. Halve what is left."),
    (CHICKENS, "To separate a mixture of kinds, set up one equation for the count and one for the legs; substitute."),
]

# (kind, problem, strategy)
BAD = [
    ("copied numbers", APPLES, "When adding, take 17 and add 25 to it."),
    ("copied numbers", TRAIN, "To find the speed, divide 240 by 4."),
    ("copied numbers", EQUATION, "To solve it, subtract 8 from 29 and divide by the factor of x."),
    ("copied numbers", DISCOUNT, "For a discount take 15 percent of 80 and subtract it."),
    ("copied numbers", CHICKENS, "1. Given 30 heads, double them.\n2. Subtract from 84.\n3. Halve it."),
    ("quotation", LETTERS, "To count the letter, spell strawberry out and mark every match."),
    ("looping", APPLES, "When adding, add the numbers. " * 6),
    (
        "looping",
        TRAIN,
        "To find the speed we need to find the speed we need to find the speed we need to find the speed",
    ),
    ("looping", EQUATION, "If linear, " + "divide " * 20),
    ("looping", CHICKENS, "\n".join(f"{step}. Count the heads and the legs to see." for step in range(1, 8))),
    ("empty", APPLES, ""),
    ("empty", TRAIN, " \n\t"),
    ("empty", LETTERS, "\n\n"),
    ("truncated", DISCOUNT, "When a price is reduced, first find the share that is taken off and then subtract the"),
    ("truncated", CHICKENS, "For two kinds with two totals, write an equation for the count and another one for"),
    ("truncated", EQUATION, "1. If it is linear, subtract {constant} from both sides.\n2. Divide by"),
    ("answer", APPLES, "When amounts are joined, add them: the result is 42."),
    ("answer", TRAIN, "To find a speed divide distance by time, which gives 60 miles an hour."),
    ("answer", EQUATION, "In a linear equation isolate the unknown, so x = 7."),
    ("answer", DISCOUNT, "For a discount subtract the share from the price. It costs $68 afterwards."),
    ("answer", CHICKENS, "Given heads and legs, halve the surplus legs. There are 12."),
    ("final answer", APPLES, "To find the total, add both amounts.\n#### 41"),
    ("final answer", APPLES, "To find the total, add both amounts.\n##### 41"),
    ("final answer", APPLES, "To find the total, add both amounts: \\boxed 41"),
    ("final answer", TRAIN, "When given distance and time, divide. \\boxed{59}"),
    ("final answer", LETTERS, "For counting letters, spell the word. The answer is 2."),
    ("no condition", TRAIN, "Divide distance by time."),
    ("no condition", APPLES, "Add both amounts and check the sum."),
    ("no condition", EQUATION, "Isolate the unknown by inverse operations."),
    ("two words", APPLES, "Add them."),
    ("two words", TRAIN, "Just divide."),
    ("two words", DISCOUNT, "Use percentages"),
]


def score(problem, strategy, truncated=False):
    parsed = parse_strategy(strategy, truncated=truncated)
    return coherence(parsed, problem) - leak(parsed.text, problem, ANSWERS[problem])


class TestRepetition:
    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("", 0.0),
            ("two words", 0.0),
            ("add the ones then the tens", 0.0),
            ("one two three one two three", 1 / 4),
            ("One, two; THREE. one two three!", 1 / 4),
            ("add add add add add", 2 / 3),
        ],
    )
    def test_examples(self, text, expected):
        assert repetition(text) == pytest.approx(expected)

    def test_size_of_grams(self):
        assert repetition("a b a b", n=2) == pytest.approx(1 / 3)
        assert repetition("a b a b", n=3) == 0.0

    @given(texts)
    @properties
    def test_is_a_share(self, text):
        assert 0.0 <= repetition(text) < 1.0

    @given(st.lists(st.sampled_from(["add", "the", "ones", "carry"]), min_size=3, max_size=8), st.integers(2, 6))
    @properties
    def test_grows_with_the_loop(self, words, times):
        once = " ".join(words)
        looped = [repetition(" ".join([once] * count)) for count in (1, times, times + 1)]
        assert looped[0] < looped[1] < looped[2]

    def test_loop_comes_close_to_one(self):
        assert repetition("add the numbers " * 50) > 0.95


class TestLiterals:
    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("Add 17 and 25.", {"17", "25"}),
            ("It costs $4.50, or 1,200 cents at 3/4.", {"4.50", "1,200", "3/4"}),
            ("From -5 to 12", {"-5", "12"}),
            ("Call it x2 or item3.", set()),
            ("Reverse \"Level\" and 'noon'.", {"level", "noon"}),
            ("It's Tom's.", set()),
            ("1. Add.\n2) Carry.\n 3: Stop.", set()),
            ("Step 1: add. Repeat step 2 and steps 3 again.", set()),
            ("1. Add 5.\n2. Carry 6.", {"5", "6"}),
            ("", set()),
        ],
    )
    def test_examples(self, text, expected):
        assert literals(text) == expected


class TestCopiedLiterals:
    @pytest.mark.parametrize(
        ("strategy", "problem", "expected"),
        [
            ("Add 17 and 25.", APPLES, {"17", "25"}),
            ("Add 170 and 2.5 and 25.1", APPLES, set()),
            ("Add both amounts.", APPLES, set()),
            ("Spell STRAWBERRY out.", LETTERS, {"strawberry"}),
            ("Divide by 100.", DISCOUNT, set()),
            ("17. Add.\nSee step 25.", APPLES, set()),
        ],
    )
    def test_examples(self, strategy, problem, expected):
        assert copied_literals(strategy, problem) == expected

    @given(st.lists(st.integers(-999, 999), min_size=1, max_size=4, unique_by=abs), st.data())
    @properties
    def test_finds_exactly_the_numbers_used(self, numbers, data):
        used = data.draw(st.lists(st.sampled_from(numbers), unique=True))
        problem = "What comes of " + " and ".join(map(str, numbers)) + "?"
        strategy = "Take " + " then ".join(map(str, used)) + "."
        assert copied_literals(strategy, problem) == set(map(str, used))

    @given(texts, texts)
    @properties
    def test_come_from_the_problem(self, strategy, problem):
        assert copied_literals(strategy, problem) <= literals(problem)


class TestCoherence:
    @pytest.mark.parametrize(
        ("strategy", "expected"),
        [
            ("When things are joined, add both amounts.", 1.0),
            ("Add both amounts and check.", 0.875),
            ("Add both amounts.\nThis works when things are joined.", 0.875),
            ("1. Name both amounts.\n2. Add them to each other.", 1.0),
            ("Add them.", 0.75),
            ("To add", 0.875),
            ("To join, add 17 first.", 0.75),
            ("To join, add 17 and 25.", 0.5 + 1 / 6),
            ("When adding add add add add add", (1.0 - (2 / 5 - 0.1) + 1.0) / 2),
        ],
    )
    def test_examples(self, strategy, expected):
        assert coherence(parse_strategy(strategy), APPLES) == pytest.approx(expected)

    @pytest.mark.parametrize("flaw", ["empty", "truncated", "not numbered steps"])
    def test_malformed(self, flaw):
        text = "When things are joined, add both amounts."
        assert coherence(ParsedStrategy(text, flaw=flaw), APPLES) == 0.0
        assert coherence(ParsedStrategy(text), APPLES) == 1.0

    @given(texts, texts, st.sampled_from(["text", "steps"]), st.booleans())
    @properties
    def test_lies_between_zero_and_one(self, strategy, problem, strategy_format, truncated):
        parsed = parse_strategy(strategy, strategy_format, truncated)
        value = coherence(parsed, problem)
        assert 0.0 <= value <= 1.0
        assert parsed.flaw is None or value == 0.0

    @given(st.integers(0, 4))
    @properties
    def test_falls_with_every_copied_number(self, copies):
        numbers = ["11", "22", "33", "44", "55"]
        problem = " ".join(numbers)
        values = [
            coherence(parse_strategy("When adding, use all of " + " and ".join(numbers[:count]) + "."), problem)
            for count in (copies, copies + 1)
        ]
        assert values[0] > values[1] > 0.0


class TestLeak:
    @pytest.mark.parametrize(
        ("strategy", "problem", "answer"),
        [
            ("Add them to get 42.", APPLES, "42"),
            ("Add them. (42)", APPLES, " 42 "),
            ("So x=7 follows.", EQUATION, "7"),
            ("It costs $68.", DISCOUNT, "68"),
            ("The capital is   new\nYORK.", "Name a big city.", "New York"),
            ("Use \\frac{1}{2} of it.", "Halve one.", "\\frac{1}{2}"),
            ("It is -3 in the end.", "What is 2 - 5?", "-3"),
            ("1. Add.\n2. Get 2 as result.", "What is one plus one?", "2"),
            ("\\boxed{12}", APPLES, None),
            ("Put it in \\boxed {12}", APPLES, "42"),
            ("Add.\n#### 12", APPLES, None),
            ("The answer is 12.", APPLES, None),
            ("the final ANSWER: 12", APPLES, None),
            ("answer = $12", APPLES, None),
            ("<answer>12</answer>", APPLES, None),
            ("When joining, get 42 in all.", APPLES, "42 (apples)"),
            ("When joining, get 42 in all.", APPLES, "42.0"),
            ("When halving, get 2.5 each.", "Halve five.", "2.50 (cm)"),
            ("When joining, get 42 (apples).", APPLES, "42 (apples)"),
            ("Get 42.0.", APPLES, "42"),
            ("Get forty-two.", APPLES, "42"),
            ("Get 042 in all.", APPLES, "42"),
            ("Get \uff14\uff12.", APPLES, "42"),
            ("Get \U0001d7d2\U0001d7d0.", APPLES, "42"),
            ("Get 4\u200b2.", APPLES, "42"),
            ("Get 4\xad2.", APPLES, "42"),
            ("Get \u06f4\u06f2.", APPLES, "42"),
            ("Get 4\ufe0f2.", APPLES, "42"),
            ("Use step 42.", APPLES, "42"),
            ("1) Add.\n42) It.", APPLES, "42"),
            ("Get $42.", APPLES, "42 dollars"),
            ("Get 1000.", APPLES, "1,000"),
            ("Get 1e3.", APPLES, "1,000"),
            ("Get 1,000.", APPLES, "1000"),
            ("Get \\dfrac56.", APPLES, "5/6"),
            ("Get 0.5.", APPLES, "1/2"),
            ("Get (1, 2).", APPLES, "(1,2)"),
            ("Get 2√3.", APPLES, "2 \\sqrt{3}"),
            ("It is P\u0430ris.", APPLES, "Paris"),
            ("It is Pa\u200bris.", APPLES, "Paris"),
            ("It is P a r i s.", APPLES, "Paris"),
        ],
    )
    def test_given_away(self, strategy, problem, answer):
        assert leak(strategy, problem, answer) == 1.0

    @pytest.mark.parametrize(
        ("strategy", "problem", "answer"),
        [
            ("Add 16 first.", "What is two times three?", "6"),
            ("Add 61 first.", "What is two times three?", "6"),
            ("Take 6.5 or 0.6 of it.", "What is two times three?", "6"),
            ("Use a6 or 6b.", "What is two times three?", "6"),
            ("Add 25 to it.", APPLES, "25"),
            ("Spell Strawberry out.", LETTERS, "strawberry"),
            ("1. Add.\n2. Carry.\n3) Stop.", "What is one plus one?", "2"),
            ("Step 2: add. Go back to step 2.", "What is one plus one?", "2"),
            ("Work out the answer.", APPLES, "42"),
            ("The answer is the sum of both.", APPLES, "42"),
            ("Add both.", APPLES, None),
            ("Add both.", APPLES, ""),
            ("Add both.", APPLES, "  "),
            ("", APPLES, "42"),
            ("Add 1 first.", APPLES, "10 (apples)"),
            ("Name the two (sides) first.", APPLES, "left (side)"),
            ("Add the two numbers, one by one.", APPLES, "2"),
            ("Add one to each of the three.", APPLES, "1"),
            ("Subtract 3 from both.", "What is 2 - 5?", "-3"),
            ("Add 25.0 to it.", APPLES, "25"),
            ("Add twenty-five to it.", APPLES, "25"),
            ("Step 7: go back to step 6.", APPLES, "7"),
            ("Add 17.5 or 1,700.", "How many?", "17"),
            ("Work with half of it.", "How much?", "1/2"),
        ],
    )
    def test_kept(self, strategy, problem, answer):
        assert leak(strategy, problem, answer) == 0.0

    @pytest.mark.parametrize(
        "strategy",
        ["#### Strategy\nWhen joining, add.", "When done, put the total in \\boxed{}.", "Finish with \\boxed{total}."],
    )
    def test_markup_without_a_number_gives_nothing_away(self, strategy):
        assert leak(strategy, APPLES, "42") == 0.0

    def test_answer_alone_on_its_line_is_no_step(self):
        assert leak("Add both amounts.\n42.\nThat is all.", APPLES, "42") == 1.0

    @given(st.integers(0, 9999), st.integers(0, 9999))
    @properties
    def test_only_the_whole_number_counts(self, answer, shown):
        expected = float(answer == shown)
        assert leak(f"When joining, get {shown} at last.", "How many?", str(answer)) == expected
        assert leak(f"When joining, get {shown}.", f"Is it {answer}?", str(answer)) == 0.0

    @given(texts, texts, texts | st.none())
    @properties
    def test_is_zero_or_one(self, strategy, problem, answer):
        assert leak(strategy, problem, answer) in (0.0, 1.0)


class TestDistinct:
    @pytest.mark.parametrize(
        ("strategies", "expected"),
        [(["a", "b"], 1.0), (["Add  it", "add it\n"], 0.5), (["a", "a", "b", "a"], 0.5), ([], 0.0)],
    )
    def test_examples(self, strategies, expected):
        assert distinct(strategies) == expected


class TestSeparation:
    """Coherence less leak tells labelled good strategies from bad ones."""

    @pytest.fixture(scope="class")
    def good(self):
        return [score(problem, strategy) for problem, strategy in GOOD]

    @pytest.fixture(scope="class")
    def bad(self):
        kinds = defaultdict(list)
        for kind, problem, strategy in BAD:
            kinds[kind].append(score(problem, strategy, truncated=kind == "truncated"))
        return kinds

    def test_labelled_set(self):
        assert len(GOOD) >= 24
        assert len(BAD) >= 24
        assert {problem for problem, _ in GOOD} == set(ANSWERS)
        assert {problem for _, problem, _ in BAD} == set(ANSWERS)

    def test_area_under_the_curve(self, good, bad):
        others = [value for values in bad.values() for value in values]
        wins = sum((better > worse) + 0.5 * (better == worse) for better in good for worse in others)
        assert wins / (len(good) * len(others)) >= 0.95

    @pytest.mark.parametrize("kind", sorted({kind for kind, _, _ in BAD}))
    def test_every_kind_of_badness_scores_below_good(self, good, bad, kind):
        assert max(bad[kind]) < median(good)

    def test_good_ones_leak_nothing(self):
        assert [strategy for problem, strategy in GOOD if leak(strategy, problem, ANSWERS[problem])] == []

    @pytest.mark.parametrize("kind", ["answer", "final answer"])
    def test_leaks_are_worse_than_nothing(self, bad, kind):
        assert max(bad[kind]) <= 0.0
