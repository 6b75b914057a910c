"""Solving a file of problems, a batch at a time: interrupted work is continued where it stopped."""

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from ..checks.damaged import expect_readable
from ..checks.json_text import parse_json, read_lines
from ..checks.shapes import either, exactly, listing, nothing, record, text
from ..errors import ConfigError
from ..evaluation.digest import Record, changes
from ..evaluation.statistics import derived_seed
from ..files import append_file
from ..method.prompts import Prompt, problem_text
from .model import Decoding
from .pipeline import SGPOPipeline


_FIRST = b'{"index": 0, "problem":'
_FIX = "choose another `--output`, or drop what is there with `--overwrite`"
_OPTIONAL_TEXT = either(nothing, text)
_ANSWER = record(
    {
        "problem_class": _OPTIONAL_TEXT,
        "answer": _OPTIONAL_TEXT,
        "strategy": text,
        "flaw": _OPTIONAL_TEXT,
        "execution": text,
        "retrieved": listing(record({"id": text, "text": text})),
        "made_by": record({}),
    }
)


def check_output(output: str, source: str) -> Path:
    """The file of answers, unless it is not named `.jsonl` or is the file of problems."""
    path = Path(output)
    if path.suffix != ".jsonl":
        raise ConfigError(f"`--output {path}` is written as JSON lines: give it the ending .jsonl.")
    if path.resolve() == Path(source).resolve():
        raise ConfigError("`--output` must be another file than `--input`.")
    return path


def solve_file(
    pipeline: SGPOPipeline,
    prompts: Sequence[Prompt],
    classes: Sequence[str | None],
    output: Path,
    made_by: Record,
    strategy: str | None,
    samples: int,
    decoding: Decoding,
    batch_size: int,
    overwrite: bool,
    plain: bool = False,
) -> tuple[int, int]:
    """
    Solves problems and appends a line for each to a file, which is synced to disk after each batch.

    Args:
        pipeline ([`SGPOPipeline`]):
            Model and bank.
        prompts (`Sequence[str | list[dict]]`), classes (`Sequence[str | None]`):
            The problems and their classes.
        output (`Path`):
            File of answers, JSON lines.
        made_by (`dict`):
            Digests of everything that answers depend on, by name. A file with others is refused.
        strategy (`str`, *optional*), samples (`int`):
            As in [`SGPOPipeline.solve`].
        decoding ([`~trl_sgpo.inference.model.Decoding`]):
            How to decode. The seed of each batch is derived from its seed.
        batch_size (`int`):
            Problems a batch.
        overwrite (`bool`):
            Whether to drop the answers in the file.
        plain (`bool`, *optional*, defaults to `False`):
            As in [`SGPOPipeline.solve`].

    Returns:
        `tuple[int, int]`: How many problems have an answer now, of how many that this call solved.

    Raises:
        [`ConfigError`]: The file has other content than answers to these problems, or the model has no positions for
            one of them.
    """
    pipeline.check_room(prompts, strategy, plain)
    problems = [problem_text(prompt) for prompt in prompts]
    done, length = (0, 0) if overwrite else _finished(output, made_by, problems, batch_size)
    answered = 0
    output.parent.mkdir(parents=True, exist_ok=True)
    with (
        append_file(output, length) as file,
        tqdm(total=len(prompts), initial=done, desc="solving", unit="problem", dynamic_ncols=True) as bar,
    ):
        for start in range(done, len(prompts), batch_size):
            part = slice(start, start + batch_size)
            chosen = replace(decoding, seed=derived_seed(decoding.seed, "file", start))
            prepared = pipeline.prepare(prompts[part], classes[part], retrieve=not plain)
            solutions = pipeline.solve(prepared, strategy, samples, chosen, None, plain)
            for index, solution in enumerate(solutions, start):
                file.write(json.dumps({"index": index, **solution.to_dict(), "made_by": made_by}) + "\n")
                answered += solution.answer is not None
            file.flush()
            os.fsync(file.fileno())
            bar.update(len(prepared))
    return answered, len(prompts) - done


def _finished(output: Path, made_by: Record, problems: list[str], batch_size: int) -> tuple[int, int]:
    """Number of problems already solved, and the length of their lines, without an unfinished batch at the end."""
    if not output.exists():
        return 0, 0
    lengths: list[int] = []
    with expect_readable(output, _FIX):
        for line in read_lines(output):
            _check_answer(output, parse_json(line), made_by, problems, len(lengths))
            lengths.append(len(line))
    if not lengths and not _is_begun(output):
        raise ConfigError(f"{output} holds something else, or answers to other problems: {_FIX}.")
    done = len(lengths) if len(lengths) == len(problems) else len(lengths) // batch_size * batch_size
    return done, sum(lengths[:done])


def _check_answer(output: Path, entry: Any, made_by: Record, problems: list[str], index: int) -> None:
    if not isinstance(entry, dict) or index >= len(problems) or entry.get("problem") != problems[index]:
        raise ConfigError(f"{output} holds something else, or answers to other problems: {_FIX}.")
    before = entry.get("made_by")
    if isinstance(before, str):  # one digest of everything, of an earlier version
        before = {}
    if isinstance(before, dict) and (other := changes(before, made_by)) is not None:
        raise ConfigError(f"{output} holds answers that were made otherwise ({other}): {_FIX}.")
    _ANSWER(entry, f"line {index + 1}")
    exactly(index)(entry["index"], f"line {index + 1}.index")


def _is_begun(output: Path) -> bool:
    """Whether a file without a whole line begins like one of answers."""
    with output.open("rb") as file:
        return _FIRST.startswith(file.read(len(_FIRST)))
