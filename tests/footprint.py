"""What a session of tests leaves behind."""

import os
from pathlib import Path


# Of tools, which write there whatever is tested
_TOOLS = {
    ".git", ".venv", ".venv-llama-cpp", ".venv-vllm", "__pycache__", ".pytest_cache", ".hypothesis", ".mypy_cache",
    ".ruff_cache",
}  # fmt: skip


def files(*folders: Path) -> set[Path]:
    """Files below folders, without those of tools."""
    found = set()
    for folder in folders:
        for root, below, names in os.walk(folder):
            below[:] = [name for name in below if name not in _TOOLS and not name.startswith(".venv-")]
            found |= {Path(root, name) for name in names}
    return found
