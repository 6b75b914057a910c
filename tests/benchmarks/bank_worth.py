"""
What a bank is worth to a model with frozen weights, on classes whose procedure cannot be read off the problem.

    PYTHONPATH=tests python -m benchmarks.bank_worth --output docs/results/bank_worth  # 5 minutes on one core

A problem names an operation that does not exist: `zor kab : 3 1 4 1`. What it does, two operations of the laboratory
one after the other, is drawn for each class and stands nowhere in the problem. The laboratory's model ignores
strategies that it is shown, so it is first taught to read them: on names that mean something else in each example, and
to guess where it is shown nothing. After that no weight changes. `SGPOTrainer` with a learning rate of 0 fills the
bank: guesses of the model that prove right are admitted, executed on other problems and trusted, by the package's own
rules.
"""

import argparse
import json
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

from trl_sgpo import SGPOConfig, SGPOPipeline, SGPOTrainer, StrategyBank
from trl_sgpo.bank import Strategy, problem_id
from trl_sgpo.bank.files import BANK_DIRECTORY
from trl_sgpo.compare.lab.list_functions import LENGTH, OPERATIONS, Program, execution, states
from trl_sgpo.compare.lab.model import fetch_model
from trl_sgpo.data.tasks import answer_reward
from trl_sgpo.evaluation.statistics import class_mean_estimate
from trl_sgpo.files import write_file
from trl_sgpo.inference.model import Decoding, TwoPhaseModel
from trl_sgpo.inference.settings import TwoPhaseSettings
from trl_sgpo.inference.verifier import verify
from trl_sgpo.method.admission import outcomes
from trl_sgpo.method.problem import Problem
from trl_sgpo.method.prompts import Prompt


_SYLLABLES = "zor kab vup bek pom gaz juf nen zak kez mog vub bix pam gep dor jug nif zux kem vok baz pub dif jog zib"
SYLLABLES = [*_SYLLABLES.split(), "kug", "ber", "piz", "daf", "jop", "lun", "wex", "tib", "rud"]
NAMES = [" ".join(pair) for pair in product(SYLLABLES, SYLLABLES) if pair[0] != pair[1]]
SETTINGS = TwoPhaseSettings(
    strategy_prompt="{problem} {strategies} strategy?",
    execution_prompt="apply",
    max_strategy_length=20,
    max_completion_length=36,
    num_retrieved=2,
)


@dataclass(frozen=True)
class Sizes:
    """How much is taught, explored and measured."""

    lessons: int = 38_400
    classes: int = 16
    explored: int = 48  # problems of a class to fill the bank with, none of them twice
    steps: int = 20  # in which the bank is filled
    tested: int = 12  # problems of a class, and of a pair of classes in either order
    distractors: tuple[int, ...] = (0, 10, 100, 1_000)


@dataclass(frozen=True)
class World:
    """Names of classes and what they mean, and names of the distractors."""

    meaning: dict[str, Program]
    others: dict[str, Program]
    pairs: list[tuple[str, str]]


def draw_world(sizes: Sizes, seed: int) -> World:
    rng = random.Random(f"world {seed}")
    names = rng.sample(NAMES, sizes.classes + max(sizes.distractors))
    meaning = {name: drawn(rng) for name in names}
    tested = names[: sizes.classes]
    pairs = list(zip(tested[::2], tested[1::2], strict=True))
    return World({n: meaning[n] for n in tested}, {n: meaning[n] for n in names[sizes.classes :]}, pairs)


def drawn(rng: random.Random) -> Program:
    return tuple(rng.choices(list(OPERATIONS), k=2))


def strategy(meaning: dict[str, Program]) -> str:
    """The strategy for operations one after the other, each by its name and what it means."""
    parts = [f"{name} {' then '.join(program)}" for name, program in meaning.items()]
    return f"For lists {' then '.join(parts)}"


def problem(meaning: dict[str, Program], rng: random.Random) -> dict[str, Any]:
    """A problem that asks for operations one after the other."""
    digits = [rng.randrange(10) for _ in range(LENGTH)]
    program = sum(meaning.values(), ())
    text = f"{' then '.join(meaning)} : {' '.join(map(str, digits))}"
    answer = " ".join(map(str, states(program, digits)[-1]))
    executed = execution(program, digits)
    return {"prompt": [{"role": "user", "content": text}], "solution": answer, "execution": executed}


# Teaching


