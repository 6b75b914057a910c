"""A line a step in the terminal in place of all metrics, which go to the trackers and to `--log_level info`."""

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.text import Text
from tqdm.auto import tqdm
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback

from ..checks.console import console


REPEATED = 20  # lines between two headers
MOST_CUT = 0.5  # share of texts that were cut off, from which it is coloured
NOTHING = "–"

Logs = Mapping[str, Any]


@dataclass(frozen=True)
class Column:
    """
    A column of the lines.

    Args:
        name (`str`):
            Its header.
        width (`int`):
            Width of its cells, or of its header if that is wider.
        cell (`Callable`):
            Makes its text of a step's metrics.
        needed (`bool`):
            Whether it stays where the terminal is narrow.
    """

    name: str
    width: int
    cell: Callable[[Logs], str]
    needed: bool = True

    @property
    def room(self) -> int:
        return max(self.width, len(self.name))


def _known(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def figure(key: str) -> Callable[[Logs], str]:
    """The cell of a metric, with two decimals."""
    return lambda logs: f"{logs[key]:.2f}" if _known(logs.get(key)) else NOTHING


def _tokens(logs: Logs) -> str:
    lengths = [logs.get(f"sgpo/{phase}_length") for phase in ("strategy", "execution", "plain")]
    return "/".join(f"{length:.0f}" for length in lengths if _known(length)) or NOTHING


def _largest_cut(logs: Logs) -> tuple[float, str]:
    shares = [(logs.get(f"sgpo/{phase}_truncated", 0.0), phase) for phase in ("strategy", "execution", "plain")]
    return max(((float(share), phase) for share, phase in shares if _known(share)), default=(0.0, ""))


def _cut(logs: Logs) -> str:
    share, phase = _largest_cut(logs)
    return f"{phase[0]} {share:.0%}" if share > 0 else "0%"


def _bank(logs: Logs) -> str:
    size = logs.get("sgpo/bank_size")
    return f"{size:.0f}" if _known(size) else NOTHING


def training_columns(args: Any) -> list[Column]:
    """The columns of a training with SGPO. `args` is its [`SGPOConfig`]."""
    limits = [args.max_strategy_length, args.max_completion_length]
    limits += [args.max_plain_length] if args.num_plain_rollouts else []
    plain = [Column("plain", 5, figure("sgpo/plain_correctness"))] if args.num_plain_rollouts else []
    bank = [Column("bank", 4, _bank, needed=False)] if args.use_bank else []
    return [
        Column("reward", 6, figure("reward")),
        Column("correct", 7, figure("sgpo/correctness")),
        Column("transfer", 8, figure("sgpo/transfer")),
        *plain,
        Column("tokens", len("/".join(map(str, limits))), _tokens, needed=False),
        Column("cut off", 6, _cut, needed=False),
        *bank,
    ]


def training_legend(args: Any) -> str:
    """What these columns hold."""
    plain = bool(args.num_plain_rollouts)
    return (
        f"correct, transfer{', plain' * plain}: right executions of own and of borrowed strategies"
        f"{', right answers without one' * plain}. tokens: strategy/execution{'/plain answer' * plain}. cut off: the "
        "largest of their shares that end at their limit."
    )


WARM_START_COLUMNS = [
    Column("loss", 7, figure("loss")),
    Column("right tokens", 12, figure("mean_token_accuracy")),
]
"""The columns of a supervised warm start."""


def clock(seconds: float) -> str:
    """A duration such as `0:09`, `12:30` or `3:00:00`."""
    minutes, left = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{left:02}" if hours else f"{minutes}:{left:02}"


class _Bars(ProgressCallback):
    """The progress bars, without the metrics."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        pass


class StepLines(TrainerCallback):
    """
    Prints a line for each logged step under a header, which is repeated.

    Args:
        columns (`Sequence[Column]`):
            The columns between the number of the step and the times.
        legend (`str`, *optional*, defaults to `""`):
            Printed once above the first header.
    """

    def __init__(self, columns: Sequence[Column], legend: str = ""):
        self.columns, self.legend = columns, legend
        self.lines = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.lines = 0
        self.began = self.last = (state.global_step, time.monotonic())

    def on_log(self, args: Any, state: Any, control: Any, logs: Logs | None = None, **kwargs: Any) -> None:
        logs = logs or {}
        if not state.is_world_process_zero:
            return
        if "train_runtime" in logs:
            steps = state.global_step - self.began[0]
            self._print(Text(f"{steps} steps in {clock(logs['train_runtime'])}"))
        elif "loss" in logs:
            self._line(f"{state.global_step}/{state.max_steps}", logs, state, self._times(state))
        elif evaluated := {key.removeprefix("eval_"): value for key, value in logs.items() if key.startswith("eval_")}:
            self._line("eval", evaluated, state, [NOTHING, NOTHING])

    def _times(self, state: Any) -> list[str]:
        """Seconds a step since the last line, and the time left at the mean of all steps."""
        step, now = state.global_step, time.monotonic()
        steps, seconds = max(step - self.last[0], 1), now - self.last[1]
        mean = (now - self.began[1]) / max(step - self.began[0], 1)
        self.last = (step, now)
        return [f"{seconds / steps:.1f}", clock(mean * (state.max_steps - step))]

    def _line(self, step: str, logs: Logs, state: Any, times: Sequence[str]) -> None:
        columns = [
            Column("step", len(f"{state.max_steps}/{state.max_steps}"), lambda logs: step),
            *self.columns,
            Column("s/step", 6, lambda logs: times[0], needed=False),
            Column("ETA", 7, lambda logs: times[1]),
        ]
        columns, gap = fitting(columns, console().width)
        if self.lines % REPEATED == 0:
            if self.lines == 0 and self.legend:
                self._print(Text(self.legend, "dim"))
            self._print(Text((" " * gap).join(column.name.rjust(column.room) for column in columns), "bold"))
        self.lines += 1
        line = Text()
        for index, column in enumerate(columns):
            cut_off = column.cell is _cut and _largest_cut(logs)[0] > MOST_CUT
            line.append(" " * gap * (index > 0))
            line.append(column.cell(logs).rjust(column.room), "yellow" if cut_off else "")
        self._print(line)

    def _print(self, text: Text) -> None:
        with tqdm.external_write_mode():  # beneath the bars
            console().print(text)


def fitting(columns: Sequence[Column], width: int) -> tuple[list[Column], int]:
    """The columns that fit into a terminal's width, and the gap between them: 2, or 1 where it is narrow."""
    shown = list(columns)

    def taken(gap: int) -> int:
        return sum(column.room for column in shown) + gap * (len(shown) - 1)

    while taken(1) > width and not all(column.needed for column in shown):
        shown.remove([column for column in shown if not column.needed][-1])
    return shown, 2 if taken(2) <= width else 1


def print_step_lines(trainer: Trainer, columns: Sequence[Column], legend: str = "") -> None:
    """
    Lets a trainer print lines in place of all metrics.

    Args:
        trainer ([`~transformers.Trainer`]):
            The trainer. With `log_level` info or debug it prints all metrics, too.
        columns (`Sequence[Column]`), legend (`str`, *optional*, defaults to `""`):
            See [`StepLines`].
    """
    if trainer.args.get_process_log_level() > logging.INFO:
        trainer.remove_callback(PrinterCallback)
        if trainer.pop_callback(ProgressCallback) is not None:
            trainer.add_callback(_Bars)
    trainer.add_callback(StepLines(columns, legend))
