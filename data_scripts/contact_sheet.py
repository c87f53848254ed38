"""A picture of a data set: one image per class, with the classes' names.

Nothing here imports torch or `datasets`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont


__all__ = ["Cell", "Section", "draw_contact_sheet", "spread"]

CELL = 150
CAPTION_LINES = 2
GAP = 10
MARGIN = 24
COLUMNS = 8
_TEXT, _FAINT, _PAPER, _FRAME = (32, 32, 32), (110, 110, 110), (255, 255, 255), (244, 244, 244)
_MISSING = (196, 60, 50)


class Cell(NamedTuple):
    """One class of a contact sheet.

    Attributes:
        image: RGB; None where it could not be read.
        caption: Name of the class.
        note: How many images it has, say.
    """

    image: Image.Image | None
    caption: str
    note: str


class Section(NamedTuple):
    """A heading, what else is to be said in faint letters, and cells in rows of `COLUMNS`."""

    heading: str
    remark: str
    cells: Sequence[Cell]


def spread(count: int, limit: int) -> list[int]:
    """At most `limit` of the numbers 0..count-1, evenly spread, the first and the last among them."""
    if count <= limit:
        return list(range(count))
    if limit == 1:
        return [0]
    return [round(i * (count - 1) / (limit - 1)) for i in range(limit)]


def draw_contact_sheet(sections: Sequence[Section]) -> Image.Image:
    """Draw the sections below one another.

    Args:
        sections: At least one, each with at least one cell.

    Returns:
        RGB picture; images keep their proportions.
    """
    heading_font, font, small = (_load_font(size) for size in (20, 12, 11))
    line = _line_height(font)
    cell_height = CELL + 6 + CAPTION_LINES * line + _line_height(small) + 2 * GAP
    heading_height = _line_height(heading_font) + 14
    columns = max(min(COLUMNS, len(section.cells)) for section in sections)
    width = 2 * MARGIN + columns * (CELL + GAP) - GAP
    width = max(width, 2 * MARGIN + max(round(_heading_width(section, heading_font, font)) for section in sections))
    height = MARGIN
    for section in sections:
        height += heading_height + -(-len(section.cells) // COLUMNS) * cell_height + GAP
    sheet = Image.new("RGB", (width, height + MARGIN - GAP), _PAPER)
    draw = ImageDraw.Draw(sheet)
    top = MARGIN
    for section in sections:
        draw.text((MARGIN, top), section.heading, _TEXT, heading_font)
        beside = MARGIN + heading_font.getlength(section.heading) + 12
        base = top + heading_font.getmetrics()[0]
        draw.text((beside, base), section.remark, _FAINT, font, anchor="ls")
        top += heading_height
        for start in range(0, len(section.cells), COLUMNS):
            for column, cell in enumerate(section.cells[start : start + COLUMNS]):
                _draw_cell(sheet, draw, (MARGIN + column * (CELL + GAP), top), cell, font, small)
            top += cell_height
        top += GAP
    return sheet


def _load_font(size: int):
    """DejaVu Sans, which matplotlib brings along; Pillow's own font has hardly a letter beyond ASCII."""
    import matplotlib

    try:
        return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", size)
    except OSError:  # a distribution's matplotlib may come without its fonts
        return ImageFont.load_default(size)


def _draw_cell(sheet, draw, corner, cell, font, small) -> None:
    left, top = corner
    draw.rectangle((left, top, left + CELL - 1, top + CELL - 1), _FRAME)
    if cell.image is None:
        draw.line((left + 45, top + 45, left + CELL - 46, top + CELL - 46), _MISSING, 3)
        draw.line((left + 45, top + CELL - 46, left + CELL - 46, top + 45), _MISSING, 3)
    else:
        image = cell.image
        scale = CELL / max(image.size)
        size = tuple(max(round(side * scale), 1) for side in image.size)
        enlarged = scale > 1
        image = image.resize(size, Image.Resampling.NEAREST if enlarged else Image.Resampling.LANCZOS)
        sheet.paste(image, (left + (CELL - size[0]) // 2, top + (CELL - size[1]) // 2))
    top += CELL + 4
    lines = _wrap(cell.caption, font, CELL, CAPTION_LINES)
    for text in lines:
        draw.text((left, top), text, _TEXT, font)
        top += _line_height(font)
    draw.text((left, top), cell.note, _FAINT, small)


def _wrap(text: str, font, width: float, limit: int) -> list[str]:
    """Break a name into lines, after " ", "_", "-", "/" or "." where there is one; "…" stands for what is left."""
    lines, rest = [], " ".join(text.split())
    while rest and len(lines) < limit:
        fits = len(rest)
        while fits > 1 and font.getlength(rest[:fits].rstrip()) > width:
            fits -= 1
        if fits < len(rest):
            if len(lines) + 1 == limit:
                while fits > 1 and font.getlength(rest[:fits].rstrip() + "…") > width:
                    fits -= 1
                lines.append(rest[:fits].rstrip() + "…")
                break
            breaks = [i + 1 for i in range(fits) if rest[i] in " _-/." and i + 1 > fits // 3]
            fits = breaks[-1] if breaks else fits
        lines.append(rest[:fits].rstrip())
        rest = rest[fits:].lstrip()
    return lines


def _heading_width(section: Section, heading_font, font) -> float:
    return heading_font.getlength(section.heading) + 12 + font.getlength(section.remark)


def _line_height(font) -> int:
    return sum(font.getmetrics()) + 1
