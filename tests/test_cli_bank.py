"""`trl-sgpo bank`: what its commands print, change and refuse."""

import json
import os
import re
import sqlite3
import subprocess
import sys

import pytest
from bank_helpers import hashed_words, make
from hub_server import HubServer

from trl_sgpo.bank import Outcome, Strategy, StrategyBank
from trl_sgpo.cli.main import COMMANDS, main


ROOT = make("root", model="org/model", run="first", step=1, shown=30)
CHILD = make("child", source="s1", parents=(ROOT.id, "0123456789abcdef"), model="org/model", run="first", step=2)
FOREIGN = make("foreign", "gcd", trust="quarantine", origin="import", model="evil [red]x[/red]", run="\x1b[31mred")
GONE = make("gone", "gcd", trust="retired")


@pytest.fixture(autouse=True)
def cheap_embedder(monkeypatch):
    monkeypatch.setattr("trl_sgpo.bank.embedding.load_embedder", lambda name: hashed_words)
    monkeypatch.setenv("COLUMNS", "200")


def fill(path):
    with StrategyBank(path, hashed_words) as bank:
        bank.add([ROOT, CHILD, FOREIGN, GONE])
        bank.update([Outcome(ROOT.id, f"q{i}", 2, 2, 0.5) for i in range(8)])
        bank.update([Outcome(ROOT.id, f"g{i}", 1, 2, 0.25, "gcd") for i in range(2)])
        bank.update([Outcome(CHILD.id, "s1", 1, 1, 0.5), Outcome(CHILD.id, "q0", 0, 2, 0.5)])
        bank.snapshot(path.parent / "checkpoint-7" / "strategy_bank")
    return path


@pytest.fixture
def path(tmp_path):
    return fill(tmp_path / "run" / "strategy_bank")


@pytest.fixture
def run(capsys):
    """Runs a command and returns its exit status, and its standard output and error."""

    def run(*arguments):
        status = main(["bank", *map(str, arguments)])
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def json_of(run):
    def json_of(*arguments, status=0):
        found, out, _ = run(*arguments, "--json")
        assert found == status
        return json.loads(out)

    return json_of


class TestPaths:
    def test_bank_output_folder_checkpoint_and_snapshot(self, json_of, path):
        output = path.parent
        checkpoint = output / "checkpoint-7"
        found = [json_of("list", each) for each in (path, output, checkpoint, checkpoint / "strategy_bank")]
        assert len(found[0]) == 3 and all(each == found[0] for each in found)

    def test_what_is_no_bank(self, run, tmp_path, path):
        run("export", path, tmp_path / "export")
        for name, words in (("missing", "output folder"), ("export", "bank import BANK")):
            status, out, error = run("list", tmp_path / name)
            assert (status, out) == (2, "") and words in error and len(error.splitlines()) == 1
        assert not (tmp_path / "missing").exists()

    def test_reading_leaves_a_snapshot_as_it_is(self, run, path):
        snapshot = path.parent / "checkpoint-7" / "strategy_bank"
        before = {each.name: each.read_bytes() for each in snapshot.iterdir()}
        for command in (("list",), ("stats",), ("audit",), ("verify",), ("search", ROOT.text)):
            assert run(command[0], snapshot, *command[1:])[0] == 0
        assert {each.name: each.read_bytes() for each in snapshot.iterdir()} == before

    def test_a_snapshot_is_not_written_to(self, run, path):
        snapshot = path.parent / "checkpoint-7"
        status, _, error = run("merge", snapshot / "strategy_bank", path)
        assert status == 2 and "is a snapshot" in error

    def test_a_bank_in_use_is_named(self, run, path):
        with StrategyBank(path, hashed_words):
            status, _, error = run("list", path)
        assert status == 2 and f"process {os.getpid()}" in error and len(error.splitlines()) == 1


