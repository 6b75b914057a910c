"""Comparisons with several base models as one table: intervals over models, seeds and problems, and collapsed runs."""

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checks.damaged import expect_readable
from ..checks.json_text import read_json
from ..checks.shapes import count, listing, mapping, number, record, text
from ..errors import ConfigError
from ..evaluation.stored import RATE
from ..evaluation.tables import in_markdown
from ..files import write_file
from .pictures import Bar, draw_comparison
from .table import files_of_table, table_lines


if TYPE_CHECKING:
    import numpy as np

COLLAPSED = 0.2
"""Accuracy below which a run has collapsed."""

_REPLICATES = 10_000
_MAX_SEEDS, _MAX_VALUES = 1_000, 50_000  # of a comparison, of each of which replicates are drawn
_MAX_ARMS, _MAX_FIGURES = 200, 500  # each arm is named at each figure
_OF_TRANSFER = ("transfer score", "own strategy", "other class's strategy", "no strategy")
_SUMMARY = record(
    {
        "settings": record(
            {
                "budget": count,
                "suites": listing(record({"name": text})),
                "transfer": record({"suite": text}),
                "overrides": record({}),
            }
        ),
        "reference": text,
        "arms": mapping(mapping(record({"values": listing(number(-1e12, 1e12))}))),
        "seeds": mapping(listing(count)),
        "problems": mapping(number(1)),
        "curves": mapping(listing(listing(record({"accuracy": RATE, "generated_tokens": count})))),
    }
)

_RATES = listing(RATE)


def read_summaries(paths: list[str]) -> list[dict[str, Any]]:
    """
    Reads summaries, one for each base model.

    Args:
        paths (`list[str]`):
            Their `.json` files, as `trl-sgpo compare` writes them.

    Raises:
        [`ConfigError`]: A file is missing or no summary, they differ in budget, suites or arms, or two are of
            one model.
    """
    summaries = []
    for path in paths:
        if not Path(path).is_file():
            raise ConfigError(f"There is no file {path}: `--pool` reads the tables (.json) that `compare` writes.")
        with expect_readable(path, "write it again by `trl-sgpo compare --table_only`"):
            summary = read_json(Path(path))
            _SUMMARY(summary, "it")
            values = sum(len(figure["values"]) for arm in summary["arms"].values() for figure in arm.values())
            if values > _MAX_VALUES or max(map(len, summary["seeds"].values()), default=0) > _MAX_SEEDS:
                raise ValueError(f"it has more than {_MAX_SEEDS} seeds or {_MAX_VALUES:,} values")
            figures = _figures([summary])
            if len(summary["arms"]) > _MAX_ARMS or len(figures) > _MAX_FIGURES:
                raise ValueError(f"it has more than {_MAX_ARMS} arms or {_MAX_FIGURES} figures")
            for arm in summary["arms"].values():
                for name in arm.keys() & figures:
                    _RATES(arm[name]["values"], f"`{name}`")
            summaries.append(summary)
    first, models = summaries[0]["settings"], [model_of(summary) for summary in summaries]
    for path, summary in zip(paths, summaries, strict=True):
        for key in ("budget", "suites", "arms"):
            if summary["settings"].get(key) != first.get(key):
                raise ConfigError(f"{path} has other `{key}` than {paths[0]}: pool comparisons that differ by model.")
    if len(set(models)) < len(models):
        raise ConfigError(f"Two of the comparisons are of one model ({', '.join(models)}): name one for each model.")
    return summaries


def model_of(summary: dict[str, Any]) -> str:
    """The base model of a comparison, if an override names it, and otherwise its recipe."""
    settings = summary["settings"]
    return str(settings["overrides"].get("model_name_or_path", settings.get("recipe")))


