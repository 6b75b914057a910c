"""
A run's report as one HTML file.

All text of a run is untrusted: problems, strategies and executions may come from anyone. jinja2 escapes all values,
the Content-Security-Policy allows only the page's own script and style, by hash, nothing is loaded from elsewhere, and
the script handles text as text, never as markup.
"""

import base64
import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from importlib.resources import files
from itertools import islice
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from .._version import __version__
from ..bank import Strategy, policy
from ..bank.statistics import best_known_lift, lift_text, plain_lift_text, transfer
from ..bank.strategy import TRUST_STATES
from ..checks.terminal import printable
from ..evaluation.tables import tables
from ..files import write_file
from .charts import Chart, Points, bank_map, class_colours, line_chart, number
from .figures import comparison, logged, quarters, verdict
from .records import RolledProblem, Run


MAX_STRATEGIES = 500
MAX_CLASSES = 60  # of a matrix, and of what a strategy was executed on
MAX_ANCESTORS = 20
MAX_TEXT = 20_000  # characters of a text that are shown
_LONG_WORD = re.compile(r"[^ \t\r\n]{1000}(?=[^ \t\r\n])")
"""Broken by a space, because the time that a browser takes to break a word grows with the square of its length."""

_KEPT = "\t\n\r\u00a0\u2009\u202f\u3000"
"""Line breaks and spaces that are shown as they are, unlike other characters that make text look like another."""

# id, title, what it says, bounds, and the metric, name and colour of each line
CHARTS: list[tuple[str, str, str, tuple[float, float] | None, list[tuple[str, str, int]]]] = [
    (
        "reward",
        "Reward",
        "What executions earn (all reward functions, weighted), and what strategies earn (correctness, transfer, "
        "coherence, leak).",
        None,
        [("reward", "execution", 0), ("sgpo/strategy_reward", "strategy", 1)],
    ),
    (
        "correctness",
        "Correctness and transfer",
        "How often the verifier accepts a strategy's execution, on the problem it was written for and on others of "
        "its class.",
        (0, 1),
        [
            ("sgpo/correctness", "own problem", 0),
            ("sgpo/transfer", "transfer", 1),
            ("eval_sgpo/correctness", "evaluation", 2),
        ],
    ),
    (
        "plain",
        "Plain answers",
        "How often the verifier accepts answers to the bare problem, and lift: how much more often it accepts "
        "executions of strategies on the same problems. Lift is 0 where plain answers are as good as guided ones.",
        None,
        [("sgpo/plain_correctness", "plain answers", 0), ("sgpo/lift", "lift", 1)],
    ),
    (
        "internalize",
        "What plain answers learn from guided ones",
        "The loss of internalize: distill or kl; with contrast, how much likelier a teacher finds the tokens of plain "
        "answers with a right strategy than with wrong ones.",
        None,
        [("sgpo/internalize_loss", "loss", 0), ("sgpo/contrast", "contrast", 1)],
    ),
    (
        "length",
        "Length",
        "Tokens of both phases and of plain answers, on average.",
        None,
        [
            ("sgpo/execution_length", "execution", 0),
            ("sgpo/strategy_length", "strategy", 1),
            ("sgpo/plain_length", "plain answer", 2),
        ],
    ),
    (
        "truncated",
        "Cut off",
        "Shares of strategies and executions that ran into their limit. High ones ask for a higher limit.",
        (0, 1),
        [("sgpo/execution_truncated", "execution", 0), ("sgpo/strategy_truncated", "strategy", 1)],
    ),
    (
        "form",
        "Form of strategies",
        "Coherent is better high; leaks of the answer and malformed ones better low; distinct ones show that the "
        "model still explores.",
        (0, 1),
        [
            ("sgpo/coherence", "coherence", 0),
            ("sgpo/leak", "leak", 1),
            ("sgpo/malformed", "malformed", 2),
            ("sgpo/distinct_strategies", "distinct", 3),
        ],
    ),
    (
        "signal",
        "Blocks without signal",
        "Share of transfer blocks that taught nothing, because all their executions earned the same.",
        (0, 1),
        [("sgpo/frac_blocks_no_signal", "no signal", 0)],
    ),
    ("bank_size", "Size of the bank", "Strategies that are not retired.", None, [("sgpo/bank_size", "strategies", 0)]),
    (
        "entropy",
        "Entropy",
        "Of the tokens' distributions. A fall to 0 means that the model no longer explores.",
        None,
        [("entropy", "entropy", 0)],
    ),
]
KEY_SETTINGS = [
    *("model_name_or_path", "model", "dataset_name", "datasets", "problems", "reward_funcs"),
    *("transfer_block_size", "num_generations", "num_bank_rollouts", "num_plain_rollouts"),
    *("max_strategy_length", "max_completion_length"),
    *("num_retrieved", "strategy_prompt", "execution_prompt", "warmstart_traces", "learning_rate", "max_steps"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "use_peft", "lora_r", "seed", "versions"),
]
NOT_COMPARED = {"output_dir", "logging_dir", "run_name", "versions", "problems"}
PARTS = {"strategy_advantage": "advantage, strategy", "execution_advantage": "advantage, execution"}
SOURCES = {"own": "own strategy", "borrowed": "borrowed strategy", "bank": "strategy of the bank", "": "no strategy"}


