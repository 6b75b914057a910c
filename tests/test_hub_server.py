"""The local Hub, by what the real client can do with it."""

import subprocess
import sys

import pytest
from hub_server import LFS_SIZE, HubServer
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfFileSystem,
    hf_hub_download,
    snapshot_download,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)


REPO = "tester/bank"
KIND = {"repo_id": REPO, "repo_type": "dataset"}


@pytest.fixture
def hub(monkeypatch):
    with HubServer() as hub:
        hub.connect(monkeypatch)
        hub.api().create_repo(**KIND, private=True)
        yield hub


def commit(hub, files, api=None, **kwargs):
    """Commits files of the given content; `None` deletes one."""
    operations = [
        CommitOperationDelete(path) if content is None else CommitOperationAdd(path, content)
        for path, content in files.items()
    ]
    return (api or hub.api()).create_commit(**KIND, operations=operations, commit_message="Change", **kwargs)


def status(error):
    return error.value.response.status_code


@pytest.mark.parametrize("repo_type", ["dataset", "model"])
def test_create_repo(hub, repo_type):
    api = hub.api()
    url = api.create_repo("tester/new", repo_type=repo_type, private=True)
    assert (url.repo_id, url.repo_type) == ("tester/new", repo_type)
    assert api.create_repo("tester/new", repo_type=repo_type, exist_ok=True) == url
    with pytest.raises(HfHubHTTPError) as error:
        api.create_repo("tester/new", repo_type=repo_type)
    assert status(error) == 409
    assert api.repo_info("tester/new", repo_type=repo_type).private


def test_commit_of_regular_and_lfs_files(hub):
    before = hub.head(**KIND)
    files = {"README.md": b"# Bank\n", "a/b.jsonl": b"{}\n", "a/x.parquet": b"\0", "big.txt": b"x" * (LFS_SIZE + 1)}
    info = commit(hub, files)
    assert len(info.oid) == 40 and info.oid == hub.head(**KIND) != before
    assert str(info.repo_url) == f"{hub.url}/datasets/{REPO}"
    assert hub.files(**KIND).items() > files.items()
    blobs = hub.repos["dataset", REPO].at("main").files
    assert [path for path, blob in sorted(blobs.items()) if blob.lfs] == ["a/x.parquet", "big.txt"]
    assert hub.files(**KIND, revision=before).keys() == {".gitattributes"}


def test_known_content_is_not_uploaded_again(hub):
    first = commit(hub, {"a.parquet": b"same", "a.txt": b"same"})
    hub.requests.clear()
    assert commit(hub, {"a.parquet": b"same", "a.txt": b"same"}).oid == first.oid
    commit(hub, {"b.parquet": b"same"})
    assert "PUT" not in {method for method, _ in hub.requests}


def test_upload_folder_is_one_commit(hub, tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "m.safetensors").write_bytes(b"\0\1")
    (tmp_path / "c.json").write_text("{}")
    hub.api().upload_folder(**KIND, folder_path=tmp_path, path_in_repo="v1")
    hub.api().upload_file(**KIND, path_or_fileobj=tmp_path / "c.json", path_in_repo="c.json")
    assert hub.files(**KIND)["v1/deep/m.safetensors"] == b"\0\1"
    assert len(hub.api().list_repo_commits(**KIND)) == 3


def test_deletes(hub):
    commit(hub, {"a/1": b"1", "a/2": b"2", "b": b"3", "bc": b"4"})
    commit(hub, {"a/": None, "b": None})
    assert hub.files(**KIND).keys() == {".gitattributes", "bc"}
    for missing in ("b", "bc/", "a"):
        with pytest.raises(EntryNotFoundError):
            commit(hub, {missing: None})