def pooled(summaries: list[dict[str, Any]], seed: int = 0) -> dict[str, Any]:
    """
    Pools comparisons.

    Intervals are from a bootstrap: models are drawn with replacement, for each its seeds, and for each run the number
    of its right answers, except for figures of transfer and learning curves. Runs of two arms are paired by model and
    seed.

    Args:
        summaries (`list[dict]`):
            Summaries by [`read_summaries`].
        seed (`int`, *optional*, defaults to 0):
            Seed of the draws.

    Returns:
        `dict`: `models`, `arms` with the figures of each arm, `differences` (reference minus arm), `curves`.
    """
    suites, reference = summaries[0]["problems"], summaries[0]["reference"]
    kinds, tells = _figures(summaries), (f"{summaries[0]['settings']['transfer']['suite']} ", "curve ")
    problems = {name: next((n for suite, n in suites.items() if name.startswith(f"{suite} ")), None) for name in kinds}
    arms: dict[str, Any] = {}
    differences: dict[str, Any] = {}
    for arm in summaries[0]["arms"]:
        arms[arm] = {}
        for name in kinds:
            runs = [_runs(summary, arm, name) for summary in summaries]
            if all(runs):
                arms[arm][name] = _pooled([list(each.values()) for each in runs], problems[name], seed)
                if not name.startswith(tells):
                    del arms[arm][name]["collapsed"]
        for name in kinds if arm != reference else ():
            pairs = [_pairs(summary, reference, arm, name) for summary in summaries]
            if all(pairs):
                differences.setdefault(arm, {})[name] = _difference(pairs, problems[name], seed)
    return {
        "settings": summaries[0]["settings"],
        "models": [model_of(summary) for summary in summaries],
        "reference": reference,
        "arms": arms,
        "differences": differences,
        "curves": {
            arm: [run for summary in summaries for run in summary["curves"].get(arm, [])]
            for arm in summaries[0]["arms"]
        },
    }


def _figures(summaries: list[dict[str, Any]]) -> list[str]:
    names = dict.fromkeys(name for summary in summaries for arm in summary["arms"].values() for name in arm)
    return [
        name
        for name in names
        if name in _OF_TRANSFER or ((name.startswith("curve ") or "accuracy" in name) and not name.endswith("greedy"))
    ]


def _runs(summary: dict[str, Any], arm: str, name: str) -> dict[int, float]:
    """The value of each seed. There are none if some runs lack the figure: the table says so."""
    values, seeds = summary["arms"].get(arm, {}).get(name, {}).get("values", []), summary["seeds"].get(arm, [])
    return dict(zip(seeds, values, strict=True)) if len(values) == len(seeds) else {}


def _pairs(summary: dict[str, Any], reference: str, arm: str, name: str) -> list[tuple[float, float]]:
    ours, theirs = _runs(summary, reference, name), _runs(summary, arm, name)
    return [(ours[seed], theirs[seed]) for seed in ours if seed in theirs]


def _drawn(values: "np.ndarray", problems: int | None, draw: "np.random.Generator") -> "np.ndarray":
    """Accuracies of runs with as many problems drawn anew, as they are where the number is not known."""
    return values if problems is None else draw.binomial(problems, values) / problems


def _replicates(models: list["np.ndarray"], problems: int | None, seed: int) -> "np.ndarray":
    """Means of replicates, of runs of shape `(seeds, arms)` for each model: shape `(replicates, arms)`."""
    import numpy as np

    draw = np.random.default_rng(seed)
    chosen = draw.integers(len(models), size=(_REPLICATES, len(models)))
    means = np.zeros((_REPLICATES, models[0].shape[1]))
    for index, runs in enumerate(models):
        times = (chosen == index).sum(axis=1)
        for most in range(1, len(models) + 1):
            rows = np.flatnonzero(times >= most)
            seeds = draw.integers(len(runs), size=(len(rows), len(runs)))
            means[rows] += _drawn(runs[seeds], problems, draw).mean(axis=1)
    return means / len(models)


def _ends(replicates: "np.ndarray") -> dict[str, float]:
    import numpy as np

    low, high = np.quantile(replicates, (0.025, 0.975))
    return {"low": float(low), "high": float(high)}


