"""`trl-sgpo demo`: a recorded run of the quickstart in the terminal, without training, model or network."""

import argparse
import json
from pathlib import Path
from typing import Any

from ..checks.arguments import Parser
from ..checks.console import console
from .text import print_table


FILE = Path(__file__).with_name("demo_run.json")
"""The run, as `tests/demo_run.py` writes it."""
BEST = 5  # strategies of the bank that are shown


def main(argv: list[str]) -> int:
    """Shows a transfer block, the bank, and figures before and after training."""
    _parser().parse_args(argv)
    run = json.loads(FILE.read_text(encoding="utf-8"))
    settings = run["settings"]
    _say(
        f"A recorded run: {settings['max_steps']} steps of SGPO on {settings['model_name_or_path']}, after a warm "
        f"start on {settings['warmstart_traces']} worked solutions. Nothing is trained now. It was made by"
    )
    print(f"  {run['command']}")
    _show_block(run["block"])
    _show_bank(run["bank"])
    from .scores import print_scores

    print("\n3. Before and after training:\n")
    print_scores(run["scores"])
    print(
        "\nNext:\n"
        "  a recipe for your problems    trl-sgpo init\n"
        "  one from that of `trl grpo`   trl-sgpo convert grpo.yaml\n"
        f"  this run, in a clone          {run['command']}"
    )
    return 0


def _parser() -> argparse.ArgumentParser:
    return Parser(
        prog="trl-sgpo demo",
        description="Show a recorded run of the quickstart: a transfer block, the credit of its strategies, the bank, "
        "and figures before and after training. Nothing is trained or downloaded.",
    )


def _say(text: str) -> None:
    """Prints a text in lines of the terminal's width."""
    console().print(text, highlight=False)


def _show_block(block: dict[str, Any]) -> None:
    names = [chr(ord("A") + index) for index in range(len(block["problems"]))]
    own = len(block["strategies"]) // len(names)
    print()
    _say(
        f"1. A transfer block of step {block['step']}: {len(names)} problems of the class {block['problem_class']}. "
        f"Each writes {own} strategies, and every strategy is executed on every problem."
    )
    for name, text in zip(names, block["problems"], strict=True):
        _say(f"   {name}  {text}")
    rows = [
        [
            names[strategy["problem"]],
            *[f"{'✓' if each['reward'] > 0 else '✗'} {each['text']}" for each in strategy["executions"]],
            f"{strategy['credit']:+.2f}",
            strategy["text"],
        ]
        for strategy in block["strategies"]
    ]
    print_table(["for", *[f"on {name}" for name in names], "credit", "strategy"], rows)
    _say(
        "credit is the advantage of the strategy's tokens. A strategy that only states an answer, like `#### 5`, is "
        "of no use on the other problem and gets the lowest."
    )


def _show_bank(records: list[dict[str, Any]]) -> None:
    from ..bank.strategy import Strategy
    from .bank_views import SORT_KEYS, in_order, print_strategies

    lists = ("source_problems", "parents")
    strategies = [Strategy(**record | {key: tuple(record[key]) for key in lists}) for record in records]
    print("\n2. The strategy bank after the run, as `trl-sgpo bank list RUN` prints it:")
    print_strategies(in_order(strategies, SORT_KEYS["utility"])[:BEST], strategies)