def lesson(rng: random.Random, conversation: Any, easy: bool) -> dict[str, list[int]]:
    """
    An example with names that mean something only here. In most, their strategies are among those shown, and what is
    to be written is read off them. In the others it can only be guessed. An easy one asks for one operation and shows
    its strategy alone.
    """
    two = not easy and rng.random() < 0.45
    names = rng.sample(NAMES, 4)
    meaning = {name: drawn(rng) for name in names}
    asked, others = names[: 1 + two], names[1 + two :]
    luck = rng.random()
    if easy:
        shown = asked
    elif luck < 0.2:
        shown = rng.sample(others, rng.randrange(3))
    elif two:
        shown = asked if luck > 0.3 else [rng.choice(asked), *rng.sample(others, rng.randrange(2))]
    else:
        shown = [*asked, *rng.sample(others, rng.choice([0, 1, 1, 1]))]
    shown = rng.sample(shown, len(shown))
    wanted = {name: meaning[name] for name in asked}
    row = problem(wanted, rng)
    request = conversation.request(row["prompt"], [(name, strategy({name: meaning[name]})) for name in shown])
    written = conversation.reply(row["prompt"], strategy(wanted))
    turn = conversation.turn(row["prompt"]).after(written)
    executed = conversation.reply(row["prompt"], row["execution"])
    masked = [-100] * len(request), [-100] * len(turn)
    return {"input_ids": request + written + turn + executed, "labels": masked[0] + written + masked[1] + executed}


def with_new_words(tokenizer: Any, folder: Path) -> Any:
    """The tokenizer, whose vocabulary is of whole words, with the words of names, saved to a folder."""
    tokenizer.save_pretrained(folder)
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    kept = {token["content"]: token["id"] for token in content["added_tokens"]}  # which would get ids of new words
    content["model"]["vocab"] |= kept | {word: len(tokenizer) + place for place, word in enumerate(SYLLABLES)}
    file.write_text(json.dumps(content))
    return AutoTokenizer.from_pretrained(folder)


def teach(name: str, sizes: Sizes, seed: int, folder: Path) -> str:
    """Teaches a model of the laboratory to read the strategies that it is shown. Returns its directory."""
    tokenizer = with_new_words(AutoTokenizer.from_pretrained(name), folder / "reader")
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    torch.manual_seed(seed)
    spread = model.get_input_embeddings().weight.std().item()
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    with torch.no_grad():
        model.get_input_embeddings().weight[-len(SYLLABLES) :].normal_(0, spread)
    conversation, rng = SETTINGS.conversation(tokenizer), random.Random(f"lessons {seed}")
    # Easy ones first: on all at once, reading is learnt much later
    lessons = [lesson(rng, conversation, easy=8 * i < sizes.lessons) for i in range(sizes.lessons)]
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            str(folder / "teaching"),
            per_device_train_batch_size=32,
            num_train_epochs=1,
            learning_rate=2e-3,
            lr_scheduler_type="linear",
            warmup_steps=0.1,
            adam_beta2=0.98,
            logging_steps=50,
            save_strategy="no",
            report_to="none",
            seed=seed,
            use_cpu=True,
            disable_tqdm=True,
            train_sampling_strategy="sequential",
        ),
        train_dataset=Dataset.from_list(lessons),
        data_collator=DataCollatorForSeq2Seq(tokenizer),
    )
    trainer.train()
    reader = folder / "reader"
    model.save_pretrained(reader)
    tokenizer.save_pretrained(reader)
    SETTINGS.of_model(tokenizer).save(reader)
    return str(reader)


# Filling the bank


def fill(reader: str, world: World, sizes: Sizes, seed: int, folder: Path) -> tuple[Path, dict[str, Any]]:
    """Fills a bank by rollouts of the frozen model. Returns its directory and what happened."""
    rng = random.Random(f"explored {seed}")
    rows = [
        problem({name: program}, rng) | {"problem_class": name}
        for name, program in world.meaning.items()
        for _ in range(sizes.explored)
    ]
    trainer = SGPOTrainer(
        model=reader,
        reward_funcs=answer_reward,
        args=SGPOConfig(
            str(folder / "filling"),
            learning_rate=0.0,
            max_steps=sizes.steps,
            transfer_block_size=2,
            num_generations=18,
            num_bank_rollouts=2,
            per_device_train_batch_size=36 * sizes.classes,
            gradient_accumulation_steps=1,
            strategy_prompt=SETTINGS.strategy_prompt,
            execution_prompt=SETTINGS.execution_prompt,
            max_strategy_length=SETTINGS.max_strategy_length,
            max_completion_length=SETTINGS.max_completion_length,
            num_retrieved=SETTINGS.num_retrieved,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            save_strategy="no",
            logging_steps=1,
            disable_tqdm=True,
            report_to="none",
            seed=seed,
        ),
        train_dataset=Dataset.from_list(rows).remove_columns("execution"),
    )
    bank = trainer.strategy_bank
    assert bank is not None
    before = {key: value.clone() for key, value in trainer.model.state_dict().items()}
    trainer.train()
    assert all(torch.equal(value, before[key]) for key, value in trainer.model.state_dict().items())
    trusted = [s for s in bank.strategies() if s.trust == "trusted"]
    right = [s for s in trusted if does(s.text, world.meaning[s.problem_class])]
    bank.close()
    return folder / "filling" / BANK_DIRECTORY, {
        "classes": sizes.classes,
        "classes_with_a_trusted_strategy": len({s.problem_class for s in trusted}),
        "trusted_strategies": len(trusted),
        "right_trusted_strategies": len(right),
        "executions": 36 * sizes.classes * sizes.steps,
        "right_by_step": [
            round(entry["sgpo/correctness"], 3) for entry in trainer.state.log_history if "loss" in entry
        ],
    }


