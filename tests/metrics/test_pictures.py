"""Contact sheets: every image in its place, every caption under it."""

import numpy as np
import torch
from PIL import ImageFont

from flux_trainer.metrics.pictures import FONT_SIZE, MARGIN, MIN_SIDE, grid, thumbnail, wrap


def colours(n: int, side: int = 16) -> torch.Tensor:
    values = torch.arange(n * 3, dtype=torch.uint8).reshape(n, 3, 1, 1) * 10
    return values.expand(n, 3, side, side)


def test_places_and_sizes():
    images = colours(5)
    sheet = grid(images, [f"number {i}" for i in range(5)], columns=3)
    scale = -(-MIN_SIDE // 16)
    cell = 16 * scale
    assert sheet.width == 3 * cell + 4 * MARGIN
    pixels = np.asarray(sheet)
    row_height = (sheet.height - MARGIN) // 2
    for i in range(5):
        row, column = divmod(i, 3)
        y, x = MARGIN + row * row_height + cell // 2, MARGIN + column * (cell + MARGIN) + cell // 2
        assert pixels[y, x].tolist() == images[i, :, 0, 0].tolist()
        assert pixels[y - cell // 2 - 1, x].tolist() == [255, 255, 255]  # the white edge above it
        assert pixels[y - cell // 2, x].tolist() == images[i, :, 0, 0].tolist()
        caption = pixels[
            MARGIN + row * row_height + cell : (row + 1) * row_height, x - cell // 2 : x + cell // 2
        ]
        assert (caption < 128).any(), "no text under the image"
    last_place = pixels[MARGIN + row_height :, MARGIN + 2 * (cell + MARGIN) :]
    assert (last_place == 255).all()


def test_large_images_keep_their_size():
    assert grid(colours(1, 200), [""]).width == 200 + 2 * MARGIN


def test_pictures_of_different_sizes_share_cells_of_the_largest():
    wide, high = torch.full((3, 96, 200), 50), torch.full((3, 176, 80), 90)
    sheet = grid([wide.byte(), high.byte()], ["a", "b"], columns=2)
    assert sheet.width == 2 * 200 + 3 * MARGIN
    pixels = np.asarray(sheet)
    bottom = MARGIN + 176 - 1
    assert pixels[bottom, MARGIN + 199].tolist() == [50] * 3
    assert pixels[bottom - 96, MARGIN].tolist() == [255] * 3  # above the wide one
    left = 2 * MARGIN + 200
    assert pixels[MARGIN, left + 79].tolist() == [90] * 3
    assert pixels[MARGIN, left + 80].tolist() == [255] * 3


def test_thumbnails_are_means_of_squares():
    picture = torch.arange(3 * 4 * 6, dtype=torch.uint8).reshape(3, 4, 6)
    assert torch.equal(thumbnail(picture, 6), picture)
    small = thumbnail(picture, 5)
    assert small.shape == (3, 2, 3)
    assert small[0, 0, 0] == round((0 + 1 + 6 + 7) / 4)


def test_default_columns_make_it_about_square():
    side = 16 * -(-MIN_SIDE // 16)
    assert grid(colours(16), ["x"] * 16).width == 4 * side + 5 * MARGIN


def test_wrap():
    font = ImageFont.load_default(FONT_SIZE)
    text = "a very long caption of a cat with an unbreakableandendlesswordthatdoesnotfit in the middle"
    lines = wrap(text, 100, font)
    assert all(font.getlength(line) <= 100 for line in lines)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    assert wrap("", 100, font) == [""]
