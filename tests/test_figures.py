"""Figures in the docs are those in the result files beside the commands that make them."""

import json
import math
import re
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

import pytest
from benchmarks import hypotheses

from trl_sgpo.compare.pool import read_summaries


DOCS = Path(__file__).parents[1] / "docs"
BUILDS = ("lab", "lab_1")
GUIDED, PLAIN = "held_out accuracy", "held_out plain accuracy"
T = 2.776445  # 97.5% of Student's t with 4 degrees of freedom


@pytest.fixture(scope="module")
def arms() -> dict[str, dict[str, Any]]:
    return {b: json.loads((DOCS / "results" / f"internalize_{b}.json").read_text())["arms"] for b in BUILDS}


def in_brackets(figure: dict[str, Any]) -> str:
    return f"{figure['mean']:.2f} [{figure['low']:.2f}, {figure['high']:.2f}]"


def signed(figure: dict[str, Any]) -> str:
    return f"{figure['mean']:+.2f} [{figure['low']:+.2f}, {figure['high']:+.2f}]"


def differences() -> dict[str, Any]:
    """SGPO minus each arm, over the four builds."""
    return json.loads((DOCS / "results" / "lab2.json").read_text())["differences"]


def difference(arms: dict[str, Any], first: str, second: str, kinds: tuple[str, str] = (PLAIN, PLAIN)) -> str:
    """Mean difference over seeds with its interval."""
    pairs = zip(arms[first][kinds[0]]["values"], arms[second][kinds[1]]["values"], strict=True)
    values = [one - other for one, other in pairs]
    half = T * stdev(values) / math.sqrt(len(values))
    return f"{fmean(values):.2f} [{fmean(values) - half:.2f}, {fmean(values) + half:.2f}]"


def without_signs(text: str) -> str:
    return re.sub(r"\s+", " ", text.replace("+", "").replace("-0.00", "0.00"))


def test_plain_answers(arms: dict[str, dict[str, Any]]) -> None:
    text = (DOCS / "plain_answers.md").read_text().partition("Ablations, ")[0]
    rows = dict(re.findall(r"^\| `(\w+)` \| [^|]+ \| ((?:[^|]+ \| ){3}[^|]+) \|$", text, re.MULTILINE))
    assert list(rows) == list(arms["lab"])
    for name, cells in rows.items():
        two_phase = f"{GUIDED} without the bank" in arms["lab"][name]
        wanted = [
            figure for b in BUILDS for figure in (in_brackets(arms[b][name][GUIDED]) if two_phase else "–",
                                                  in_brackets(arms[b][name][PLAIN]))
        ]  # fmt: skip
        assert cells.split(" | ") == wanted


def test_ablations(arms: dict[str, dict[str, Any]]) -> None:
    text = (DOCS / "plain_answers.md").read_text().partition("Ablations, ")[2]
    rows = dict(re.findall(r"^\| `(\w+)` \| [^|]+ \| ((?:[^|]+ \| ){3}[^|]+) \|$", text, re.MULTILINE))
    assert len(rows) == 9
    for name, cells in rows.items():
        wanted = []
        for build in BUILDS:
            changed = json.loads((DOCS / "results" / f"internalize_ablations_{build}.json").read_text())["arms"]
            for kind in (GUIDED, PLAIN):
                values = (changed | arms[build])[name][kind]["values"][:3]
                wanted.append(f"{fmean(values):.2f} ({', '.join(f'{value:.2f}' for value in values)})")
        assert cells.split(" | ") == wanted


@pytest.mark.parametrize("page", ["plain_answers.md", "hypotheses.md"])
def test_differences(page: str, arms: dict[str, dict[str, Any]]) -> None:
    """Each interval that a page names is one between two arms, on plain or on guided answers."""
    pairs = [(a, b) for a in arms["lab"] for b in arms["lab"] if a != b]
    known = {difference(arms[b], *pair) for b in BUILDS for pair in pairs}
    known |= {difference(arms[b], *pair, kinds=(GUIDED, GUIDED)) for b in BUILDS for pair in pairs}
    known |= {difference(arms[b], name, name, (GUIDED, PLAIN)) for b in BUILDS for name in arms["lab"]}
    known |= {in_brackets(arms[b][name][kind]) for b in BUILDS for name in arms["lab"] for kind in (GUIDED, PLAIN)}
    known = {without_signs(each) for each in known}
    named = re.findall(
        r"-?\d\.\d\d \[-?\d\.\d\d, -?\d\.\d\d\]", without_signs((DOCS / page).read_text().partition("### H1 and")[0])
    )
    assert len(named) >= 10 and not [each for each in named if each not in known]


