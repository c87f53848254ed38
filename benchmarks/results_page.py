"""Put tables and pictures that the benchmarks wrote into a page, so that no figure is copied by hand.

    python benchmarks/results_page.py docs/results.md --report grocery=runs/compare/comparison.md \\
        dependence=runs/dependence/dependence.md dependence=runs/dependence/dependence.png

The page has places for them, `<!-- begin grocery -->` to `<!-- end grocery -->`. What is named so takes the place of
what stands between: a Markdown file as it is, a picture as `images/results_NAME.png` beside the page. What isn't named
stays.
"""

import argparse
import re
import shutil
from pathlib import Path

from vptsp.files.atomic import atomic_path, write_text


def fill(text, name, content):
    """A page with other content in one of its places.

    Raises:
        ValueError: it has no such place, or several.
    """
    place = re.compile(rf"(<!-- begin {re.escape(name)} -->\n).*?(<!-- end {re.escape(name)} -->)", re.DOTALL)
    filled, count = place.subn(lambda found: f"{found[1]}\n{content.strip()}\n\n{found[2]}", text)
    if count != 1:
        known = ", ".join(re.findall(r"<!-- begin (\S+) -->", text)) or "none"
        raise ValueError(f"the page must have one place {name!r}, got {count}; its places are {known}")
    return filled


def report(page, parts):
    """Fill a page and copy pictures.

    Args:
        page: Markdown file.
        parts: `NAME=FILE` each, of `.md` or `.png`.

    Raises:
        ValueError: one is none of these, or the page has no place for it. Nothing is written then.
    """
    text, pictures, contents = page.read_text(encoding="utf-8"), {}, {}
    for part in parts:
        name, _, file = part.partition("=")
        path = Path(file)
        if not file or path.suffix not in (".md", ".png"):
            raise ValueError(f"--report takes NAME=FILE with a file .md or .png, got {part!r}")
        if not path.is_file():
            raise ValueError(f"--report {name}: there is no file {path}")
        if path.suffix == ".png":
            target = page.parent / "images" / f"results_{name}.png"
            pictures[target] = path
            content = f"![{name}, as a picture](images/{target.name})"
        else:
            content = path.read_text(encoding="utf-8").strip()
        contents.setdefault(name, []).append(content)
    for name, content in contents.items():
        text = fill(text, name, "\n\n".join(content))
    for target, source in pictures.items():
        with atomic_path(target) as temporary:
            shutil.copyfile(source, temporary)
    write_text(page, text)


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("page", type=Path, help="Markdown file")
    parser.add_argument("--report", nargs="+", required=True, metavar="NAME=FILE", help="what goes where")
    args = parser.parse_args(argv)
    try:
        report(args.page, args.report)
    except (OSError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
