"""Evaluates a two-phase model on suites, in chunks whose content depends only on the settings."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from ..bank.strategy import problem_id
from ..data.answers import comparison
from ..data.final_answers import final_answer
from ..inference.model import Decoding, TwoPhaseModel
from ..inference.retrieval import with_retrieved
from ..inference.verifier import Verifier, verify
from ..method.problem import as_problem
from .chunks import Chunk, RunChunk, run_now
from .statistics import (
    SOLVED,
    Estimate,
    derived_seed,
    majority_vote,
    mean_estimate,
    pass_at_k,
    rate_estimate,
    wilson_interval,
)
from .stored import attempts_chunk
from .suites import UNKNOWN, LoadedSuite


if TYPE_CHECKING:
    from ..bank import StrategyBank

FORMS = ("two_phase", "plain")


@dataclass(frozen=True)
class Protocol:
    """
    How suites are evaluated.

    Args:
        form (`str`, *optional*, defaults to `"two_phase"`):
            `"two_phase"` (write a strategy, execute it) or `"plain"` (answer at once).
        samples (`int`, *optional*, defaults to `0`):
            Sampled attempts at each problem, beside the greedy one.
        temperature (`float`, *optional*, defaults to `1.0`):
            Temperature of the sampled ones.
        top_p (`float`, *optional*, defaults to `1.0`):
            Probability mass that they are sampled from.
        seed (`int`, *optional*, defaults to `42`):
            Seed of all random draws.
        chunk_size (`int`, *optional*, defaults to `32`):
            Problems a chunk.
        plain_length (`int`, *optional*):
            Maximum number of tokens of a plain answer. If `None`, that of an execution.
    """

    form: str = "two_phase"
    samples: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 42
    chunk_size: int = 32
    plain_length: int | None = None


def evaluate_suite(
    model: TwoPhaseModel,
    loaded: LoadedSuite,
    verifier: Verifier,
    protocol: Protocol,
    bank: "StrategyBank | None" = None,
    run: RunChunk = run_now,
    part: str = "suite",
) -> dict[str, Any]:
    """
    Evaluates a model on a suite.

    Args:
        model ([`~trl_sgpo.inference.model.TwoPhaseModel`]):
            The model.
        loaded ([`~trl_sgpo.evaluation.suites.LoadedSuite`]):
            The suite.
        verifier (`Callable`):
            Reward function that checks texts.
        protocol ([`Protocol`]):
            How to evaluate.
        bank ([`~trl_sgpo.bank.StrategyBank`], *optional*):
            Bank whose trusted strategies are shown with the problems. It is not changed.
        run (`Callable`, *optional*):
            Runs a chunk, see [`~trl_sgpo.evaluation.chunks.ChunkLog`].
        part (`str`, *optional*, defaults to `"suite"`):
            Begins the names of the chunks. Random draws do not depend on it.

    Returns:
        `dict`: The suite's results, as in `results.json`.
    """
    suite, chunks = loaded.suite, []
    for start in range(0, len(loaded.rows), protocol.chunk_size):
        place, rows = f"{suite.name}/{start}", loaded.rows[start : start + protocol.chunk_size]
        compute = partial(_attempt, model, suite.class_column, rows, verifier, protocol, bank, f"suite/{place}")
        check = attempts_chunk(len(rows), 1 + protocol.samples)
        chunks.append(run(f"{part}/{place}", suite_texts(len(rows), protocol), compute, check))
    return summarise(loaded, chunks, protocol)


def suite_texts(problems: int, protocol: Protocol) -> int:
    """Texts generated for a number of problems."""
    return problems * (1 + protocol.samples) * (2 if protocol.form == "two_phase" else 1)


def evaluate_ways(
    model: TwoPhaseModel,
    loaded: LoadedSuite,
    verifier: Verifier,
    protocol: Protocol,
    bank: "StrategyBank | None" = None,
    run: RunChunk = run_now,
    plain: bool = True,
) -> dict[str, Any]:
    """
    Evaluates a two-phase model on a suite in up to three ways: with a bank, with its own strategies only, and by plain
    answers.

    The arguments are those of [`evaluate_suite`].

    Args:
        plain (`bool`, *optional*, defaults to `True`):
            Whether to measure plain answers.

    Returns:
        `dict`: The suite's results with the bank, if there is one, and under `plain`, `own` and `bank`, where it was
        measured, accuracy, sampled figures and tokens of each way.
    """
    found = evaluate_suite(model, loaded, verifier, protocol, bank, run)
    ways = {"own" if bank is None else "bank": found}
    if bank is not None:
        ways["own"] = evaluate_suite(model, loaded, verifier, protocol, None, run, "own")
    if plain:
        ways["plain"] = evaluate_plain(model, loaded, verifier, protocol, run)
    return found | {name: way_figures(result) for name, result in ways.items()}


def evaluate_plain(
    model: TwoPhaseModel, loaded: LoadedSuite, verifier: Verifier, protocol: Protocol, run: RunChunk = run_now
) -> dict[str, Any]:
    """As [`evaluate_suite`], of plain answers of a two-phase model, at up to the length of both phases."""
    protocol = replace(protocol, form="plain", plain_length=model.settings.max_plain_length)
    return evaluate_suite(model, loaded, verifier, protocol, None, run, "plain")


def way_figures(result: dict[str, Any]) -> dict[str, Any]:
    """What is kept of a suite's results in one way beside those in another."""
    return {key: result[key] for key in ("accuracy", "sampled", "generated_tokens")}