LAB2 = {
    "Warm start": "base",
    "SFT, seed 1": "sft",
    "GRPO": "grpo",
    "Two-phase GRPO: the same in two phases, with nothing else of SGPO": "two_phase_grpo",
    "Two-phase GRPO with the bank": "two_phase_grpo_bank",
    "SGPO without bank, without leak penalty and without coherence": "transfer_only",
    "SGPO with random rewards, seed 1": "random_reward",
    "**SGPO**": "sgpo",
}


def test_readme() -> None:
    found = json.loads((DOCS / "results" / "lab2.json").read_text())["arms"]
    text = (DOCS.parent / "README.md").read_text()
    table = text.partition("| Four models, seeds 1 to 3 | ")[2].partition("\n\n")[0]
    rows = [line.strip("| ").split(" | ") for line in table.splitlines()[2:]]
    assert {row[0] for row in rows} == LAB2.keys()
    for name, *cells in rows:
        trained, plain = (found[LAB2[name]][kind] for kind in (GUIDED, PLAIN))
        assert cells == [in_brackets(trained), in_brackets(plain), f"{trained['collapsed']} of {trained['runs']}"]
    words = " ".join(text.split())
    over = differences()["two_phase_grpo"]
    by_model = [f"{fmean(values):+.2f}" for values in over[GUIDED]["values"]]
    assert f"two-phase GRPO**: {signed(over[GUIDED])}, the mean of {by_model[0]} with" in words
    assert f"and {by_model[1]}, {by_model[2]} and {by_model[3]} with the others" in words
    assert f"after a quarter of the tokens it is {in_brackets(over['curve 1'])} above" in words
    assert f"those of SFT: {signed(differences()['sft'][PLAIN])}" in words
    collapses = [[min(values) < 0.2 for values in found[arm][GUIDED]["values"]] for arm in ("grpo", "two_phase_grpo")]
    assert [sum(models) for models in collapses] == [3, 1] and found["sgpo"][GUIDED]["collapsed"] == 0
    assert max(figures["longer accuracy"]["mean"] for figures in found.values()) < 0.035
    gain = json.loads((DOCS / "results" / "internalize.json").read_text())["differences"]["distill"][PLAIN]
    assert f"adds {-gain['mean']:.2f} [{-gain['high']:.2f}, {-gain['low']:.2f}] to plain answers" in words


def test_over_models() -> None:
    """The table of all arms, and the runs that the page on hypotheses names."""
    found = json.loads((DOCS / "results" / "lab2.json").read_text())["arms"]
    text = (DOCS / "comparison.md").read_text().partition("## Results over models")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| \**`(\w+)`[^|]* \| (.+) \|$", text, re.MULTILINE)
    assert {name for name, _ in rows} == found.keys()
    for name, cells in rows:
        guided, plain, transfer = (found[name][kind] for kind in (GUIDED, PLAIN, "transfer score"))
        runs = "; ".join(" ".join(f"{value:.2f}" for value in values) for values in guided["values"])
        quarter = in_brackets(found[name]["curve 1"]) if "curve 1" in found[name] else "–"
        collapsed = f"{guided['collapsed']} of {guided['runs']}"
        wanted = [in_brackets(guided), runs, collapsed, in_brackets(plain), in_brackets(transfer), quarter]
        assert cells.split(" | ") == wanted
    words, known = without_signs(text), {without_signs(signed(f)) for d in differences().values() for f in d.values()}
    known |= {in_brackets(figure) for figures in found.values() for figure in figures.values()}
    answers = json.loads((DOCS / "results" / "hypotheses.json").read_text())
    known |= {without_signs(signed(answers[name])) for name in ("H1", "H4", "H5")}
    named = re.findall(r"-?\d\.\d\d \[-?\d\.\d\d, -?\d\.\d\d\]", words)
    assert len(named) > 60 and not [each for each in named if each not in {without_signs(each) for each in known}]
    leaks = json.loads((DOCS / "results" / "collapse.json").read_text())
    of_two_phases = sorted(f"{run['leaks, first']:.2f}" for run in leaks if run["arm"] == "two_phase_grpo")
    assert f"begins with {of_two_phases[0]} to {of_two_phases[-1]} of strategies that leak" in words
    with_transfer = [run for run in leaks if run["arm"] in ("sgpo", "transfer_only")]
    first = sorted(f"{run['leaks, first']:.2f}" for run in with_transfer)
    assert f"share is {first[0]} to {first[-1]} in the first ten steps and at most 0.01 in the last" in words
    assert max(run["leaks, last"] for run in with_transfer) < 0.015


