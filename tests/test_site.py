"""The site of the documentation, built without network and with links checked."""

import re
import subprocess
import sys
from html import unescape
from pathlib import Path

import public_api
import pytest


ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(directory)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return directory


def test_each_page_is_on_the_site(site: Path) -> None:
    pages = {page.relative_to(ROOT / "docs").with_suffix(".html") for page in (ROOT / "docs").rglob("*.md")}
    assert pages | {Path("CHANGELOG.html"), Path("SECURITY.html")} <= {p.relative_to(site) for p in site.rglob("*")}
    assert not list(site.glob("*.py"))


def test_the_reference_has_each_public_name_with_its_arguments(site: Path) -> None:
    parts = re.split(r'<h3 id="([^"]+)"', (site / "api.html").read_text())[1:]
    text = dict(zip(parts[::2], map(unescape, parts[1::2]), strict=True))
    for items in public_api.PUBLIC.values():
        for path, item in items.items():
            given = [] if public_api.is_error(item) else public_api.arguments(item)
            names = {argument.split("=")[0] for argument in given} - {"*"}
            assert {name for name in names if f"<code>{name}</code>" not in text[path]} == set()


def test_references_between_docstrings_are_links(site: Path) -> None:
    text = (site / "api.html").read_text()
    assert re.search(r'<a [^>]*href="#trl_sgpo.SGPOTrainer"[^>]*><code>SGPOTrainer</code></a>', text)
    assert "[<code>" not in text


def anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", ["README.md", "CHANGELOG.md", "SECURITY.md"])
def test_links_of_pages_above_docs(page: str) -> None:
    """The links of README are not checked by the site, on which it is not."""
    text = re.sub(r"```.*?```|`[^`]*`", "", (ROOT / page).read_text(), flags=re.DOTALL)
    for target in re.findall(r'(?:\]\(|src="|srcset=")([^)"]+)', text):
        name, _, anchor = target.partition("#")
        if not name.startswith("https://"):
            path = ROOT / (name or page)
            assert path.is_file() and (not anchor or anchor in anchors(path)), target


def test_no_page_loads_anything_from_elsewhere(site: Path) -> None:
    for page in site.rglob("*.html"):
        tags = re.findall(r'<(?:script|img|link rel="stylesheet")[^>]*>', page.read_text())
        assert not [tag for tag in tags if re.search(r'(src|href)="(https?:)?//', tag)], page
