"""Pushing a bank to a dataset on the Hub and pulling it, by the real client and with the Hub's faults."""

import hashlib
import json
import re

import pytest
from bank_helpers import hashed_words, make
from hub_server import HubServer
from huggingface_hub import CommitOperationAdd, DatasetCard

from trl_sgpo.bank import Outcome, StrategyBank, export_files
from trl_sgpo.bank.exchange import ImportReport, export_bank, import_bank, push_bank
from trl_sgpo.bank.export_files import read_export
from trl_sgpo.bank.hub import make_card, pull_bank
from trl_sgpo.errors import BankError


REPO = "tester/bank"
KIND = {"repo_id": REPO, "repo_type": "dataset"}


@pytest.fixture
def hub(monkeypatch):
    with HubServer() as hub:
        hub.connect(monkeypatch)
        yield hub


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    with StrategyBank(tmp_path_factory.mktemp("source"), hashed_words) as bank:
        bank.add([make(f"s{i}", "even" if i % 2 == 0 else "odd", step=i, model=f"org/m{i % 2}") for i in range(6)])
        trusted = bank.strategies()[0]
        bank.update([Outcome(trusted.id, f"p{i}", 1.0, 1, 0.5) for i in range(8)])
        assert bank.get(trusted.id).trust == "trusted"
        yield bank


def commit(hub, **files):
    """A dataset with these files, whoever made them."""
    hub.api().create_repo(**KIND, exist_ok=True)
    operations = [CommitOperationAdd(name.replace("_", "."), content) for name, content in files.items()]
    return hub.api().create_commit(**KIND, operations=operations, commit_message="Change").oid


def failing(call, message):
    with pytest.raises(BankError, match=message) as error:
        call()
    assert "\n" not in str(error.value) and "hf_" not in str(error.value)


def test_what_is_pulled_is_what_was_pushed(hub, source, bank, tmp_path):
    sha = push_bank(source, REPO, license="cc-by-4.0")
    assert sha == hub.head(**KIND) and len(hub.api().list_repo_commits(**KIND)) == 2
    files = hub.files(**KIND)
    assert files.keys() - {".gitattributes"} == {"README.md", "manifest.json", "strategies.jsonl"}
    hub.requests.clear()
    directory, pulled = pull_bank(REPO, tmp_path / "pulled")
    assert (directory, pulled) == (tmp_path / "pulled", sha)
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == {
        name: files[name] for name in ("manifest.json", "strategies.jsonl")
    }
    asked = [
        path.rpartition("/resolve/")[2] for method, path in hub.requests if method == "GET" and "/resolve/" in path
    ]
    assert asked == [f"{sha}/manifest.json", f"{sha}/strategies.jsonl"]
    assert read_export(directory)[0] == source.strategies()
    report = import_bank(bank, directory, origin=f"hub:{REPO}@{pulled[:12]}")
    assert report == ImportReport(added=6, known=0, near_copies=0, quarantined=6)
    assert {s.origin for s in bank.strategies()} == {f"hub:tester/bank@{sha[:12]}"}


def test_a_pinned_revision_stays_what_it_was(hub, source, bank, tmp_path):
    first = push_bank(source, REPO)
    hub.api().create_tag(**KIND, tag="v1")
    bank.add([make("later")])
    second = push_bank(bank, REPO, message="Another one")
    assert hub.api().list_repo_commits(**KIND)[0].title == "Another one"
    for revision, sha, count in [(first, first, 6), ("v1", first, 6), ("main", second, 1), (None, second, 1)]:
        directory, pulled = pull_bank(REPO, tmp_path / "pulled", revision=revision)
        assert pulled == sha and len(read_export(directory)[0]) == count


def test_the_file_of_an_earlier_version_goes_in_the_same_commit(hub, source, tmp_path):
    commit(hub, strategies_parquet=b"PAR1", manifest_json=b"{}")
    before = len(hub.api().list_repo_commits(**KIND))
    push_bank(source, REPO)
    assert "strategies.parquet" not in hub.files(**KIND) and "strategies.jsonl" in hub.files(**KIND)
    assert len(hub.api().list_repo_commits(**KIND)) == before + 1
    directory, _ = pull_bank(REPO, tmp_path / "pulled")
    assert sorted(path.name for path in directory.iterdir()) == ["manifest.json", "strategies.jsonl"]


def test_the_card(hub, source):
    sha = push_bank(source, "bank", license="apache-2.0")
    assert sha == hub.head(**KIND)
    card = DatasetCard(hub.files(**KIND)["README.md"].decode())
    assert card.data.to_dict() == {
        "license": "apache-2.0",
        "tags": ["trl-sgpo", "strategy-bank"],
        "size_categories": ["n<1K"],
        "configs": [{"config_name": "default", "data_files": "strategies.jsonl"}],
    }
    for line in (
        "| class | candidate | trusted |",
        "| `even` | 2 | 1 |",
        "| `odd` | 3 | 0 |",
        "| all | 5 | 1 |",
        "- Embedding model of the bank: `hashed_words`. Embeddings are not included: a bank makes its own.",
        "- Models that wrote the strategies: `org/m0`, `org/m1`",
        'directory, sha = pull_bank("tester/bank", "pulled-bank")',
    ):
        assert line in card.text.splitlines()
    assert "revision=sha" in card.text and "**Imported strategies are quarantined.**" in card.text