def test_dose() -> None:
    found = json.loads((DOCS / "results" / "dose.json").read_text())
    text = (DOCS / "comparison.md").read_text().partition("### What is left where")[2].partition("\n### ")[0]
    arms = re.findall(r"`(\w+)`", next(line for line in text.splitlines() if line.startswith("| Share")))
    rows = re.findall(r"^\| ([\d.]+) \| (.+) \|$", text, re.MULTILINE)
    assert arms == list(found) and {float(share) for share, _ in rows} == {float(each) for each in found["sgpo"]}
    means = {}
    for share, cells in rows:
        for arm, cell in zip(arms, cells.split(" | "), strict=True):
            models = found[arm][str(float(share))].values()
            means[arm, share] = f"{fmean(map(fmean, models)):.2f}"
            runs = "; ".join(" ".join(f"{value:.2f}" for value in values) for values in models)
            assert cell == f"{means[arm, share]} ({runs})"
    words = " ".join((DOCS.parent / "README.md").read_text().split())
    none = [means[arm, "0"] for arm in ("sgpo", "two_phase_grpo", "grpo")]
    assert "({} and {}; GRPO {}, two models)".format(*none) in words
    assert f"SGPO ends at {means['sgpo', '0.9']} and no other arm above 0.05" in words
    collapsed = {arm: [v < 0.2 for share in found[arm].values() for vs in share.values() for v in vs] for arm in arms}
    runs, of_sgpo, of_two, of_grpo = (
        len(collapsed["sgpo"]),
        *map(sum, (collapsed[arm] for arm in ("sgpo", "two_phase_grpo", "grpo"))),
    )
    said = f"{of_sgpo} of {runs} runs of SGPO collapsed, {of_two} of two-phase GRPO and {of_grpo} of GRPO"
    assert said in words
    answer = " ".join((DOCS / "hypotheses.md").read_text().split())
    assert f"{of_sgpo} of {runs} runs of `sgpo` collapsed, {of_grpo} of `grpo` and {of_two} of" in answer
    below = [float(means["two_phase_grpo", "0"]) - float(means[arm, "0"]) for arm in ("base", "sft", "grpo")]
    assert f"end {min(below):.2f} to {max(below):.2f} below `two_phase_grpo`" in answer
    assert max(v for arm in arms if arm != "sgpo" for vs in found[arm]["0.9"].values() for v in vs) < 0.055


def test_data_efficiency() -> None:
    found = json.loads((DOCS / "results" / "efficiency.json").read_text())
    text = " ".join(
        (DOCS / "comparison.md").read_text().partition("### Data efficiency")[2].partition("\n## ")[0].split()
    )

    def point(arm: str, quarter: int) -> tuple[float, str, str]:
        points = [run["points"][quarter] for run in found["runs"][arm]]
        accuracy, tokens, problems = (
            fmean(each[key] for each in points) for key in ("accuracy", "tokens", "problems")
        )
        return f"{accuracy:.2f}", f"{round(tokens, -3):,.0f}", f"{problems:,.0f}"

    assert "SGPO is at {} after {} generated tokens and {} problems drawn".format(*point("sgpo", 0)) in text
    assert "Two-phase GRPO is at {} after {} tokens and {} problems".format(*point("two_phase_grpo", 3)) in text
    assert f"GRPO at {point('grpo', 3)[0]}." in text and f"worked solutions, is at {fmean(found['sft']):.2f}." in text


