"""The fenced blocks of the documentation, as they stand in the Markdown files."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "SECURITY.md", ROOT / "CHANGELOG.md", *sorted(ROOT.glob("docs/*.md"))]
NEEDS = ("gpu", "network")
_MARK = re.compile(r"<!-- needs: (.*) -->")
_FENCE = re.compile(r"\s*(```+|~~~+)(.*)")


@dataclass(frozen=True)
class Block:
    """
    A fenced block.

    Args:
        page (`str`):
            The file, relative to the repository.
        line (`int`):
            Line of its opening fence.
        language (`str`):
            What stands behind the opening fence.
        text (`str`):
            Its content.
        needs (`str`, *optional*):
            What the mark before it says it needs.
    """

    page: str
    line: int
    language: str
    text: str
    needs: str | None = None

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def commands(self) -> list[str]:
        """Lines of a `bash` block, continued ones joined."""
        lines = self.text.replace("\\\n", " ").splitlines()
        return [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]


def read_blocks(page: str, text: str) -> Iterator[Block]:
    """
    Reads the blocks of a page.

    Raises:
        `ValueError`: A comment that is no mark, a mark without a block, or a block without an end.
    """
    lines = text.splitlines()
    needs, number = None, 0
    while number < len(lines):
        line, number = lines[number], number + 1
        if fence := _FENCE.fullmatch(line):
            start, content = number, []
            while number < len(lines) and lines[number].strip() != fence[1]:
                content.append(lines[number])
                number += 1
            if number == len(lines):
                raise ValueError(f"{page}:{start}: the block has no end")
            number += 1
            yield Block(page, start, fence[2].strip(), "\n".join(content), needs)
            needs = None
        elif needs is not None:
            raise ValueError(f"{page}:{number}: a mark stands right before its block")
        elif "<!--" in line:
            mark = _MARK.fullmatch(line)
            if mark is None or mark[1] not in NEEDS:
                raise ValueError(f"{page}:{number}: a block is marked `needs: gpu` or `needs: network`, not {line!r}")
            needs = mark[1]
    if needs is not None:
        raise ValueError(f"{page}:{number}: a mark stands right before its block")


BLOCKS = [block for page in PAGES for block in read_blocks(str(page.relative_to(ROOT)), page.read_text())]