def does(text: str, program: Program) -> bool:
    """Whether the operations that a strategy ends its parts with do what a class means, on some lists."""
    words = [part.split()[-1] for part in text.split(" then ")]
    probes = [[1, 2, 3, 4], [5, 9, 0, 7], [8, 8, 6, 3]]
    return set(words) <= set(OPERATIONS) and all(
        states(tuple(words), probe)[-1] == states(program, probe)[-1] for probe in probes
    )


def distract(bank: StrategyBank, model: TwoPhaseModel, names: Sequence[str], world: World, seed: int) -> None:
    """Adds right strategies of other classes, each executed on problems of its class beside a guess of the model."""
    rng, count = random.Random(f"distractors {names[0]} {seed}"), 2 * bank.min_problems
    rows = [[problem({name: world.others[name]}, rng) for _ in range(count)] for name in names]
    added = [Strategy(strategy({name: world.others[name]}), name, (), origin="import") for name in names]
    flat = [row for each in rows for row in each]
    problems = [Problem(row["prompt"]) for row in flat]
    guesses = model.write_strategies(problems, Decoding(greedy=False, seed=seed))
    given = [each.text for each in added for _ in range(count)]
    verified = torch.stack(
        [
            torch.tensor(verify(answer_reward, flat, model.execute(problems, how))).view(len(names), count)
            for how in (given, guesses)
        ],
        dim=1,
    )
    ids = [[problem_id(row["prompt"]) for row in each] for each in rows]
    found = outcomes([[s.id, "guess"] for s in added], ids, list(names), verified, verified[:, :0])
    bank.record(added, found)


# Measuring


def measure(name: str, sizes: Sizes, seed: int, folder: Path) -> dict[str, Any]:
    """Teaches a model, fills its bank and measures both. Returns the outcomes of each condition by class."""
    world = draw_world(sizes, seed)
    reader = teach(name, sizes, seed, folder)
    path, filled = fill(reader, world, sizes, seed, folder)
    model = TwoPhaseModel.from_pretrained(reader, batch_size=256, device="cpu")
    rng = random.Random(f"tested {seed}")
    single = [
        ((one,), problem({one: program}, rng)) for one, program in world.meaning.items() for _ in range(sizes.tested)
    ]
    double = [
        (each, problem({one: world.meaning[one] for one in each}, rng))
        for pair in world.pairs
        for each in (pair, pair[::-1])
        for _ in range(sizes.tested)
    ]
    rows: dict[str, Any] = {}
    settings = model.settings
    untaught = TwoPhaseModel.from_pretrained(name, batch_size=256, device="cpu")

    def solved(
        key: str,
        asked: list[Any],
        bank: StrategyBank | None,
        k: int,
        classes: bool = False,
        right: bool = False,
        model: TwoPhaseModel = model,
    ) -> None:
        model.settings = replace(settings, num_retrieved=k)
        pipeline = SGPOPipeline(model, bank)
        prompts: list[Prompt] = [row["prompt"] for _, row in asked]
        prepared = pipeline.prepare(prompts, [names[0] for names, _ in asked] if classes else None)
        if right:
            prepared = [
                replace(each, retrieved=shown_right(world, names, k))
                for each, (names, _) in zip(prepared, asked, strict=True)
            ]
        executed = [solution.execution for solution in pipeline.solve(prepared)]
        outcome = verify(answer_reward, [row for _, row in asked], executed)
        by_class: dict[str, list[list[float]]] = {}
        for (names, _), value, each in zip(asked, outcome, prepared, strict=True):
            shown = {s.problem_class for s in each.retrieved if does(s.text, meaning(world, s))}
            by_class.setdefault("+".join(sorted(names)), []).append([value, float(shown >= set(names))])
        rows[key] = by_class

    for kind, asked, k in (("one", single, 1), ("two", double, 2)):
        solved(f"{kind} | empty", asked, None, k)
        solved(f"{kind} | not asked: the right strategies shown", asked, None, k, right=True)
    solved("one | not asked: the right strategy and another shown", single, None, 2, right=True)
    with StrategyBank(path) as bank:
        others, known = list(world.others), 0
        solved("one | filled, class given, model not taught", single, bank, 1, classes=True, model=untaught)
        for number in sizes.distractors:
            if number > known:
                distract(bank, model, others[known:number], world, seed)
                known = number
            start = f"filled, {number:,} others"
            if number in (0, sizes.distractors[-1]):
                solved(f"one | {start}, class given", single, bank, 1, classes=True)
            solved(f"one | {start}", single, bank, 1)
            solved(f"one | {start}, 2 shown", single, bank, 2)
            solved(f"two | {start}", double, bank, 2)
        trusted = sum(s.trust == "trusted" and s.problem_class in world.others for s in bank.strategies())
    return {"seed": seed, "filling": filled | {"trusted_distractors": trusted}, "outcomes": rows}