def test_info_and_listings(hub):
    api, old = hub.api(), hub.head(**KIND)
    sha = commit(hub, {"a/b/c.txt": b"text", "m.safetensors": b"\0"}).oid
    assert api.dataset_info(REPO).sha == api.repo_info(**KIND, revision="main").sha == sha
    assert api.dataset_info(REPO, revision=old).sha == old
    lfs = [file for file in api.dataset_info(REPO, files_metadata=True).siblings if file.lfs]
    assert [(file.rfilename, file.size) for file in lfs] == [("m.safetensors", 1)]
    assert sorted(api.list_repo_files(**KIND)) == [".gitattributes", "a/b/c.txt", "m.safetensors"]
    assert [each.path for each in api.list_repo_tree(**KIND)] == ["a", ".gitattributes", "m.safetensors"]
    assert [each.path for each in api.list_repo_tree(**KIND, path_in_repo="a/b")] == ["a/b/c.txt"]
    assert api.file_exists(**KIND, filename="a/b/c.txt")
    assert not api.file_exists(**KIND, filename="a/b/c.txt", revision=old)
    assert not api.file_exists("tester/none", "a")
    with pytest.raises(RevisionNotFoundError):
        api.repo_info(**KIND, revision="f" * 40)
    api.create_repo("tester/model")
    assert api.model_info("tester/model").sha == hub.head("tester/model")


def test_whoami(hub):
    assert hub.api().whoami()["name"] == hub.user
    with pytest.raises(HfHubHTTPError) as error:
        hub.api("hf_wrong").whoami()
    assert status(error) == 401


def test_tags_and_branches(hub):
    api, old = hub.api(), hub.head(**KIND)
    api.create_tag(**KIND, tag="v1")
    api.create_branch(**KIND, branch="next", exist_ok=True)
    new = commit(hub, {"a": b"1"}, revision="next").oid
    refs = api.list_repo_refs(**KIND)
    assert {ref.name: ref.target_commit for ref in refs.branches + refs.tags} == {"main": old, "next": new, "v1": old}
    assert api.repo_info(**KIND, revision="v1").sha == old
    with pytest.raises(HfHubHTTPError) as error:
        api.create_tag(**KIND, tag="v1")
    assert status(error) == 409
    with pytest.raises(RevisionNotFoundError):
        commit(hub, {"a": b"2"}, revision="v1")


def test_downloads(hub, tmp_path):
    old = commit(hub, {"a/b.txt": b"old", "m.safetensors": b"\0\1\2"}).oid
    new = commit(hub, {"a/b.txt": b"new"}).oid
    source = {**KIND, "endpoint": hub.url, "token": hub.token, "cache_dir": tmp_path}
    with open(hf_hub_download(**source, filename="a/b.txt", revision=old), "rb") as file:
        assert file.read() == b"old"
    for revision in ("main", old):
        folder = snapshot_download(**source, revision=revision)
        assert folder.endswith(new if revision == "main" else old)
        files = hub.files(**KIND, revision=revision)
        for path, content in files.items():
            with open(f"{folder}/{path}", "rb") as file:
                assert file.read() == content
    hub.requests.clear()
    snapshot_download(**source, revision=old)
    assert hub.requests == []
    with pytest.raises(EntryNotFoundError):
        hf_hub_download(**source, filename="none")


def test_ranges(hub):
    commit(hub, {"a.parquet": bytes(range(10))})
    with HfFileSystem(endpoint=hub.url, token=hub.token).open(f"datasets/{REPO}/a.parquet", block_size=2) as file:
        file.seek(7)
        assert file.read(2) == b"\7\x08"


def test_stale_parent(hub):
    stale = hub.head(**KIND)
    new = commit(hub, {"a": b"1"}, parent_commit=stale).oid
    with pytest.raises(HfHubHTTPError) as error:
        commit(hub, {"a": b"2"}, parent_commit=stale)
    assert status(error) == 412
    assert hub.head(**KIND) == new


@pytest.mark.parametrize("fault", [500, "drop"])
def test_failed_commit_leaves_main(hub, fault):
    before = hub.head(**KIND)
    hub.fail(1, fault, path_contains="/commit/")
    with pytest.raises(Exception, match=r"500|disconnected"):
        commit(hub, {"a": b"1", "b.parquet": b"2"})
    assert hub.head(**KIND) == before
    assert commit(hub, {"a": b"1", "b.parquet": b"2"}).oid == hub.head(**KIND)


