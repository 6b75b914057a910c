"""What tensorboard, trackio and wandb write of a run, read back from their files."""

import json
import os
import re
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import processes
import pytest
import trackio.utils
from models import save_tiny_model
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from trackio.sqlite_storage import SQLiteStorage
from wandb.proto.wandb_internal_pb2 import Record


DOCS = Path(__file__).parents[1] / "docs"
SECTION = re.search(r"### In trackers\n(.*?)\n#", (DOCS / "concepts.md").read_text(), re.DOTALL)[1]
NAMES = re.findall(r"`((?:train|eval)/[\w/]+)`", SECTION)
COLUMNS = {"step", "prompt", "completion", "evenness", "advantage", "source", "strategy", "execution", "correctness"}
COLUMNS |= {"transfer", "strategy_advantage"}
Scalars = dict[str, list[float]]
"""The values of each name, in the order in which they were logged."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run with all trackers, in a process of its own: they keep threads and processes."""
    directory = tmp_path_factory.mktemp("tracked")
    model = save_tiny_model(directory / "model")
    with pytest.MonkeyPatch.context() as change:
        change.setenv("WANDB_MODE", "offline")
        change.setenv("WANDB_DIR", str(directory))
        change.chdir(directory)
        done = processes.run("tracked_run", str(directory), model)
    assert done.returncode == 0, done.stderr[-6000:]
    return directory


def in_tensorboard(run: Path) -> Scalars:
    (folder,) = {path.parent for path in run.rglob("events.out.tfevents.*")}
    events = EventAccumulator(str(folder)).Reload()
    return {name: [event.value for event in events.Scalars(name)] for name in events.Tags()["scalars"]}


def trackio_logs() -> list[dict[str, Any]]:
    assert Path(os.environ["TRACKIO_DIR"]) == trackio.utils.TRACKIO_DIR
    return SQLiteStorage.get_logs("tracked", "three-steps")


def wandb_records(run: Path) -> Iterator[Any]:
    """The records of the file that `wandb sync` sends: blocks of 32 KiB with parts of records, as LevelDB's log."""
    (path,) = run.glob("wandb/offline-run-*/run-*.wandb")
    data, place, record = path.read_bytes(), 7, b""
    while place < len(data):
        if (left := 32768 - place % 32768) < 7:
            place += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        record += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # a whole record, or its last part
            yield Record.FromString(record)
            record = b""


def wandb_logs(run: Path) -> list[dict[str, Any]]:
    histories = [record.history.item for record in wandb_records(run) if record.HasField("history")]
    return [
        {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items} for items in histories
    ]


def scalars(logs: list[dict[str, Any]]) -> Scalars:
    found: Scalars = {}
    for log in logs:
        for name, value in log.items():
            if isinstance(value, int | float):
                found.setdefault(name, []).append(value)
    return found


READ: dict[str, Callable[[Path], Scalars]] = {
    "tensorboard": in_tensorboard,
    "trackio": lambda run: scalars(trackio_logs()),
    "wandb": lambda run: scalars(wandb_logs(run)),
}


@pytest.mark.parametrize("tracker", READ)
def test_metrics_have_the_documented_names_and_the_logged_values(run: Path, tracker: str) -> None:
    found = READ[tracker](run)
    assert len(NAMES) > 10 and set(NAMES) <= found.keys()
    logs = json.loads((run / "logs.json").read_text())
    for name in NAMES:
        kind, _, key = name.partition("/")
        key, times = (key, 3) if kind == "train" else (f"eval_{key}", 2)
        expected = [log[key] for log in logs if key in log]  # the evaluation before training is in no log of it
        assert len(found[name]) == times and len(expected) == (times if kind == "train" else 1), name
        assert found[name][-len(expected) :] == pytest.approx(expected, rel=1e-6), name  # tensorboard has 32 bits


def test_every_metric_of_this_package_is_documented(run: Path) -> None:
    text = (DOCS / "concepts.md").read_text() + (DOCS / "plain_answers.md").read_text()
    logged = {name for name in in_tensorboard(run) if name.startswith("train/sgpo/")}
    assert len(logged) > 12
    assert [name for name in logged if f"`{name.removeprefix('train/')}`" not in text] == []


def test_completions_are_a_table_of_trackio_and_wandb(run: Path) -> None:
    """Their tables are those in the folder of the run."""
    files = next(run.glob("wandb/offline-run-*/files"))
    paths = [log["completions/path"] for log in wandb_logs(run) if "completions/path" in log]
    tables = [json.loads((files / path).read_text()) for path in paths]
    in_wandb = [pd.DataFrame(table["data"], columns=table["columns"]) for table in tables]
    in_trackio = [pd.DataFrame(log["completions"]["_value"]) for log in trackio_logs() if "completions" in log]
    for step in (1, 2):  # at the third the table of the evaluation takes the place of that of training
        written = pd.read_parquet(run / "run" / "completions" / f"completions_{step:05d}.parquet")
        assert len(written) == 24 and {*written["source"]} == {"own", "borrowed", "plain"}
        for found in (in_trackio, in_wandb):
            (table,) = [each for each in found if (each["step"] == step).all()]
            assert COLUMNS <= {*table.columns} == {*written.columns}
            assert [*table["execution"]] == [*written["execution"]] and [*table["strategy"]] == [*written["strategy"]]
            assert [*table["correctness"]] == [*written["correctness"]]