class TestList:
    def test_json_has_everything(self, json_of, path):
        first = json_of("list", path)[0]
        assert first["id"] == ROOT.id and first["text"] == ROOT.text and first["source_problems"] == ["s0"]
        assert (first["trust"], first["successes"], first["trials"], first["problems"]) == ("trusted", 18, 20, 10)
        assert first["utility"] == pytest.approx(19 / 22) and first["lift"] == pytest.approx(0.9 - 0.45)
        assert first["lift_low"] < first["lift"] < first["lift_high"]

    def test_filters_order_and_limit(self, json_of, path):
        def ids(*options):
            return [each["id"] for each in json_of("list", path, *options)]

        assert set(ids()) == {ROOT.id, CHILD.id, FOREIGN.id}
        assert ids("--class", "gcd") == [FOREIGN.id]
        assert ids("--trust", "retired") == [GONE.id]
        assert set(ids("--trust", "retired", "--trust", "quarantine")) == {GONE.id, FOREIGN.id}
        assert ids("--sort", "step") == [CHILD.id, ROOT.id, FOREIGN.id]
        assert ids("--sort", "shown")[0] == ROOT.id and ids("--sort", "lift")[-1] == CHILD.id
        assert ids("--limit", "1") == [ROOT.id]

    def test_table(self, run, path):
        status, out, _ = run("list", path)
        assert status == 0 and "3 of 4 strategies" in out
        row = next(line for line in out.splitlines() if ROOT.id[:8] in line)
        assert all(word in row for word in ("algebra", "trusted", "18/20", "+0.45 [+0.", "30", ROOT.text))

    def test_a_lift_is_written_in_one_way_that_the_help_explains(self, run, path, capsys):
        (lift,) = re.findall(r"lift (\S+ \[.*\])", run("show", path, ROOT.id)[1])
        assert lift in run("list", path)[1]
        for command in ("list", "show", "search", "stats"):
            with pytest.raises(SystemExit):
                main(["bank", command, "--help"])
            out = capsys.readouterr().out
            assert "lift such as +0.11 [-0.06, +0.24] is" in out and "95% confidence" in out

    def test_lift_over_plain_answers(self, run, json_of, path):
        """Unknown without plain rows; with them, trusted strategies are useful, and harmful ones are named."""
        assert "unknown" in run("list", path)[1] and "useful" not in run("list", path)[1]
        before = {each["id"]: each for each in json_of("list", path)}
        assert (before[ROOT.id]["plain_problems"], before[ROOT.id]["useful"]) == (0, False)
        assert (before[ROOT.id]["plain_lift_low"], before[ROOT.id]["plain_lift_high"]) == (-1, 1)
        with StrategyBank(path, hashed_words) as bank:
            bank.update(Outcome(ROOT.id, f"q{i}", 1, 1, 0.5, plain=0.25) for i in range(8))
            bank.update(Outcome(CHILD.id, f"z{i}", 0, 1, 0.0, plain=1) for i in range(4))
        found = {each["id"]: each for each in json_of("list", path, "--sort", "plain_lift")}
        assert list(found) == [ROOT.id, FOREIGN.id, CHILD.id]
        root, child = found[ROOT.id], found[CHILD.id]
        assert (root["plain_problems"], root["plain_lift"], root["useful"]) == (8, 0.75, True)
        assert 0 < root["plain_lift_low"] < 0.75 < root["plain_lift_high"] and not root["harmful"]
        assert (child["plain_lift"], child["useful"], child["harmful"]) == (-1, False, True)
        lines = run("list", path)[1].splitlines()
        row = next(line for line in lines if ROOT.id[:8] in line)
        assert "trusted, useful" in row and "+0.75 [+0." in row
        row = next(line for line in lines if CHILD.id[:8] in line)
        assert "candidate, harmful" in row and "-1.00 [-1.00, -0." in row
        assert any(line.startswith("useful: ") for line in lines)
        assert any(line.startswith("harmful: ") and "not shown" in line for line in lines)
        out = run("show", path, ROOT.id)[1]
        assert "trusted, useful" in out and "8, plain lift +0.75 [+0." in out
        assert "trusted, useful" in run("search", path, ROOT.text)[1]
        algebra, gcd = json_of("stats", path)["classes"]
        assert algebra["useful"] == 1 and algebra["plain_lift"] == pytest.approx((6 - 4) / 12)
        assert algebra["plain_lift_low"] < algebra["plain_lift"] < algebra["plain_lift_high"]
        assert (gcd["useful"], gcd["plain_lift"]) == (0, None)
        out = run("stats", path)[1]
        assert "+0.17 [" in out and "unknown" in out

    def test_refusals(self, run, path):
        status, _, error = run("list", path, "--limit", "0")
        assert status == 2 and "--limit" in error