def test_the_card_shows_names_as_they_are_and_only_so_many():
    strategies = [make(f"s{i}", f"class {i:03}") for i in range(60)]
    strategies += [make(f"t{i}", "`|<b>\n# x") for i in range(2)] + [make("u", "")]
    manifest = {
        "trust": {"candidate": 63},
        "models": ["a`|<script>"],
        "embedding_model": "",
        "license": "other",
        "file": "strategies.jsonl",
        "trl_sgpo_version": "1",
        "created": "now",
    }
    card = make_card(REPO, strategies, manifest)
    assert "| `???b??? x` | 2 |" in card and "| – | 1 |" in card and "`a???script?`" in card
    assert "| 12 other classes | 12 |" in card and "| all | 63 |" in card and "<" not in card.replace("n<1K", "")
    for count, category in [(999, "n<1K"), (1_000, "1K<n<10K"), (20_000, "10K<n<100K"), (200_000, "100K<n<1M")]:
        assert f"- {category}\n" in make_card(REPO, strategies[:1] * count, manifest)


def test_private_means_private(hub, source, tmp_path):
    push_bank(source, REPO, private=True)
    assert hub.api().dataset_info(REPO).private
    failing(lambda: pull_bank(REPO, tmp_path / "pulled", token=False), "status 401.*hf auth login")
    pull_bank(REPO, tmp_path / "pulled")
    push_bank(source, "tester/open")
    head = hub.head("tester/open", "dataset")
    failing(lambda: push_bank(source, "tester/open", private=True), "tester/open is public: make it private")
    assert hub.head("tester/open", "dataset") == head


def test_a_push_onto_another_commit_than_meant_is_refused(hub, source):
    first = push_bank(source, REPO)
    second = push_bank(source, REPO, license="mit", parent_commit=first)
    failing(lambda: push_bank(source, REPO, parent_commit=first), "status 412.*changed it meanwhile: try again")
    assert hub.head(**KIND) == second


@pytest.mark.parametrize(
    ("status", "where", "message"),
    [
        (
            401,
            "/preupload/",
            "Pushing to tester/bank failed .status 401.: log in with `hf auth login` or pass the `token`",
        ),
        (403, "/commit/", "status 403.*`token` that has the permission"),
        (404, "/commit/", "status 404.*check the name"),
        (409, "/commit/", "status 409.*try again"),
        (429, "/commit/", "status 429.*in a few minutes"),
        (500, "/commit/", "status 500.*in a few minutes"),
        (503, "/preupload/", "status 503.*in a few minutes"),
        (400, "/commit/", "status 400.*Bad Request"),
        ("drop", "/commit/", "no connection.*safe also if part was done"),
        (500, "/upload/", "status 500"),
    ],
)
def test_a_push_that_fails_leaves_the_dataset_as_it_was(hub, source, status, where, message, monkeypatch):
    monkeypatch.setattr("hub_server.LFS_SIZE", 100)  # so that the strategies are uploaded apart from the commit
    before = push_bank(source, REPO)
    files = hub.files(**KIND)
    hub.fail(20, status, path_contains=where)
    failing(lambda: push_bank(source, REPO, license="mit"), message)
    assert hub.head(**KIND) == before and hub.files(**KIND) == files
    hub._faults.clear()
    assert push_bank(source, REPO, license="mit") == hub.head(**KIND) != before


def test_a_push_whose_answer_was_lost_can_be_repeated(hub, source, tmp_path):
    push_bank(source, REPO)
    hub.fail(1, "lose", path_contains="/commit/")
    failing(lambda: push_bank(source, REPO, license="mit"), "no connection")
    sha = push_bank(source, REPO, license="mit")
    directory, pulled = pull_bank(REPO, tmp_path / "pulled")
    assert pulled == sha and read_export(directory)[0] == source.strategies()


@pytest.mark.parametrize(
    ("status", "where", "message"),
    [
        (401, "/api/datasets/", "Pulling tester/bank failed .status 401"),
        (403, "/paths-info/", "status 403"),
        (429, "/paths-info/", "status 429.*in a few minutes"),
        (503, "/resolve/", "Pulling tester/bank failed"),
        ("drop", "/resolve/", "Pulling tester/bank failed"),
        ("drop", "/api/datasets/", "no connection"),
    ],
)
def test_a_pull_that_fails_writes_nothing(hub, source, tmp_path, status, where, message):
    push_bank(source, REPO)
    hub.fail(50, status, path_contains=where)
    failing(lambda: pull_bank(REPO, tmp_path / "pulled"), message)
    assert not (tmp_path / "pulled").exists()
    hub._faults.clear()
    assert len(read_export(pull_bank(REPO, tmp_path / "pulled")[0])[0]) == 6


