"""What the site needs beside docs/*.md: pages from elsewhere in the repository, and shapes as code.

Links in the sources are those of the repository, where they work, too.
"""

import pathlib
import posixpath
import re

import griffe
from mkdocs.structure.files import File

ROOT = pathlib.Path(__file__).parent.parent
# Pages by their paths in the repository, and where they are on the site.
PAGES = {"README.md": "index.md"} | {
    str(path.relative_to(ROOT)): str(path.relative_to(ROOT))
    for name in ("CHANGELOG.md", "CONTRIBUTING.md", "benchmarks/results/*.md")
    for path in ROOT.glob(name)
}
SOURCES = {page: path for path, page in PAGES.items()}


def on_files(files, config):
    """Adds the pages that are not in docs/."""
    for path, page in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Turns links of the repository into those of the site, on the page of examples into code.

    Of what is not on the site, the text remains.
    """
    uri = page.file.src_uri
    folder = posixpath.dirname(SOURCES.get(uri, f"docs/{uri}"))

    def replace(link):
        text, target, anchor = link.groups()
        path = posixpath.normpath(posixpath.join(folder, target))
        if path.startswith("examples") and uri == "examples.md":
            return f"```python\n{(ROOT / path).read_text()}```"
        place = PAGES.get(path, path.removeprefix("docs/"))
        place = "examples.md" if path.startswith("examples") else place
        if not files.get_file_from_path(place):
            return link[0] if path.startswith("docs/") else text.strip("![]")
        return f"{text}({posixpath.relpath(place, posixpath.dirname(uri))}{anchor})"

    return re.sub(r"(!?\[[^\]]*\])\(([\w./]+)(#[\w-]*|)\)", replace, markdown)


class Shapes(griffe.Extension):
    """Shapes such as [*B, k, r] are code, which Markdown leaves alone, and pages are links."""

    def on_object(self, *, obj, **kwargs):
        if obj.docstring:
            text = re.sub(r"(?<![\w`])\[[^\]\n]+\](?!`)", r"`\g<0>`", obj.docstring.value)
            obj.docstring.value = re.sub(r"docs/(\w+)\.md", r"[\g<0>](../\1.md)", text)