def test_answers_to_hypotheses() -> None:
    """They are those of the summaries, and the page has them."""
    summaries = [str(DOCS / "results" / f"lab2_lab{part}.json") for part in ("", "_1", "_2", "_3")]
    found = hypotheses.answers(read_summaries(summaries))
    assert (
        json.loads(json.dumps(found)).items() <= json.loads((DOCS / "results" / "hypotheses.json").read_text()).items()
    )
    page = (DOCS / "hypotheses.md").read_text()
    for name in ("H1", "H4", "H5"):
        first, second = found[name]["arms"]
        by_model = " | ".join(f"{fmean(values):+.2f}" for values in found[name]["values"])
        row = f"| {name} | `{first}` − `{second}` | **{found[name]['answer']}** | {signed(found[name])} | {by_model} |"
        assert row in page
    tokens = [
        "; ".join(
            " ".join("never" if each is None else f"{each:,}" for each in runs) if any(runs) else "never"
            for runs in pair
        )
        for pair in zip(found["H6"]["tokens"]["sgpo"], found["H6"]["tokens"]["grpo"], strict=True)
    ]
    assert f"`grpo` | **{found['H6']['answer']}** | | {' | '.join(tokens)} |" in page
    counts = [found["H7"]["collapsed"][arm] for arm in ("sgpo", "grpo", "two_phase_grpo")]
    by_model = " | ".join(", ".join(map(str, models)) for models in zip(*counts, strict=True))
    total = ", ".join(str(sum(each)) for each in counts)
    assert f"`two_phase_grpo` | **{found['H7']['answer']}** | {total} of 12 | {by_model} |" in page


def test_cost_of_contrast() -> None:
    lines = (DOCS / "results" / "bench_contrast.txt").read_text().splitlines()
    seconds = {
        arm: median(float(line.split()[3]) for line in lines if line.startswith(f"{arm} step"))
        for arm in ("sgpo", "untaught")
    }
    said = f"{seconds['sgpo'] / seconds['untaught']:.2f} times as long as one without ({seconds['sgpo']:.1f} and"
    assert f"{said} {seconds['untaught']:.1f} s," in " ".join((DOCS / "plain_answers.md").read_text().split())


def test_bank_worth() -> None:
    found = json.loads((DOCS / "results" / "bank_worth.json").read_text())["figures"]
    text = (DOCS / "bank.md").read_text().partition("## What it is worth")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (one|two) \| ([^|]+) \| ([^|]+) \| ([^|]+) \|$", text, re.MULTILINE)
    assert len(rows) >= 10
    for kind, bank, accuracy, shown in rows:
        figures = found[f"{kind} | {bank}"]
        value, low, high = (figures["accuracy"][key] for key in ("value", "low", "high"))
        assert (accuracy, shown) == (f"{value:.2f} [{low:.2f}, {high:.2f}]", f"{figures['strategies_shown']:.2f}")


def test_ceiling() -> None:
    rows = json.loads((DOCS / "results" / "plain_ceiling.json").read_text())
    text = " ".join((DOCS / "plain_answers.md").read_text().split())
    best = {
        (fresh, build): max(row["plain"] for row in rows if (row["fresh_problems"], row["run"][:2]) == (fresh, build))
        for fresh in (None, 0, 768, 4096)
        for build in ("b0", "b1")
    }
    for fresh, before in ((None, "from"), (0, "to"), (768, "to"), (4096, "to")):
        assert f"{before} {best[fresh, 'b0']:.2f} and {best[fresh, 'b1']:.2f} " in text
    assert f"The lowest figure of guided ones is {min(row['guided'] for row in rows):.2f}" in text


def table_rows(text: str, first: str) -> dict[str, list[str]]:
    """Rows of the table whose heading begins with a text, by their first cell."""
    lines = text[text.index(f"| {first}") :].split("\n\n")[0].splitlines()[2:]
    return {cells[0]: cells[1:] for cells in ([cell.strip() for cell in line[1:-1].split("|")] for line in lines)}


def arrows(runs: list[dict[str, Any]], rollouts: bool) -> list[str]:
    """Means over runs of the quickstart, before → after."""
    found = [[(run["first_quarter"], run["last_quarter"]) for run in runs]] if rollouts else []
    for mode in ("sampled", "greedy"):
        for kind in ("accuracy", "transfer"):
            found.append([(run["report"]["before"][mode][kind], run["report"]["after"][mode][kind]) for run in runs])
    means = [[round(fmean(values), 6) for values in zip(*pairs, strict=True)] for pairs in found]
    return [f"{before:.2f} → {after:.2f}" for before, after in means]