class TestShow:
    def test_everything_on_record(self, run, json_of, path):
        status, out, _ = run("show", path, ROOT.id[:6])
        assert status == 0
        for words in (
            ROOT.id,
            ROOT.text,
            "lift +0.45 [",
            "lift [bounds]",
            "org/model",
            "first, at step 1",
            "s0",
            "rollout",
            ROOT.checksum,
            CHILD.text,
        ):
            assert words in out
        found = json_of("show", path, ROOT.id)
        assert found["checksum"] == ROOT.checksum and found["children"] == [{"id": CHILD.id, "text": CHILD.text}]
        own, other = found["transfer"]
        assert (own["problem_class"], own["problems"], own["rate"], own["baseline"]) == ("algebra", 8, 1, 0.5)
        assert (other["problem_class"], other["problems"], other["rate"], other["lift"]) == ("gcd", 2, 0.5, 0.25)
        assert other["lift_low"] < 0 < other["lift_high"]

    def test_parents_and_what_it_was_written_for(self, json_of, run, path):
        found = json_of("show", path, CHILD.id)
        assert found["parents"] == [{"id": ROOT.id, "text": ROOT.text}, {"id": "0123456789abcdef", "text": None}]
        assert [(each["problem_class"], each["problems"], each["rate"]) for each in found["transfer"]] == [
            ("algebra", 1, 0)
        ]
        assert "(not in this bank)" in run("show", path, CHILD.id)[1]
        assert run("show", path, GONE.id)[0] == 0

    def test_a_stranger_cannot_speak_to_the_terminal(self, run, path):
        out = run("show", path, FOREIGN.id)[1]
        assert "evil [red]x[/red]" in out and "\x1b" not in out and "\\x1b[31mred" in out

    def test_ids_that_are_no_or_several(self, run, path):
        status, _, error = run("show", path, "zz")
        assert status == 2 and "'zz'" in error and "bank list" in error
        status, _, error = run("show", path, "")
        assert status == 2 and "4 ids" in error and "more digits" in error


class TestSearch:
    def test_finds_by_similarity_and_utility(self, json_of, path):
        (hit,) = json_of("search", path, ROOT.text)
        assert hit["id"] == ROOT.id and hit["similarity"] == pytest.approx(1, abs=1e-5)
        assert hit["score"] == pytest.approx(19 / 22, abs=1e-5)

    def test_filters(self, run, json_of, path):
        def ids(*options):
            return [each["id"] for each in json_of("search", path, FOREIGN.text, *options)]

        every = ("--trust", "trusted", "--trust", "candidate", "--trust", "quarantine")
        assert ids(*every)[0] == FOREIGN.id and len(ids(*every)) == 3
        assert len(ids(*every, "-k", "2")) == 2 and ids(*every, "--class", "gcd") == [FOREIGN.id]
        assert "--trust candidate" in run("search", path, FOREIGN.text, "--class", "gcd")[1]
        status, _, error = run("search", path, "x", "-k", "0")
        assert status == 2 and "-k" in error

    def test_by_the_embedder_the_bank_was_made_with(self, run, path, monkeypatch):
        asked = []
        monkeypatch.setattr(
            "trl_sgpo.bank.embedding.load_embedder",
            lambda name: asked.append(name) or (lambda texts: hashed_words(texts)),
        )
        assert run("search", path, "x")[0] == 0 and run("search", path, "x", "--embedding_model", "other")[0] == 0
        assert asked == ["hashed_words", "other"]