@dataclass(frozen=True)
class Matrix:
    """Mean outcomes by class of the strategy (rows) and problem (columns), and numbers of executions."""

    title: str
    note: str
    classes: Sequence[str]
    rows: list[tuple[str, list[float | None]]]


def write_report(run: Run, output: Path, other: Run | None = None) -> None:
    """
    Writes the report.

    Args:
        run ([`~trl_sgpo.report.records.Run`]):
            The run.
        output (`Path`):
            HTML file.
        other ([`~trl_sgpo.report.records.Run`], *optional*):
            A run to compare it with.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    write_file(output, render(run, other))


@cache
def _asset(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")


def content_policy(watched: bool) -> str:
    """The Content-Security-Policy: the report's own style and script, and its own address if it is watched."""
    style, script = (_hash(_asset(name)) for name in ("style.css", "script.js"))
    own = " connect-src 'self';" if watched else ""
    return (
        f"default-src 'none'; style-src '{style}'; script-src '{script}';{own} img-src data:; base-uri 'none'; "
        "form-action 'none'"
    )


def render(run: Run, other: Run | None = None, tag: str | None = None) -> str:
    """The report's HTML. The arguments are those of [`write_report`], and the page's tag if it is served."""
    environment = Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined, finalize=_visible
    )
    environment.filters.update(number=number, reward=_reward, code=_code)
    template = environment.from_string(_asset("template.html"))
    bank = run.bank
    strategies = _most_useful(bank.strategies) if bank is not None else []
    marks, kept = bank_map(strategies, bank.embeddings) if bank is not None else ([], 1.0)
    return template.render(
        # The package's own files, which are not escaped
        style=Markup(_asset("style.css")),
        script=Markup(_asset("script.js")),
        policy=Markup(content_policy(tag is not None)),
        tag=tag,
        version=__version__,
        made=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M"),
        run=run,
        other=other,
        names=_names(run, other),
        waiting=tag is not None and run.has_no_step,
        verdict=verdict(run.measured, run.history),
        facts=_facts(run),
        compared=comparison(run.measured, run.history, run.evaluations),
        charts=_charts(run, other),
        evaluations={name: tables(results) for name, results in run.evaluations.items()},
        matrices=_matrices(run),
        bank=bank,
        listed={strategy.id for strategy in strategies},
        strategies=[_strategy_view(run, strategy) for strategy in strategies],
        classes=class_colours(strategies),
        trusts=[state for state in TRUST_STATES if any(each.trust == state for each in strategies)],
        marks=marks,
        kept=kept,
        problems=[_problem_view(problem) for problem in run.problems],
        sources=SOURCES,
        key_settings={name: _setting(run.settings[name]) for name in KEY_SETTINGS if name in run.settings},
        settings={name: _setting(value) for name, value in sorted(run.settings.items())},
        changes=_changes(run, other) if other is not None else None,
    )


