"""The pages of the documentation: their code blocks, their links, and the names of files and functions in them."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
# Folders of pages; `build` may hold environments with the pages of other packages.
FOLDERS = ("benchmarks", "examples", "jlora", "tests")
PAGES = sorted([ROOT / "README.md", *(page for folder in FOLDERS for page in (ROOT / folder).rglob("*.md"))])

# A comment on the line above a block: `<!-- nightly: reason -->`, `keras` or `syntax only`.
_MARK = re.compile(r"<!-- (nightly|keras|syntax only): \S.* -->")
_FENCE = re.compile(r"```(\w*)")


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block.

    Arguments:
        language: what follows the fence.
        text: the lines between the fences.
        line: the number of the first of them in the page.
        mark: "nightly", "keras" (where it is installed), "syntax only", or "" for a block that every test run executes.
    """

    language: str
    text: str
    line: int
    mark: str


def blocks(page: Path) -> list[Block]:
    """Every fenced block of a page, in order."""
    out: list[Block] = []
    mark, start, language, lines = "", 0, "", []
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), start=1):
        fence = _FENCE.fullmatch(line)
        if start and line == "```":
            out.append(Block(language, "\n".join(lines) + "\n", start, mark))
            mark, start = "", 0
        elif start:
            lines.append(line)
        elif fence:
            start, language, lines = number + 1, fence[1], []
        elif line:
            comment = _MARK.fullmatch(line)
            mark = comment[1] if comment else ""
    assert not start, f"{page}: the block that starts at line {start} has no end"
    return out


def prose(page: Path) -> str:
    """The page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def links(page: Path) -> list[tuple[str, str]]:
    """Text and target of every link and picture that leads to a file of this repository or to a heading."""
    return [
        (text, target)
        for text, target in re.findall(r"\[([^\]]*)\]\(([^)\s]+)\)", prose(page))
        if not re.match(r"[a-z]+:", target)
    ]


def setup_pages(page: Path) -> list[Path]:
    """The pages whose blocks run before those of a page: those whose section "Setup" it links to."""
    targets = [target for _, target in links(page) if target.endswith("README.md#setup")]
    return [page.parent / target.partition("#")[0] for target in dict.fromkeys(targets)]


def spans(page: Path) -> list[str]:
    """The code between backticks outside of blocks."""
    return re.findall(r"`([^`\n]+)`", prose(page))


def anchors(page: Path) -> set[str]:
    """What a link may name after `#`: every heading as GitHub spells it."""
    headings = re.findall(r"^#+ (.+)$", prose(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