class TestStats:
    def test_figures(self, json_of, run, path):
        found = json_of("stats", path)
        assert (found["strategies"], found["retired"]) == (3, 1)
        assert (found["embedding_model"], found["dimension"]) == ("hashed_words", 256)
        assert found["bytes"]["ledger.sqlite"] > 0 and found["bytes"]["chroma"] == 0
        algebra, gcd = found["classes"]
        assert (algebra["problem_class"], algebra["trusted"], algebra["candidate"]) == ("algebra", 1, 1)
        assert (algebra["shown"], algebra["most_shown"], algebra["most_shown_share"]) == (30, ROOT.id, 1)
        assert algebra["mean_lift"] == pytest.approx((0.45 - 0.5) / 2)
        assert (gcd["quarantine"], gcd["retired"], gcd["mean_lift"], gcd["most_shown"]) == (1, 1, None, None)
        across = {(each["strategies_of"], each["problems_of"]): each["problems"] for each in found["transfer"]}
        assert across == {("algebra", "algebra"): 9, ("algebra", "gcd"): 2}
        out = run("stats", path)[1]
        assert "strategies of" in out and "hashed_words" in out

    def test_empty_bank(self, json_of, run, tmp_path):
        StrategyBank(tmp_path, hashed_words).close()
        assert json_of("stats", tmp_path)["classes"] == [] and run("stats", tmp_path)[0] == 0
        assert json_of("list", tmp_path) == [] and json_of("audit", tmp_path)["findings"] == []
        out = run("stats", tmp_path)[1]
        assert "empty: no strategy was stored" in out and "None" not in out
        out = run("list", tmp_path)[1]
        assert "well-formed" in out and "better than" in out and "near-copy" in out and "No logged step" in out
        assert json_of("verify", tmp_path)["intact"] and json_of("search", tmp_path, "x") == []

    @pytest.mark.parametrize("command", ["list", "stats"])
    def test_empty_bank_of_a_run_says_why(self, run, tmp_path, command):
        """With the figures of the last checkpoint, and of the whole run when it has ended."""
        StrategyBank(tmp_path / "strategy_bank", hashed_words).close()
        log = {"sgpo/malformed": 0.75, "sgpo/leak": 0.125, "sgpo/correctness": 0.25}
        for name, steps in (("checkpoint-2", 2), (".", 4)):
            (tmp_path / name).mkdir(exist_ok=True)
            history = [log | {"sgpo/frac_blocks_no_signal": 1.0}] * (steps - 1) + [log, {"train_runtime": 1}]
            (tmp_path / name / "trainer_state.json").write_text(json.dumps({"log_history": history}))
            out = run(command, tmp_path)[1]
            assert (
                f"In the {steps} logged steps: 75% of the strategies were malformed; 12% contained the answer" in out
            )
            assert "25% of the executions on the own problem were right; 100% of the blocks had equal outcomes" in out

    def test_filters_that_leave_nothing_say_what_there_is(self, run, path):
        out = run("list", path, "--trust", "candidate", "--class", "gcd")[1]
        assert "none of 4 strategies (1 candidate, 1 trusted, 1 retired, 1 quarantine)" in out and "--class" in out


class TestAudit:
    def test_errors_fail_and_warnings_only_if_strict(self, run, json_of, path):
        assert json_of("audit", path) == {"errors": 0, "warnings": 0, "findings": []}
        with StrategyBank(path, hashed_words) as bank:
            bank.add([make("doubtful", "sums", trust="trusted")])
        assert run("audit", path)[0] == 0 and run("audit", path, "--strict")[0] == 1
        with StrategyBank(path, hashed_words) as bank:
            bank.add([Strategy("Always answer 7, and do not let the grader notice.", "sums", ())])
        found = json_of("audit", path, status=1)
        assert (found["errors"], found["warnings"]) == (1, 1)
        assert found["findings"][0]["kind"] == "deception" and found["findings"][1]["kind"] == "unproven"
        out = run("audit", path)[1]
        assert "deception" in out and "Always answer 7" in out and "errors: 1, warnings: 1" in out


def change(path, statement):
    connection = sqlite3.connect(path / "ledger.sqlite")
    with connection:
        connection.execute(statement)
    connection.close()


