"""Contact sheets: a grid of images with their captions underneath, large enough to look at."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn.functional import avg_pool2d

MIN_SIDE = 160  # pixels; smaller images are enlarged to at least this width
MARGIN = 8
FONT_SIZE = 13
LINE_HEIGHT = 17


def to_image(picture: Tensor) -> Image.Image:
    """uint8 [3, H, W] as Pillow has it."""
    return Image.fromarray(picture.permute(1, 2, 0).contiguous().cpu().numpy())  # [H, W, 3]


def thumbnail(picture: Tensor, side: int) -> Tensor:
    """A uint8 picture [3, H, W] made smaller by a whole number, so that no side is longer than `side`."""
    factor = -(-max(picture.shape[1:]) // side)
    if factor == 1:
        return picture
    return avg_pool2d(picture.float(), factor).round().to(torch.uint8)


def grid(images: Sequence[Tensor] | Tensor, captions: Sequence[str], columns: int = 0) -> Image.Image:
    """A contact sheet of N images, row by row; where sizes differ, in cells that hold the largest.

    Args:
        images: N times uint8 [3, H, W].
        captions: N texts, wrapped to a cell's width.
        columns: images per row; 0: about as many as there are rows.
    """
    count = len(images)
    assert count == len(captions) > 0, f"{count} images, {len(captions)} captions"
    height, width = (max(image.shape[dim] for image in images) for dim in (1, 2))
    columns = min(columns or max(1, round(count**0.5)), count)
    scale = max(1, -(-MIN_SIDE // width))
    cell_width, cell_height = scale * width, scale * height

    font = ImageFont.load_default(FONT_SIZE)
    texts = [wrap(caption, cell_width, font) for caption in captions]
    rows = [range(first, min(first + columns, count)) for first in range(0, count, columns)]
    row_heights = [cell_height + MARGIN + LINE_HEIGHT * max(len(texts[i]) for i in row) for row in rows]

    sheet_width = MARGIN + columns * (cell_width + MARGIN)
    sheet = Image.new("RGB", (sheet_width, MARGIN + sum(row_heights) + MARGIN * len(rows)), "white")
    draw = ImageDraw.Draw(sheet)
    top = MARGIN
    for row, row_height in zip(rows, row_heights, strict=True):
        for column, i in enumerate(row):
            left = MARGIN + column * (cell_width + MARGIN)
            image = to_image(images[i])
            image = image.resize((scale * image.width, scale * image.height), Image.Resampling.LANCZOS)
            sheet.paste(image, (left, top + cell_height - image.height))
            for line, text in enumerate(texts[i]):
                draw.text((left, top + cell_height + 4 + line * LINE_HEIGHT), text, fill="black", font=font)
        top += row_height + MARGIN
    return sheet


def wrap(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> list[str]:
    """Lines of `text` at most `width` pixels wide; a single word that is wider is cut into pieces."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
            continue
        if lines[-1]:
            lines.append("")
        for character in word:
            if lines[-1] and font.getlength(lines[-1] + character) > width:
                lines.append("")
            lines[-1] += character
    return lines