def _pooled(models: list[list[float]], problems: int | None, seed: int) -> dict[str, Any]:
    import numpy as np

    runs = [value for values in models for value in values]
    replicates = _replicates([np.array(values)[:, None] for values in models], problems, seed)[:, 0]
    return {
        "mean": float(np.mean([np.mean(values) for values in models])),
        **_ends(replicates),
        "collapsed": sum(value < COLLAPSED for value in runs),
        "runs": len(runs),
        "values": models,
    }


def _difference(pairs: list[list[tuple[float, float]]], problems: int | None, seed: int) -> dict[str, Any]:
    import numpy as np

    replicates = _replicates([np.array(each) for each in pairs], problems, seed)
    of_models = [[ours - theirs for ours, theirs in each] for each in pairs]
    return {
        "mean": float(np.mean([np.mean(values) for values in of_models])),
        **_ends(replicates[:, 0] - replicates[:, 1]),
        "values": of_models,
    }


def markdown(summed: dict[str, Any]) -> str:
    """The tables of a pooled comparison."""
    names = list(dict.fromkeys(name for figures in summed["arms"].values() for name in figures))
    models = in_markdown(", ".join(summed["models"]))
    lines = [
        f"# Comparison over {len(summed['models'])} models",
        "",
        f"{summed['settings']['budget']:,} tokens a run. Models: {models}. Means over models, "
        f"with 95% intervals of a bootstrap over models, seeds and problems. A run has collapsed whose accuracy "
        f"on {summed['settings']['transfer']['suite']} is below {COLLAPSED}. "
        "Runs are listed by model, in the order of their seeds.",
    ]
    for name in names:
        lines += ["", f"## {in_markdown(_title(name, summed))}", ""]
        rows = []
        for arm, figures in summed["arms"].items():
            if name in figures:
                f, other = figures[name], summed["differences"].get(arm, {}).get(name)
                runs = "; ".join(" ".join(f"{value:.2f}" for value in values) for values in f["values"])
                collapsed = f"{f['collapsed']} of {f['runs']}" if "collapsed" in f else ""
                rows.append([arm, _cell(f), collapsed, "" if other is None else _cell(other, "+"), runs])
        header = ["arm", "accuracy", "collapsed", f"{summed['reference']} minus arm", "runs"]
        lines += table_lines(header, rows)
        if without := [arm for arm, figures in summed["arms"].items() if name not in figures]:
            lines += ["", f"Without it for each model, and so left out: {in_markdown(', '.join(without))}."]
    return "\n".join(lines) + "\n"


def _title(name: str, summed: dict[str, Any]) -> str:
    """The name of a figure, and that of a point of the learning curves by its tokens."""
    points = max((len(run) for runs in summed["curves"].values() for run in runs), default=0)
    point = re.fullmatch(r"curve (\d{1,4})", name)
    if point is None or not points:
        return name
    tokens = summed["settings"]["budget"] * int(point[1]) // points
    return f"{summed['settings']['transfer']['suite']} accuracy after about {tokens:,} tokens, on its first problems"


def _cell(figure: dict[str, Any], sign: str = "") -> str:
    mean, low, high = (f"{figure[key]:{sign}.2f}" for key in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


def write(summed: dict[str, Any], stem: Path) -> list[Path]:
    """Writes a pooled comparison beside `stem` as `.json`, `.md` and `.png`."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    paths = files_of_table(stem)
    write_file(paths[0], json.dumps(summed, indent=1) + "\n")
    write_file(paths[1], markdown(summed))
    known = {name for figures in summed["arms"].values() for name in figures}
    shown = [f"{suite['name']} accuracy" for suite in summed["settings"]["suites"]] + ["transfer score"]
    panels = {
        name: {arm: _bar(figures[name]) for arm, figures in summed["arms"].items() if name in figures}
        for name in shown
        if name in known
    }
    title = f"{summed['settings']['transfer']['suite']} accuracy by thousand tokens"
    draw_comparison(paths[2], panels, summed["curves"], title, summed["reference"])
    return paths


def _bar(figure: dict[str, Any]) -> Bar:
    note = f"{figure['collapsed']} of {figure['runs']} collapsed" if figure.get("collapsed") else ""
    return Bar(figure["mean"], figure["low"], figure["high"], figure["values"], note)
