"""Word problems in the columns of public datasets, in words of our own."""

import json
from pathlib import Path
from typing import Any


NAMES = ("Ada", "Ben", "Cleo", "Dan", "Eva", "Finn")
THINGS = ("pens", "shells", "stamps", "plums", "cards")


def story(index: int) -> tuple[str, str, int, str]:
    """Situation, question, answer and what is counted."""
    name, thing = NAMES[index % 6], THINGS[index % 5]
    have, more = 3 + index, 1 + index % 7
    body = f"{name} keeps {have} {thing} in a tin and is given {more} more by a friend."
    return body, f"How many {thing} does {name} have now?", have + more, thing


def svamp(size: int) -> list[dict[str, Any]]:
    """`ID`, `Body`, `Question`, `Equation`, `Answer` as a float and `Type`."""
    rows = []
    for index in range(size):
        body, question, answer, _ = story(index)
        equation = f"( {3 + index}.0 + {1 + index % 7}.0 )"
        rows.append(
            {
                "ID": f"row-{index}",
                "Body": body,
                "Question": question,
                "Equation": equation,
                "Answer": float(answer),
                "Type": ("Addition", "Common-Division", "Subtraction")[index % 3],
            }
        )
    return rows


def asdiv(size: int) -> list[dict[str, Any]]:
    """`body`, `question`, `solution_type`, `answer` with its unit in parentheses and `formula`."""
    rows = []
    for index in range(size):
        body, question, answer, thing = story(index)
        rows.append(
            {
                "body": body,
                "question": question,
                "solution_type": "Addition",
                "answer": f"{answer} ({thing})",
                "formula": f"{3 + index}+{1 + index % 7}={answer}",
            }
        )
    return rows


def open_math(size: int) -> list[dict[str, Any]]:
    """`problem`, `generated_solution` and `expected_answer`."""
    rows = []
    for index in range(size):
        body, question, answer, _ = story(index)
        worked = f"We add both numbers and get $\\boxed{{{answer}}}$."
        rows.append(
            {
                "problem": f"{body} {question}",
                "generated_solution": worked,
                "expected_answer": str(answer),
                "problem_source": "made up for this test",
            }
        )
    return rows


def choices(size: int) -> list[dict[str, Any]]:
    """`question`, `choices` as a list and `answer` as a letter."""
    rows = []
    for index in range(size):
        body, question, answer, _ = story(index)
        rows.append({"question": f"{body} {question}", "choices": [str(answer + 1), str(answer)], "answer": "B"})
    return rows


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    """Writes rows as JSON lines and returns the file's name."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path.name