def _visible(value: Any) -> Any:
    """Replaces characters that can make text look like another by escapes, and cuts long text."""
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    text, length = value[:MAX_TEXT], len(value)
    text = _LONG_WORD.sub(r"\g<0> ", printable(text, _KEPT))
    return text if length <= MAX_TEXT else f"{text}… (the first {MAX_TEXT:,} of {length:,} characters)"


def _code(text: str) -> Markup:
    """Shows the parts of a message that are between backticks as code."""
    parts = re.split(r"`([^`]+)`", _visible(text))
    return Markup("").join(Markup("<code>{}</code>").format(part) if i % 2 else part for i, part in enumerate(parts))


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _names(run: Run, other: Run | None) -> tuple[str, str]:
    """Different names for the two runs."""
    if other is None or run.name != other.name:
        return run.name, other.name if other is not None else ""
    return str(run.path), str(other.path)


def _reward(value: Any) -> str:
    if _known(value) is None:
        return "–"
    return number(value) if isinstance(value, int | float) else str(value)


# Curves and figures


def _charts(run: Run, other: Run | None) -> list[Chart]:
    charts = []
    name, other_name = _names(run, other)
    for id, title, note, within, metrics in CHARTS:
        lines: list[tuple[str, Points, int, bool]] = []
        for metric, label, colour in metrics:
            if other is None:
                lines.append((label, logged(run.history, metric), colour, False))
            else:
                lines.append((f"{label}, {name}", logged(run.history, metric), colour, False))
                lines.append((f"{label}, {other_name}", logged(other.history, metric), colour, True))
        if (chart := line_chart(id, title, note, lines, within)) is not None:
            charts.append(chart)
    return charts


def _facts(run: Run) -> list[str]:
    """How far the run is, and what its bank holds."""
    facts = []
    if run.max_steps:
        facts.append(f"{'Finished' if run.is_finished else 'Unfinished'}: step {run.steps:,} of {run.max_steps:,}")
    if run.bank is not None:
        counts = Counter(strategy.trust for strategy in run.bank.strategies)
        live = sum(counts.values()) - counts["retired"]
        states = ", ".join(f"{counts[state]} {state}" for state in TRUST_STATES if counts[state])
        facts.append(f"{live} strategies in the bank ({states or 'none'})")
    return facts


def _means(run: Run, metric: str) -> str | None:
    means = quarters(run.history, metric)
    return None if means is None else f"{means[0]:.2f} → {means[1]:.2f}"


def _matrices(run: Run) -> list[Matrix]:
    matrices = []
    for name, results in run.evaluations.items():
        for suite, report in results["transfer"].items():
            cells = {
                (own, other): value
                for own, row in zip(report["classes"], report["matrix"], strict=True)
                for other, value in zip(report["classes"], row, strict=True)
            }
            note = "Measured on unseen problems by trl-sgpo eval: mean outcome of the trained model's strategies."
            matrices.append(_matrix(f"Transfer between classes: {suite} ({name})", note, report["classes"], cells))
    if run.bank is not None:
        executions = [(each, matrices) for each in run.bank.strategies for matrices in run.bank.executions[each.id]]
        pairs = transfer(executions, lambda strategy, execution: (strategy.problem_class, execution.problem_class))
        if pairs:
            cells = {pair: figures["rate"] for pair, figures in pairs.items()}
            note = (
                "From training: mean outcome of the bank's strategies on problems they were not written for. Classes "
                "meet only where strategies are shown across classes."
            )
            classes = sorted({name for pair in pairs for name in pair})
            matrices.append(_matrix("Transfer of the bank's strategies", note, classes, cells))
    return matrices


def _matrix(title: str, note: str, classes: Sequence[str], cells: Mapping[tuple[str, str], float | None]) -> Matrix:
    """A matrix of the first classes: one of all would grow with their square."""
    if len(classes) > MAX_CLASSES:
        note += f" Of {len(classes):,} classes the first {MAX_CLASSES} are shown."
    shown = classes[:MAX_CLASSES]
    return Matrix(title, note, shown, [(own, [cells.get((own, name)) for name in shown]) for own in shown])


