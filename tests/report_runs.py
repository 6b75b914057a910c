"""Runs to report on, written to disk as training writes them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
from bank_helpers import hashed_words

from trl_sgpo.bank import Outcome, Strategy, StrategyBank


HOSTILE = "</script></style><script>window.pwned=1</script><img src=x onerror='window.pwned=1'>\"'>{{ 7 * 7 }}&lt;"
CLASSES = ("lcm", "gcd", "chain sum")
WORDS = (
    "multiply",
    "divide",
    "list",
    "compare",
    "reduce",
    "factor",
    "add",
    "check",
    "halve",
    "double",
    "count",
    "sort",
)


def strategies(extra: str = "") -> list[Strategy]:
    """Four generations of strategies in each class, each adapting the one before."""
    found: list[Strategy] = []
    for row, name in enumerate(CLASSES):
        parents: tuple[str, ...] = ()
        for step in range(4):
            text = " ".join(f"{word}{row}{step}" for word in WORDS[step : step + 6]) + extra
            found.append(Strategy(text, name, (f"source-{row}-{step}",), parents, "org/model", "first", step + 1))
            parents = (found[-1].id,)
    return found


def write_run(
    path: Path,
    steps: int = 12,
    max_steps: int = 12,
    text: str = "",
    bank: bool = True,
    completions: bool = True,
    evaluation: bool = True,
    metrics: dict[str, Callable[[int], float]] | None = None,
    **settings: Any,
) -> Path:
    """
    A run's output folder. `text` goes wherever foreign text can go.

    Returns:
        `Path`: The folder.
    """
    path.mkdir(parents=True)
    history = [
        {
            "step": step,
            "loss": 0.01,
            "reward": step / 20,
            "entropy": 1 / step,
            "sgpo/correctness": step / 16,
            "sgpo/transfer": step / 20,
            "sgpo/strategy_reward": -0.5 + step / 20,
            "sgpo/strategy_length": 12.0 + step,
            "sgpo/execution_length": 20.0 - step / 2,
            "sgpo/strategy_truncated": 0.1,
            "sgpo/execution_truncated": 0.0,
            "sgpo/coherence": 0.8,
            "sgpo/bank_size": float(step),
            "sgpo/frac_blocks_no_signal": 0.25,
            **{name: values(step) for name, values in (metrics or {}).items()},
        }
        for step in range(1, steps + 1)
    ]
    state = {"global_step": steps, "max_steps": max_steps, "log_history": history}
    directory = path if steps == max_steps else path / f"checkpoint-{steps}"
    directory.mkdir(exist_ok=True)
    (directory / "trainer_state.json").write_text(json.dumps(state))
    values = {"model": f"org/model{text}", "learning_rate": 1e-5, "seed": 42, "hub_token": None} | settings
    (path / "settings.json").write_text(json.dumps(values | ({text: text} if text else {})))
    if bank:
        write_bank(path / "strategy_bank", text)
    if completions:
        (path / "completions").mkdir()
        for step in range(1, steps + 1):
            frame = pd.DataFrame(rollouts(step, text))
            frame.to_parquet(path / "completions" / f"completions_{step:05d}.parquet")
    if evaluation:
        score = {"accuracy": 0.5, "transfer": 0.4, "problems": 32, "transfers": 96}
        report = {when: {"sampled": score, "greedy": score} for when in ("before", "after")}
        (path / "report.json").write_text(json.dumps(report))
        (path / "eval").mkdir()
        (path / "eval" / "results.json").write_text(json.dumps(results(text)))
    return path


def log_step(path: Path, step: int, max_steps: int = 12) -> None:
    """Logs a step of a run that is training, whose folder is made with the first one."""
    path.mkdir(parents=True, exist_ok=True)
    file = path / "progress.jsonl"
    lines = [] if file.exists() else [{"max_steps": max_steps}]
    lines.append({"step": step, "loss": 0.01, "reward": step / 20, "sgpo/correctness": step / 16})
    with file.open("a") as opened:
        opened.writelines(f"{json.dumps(line)}\n" for line in lines)


def write_bank(path: Path, text: str = "") -> None:
    made = strategies(f" {text}" if text else "")
    if text:
        made.append(Strategy(text, text, (text,), (text, made[0].id), text, text, 1, text))
    with StrategyBank(path, hashed_words) as bank:
        bank.add(made)
        bank.update([Outcome(made[0].id, f"q{i}", 2, 2, 0.5) for i in range(8)])
        bank.update([Outcome(made[1].id, f"g{i}", 0, 2, 0.75, "gcd") for i in range(9)])
        bank.update([Outcome(made[2].id, f"h{i}", 1, 2, 0.4, text or "gcd") for i in range(3)])


def rollouts(step: int, text: str) -> list[dict[str, Any]]:
    known = strategies(f" {text}" if text else "")
    rows = []
    for problem in range(2):
        for row, source in enumerate(("own", "own", "borrowed", "bank")):
            rows.append(
                {
                    "step": step,
                    "prompt": [{"role": "user", "content": f"Problem {problem} of step {step} {text} riddle-{step}."}],
                    "completion": [{"role": "assistant", "content": "whole"}],
                    f"answer_reward{text}": float(row < step % 5),
                    "source": source,
                    "retrieved": known[problem].id if source == "own" else "",
                    "strategy": f"{known[row].text}",
                    "execution": f"So 2 times 3 is 6 #### {row} {text}",
                    "correctness": float(row < step % 5),
                    "transfer": float("nan") if source == "bank" else 0.5,
                    "strategy_advantage": 0.25,
                    "advantage": -0.5,
                }
            )
    return rows


def results(text: str) -> dict[str, Any]:
    figures = {"value": 0.5, "low": 0.25, "high": 0.75, "problems": 8}
    suite = {
        "kind": "in_distribution",
        "problems": 8,
        "accuracy": figures,
        "sampled": None,
        "generated_tokens": 100,
        "classes": {},
    }
    transfer = {
        "classes": ["lcm", text or "gcd"],
        "left_out_classes": [],
        "conditions": {"transfer": figures},
        "differences": {"transfer - none": figures},
        "relative": 0.8,
        "matrix": [[0.0, 0.25], [None, 1.0]],
    }
    name = f"sums{text}"
    return {"suites": {name: suite}, "kinds": {"in_distribution": figures}, "transfer": {name: transfer}}
