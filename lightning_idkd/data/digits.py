"""Two small sets that need no download: scikit-learn's handwritten digits, and printed characters as a public set."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lightning_idkd.data.images import ImageInputs
from lightning_idkd.data.inputs import Inputs
from lightning_idkd.data.samples import draw_test_part
from lightning_idkd.data.source import Subset
from lightning_idkd.errors import UserError, require


@dataclass
class Digits(Subset):
    """The 1,797 handwritten digits of scikit-learn: 8x8 pixels, grey, with their ink 0..16 scaled to 0..255.

    The split is fixed: 20 % of every class are the test set, drawn at random once; the others keep their order.

    Source: Alpaydin and Kaynak, Optical recognition of handwritten digits, UCI, 1998 (its test part).
    """

    def identity(self, split: str, size: int | None, key: str) -> tuple:
        return ("digits", split)

    def expect(self, size: int | None, channels: int | None) -> Inputs:
        return ImageInputs(channels or 1, size or 8)

    def read(self, split: str, size: int | None, key: str) -> tuple[tuple[str, ...], Iterable[tuple]]:
        from sklearn.datasets import load_digits

        digits = load_digits()
        test = draw_test_part(digits.target, 0.2)
        wanted = test if split == "test" else ~test
        pixels = np.rint(digits.images[wanted] * (255 / 16)).astype(np.uint8)
        return tuple("0123456789"), zip(pixels, digits.target[wanted].tolist(), strict=True)


GROUPS = ("0123456789", "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz", "!#$%&()*+/<=>?@[\\]^{}~")
CHARACTERS = "".join(GROUPS)
FONTS = (  # the fonts of matplotlib that have every character at its own code point
    *("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSansMono", "DejaVuSansMono-Bold"),
    *("DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic"),
    *("STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic", "STIXGeneralBolIta"),
)
CANVAS = 64  # side in pixels before blocks of 8x8 pixels are averaged


@dataclass
class Glyphs(Subset):
    """Printed digits, letters and signs, one third of each, drawn to look like `Digits`: 8x8 pixels, bright on black.

    An image shows a random character in a random font of those that matplotlib brings, with random weight, slant, size
    and place. The set is meant as a public set that lies partly in the distribution of `Digits`; its labels, the
    characters, serve diagnosis only. Image i is the same for every number of samples.

    Args:
        samples: number of images to draw.
    """

    samples: int = 6000

    def identity(self, split: str, size: int | None, key: str) -> tuple:
        from importlib.metadata import version

        return ("glyphs", self.samples, version("pillow"), version("matplotlib"))  # which bring rasteriser and fonts

    def read(self, split: str, size: int | None, key: str) -> tuple[tuple[str, ...], Iterable[tuple]]:
        if split == "test":
            raise UserError(f"{key}: Glyphs is a public set without test images; allowed for data.private: Digits")
        return tuple(CHARACTERS), self._draw()

    def check(self, key: str) -> None:
        super().check(key)
        require(self.samples >= 1, f"{key}.samples", self.samples, "1 or more")

    def _draw(self) -> Iterator[tuple[np.ndarray, int]]:
        import matplotlib
        from PIL import Image, ImageFilter, ImageFont, ImageOps

        folder, basic = Path(matplotlib.get_data_path()) / "fonts" / "ttf", ImageFont.Layout.BASIC
        fonts = [ImageFont.truetype(folder / f"{name}.ttf", CANVAS, layout_engine=basic) for name in FONTS]
        shapes: dict[tuple, Image.Image] = {}
        for index, draw in enumerate(np.random.default_rng(8).random((self.samples, 8))):
            group = GROUPS[index % 3]
            character, font, weight = group[int(draw[0] * len(group))], int(draw[1] * len(fonts)), int(draw[2] * 3)
            shape = shapes.get((character, font, weight))
            if shape is None:
                mask = fonts[font].getmask(character, mode="L")
                thin = ImageOps.expand(Image.frombytes("L", mask.size, bytes(mask)), 4)
                bold = thin.filter(ImageFilter.MaxFilter(2 * weight + 1)) if weight else thin
                shape = shapes[character, font, weight] = bold.crop(bold.getbbox())
            width, height = shape.size
            slant = 0.25 * draw[3] - 0.15
            slanted = width + abs(slant) * height
            tall, wide = CANVAS * (0.95 + 0.1 * draw[4]) / height, CANVAS * (0.55 + 0.3 * draw[5]) / slanted
            wide = min(wide, 1.3 * tall)  # the character 1 stays thin,
            tall = min(tall, 1.6 * wide) if slanted > 1.5 * height else tall  # and = stays flat
            x, y = CANVAS / 2 + 4 * (draw[6] - 0.5), CANVAS / 2 + 2 * (draw[7] - 0.5)
            # the rows of the inverse affine map, from a canvas pixel to its place in the shape
            across = (1 / wide, slant / tall, width / 2 - x / wide - slant * y / tall)
            down = (0, 1 / tall, height / 2 - y / tall)
            affine, bilinear = Image.Transform.AFFINE, Image.Resampling.BILINEAR
            canvas = shape.transform((CANVAS, CANVAS), affine, across + down, bilinear)
            yield np.asarray(canvas.resize((8, 8), Image.Resampling.BOX)), CHARACTERS.index(character)
