"""The texts of both phases."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trl.rewards import accuracy_reward

from trl_sgpo.data.tasks import answer_reward
from trl_sgpo.errors import ConfigError, DataError
from trl_sgpo.method.prompts import (
    EXECUTION_PROMPT,
    RETRIEVED_HEADER,
    STEPS_PROMPT,
    STRATEGY_PROMPT,
    check_strategy_prompt,
    default_strategy_prompt,
    parse_strategy,
    plain_bridge,
    problem_text,
    quote_strategies,
    strategy_prompt,
    strategy_request,
)


properties = settings(max_examples=60, deadline=None, derandomize=True)
# Texts that look like templates
braced = st.lists(
    st.sampled_from(
        ["{", "}", "{{", "}}", "{problem}", "{strategies}", "{0}", "\\frac{1}{2}", "%s", "$x", "word", " "]
    ),
    max_size=8,
).map("".join)


class TestTemplates:
    @pytest.mark.parametrize("template", [STRATEGY_PROMPT, STEPS_PROMPT])
    @given(problem=braced, strategy=braced)
    @properties
    def test_braces_are_left_as_they_are(self, template, problem, strategy):
        request = strategy_request(template, problem, [("sums", strategy)])
        head, tail = template.split("{problem}")
        quoted = f"{RETRIEVED_HEADER}> [sums] {' '.join(strategy.split())}\n\n"
        assert request == head + problem + tail.replace("{strategies}", quoted)

    def test_default_execution_prompt_asks_for_a_form_that_verifiers_read(self):
        (form,) = re.findall(r"\\boxed\{\}", EXECUTION_PROMPT)
        execution = f"One and two make three.\n{form[:-1]}3}}"
        assert answer_reward([execution, execution], ["3", "4"]) == [1.0, 0.0]
        completions = [[{"role": "assistant", "content": execution}]] * 2
        assert accuracy_reward(completions, ["$3$", "$4$"]) == [1.0, 0.0]

    def test_nothing_retrieved_leaves_no_trace(self):
        request = strategy_request(STRATEGY_PROMPT, "What is {x} + 1?", [])
        assert request == "What is {x} + 1?" + STRATEGY_PROMPT.removeprefix("{problem}").replace("{strategies}", "")
        assert RETRIEVED_HEADER not in request

    def test_strategies_before_the_problem(self):
        request = strategy_request("{strategies}Problem: {problem}", "2 + {strategies}?", [("a", "Add.")])
        assert request == f"{RETRIEVED_HEADER}> [a] Add.\n\nProblem: 2 + {{strategies}}?"

    def test_template_without_a_place_for_strategies(self):
        template = "Problem: {problem}\nStrategy?"
        assert strategy_request(template, "1 + 1", []) == "Problem: 1 + 1\nStrategy?"
        shown = strategy_request(template, "1 + 1", [("a", "Add.")])
        assert shown == f"Problem: 1 + 1\n\n{RETRIEVED_HEADER}> [a] Add.\nStrategy?"

    @pytest.mark.parametrize("template", ["Write a strategy.", "{problem} and {problem}", "{ problem }", ""])
    def test_template_needs_one_place_for_the_problem(self, template):
        with pytest.raises(ConfigError, match=r"\{problem\} exactly once"):
            check_strategy_prompt(template)

    def test_default_templates_are_valid_and_differ(self):
        assert default_strategy_prompt("text") == STRATEGY_PROMPT
        assert default_strategy_prompt("steps") == STEPS_PROMPT
        for template in (STRATEGY_PROMPT, STEPS_PROMPT):
            check_strategy_prompt(template)
            assert template.count("{strategies}") == 1


class TestQuoting:
    def test_one_line_each(self):
        quoted = quote_strategies([("sums", "Add\nthe  tens.\n\nThen the ones."), ("products", "Multiply.")])
        assert quoted == f"{RETRIEVED_HEADER}> [sums] Add the tens. Then the ones.\n> [products] Multiply.\n\n"

    def test_none(self):
        assert quote_strategies([]) == ""

    @given(st.lists(st.text(max_size=40), min_size=1, max_size=4))
    @properties
    def test_a_strategy_cannot_leave_its_line(self, texts):
        lines = quote_strategies([("c", text) for text in texts]).removeprefix(RETRIEVED_HEADER).split("\n")
        assert lines[-2:] == ["", ""]
        assert len(lines) == len(texts) + 2
        assert all(line.startswith("> [c] ") for line in lines[:-2])


class TestParsing:
    def test_text(self):
        parsed = parse_strategy("  When adding, line up the {first number}.\n")
        assert parsed.text == "When adding, line up the {first number}."
        assert (parsed.steps, parsed.placeholders, parsed.flaw) == ((), ("first number",), None)

    @pytest.mark.parametrize("strategy_format", ["text", "steps"])
    @pytest.mark.parametrize("truncated", [False, True])
    @pytest.mark.parametrize("text", ["", " ", "\n\t\n"])
    def test_empty(self, text, truncated, strategy_format):
        parsed = parse_strategy(text, strategy_format, truncated)
        assert (parsed.text, parsed.flaw) == ("", "empty")

    @pytest.mark.parametrize("strategy_format", ["text", "steps"])
    def test_truncated(self, strategy_format):
        parsed = parse_strategy("1. Add the ones\n2. Add the", strategy_format, truncated=True)
        assert parsed.flaw == "truncated"
        assert parsed.text == "1. Add the ones\n2. Add the"

    @pytest.mark.parametrize(
        "text",
        [
            "1. Add {a}.\n2. Carry {b}.",
            "1) Add {a}.\n2) Carry {b}.",
            "Step 1: Add {a}.\n\n step 2: Carry {b}.",
            "\n1. Add {a}.\n\n2. Carry {b}.\n",
        ],
    )
    def test_steps(self, text):
        parsed = parse_strategy(text, "steps")
        assert parsed.flaw is None
        assert parsed.steps == ("Add {a}.", "Carry {b}.")
        assert parsed.placeholders == ("a", "b")

    @pytest.mark.parametrize(
        "text",
        ["Add the numbers.", "1. Add the numbers.", "1. Add.\nThen stop.", "Do this:\n1. Add.\n2. Stop.", "1.\n2."],
    )
    def test_not_steps(self, text):
        assert parse_strategy(text, "steps").flaw == "not numbered steps"
        assert parse_strategy(text, "text").flaw is None

    def test_steps_in_free_text_are_read_too(self):
        assert parse_strategy("If adding:\n1. Add.\n2. Stop.").steps == ("Add.", "Stop.")

    @pytest.mark.parametrize(
        "reasoning", ["<think>\nSo {x}?\n</think>\n\n", "So\n</think>", "<think></think> </think>\n"]
    )
    def test_reasoning_is_cut_off(self, reasoning):
        parsed = parse_strategy(f" {reasoning}1. Add {{a}}.\n2. Stop. ", "steps")
        assert (parsed.text, parsed.flaw) == ("1. Add {a}.\n2. Stop.", None)
        assert (parsed.steps, parsed.placeholders) == (("Add {a}.", "Stop."), ("a",))
        assert (parsed.reasoning, parsed.as_written) == (reasoning, reasoning + parsed.text)

    @pytest.mark.parametrize(("truncated", "flaw"), [(True, "truncated"), (False, "empty")])
    @pytest.mark.parametrize(
        ("text", "opened"), [("<think> Add", False), ("Add", True), ("<think>a</think>", False), ("a</think>", True)]
    )
    def test_reasoning_without_a_strategy(self, text, opened, truncated, flaw):
        parsed = parse_strategy(text, truncated=truncated, reasoning_opened=opened)
        assert (parsed.text, parsed.flaw, parsed.as_written) == ("", flaw, text)

    @given(st.text(max_size=80), st.sampled_from(["text", "steps"]), st.booleans())
    @properties
    def test_nothing_is_refused(self, text, strategy_format, truncated):
        parsed = parse_strategy(text, strategy_format, truncated)
        assert parsed.text == text.strip()
        assert parsed.flaw in (None, "empty", "truncated", "not numbered steps")
        assert (parsed.flaw == "empty") == (not text.strip())
        if truncated:
            assert parsed.flaw in ("empty", "truncated")


class TestProblemText:
    def test_last_user_message(self):
        messages = [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Hello"},
            {"role": "assistant", "content": "Hi"},
            {"role": "user", "content": "1 + 1?"},
        ]
        assert problem_text(messages) == "1 + 1?"

    def test_text_parts(self):
        parts = [{"type": "text", "text": "1 + 1?"}, {"type": "image"}, {"type": "text", "text": "Think."}]
        assert problem_text([{"role": "user", "content": parts}]) == "1 + 1?\nThink."

    def test_plain_text(self):
        assert problem_text("1 + 1?") == "1 + 1?"


class TestStrategyPrompt:
    MESSAGES = ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is {x}?"})
    RETRIEVED = (("a", "Add."),)

    def test_chat(self):
        prompt = list(self.MESSAGES)
        built = strategy_prompt(prompt, STRATEGY_PROMPT, self.RETRIEVED, chat=True)
        request = strategy_request(STRATEGY_PROMPT, "What is {x}?", self.RETRIEVED)
        assert built == [self.MESSAGES[0], {"role": "user", "content": request}]
        assert prompt == list(self.MESSAGES)
        assert prompt[1]["content"] == "What is {x}?"

    def test_conversation_without_chat_template(self):
        built = strategy_prompt(list(self.MESSAGES), STRATEGY_PROMPT, self.RETRIEVED, chat=False)
        request = strategy_request(STRATEGY_PROMPT, "What is {x}?", self.RETRIEVED)
        assert built == f"Be brief.\n\n{request}\n\nStrategy:"

    @pytest.mark.parametrize("chat", [False, True])
    def test_plain_text(self, chat):
        built = strategy_prompt("What is {x}?", STRATEGY_PROMPT, [], chat)
        assert built == strategy_request(STRATEGY_PROMPT, "What is {x}?", []) + "\n\nStrategy:"

    @pytest.mark.parametrize("role", ["assistant", "tool", "system"])
    def test_last_message_of_another_role_is_refused(self, role):
        prompt = [*self.MESSAGES, {"role": role, "content": "Let me see."}]
        with pytest.raises(DataError, match=f"ends in a message of the role `{role}`.* must end in a user message"):
            strategy_prompt(prompt, STRATEGY_PROMPT, [], chat=True)

    def test_no_message_is_refused(self):
        with pytest.raises(DataError, match="has no messages"):
            strategy_prompt([], STRATEGY_PROMPT, [], chat=True)


def test_plain_bridge():
    assert plain_bridge("Apply {it}.") == "\n\nApply {it}.\n\nExecution:"