# Bank


def _most_useful(strategies: Iterable[Strategy]) -> list[Strategy]:
    order = sorted(
        strategies, key=lambda each: (each.trust == "retired", -policy.utility(each.successes, each.trials), each.id)
    )
    return order[:MAX_STRATEGIES]


def _strategy_view(run: Run, strategy: Strategy) -> dict[str, Any]:
    assert run.bank is not None
    own = [(strategy, execution) for execution in run.bank.executions[strategy.id]]
    of_classes = transfer(own, lambda _, execution: execution.problem_class)
    return {
        "record": strategy,
        "won": f"{number(strategy.successes)} of {strategy.trials}",
        "utility": policy.utility(strategy.successes, strategy.trials),
        "best_known_lift": best_known_lift(strategy),
        "lift": lift_text(strategy),
        "plain_lift": plain_lift_text(strategy),
        "effect": "useful" if policy.useful(strategy) else "harmful" if policy.harmful(strategy) else "",
        "transfer": dict(islice(of_classes.items(), MAX_CLASSES)),
        "left_out": max(len(of_classes) - MAX_CLASSES, 0),
        "lineage": _lineage(run.bank.by_id, strategy),
        "children": run.bank.children.get(strategy.id, []),
    }


def _lineage(by_id: dict[str, Strategy], strategy: Strategy) -> list[tuple[int, str, Strategy | None]]:
    """Depth, id and record of the ancestors, each once, parents before grandparents of the same line."""
    ancestors: list[tuple[int, str, Strategy | None]] = []
    seen = {strategy.id}
    waiting = [(1, key) for key in reversed(strategy.parents)]
    while waiting and len(ancestors) < MAX_ANCESTORS:
        depth, key = waiting.pop()
        if key in seen:
            continue
        seen.add(key)
        ancestors.append((depth, key, by_id.get(key)))
        if key in by_id:
            waiting += [(depth + 1, parent) for parent in reversed(by_id[key].parents)]
    return ancestors


# Rollouts


def _problem_view(problem: RolledProblem) -> dict[str, Any]:
    views = [
        {
            "rollout": rollout,
            "correct": _known(rollout.parts.get("correctness")),
            "parts": {PARTS.get(name, name): value for name, value in rollout.parts.items()},
        }
        for rollout in problem.rollouts
    ]
    outcomes = [view["correct"] > 0.5 for view in views if view["correct"] is not None]
    return {"problem": problem, "rollouts": views, "right": sum(outcomes), "of": len(outcomes)}


def _known(value: Any) -> Any:
    """The value, `None` where it is not a number."""
    return None if value != value else value


# Settings and what changed


def _setting(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name}: {_setting(each)}" for name, each in value.items())
    if isinstance(value, list):
        return ", ".join(map(_setting, value))
    return "–" if value is None else str(value)


def _changes(run: Run, other: Run) -> dict[str, Any]:
    names = sorted({*run.settings, *other.settings} - NOT_COMPARED)
    settings = [
        (name, _setting(run.settings.get(name)), _setting(other.settings.get(name)))
        for name in names
        if run.settings.get(name) != other.settings.get(name)
    ]
    figures = []
    for _, title, _, _, metrics in CHARTS:
        for metric, label, _ in metrics:
            values = (_means(run, metric), _means(other, metric))
            if any(values):
                figures.append((f"{title}: {label}", *(value or "–" for value in values)))
    ours, theirs = ({} if each.bank is None else each.bank.by_id for each in (run, other))
    both = [(ours[key], theirs[key]) for key in ours if key in theirs]
    return {
        "verdict": verdict(other.measured, other.history),
        "compared": comparison(other.measured, other.history, other.evaluations),
        "settings": settings,
        "figures": figures,
        "only_run": _most_useful(each for key, each in ours.items() if key not in theirs),
        "only_other": _most_useful(each for key, each in theirs.items() if key not in ours),
        "both": both,
    }
