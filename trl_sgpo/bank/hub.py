"""Exports of strategies as datasets on the Hugging Face Hub. A pulled export is checked like any other."""

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from ..errors import BankError
from ..hub.errors import readable_errors
from .export_files import MAX_MANIFEST_BYTES, parse_manifest, read_export, write_export
from .files import BANK_DIRECTORY, EXPORT_FILE, EXPORT_MANIFEST, PARQUET_FILE
from .strategy import TRUST_STATES, Strategy


CARD = "README.md"
_CLASSES_ON_CARD = 50
COMMIT = re.compile(r"[0-9a-f]{40}")


# The card


def _cell(name: str) -> str:
    """An untrusted name, escaped for Markdown."""
    return "`" + re.sub(r"[^\w ./:+-]", "?", name) + "`" if name else "–"


def _size_category(count: int) -> str:
    bounds = [(1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K")]
    return next((name for bound, name in bounds if count < bound), "100K<n<1M")


def make_card(repo_id: str, strategies: Sequence[Strategy], manifest: dict[str, Any]) -> str:
    """
    The dataset card of an export.

    Args:
        repo_id (`str`):
            Name of the dataset.
        strategies (`Sequence[Strategy]`):
            The exported strategies.
        manifest (`dict[str, Any]`):
            Their manifest.

    Returns:
        `str`: Markdown with the metadata that the Hub reads.
    """
    states = [state for state in TRUST_STATES if state in manifest["trust"]]
    held = Counter((strategy.problem_class, strategy.trust) for strategy in strategies)
    sizes = Counter(strategy.problem_class for strategy in strategies)
    largest = sorted(sizes, key=lambda name: (-sizes[name], name))
    rows = [(_cell(name), *(held[name, state] for state in states)) for name in largest[:_CLASSES_ON_CARD]]
    if len(largest) > _CLASSES_ON_CARD:
        others = largest[_CLASSES_ON_CARD:]
        rows.append((f"{len(others)} other classes", *(sum(held[name, state] for name in others) for state in states)))
    rows.append(("all", *(manifest["trust"][state] for state in states)))
    table = "\n".join(
        f"| {' | '.join(map(str, row))} |" for row in [("class", *states), ("---",) * (1 + len(states)), *rows]
    )
    models = ", ".join(map(_cell, manifest["models"][:_CLASSES_ON_CARD])) or "not recorded"
    return f"""---
license: {manifest["license"]}
tags:
- trl-sgpo
- strategy-bank
size_categories:
- {_size_category(len(strategies))}
configs:
- config_name: default
  data_files: {manifest["file"]}
---

# Strategy bank

{len(strategies)} strategies for solving problems, written by language models trained with SGPO, each with its
provenance, its trust state and the results of its verified executions. `{EXPORT_MANIFEST}` has the checksum, size and
count of `{manifest["file"]}`.

{table}

- Embedding model of the bank: {_cell(manifest["embedding_model"])}. Embeddings are not included: a bank makes its own.
- Models that wrote the strategies: {models}
- Written by trl-sgpo {_cell(manifest["trl_sgpo_version"])}, {_cell(manifest["created"])}

## Use

```python
from trl_sgpo.bank import StrategyBank
from trl_sgpo.bank.exchange import import_bank
from trl_sgpo.bank.hub import pull_bank

directory, sha = pull_bank("{repo_id}", "pulled-bank")
with StrategyBank("bank") as bank:
    print(import_bank(bank, directory, origin=f"hub:{repo_id}@{{sha[:12]}}"))
```

To get the very same strategies again, pin the commit: `pull_bank("{repo_id}", "pulled-bank", revision=sha)`.

**Imported strategies are quarantined.** They are texts that helped elsewhere, and nobody has checked what they say: a
bank takes over none of the counts and trust states above, and shows no imported strategy with a problem before it has
earned trust by executions that its own training verified.
"""


# Push and pull


def push_export(
    directory: Path,
    repo_id: str,
    *,
    private: bool = False,
    token: str | None = None,
    endpoint: str | None = None,
    message: str | None = None,
    parent_commit: str | None = None,
) -> str:
    """
    Publish an export as a dataset on the Hub, in one commit. The other arguments and the result are those of
    [`~trl_sgpo.bank.exchange.push_bank`].
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api = HfApi(endpoint=endpoint, token=token)
    strategies, _, manifest = read_export(directory)
    with readable_errors(f"Pushing to {repo_id}", BankError):
        repo_id = api.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True).repo_id
        repository = api.dataset_info(repo_id)
    if private and not repository.private:
        raise BankError(f"{repo_id} is public: make it private on the Hub first, or push to a new name.")
    operations: list[CommitOperationAdd | CommitOperationDelete] = [
        CommitOperationAdd(CARD, make_card(repo_id, strategies, manifest).encode()),
        *(CommitOperationAdd(name, directory / name) for name in (EXPORT_FILE, EXPORT_MANIFEST)),
    ]
    if PARQUET_FILE in {sibling.rfilename for sibling in repository.siblings or ()}:
        operations.append(CommitOperationDelete(PARQUET_FILE))
    with readable_errors(f"Pushing to {repo_id}", BankError):
        commit = api.create_commit(
            repo_id,
            operations,
            repo_type="dataset",
            commit_message=message or f"Export {len(strategies)} strategies",
            parent_commit=parent_commit or repository.sha,
        )
    return commit.oid


def pull_bank(
    repo_id: str,
    directory: str | Path,
    *,
    revision: str | None = None,
    token: str | None = None,
    endpoint: str | None = None,
    repo_type: Literal["dataset", "model"] = "dataset",
) -> tuple[Path, str]:
    """
    Download an export from the Hub, ready for [`~trl_sgpo.bank.exchange.import_bank`].

    Only the manifest and the file of strategies are downloaded, if their sizes are within the limits.

    Args:
        repo_id (`str`):
            Name of the dataset or model, `"user/name"`.
        directory (`str` or `Path`):
            Where to, which may have nothing but an earlier export in it.
        revision (`str`, *optional*):
            Branch, tag or commit. If `None`, the latest commit.
        token (`str`, *optional*):
            Access token. If `None`, the one that `hf auth login` stored.
        endpoint (`str`, *optional*):
            Address of another Hub.
        repo_type (`str`, *optional*, defaults to `"dataset"`):
            `"dataset"`, as [`~trl_sgpo.bank.exchange.push_bank`] writes, or `"model"`, where the export of a run is in
            `strategy_bank/`.

    Returns:
        `tuple[Path, str]`: The directory, and the commit, 40 hexadecimal digits, by which the same is pulled again.

    Raises:
        [`~trl_sgpo.errors.BankError`]: If there is no export, or the download fails. Nothing is written then.
    """
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.hf_api import RepoFile

    action = f"Pulling {repo_id}"
    folder = f"{BANK_DIRECTORY}/" if repo_type == "model" else ""
    api = HfApi(endpoint=endpoint, token=token)
    with readable_errors(action, BankError):
        sha = api.repo_info(repo_id, revision=revision, repo_type=repo_type).sha or ""
    if not COMMIT.fullmatch(sha):
        raise BankError(f"{action} failed: {api.endpoint} names no commit for it. Check the endpoint.")
    with readable_errors(action, BankError):
        paths = [folder + name for name in (EXPORT_MANIFEST, EXPORT_FILE)]
        found = api.get_paths_info(repo_id, paths, revision=sha, repo_type=repo_type)
    sizes = {each.path.removeprefix(folder): each.size for each in found if isinstance(each, RepoFile)}
    where = f"{EXPORT_MANIFEST} of {repo_id}@{sha[:12]}"
    if not 0 < sizes.get(EXPORT_MANIFEST, 0) <= MAX_MANIFEST_BYTES:
        raise BankError(f"{where} is missing or too large: name a {repo_type} and a revision that `push` wrote.")
    with TemporaryDirectory() as cache:

        def download(name: str) -> bytes:
            with readable_errors(action, BankError):
                path = hf_hub_download(
                    repo_id,
                    folder + name,
                    repo_type=repo_type,
                    revision=sha,
                    cache_dir=cache,
                    token=token,
                    endpoint=endpoint,
                )
            return Path(path).read_bytes()

        content = download(EXPORT_MANIFEST)
        manifest = parse_manifest(content, where)
        if sizes.get(EXPORT_FILE) != manifest["size"]:
            raise BankError(
                f"{where} gives {EXPORT_FILE} {manifest['size']} bytes, and it has {sizes.get(EXPORT_FILE, 0)} there. "
                "Pull another revision, or have it pushed again."
            )
        write_export(Path(directory), download(EXPORT_FILE), content)
    return Path(directory), sha