def meaning(world: World, shown: Strategy) -> Program:
    return (world.meaning | world.others)[shown.problem_class]


def shown_right(world: World, names: Sequence[str], k: int) -> tuple[Strategy, ...]:
    """The right strategies of classes, before them one of another class where more are shown."""
    others = [name for name in world.meaning if name not in names][: k - len(names)]
    meanings = [(name, world.meaning[name]) for name in (*others, *names)]
    return tuple(Strategy(strategy({name: program}), name, (), trust="trusted") for name, program in meanings)


# Results


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Accuracies, shares of problems whose strategies were shown, and differences to the empty bank, by condition."""
    found: dict[str, Any] = {}
    for key in runs[0]["outcomes"]:
        start = f"{key.partition(' | ')[0]} | empty"
        flat = [
            ((run["seed"], name), value, shown, base)
            for run in runs
            for name, pairs in run["outcomes"][key].items()
            for (value, shown), (base, _) in zip(pairs, run["outcomes"][start][name], strict=True)
        ]
        classes, values, shown, base = map(list, zip(*flat, strict=True))

        def estimate(each: Callable[[int], float], least: float = 0.0, classes: list[Any] = classes) -> dict[str, Any]:
            estimated = class_mean_estimate([each(i) for i in range(len(classes))], classes, least)
            assert estimated is not None
            return estimated.to_dict()

        found[key] = {
            "accuracy": estimate(lambda i, values=values: values[i]),
            "strategies_shown": sum(shown) / len(shown),
            "gain": estimate(lambda i, values=values, base=base: values[i] - base[i], least=-1.0),
        }
    return found


def markdown(summed: dict[str, Any], runs: list[dict[str, Any]]) -> str:
    """The table."""
    filled = [run["filling"] for run in runs]
    lines = [
        "# What a bank is worth to a frozen model",
        "",
        f"Taught models: {len(runs)}; classes: {sum(f['classes'] for f in filled)}. Means over classes, or pairs of "
        "them, with 95% intervals over these, not over models. Written by `benchmarks.bank_worth`.",
        "",
        "| Problems | Bank | Accuracy | Gain over the empty bank | Right strategies among those shown |",
        "|---|---|---|---|---|",
    ]
    for key, figures in summed.items():
        kind, _, bank = key.partition(" | ")
        cells = [f"{f['value']:.2f} [{f['low']:.2f}, {f['high']:.2f}]" for f in (figures["accuracy"], figures["gain"])]
        lines.append(f"| {kind} | {bank} | {cells[0]} | {cells[1]} | {figures['strategies_shown']:.2f} |")
    for run in runs:
        lines += [
            "",
            f"Model {run['seed']}: " + ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in run["filling"].items()),
        ]
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None, sizes: Sizes = Sizes()) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="path without suffix for the figures")
    parser.add_argument("--model", default="trl-sgpo/lab", help="a model of the laboratory")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1], help="a taught model and its classes for each")
    options = parser.parse_args(argv)
    name, runs = fetch_model(options.model), []
    for seed in options.seeds:
        started = time.process_time()
        with tempfile.TemporaryDirectory(prefix="trl-sgpo-bench-") as folder:
            runs.append(measure(name, sizes, seed, Path(folder)))
        runs[-1]["cpu_seconds"] = round(time.process_time() - started)
        summed = summary(runs)
        result = {"model": options.model, "figures": summed, "runs": runs}
        write_file(options.output.with_suffix(".json"), json.dumps(result) + "\n")
        write_file(options.output.with_suffix(".md"), markdown(summed, runs))
        print(markdown(summed, runs), flush=True)


if __name__ == "__main__":
    main()