def test_a_download_that_breaks_off_goes_on(hub, source, tmp_path):
    push_bank(source, REPO, license="mit")
    hub.fail(1, "cut", path_contains="strategies.jsonl", method="GET")
    assert read_export(pull_bank(REPO, tmp_path / "pulled")[0])[0] == source.strategies()


def test_names_that_are_not_there(hub, source, tmp_path):
    failing(lambda: pull_bank("tester/none", tmp_path / "pulled"), "status 404.*check the name and the revision")
    failing(lambda: pull_bank("no/such/name", tmp_path / "pulled"), "Pulling no/such/name failed.*user/name")
    failing(lambda: push_bank(source, "no/such/name"), "Pushing to no/such/name failed.*user/name")
    failing(lambda: push_bank(source, REPO, token="hf_wrong"), "status 401")
    failing(lambda: push_bank(source, REPO, token="hf_read"), "status 403")
    push_bank(source, REPO)
    failing(lambda: push_bank(source, REPO, token="hf_read"), "status 403")
    failing(lambda: pull_bank(REPO, tmp_path / "pulled", revision="f" * 40), "status 404")
    failing(lambda: push_bank(source, REPO, parent_commit="main"), "not a valid commit")
    hub.close()
    failing(lambda: pull_bank(REPO, tmp_path / "pulled"), "no connection.*check the network")
    failing(lambda: push_bank(source, REPO), "no connection.*check the network")
    assert not (tmp_path / "pulled").exists()


def test_offline_mode_is_named(source, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for call in (lambda: pull_bank(REPO, tmp_path / "pulled"), lambda: push_bank(source, REPO)):
        failing(call, "unset HF_HUB_OFFLINE")


def test_a_dataset_that_is_no_export_is_not_downloaded(hub, source, tmp_path, monkeypatch):
    directory = export_bank(source, tmp_path / "export")
    data, manifest = (
        (directory / "strategies.jsonl").read_bytes(),
        json.loads((directory / "manifest.json").read_text()),
    )

    def with_manifest(**changes):
        return commit(hub, strategies_jsonl=data, manifest_json=json.dumps(manifest | changes).encode())

    def refused(message, allowed):
        hub.requests.clear()
        failing(lambda: pull_bank(REPO, tmp_path / "pulled"), message)
        asked = {path.rpartition("/")[2] for method, path in hub.requests if "/resolve/" in path}
        assert asked == allowed and not (tmp_path / "pulled").exists()

    commit(hub, strategies_jsonl=data, strategies_pkl=b"\x80\x04.")
    refused(r"manifest.json of tester/bank@[0-9a-f]{12} is missing or too large.*`push` wrote", set())
    commit(hub, manifest_json=b"x" * (2**20 + 1))
    refused("is missing or too large", set())
    commit(hub, manifest_json=b"\x80\x04cos\nsystem\n.")
    refused("manifest.json of tester/bank@[0-9a-f]{12} is no manifest", {"manifest.json"})
    for changes, message in [
        ({"file": "../../strategies.jsonl"}, "file must be"),
        ({"file": "strategies.pkl"}, "file must be"),
        ({"file": "strategies.parquet"}, "an export in Parquet.*export the bank again as JSONL"),
        ({"size": 5}, f"gives strategies.jsonl 5 bytes, and it has {len(data)} there"),
        ({"size": 2**40}, "size must be at most"),
    ]:
        with_manifest(**changes)
        refused(message, {"manifest.json"})
    monkeypatch.setattr(export_files, "MAX_FILE_BYTES", len(data) - 1)
    with_manifest()
    refused("size must be at most", {"manifest.json"})


def test_what_was_tampered_with_is_pulled_but_not_imported(hub, source, bank, tmp_path):
    push_bank(source, REPO)
    commit(hub, strategies_jsonl=hub.files(**KIND)["strategies.jsonl"].replace(b"s0one", b"s0two"))
    directory, _ = pull_bank(REPO, tmp_path / "pulled")
    failing(lambda: import_bank(bank, directory), "cut off or changed")
    data = (directory / "strategies.jsonl").read_bytes()
    manifest = json.loads((directory / "manifest.json").read_text()) | {"sha256": hashlib.sha256(data).hexdigest()}
    commit(hub, manifest_json=json.dumps(manifest).encode())
    directory, _ = pull_bank(REPO, directory)
    failing(lambda: import_bank(bank, directory), "row 1: its id is not that of its text")
    assert len(bank) == 0


def test_a_pull_spares_what_is_in_the_directory(hub, source, tmp_path):
    push_bank(source, REPO)
    (tmp_path / "notes.txt").write_text("mine")
    failing(lambda: pull_bank(REPO, tmp_path), re.escape("has 'notes.txt' in it"))
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