def ways_texts(problems: int, protocol: Protocol, bank: bool, plain: bool) -> int:
    """Texts that [`evaluate_ways`] generates for a number of problems."""
    texts = suite_texts(problems, protocol) * (2 if bank else 1)
    return texts + (suite_texts(problems, replace(protocol, form="plain")) if plain else 0)


def _attempt(
    model: TwoPhaseModel,
    class_column: str,
    rows: Sequence[dict[str, Any]],
    verifier: Verifier,
    protocol: Protocol,
    bank: "StrategyBank | None",
    key: str,
) -> Chunk:
    """All attempts at the problems of a chunk. The first one of each is greedy."""
    before = model.generated_tokens
    problems = [as_problem(row, class_column) for row in rows]
    problems = with_retrieved(problems, bank, model.settings.num_retrieved, merged=model.settings.merged_classes)
    results: list[dict[str, Any]] = [
        {
            "problem": problem_id(problem.prompt),
            "class": problem.problem_class,
            "shown": [strategy.id for strategy in problem.retrieved],
            "attempts": [],
        }
        for problem in problems
    ]
    for sample in range(1 + protocol.samples):
        decoding = Decoding(
            greedy=sample == 0,
            temperature=protocol.temperature,
            top_p=protocol.top_p,
            seed=derived_seed(protocol.seed, key, sample, "strategy"),
        )
        executing = replace(decoding, seed=derived_seed(protocol.seed, key, sample, "execution"))
        if protocol.form == "plain":
            written = None
            prompts = [problem.prompt for problem in problems]
            texts = model.answer(prompts, executing, limit=protocol.plain_length)
        else:
            written = model.write_strategies(problems, decoding)
            texts = model.execute(problems, written, executing)
        for position, (text, outcome) in enumerate(zip(texts, verify(verifier, rows, texts), strict=True)):
            strategy = None if written is None else written[position]
            results[position]["attempts"].append(
                {
                    "strategy": None if strategy is None else strategy.text,
                    "flaw": None if strategy is None else strategy.flaw,
                    "text": text,
                    "answer": final_answer(text),
                    "outcome": None if math.isnan(outcome) else outcome,
                }
            )
    return {"results": results, "tokens": model.generated_tokens - before}


def summarise(loaded: LoadedSuite, chunks: Sequence[Chunk], protocol: Protocol) -> dict[str, Any]:
    """
    Summarises the results of a suite.

    Args:
        loaded ([`~trl_sgpo.evaluation.suites.LoadedSuite`]):
            The suite.
        chunks (`Sequence[dict]`):
            Its finished chunks.
        protocol ([`Protocol`]):
            Settings they were computed with.

    Returns:
        `dict`: The suite's results, as in `results.json`.
    """
    every = [result for chunk in chunks for result in chunk["results"]]
    results = [result for result in every if all(attempt["outcome"] is not None for attempt in result["attempts"])]
    greedy = [result["attempts"][0]["outcome"] for result in results]
    classes = [result["class"] for result in results]
    flaws = Counter(attempt["flaw"] for result in every for attempt in result["attempts"] if attempt["flaw"])
    return {
        "path": loaded.suite.path,
        "kind": loaded.suite.kind,
        "problems": len(every),
        "available": loaded.available,
        "unverified": len(every) - len(results),
        "accuracy": _figures(rate_estimate(greedy)),
        "classes": {
            name: _figures(rate_estimate([value for value, its in zip(greedy, classes, strict=True) if its == name]))
            for name in sorted(set(classes))
        },
        "sampled": _summarise_samples(results, protocol) if protocol.samples else None,
        "flawed_strategies": dict(sorted(flaws.items())),
        "generated_tokens": sum(chunk["tokens"] for chunk in chunks),
    }


def _summarise_samples(results: Sequence[dict[str, Any]], protocol: Protocol) -> dict[str, Any]:
    n = protocol.samples
    outcomes = [[attempt["outcome"] for attempt in result["attempts"][1:]] for result in results]
    solved = [sum(outcome >= SOLVED for outcome in row) for row in outcomes]
    return {
        "samples": n,
        "accuracy": _figures(mean_estimate([math.fsum(row) / n for row in outcomes])),
        "pass_at_k": {
            str(k): _figures(mean_estimate([pass_at_k(n, count, k) for count in solved]))
            for k in [*(2**power for power in range(n.bit_length()) if 2**power < n), n]
        },
        "majority": _figures(rate_estimate([_majority_outcome(result["attempts"][1:]) for result in results])),
    }


def _majority_outcome(attempts: Sequence[dict[str, Any]]) -> float:
    chosen = majority_vote([attempt["answer"] for attempt in attempts], comparison())
    return 0.0 if chosen is None else attempts[chosen]["outcome"]


def summarise_kinds(suites: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any] | None]:
    """Accuracy of each known kind of suites, over all their verified problems."""
    kinds: dict[str, dict[str, Any] | None] = {}
    for kind in sorted({result["kind"] for result in suites.values()} - {UNKNOWN}):
        measured = [r["accuracy"] for r in suites.values() if r["kind"] == kind and r["accuracy"] is not None]
        problems = sum(figures["problems"] for figures in measured)
        right = math.fsum(figures["value"] * figures["problems"] for figures in measured)
        rate = right / problems if problems else 0.0
        kinds[kind] = Estimate(rate, *wilson_interval(rate, problems), problems).to_dict() if problems else None
    return kinds


def _figures(estimate: Estimate | None) -> dict[str, Any] | None:
    return None if estimate is None else estimate.to_dict()