def test_failed_upload_leaves_main(hub):
    before = hub.head(**KIND)
    hub.fail(6, path_contains="/upload/", method="PUT")
    with pytest.raises(RuntimeError, match=r"uploading 'b\.parquet'"):
        commit(hub, {"a": b"1", "b.parquet": b"2"})
    assert hub.head(**KIND) == before
    assert hub.waits == [1, 2, 4, 8, 8]


def test_commit_refuses_lfs_files_that_are_not_there(hub):
    before, operations = hub.head(**KIND), [CommitOperationAdd("a", b"1"), CommitOperationAdd("b.parquet", b"2")]
    hub.api().preupload_lfs_files(**KIND, additions=operations)
    hub.repos["dataset", REPO].objects.clear()
    with pytest.raises(HfHubHTTPError, match="not uploaded"):
        hub.api().create_commit(**KIND, operations=operations, commit_message="Change")
    assert hub.head(**KIND) == before


def test_lost_answer_to_a_commit(hub):
    before = hub.head(**KIND)
    hub.fail(1, "lose", path_contains="/commit/")
    with pytest.raises(Exception, match="disconnected"):
        commit(hub, {"a": b"1"})
    assert hub.head(**KIND) != before
    assert hub.files(**KIND)["a"] == b"1"


def test_retries(hub, tmp_path):
    hub.fail(1, 429, path_contains="/preupload/", retry_after=7)
    hub.fail(1, "drop", path_contains="/objects/batch")
    commit(hub, {"a.parquet": bytes(1000)})
    assert hub.waits == [8, 1]
    hub.fail(1, "cut", path_contains="/resolve/", method="GET")
    path = hf_hub_download(**KIND, filename="a.parquet", token=hub.token, cache_dir=tmp_path)
    with open(path, "rb") as file:
        assert file.read() == bytes(1000)
    assert [method for method, path in hub.requests if "/resolve/" in path] == ["HEAD", "GET", "GET"]


def test_read_only_token(hub):
    api, before = hub.api(*hub.read_only_tokens), hub.head(**KIND)
    assert api.repo_info(**KIND).sha == before
    assert api.create_repo(**KIND, exist_ok=True).repo_id == REPO
    for write in (lambda: commit(hub, {"a": b"1"}, api), lambda: api.create_repo("tester/new")):
        with pytest.raises(HfHubHTTPError) as error:
            write()
        assert status(error) == 403
    assert hub.head(**KIND) == before


def test_private_repo(hub, tmp_path):
    for token, expected in ((False, RepositoryNotFoundError), ("hf_wrong", HfHubHTTPError)):
        with pytest.raises(expected) as error:
            hub.api(token).repo_info(**KIND)
        assert status(error) == 401
        with pytest.raises(expected) as error:
            snapshot_download(**KIND, endpoint=hub.url, token=token, cache_dir=tmp_path)
        assert status(error) == 401
    hub.api().create_repo("tester/open")
    assert hub.api(False).repo_info("tester/open").sha == hub.head("tester/open")
    with pytest.raises(RepositoryNotFoundError) as error:
        hub.api().repo_info("tester/none")
    assert status(error) == 404


def test_closed_server(hub, tmp_path):
    source = {"repo_type": "dataset", "token": hub.token, "cache_dir": tmp_path}
    cached = snapshot_download(REPO, **source)
    hub.close()
    assert snapshot_download(REPO, **source) == cached
    with pytest.raises(LocalEntryNotFoundError):
        snapshot_download("tester/other", **source)


def test_other_process(hub, tmp_path):
    upload = f"upload_file(path_or_fileobj=b'1', path_in_repo='a.bin', **{KIND})"
    code = f"import huggingface_hub; print(huggingface_hub.{upload}.oid)"
    env = {**hub.env, "HF_HOME": str(tmp_path)}
    assert subprocess.check_output([sys.executable, "-c", code], env=env, text=True).strip() == hub.head(**KIND)