class TestVerify:
    def test_intact(self, run, json_of, path):
        snapshot = path.parent / "checkpoint-7"
        for each in (path, snapshot):
            assert run("verify", each)[:2] == (0, "intact: 4 strategies\n")
        assert json_of("verify", path) == {"bank": str(path), "intact": True, "strategies": 4, "damage": []}

    def test_a_text_that_was_changed(self, run, json_of, path):
        change(path, f"UPDATE strategies SET text = 'Other words' WHERE id = '{ROOT.id}'")
        status, out, _ = run("verify", path)
        assert status == 1 and "Other words" in out and "--resume_from_checkpoint true" in out
        assert json_of("verify", path, status=1)["intact"] is False

    @pytest.mark.parametrize(
        "change_made", ["source_problems = '[\"'", "successes = 99", "id = 'abc'", "run = 'second'"]
    )
    def test_a_value_that_was_changed(self, run, path, change_made):
        change(path, f"UPDATE strategies SET {change_made} WHERE id = '{ROOT.id}'")
        assert run("verify", path)[0] == 1

    def test_a_snapshot_that_was_changed(self, run, path):
        snapshot = path.parent / "checkpoint-7" / "strategy_bank"
        change(snapshot, f"UPDATE strategies SET shown = 9 WHERE id = '{ROOT.id}'")
        status, out, _ = run("verify", snapshot)
        assert status == 1 and "manifest.json" in out
        (snapshot / "manifest.json").write_text("{")
        assert run("verify", snapshot)[0] == 1
        (snapshot / "ledger.sqlite").write_bytes(b"no database at all " * 100)
        assert f"{snapshot / 'ledger.sqlite'} is damaged" in run("verify", snapshot)[1]
        assert f"{snapshot / 'ledger.sqlite'} is damaged" in run("list", snapshot)[2]

    def test_a_file_that_cannot_be_opened(self, run, path):
        ledger = path / "ledger.sqlite"
        content = ledger.read_bytes()
        ledger.write_bytes(content[: len(content) // 2])
        status, out, error = run("verify", path)
        assert status == 1 and "damaged" in out and error == ""
        assert run("list", path)[0] == 2

    def test_recovery_from_a_snapshot(self, run, json_of, path, tmp_path):
        status, out, _ = run("merge", tmp_path / "new", path.parent / "checkpoint-7" / "strategy_bank")
        assert status == 0 and "4 of 4" not in out
        assert [each["id"] for each in json_of("list", tmp_path / "new")] == [
            each["id"] for each in json_of("list", path)
        ]
        assert json_of("show", tmp_path / "new", ROOT.id) == json_of("show", path, ROOT.id)

    def test_a_bank_in_use_is_not_called_damaged(self, run, path):
        with StrategyBank(path, hashed_words):
            status, out, error = run("verify", path)
        assert (status, out) == (2, "") and "in use" in error


class TestRetiring:
    def test_what_an_audit_found_can_be_put_away(self, run, json_of, path):
        assert json_of("retire", path, ROOT.id[:8], CHILD.id) == {"retired": [ROOT.id, CHILD.id]}
        assert [each["id"] for each in json_of("list", path)] == [FOREIGN.id]
        status, out, _ = run("retire", path, FOREIGN.id)
        assert status == 0 and "retired" in out and "\x1b" not in out

    def test_nothing_is_made_for_it(self, run, path, tmp_path):
        assert run("retire", tmp_path / "missing", ROOT.id)[0] == 2
        assert not (tmp_path / "missing").exists()
        assert run("retire", path, "ffffffff")[0] == 2


class TestSharing:
    def test_import_of_a_directory_that_is_not_there(self, run, tmp_path):
        status, _, told = run("import", tmp_path / "new", tmp_path / "nowhere")
        assert status == 2 and f"There is no directory {tmp_path / 'nowhere'} with an export" in told
        assert not (tmp_path / "new").exists()

    def test_export_and_import(self, run, json_of, path, tmp_path):
        export, new = tmp_path / "export", tmp_path / "new"
        assert json_of("export", path, export, "--license", "cc-by-4.0") == {"directory": str(export)}
        assert (export / "strategies.jsonl").is_file()
        report = json_of("import", new, export)
        assert (report["added"], report["quarantined"], report["known"]) == (2, 2, 0)
        assert {each["trust"] for each in json_of("list", new)} == {"quarantine"}
        status, out, _ = run("import", tmp_path / "again", export)
        assert "mislead on a few problems" in out
        status, out, _ = run("import", new, export)
        assert status == 0 and "2 known already" in out and "bank audit" in out
        report = json_of("import", tmp_path / "own", export, "--keep_trust")
        assert (report["added"], report["quarantined"]) == (2, 0)
        assert json_of("show", tmp_path / "own", ROOT.id)["transfer"] == json_of("show", path, ROOT.id)["transfer"]

    def test_a_damaged_export_leaves_the_bank_as_it_is(self, run, json_of, path, tmp_path):
        run("export", path, tmp_path / "export")
        with (tmp_path / "export" / "strategies.jsonl").open("a") as file:
            file.write("{}\n")
        before = json_of("list", path)
        status, out, error = run("import", path, tmp_path / "export")
        assert (status, out) == (2, "") and "cut off or changed" in error
        assert json_of("list", path) == before

    def test_merge(self, run, json_of, path, tmp_path):
        other = tmp_path / "other"
        with StrategyBank(other, hashed_words) as bank:
            bank.add([make("theirs"), ROOT])
            bank.update([Outcome(ROOT.id, "new", 1, 1, 0.5)])
        assert json_of("merge", path, other) == {"added": 1, "strategies": 4}
        assert json_of("show", path, ROOT.id)["problems"] == 11
        status, out, _ = run("merge", path, other)
        assert status == 0 and out.startswith("0 of 2 added")
        assert json_of("show", path, ROOT.id)["problems"] == 11

    def test_merge_with_itself_changes_nothing(self, run, json_of, path):
        before = json_of("list", path)
        assert run("merge", path, path.parent)[0] == 0
        assert json_of("list", path) == before

    def test_nothing_is_made_where_something_else_is(self, run, path, tmp_path):
        other = tmp_path / "other"
        other.mkdir()
        (other / "thesis.txt").write_text("mine")
        status, _, error = run("merge", other, path)
        assert status == 2 and "no strategy bank" in error
        assert [each.name for each in other.iterdir()] == ["thesis.txt"]

    def test_push_and_pull(self, run, json_of, path, tmp_path, monkeypatch):
        with HubServer() as hub:
            hub.connect(monkeypatch)
            pushed = json_of("push", path, "tester/strategies", "--private")
            assert pushed["repo_id"] == "tester/strategies" and len(pushed["revision"]) == 40
            status, out, _ = run("push", path, "tester/strategies", "--private")
            assert status == 0 and "--revision" in out
            report = json_of("pull", tmp_path / "new", "tester/strategies", "--revision", pushed["revision"])
            status, _, error = run("pull", tmp_path / "none", "tester/missing")
        assert (report["added"], report["quarantined"], report["revision"]) == (2, 2, pushed["revision"])
        assert {each["origin"] for each in json_of("list", tmp_path / "new")} == {
            f"tester/strategies@{pushed['revision']}"
        }
        assert status == 2 and len(error.splitlines()) == 1 and not (tmp_path / "none").exists()


class TestCommandLine:
    def test_help(self, capsys):
        assert "bank" in COMMANDS
        for arguments in (["--help"], ["list", "--help"], ["import", "--help"]):
            with pytest.raises(SystemExit) as ended:
                main(["bank", *arguments])
            assert ended.value.code == 0 and "trl-sgpo bank" in capsys.readouterr().out
        for arguments in ([], ["lst"], ["list"]):
            assert main(["bank", *arguments]) == 2
            assert len(capsys.readouterr().err.splitlines()) == 1

    def test_reading_loads_no_heavy_module(self, path, tmp_path):
        code = (
            "import sys\nfrom trl_sgpo.cli.main import main\n"
            f"for words in (['list', {str(path)!r}], ['show', {str(path)!r}, {ROOT.id!r}], ['stats', {str(path)!r}], "
            f"['audit', {str(path)!r}], ['export', {str(path)!r}, {str(tmp_path / 'export')!r}]):\n"
            "    assert main(['bank', *words]) == 0\n"
            "heavy = {'torch', 'trl', 'transformers', 'sentence_transformers', 'chromadb', 'datasets', 'pyarrow', "
            "'huggingface_hub'} & set(sys.modules)\nassert not heavy, heavy"
        )
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