def test_quickstart() -> None:
    results = json.loads((DOCS / "results" / "quickstart_seeds.json").read_text())
    runs = list(results["seeds"].values())
    text = (DOCS / "quickstart.md").read_text()
    means = arrows(runs, rollouts=True)
    rows = table_rows(text, "Seed | Rollouts")
    assert list(rows) == [*results["seeds"], "mean"]
    assert list(rows.values()) == [*(arrows([run], rollouts=True) for run in runs), means]
    rows = table_rows((DOCS.parent / "README.md").read_text(), "80 unseen problems")
    assert list(rows.values()) == [arrows(each, rollouts=False) for each in (runs[:1], runs)]
    recipe = " ".join((DOCS.parent / "recipes" / "quickstart.yaml").read_text().replace("\n# ", " ").split())
    rollouts, sampled, transfer, greedy, _ = (each.replace("→", "to") for each in means)
    assert f"rises from {sampled} sampled and from {greedy} greedy, transfer score from {transfer}," in recipe
    assert "from {} in the first to {} in the last quarter".format(*rollouts.split(" to ")) in recipe
    gains = [
        run["report"]["after"]["greedy"]["accuracy"] - run["report"]["before"]["greedy"]["accuracy"] for run in runs
    ]
    words = " ".join(text.split())
    assert f"Greedy accuracy rises by {fmean(gains):.2f} on average" in words
    _, more, _, more_greedy, _ = arrows([results["with_480_traces"]["42"]], rollouts=True)
    assert f"from {more.replace('→', 'to')} sampled and from {more_greedy.replace('→', 'to')} greedy" in words
    assert not any(run["trusted"] for run in runs) and "It trusted none in these runs" in words


@pytest.mark.parametrize(
    ("page", "heading"), [("README.md", "SGPO divided by"), ("docs/scaling.md", "Quickstart recipe, SGPO")]
)
def test_cost(page: str, heading: str) -> None:
    ends, full, memory = (
        json.loads((DOCS / "results" / f"bench_{name}.json").read_text())
        for name in ("throughput_ends", "throughput", "memory")
    )
    both = {
        "Time of an optimizer step": ("step_time_ratio", 2),
        "Generated tokens": ("generated_tokens_ratio", 2),
        "Time per generated token": ("seconds_per_generated_token_ratio", 2),
        "Operations per generated token": ("flops_per_generated_token_ratio", 2),
        "Share of an SGPO step spent outside the model": ("share_outside_model", 3),
        "Share of an SGPO step spent on the bank": ("bank_share", 3),
    }
    wanted = {name: [f"{of[key]:.{digits}f}" for of in (ends, full)] for name, (key, digits) in both.items()}
    wanted["Peak memory, at equal rows and total lengths"] = ["", f"{memory['peak_memory_ratio']:.2f}"]
    wanted["The same, tensors of a step only"] = ["", f"{memory['step_memory_ratio']:.2f}"]
    text = (DOCS.parent / page).read_text()
    rows = table_rows(text, heading)
    assert len(rows) >= 5 and rows == {name: wanted[name] for name in rows}
    if page == "README.md":
        named = [wanted[name] for name in ("Time of an optimizer step", "Generated tokens")]
        figures = [" to ".join(sorted(each)) for each in named] + [f"{memory['peak_memory_ratio']:.2f}"]
        assert [cells[1] for cells in list(table_rows(text, "| GRPO | SGPO |").values())[-3:]] == figures


def test_two_problems_a_block() -> None:
    table = [line for line in (DOCS / "results" / "lab.md").read_text().splitlines() if line.startswith("| k1 | +")]
    end, quarter = (without_signs(line.split("|")[cell].strip()) for line, cell in zip(table, (3, 2), strict=True))
    text = without_signs((DOCS / "geometry.md").read_text())
    assert re.search(rf"{re.escape(quarter)} (higher than that of K = 1 )?after a quarter of the tokens", text)
    assert re.search(rf"{re.escape(end)} (higher )?at the end", text)


def test_bank() -> None:
    figures = json.loads((DOCS / "results" / "bench_bank.json").read_text())
    rows = table_rows((DOCS.parent / "README.md").read_text(), "Measured with synthetic strategies")
    kills = f"{figures['kills']} kills, {figures['kills_while_indexing']} of them"
    assert next(iter(rows)).startswith(kills)
    attacked, undefended = figures["attack_success_rate"], figures["undefended_attack_success_rate"]
    assert [cells[0] for cells in rows.values()] == [
        f"{figures['lost']}, {figures['duplicated']}, {figures['unopenable']}",
        f"{attacked:.1%}, {undefended:.0%}",
        f"{figures['classes_retained']:.0%}",
        f"{figures['retrieve_p50_ms']['100000']:.0f} ms; {figures['commit_p50_ms']['100000']:.1f} ms",
    ]
