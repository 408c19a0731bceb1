"""Image sets without a download: scikit-learn's handwritten digits and OOD sets made to look like them.

The digits are 8 x 8 images with 17 levels: NIST counted the set pixels in the 4 x 4 blocks of 32 x 32
bitmaps (E. Alpaydin, C. Kaynak, "Optical Recognition of Handwritten Digits", UCI, 1998). Every OOD set here
goes through that same count, so neither resolution nor the value range tells ID from OOD, and its mean ink
is kept near that of the digits. All images are uint8 RGB [N, 8, 8, 3] with the values of LEVELS.

Near OOD: letters, chimeras (halves of two digits). Far OOD: photographs, textures, noise. To tune on: jigsaw
(digits with their quarters exchanged).
The generators are seeded; their exact pixels may differ between releases of numpy, Pillow and matplotlib,
which the fingerprint of the set then shows.
"""

from functools import cache
from itertools import permutations
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy.ndimage import gaussian_filter

SIDE, BLOCK = 32, 4  # bitmap and block of the NIST preprocessing
LEVELS = np.rint(np.arange(BLOCK * BLOCK + 1) * 255 / BLOCK**2).astype(np.uint8)
SPLIT_SIZES = {"test": 600, "validation": 197, "train": 1000}

# Left out because they look like a digit, in print or handwritten: O o D Q U u (0), I i l J j L r f (1), Z z (2),
# E e B (3, 8), Y y (4), S s (5), G b C c d (6), t (7), a g q p (9); and v, w, x, which are V, W, X again.
LETTERS = "AFHKMNPRTVWXhkmn"
SANS_SERIF = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSansMono")
SERIF = ("DejaVuSerif", "DejaVuSerif-Italic", "STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic")
FONTS = (*SANS_SERIF, *SERIF, "cmr10", "cmss10", "cmtt10")


def _images(counts: np.ndarray) -> np.ndarray:
    """Block counts 0..16 [N, 8, 8] as uint8 RGB [N, 8, 8, 3]."""
    return np.repeat(LEVELS[counts.astype(np.intp)][..., None], 3, axis=3)


def _block_counts(bitmaps: np.ndarray) -> np.ndarray:
    """Set pixels of bool bitmaps [N, 32, 32] in their 4 x 4 blocks, [N, 8, 8]."""
    blocks = SIDE // BLOCK
    return bitmaps.reshape(-1, blocks, BLOCK, blocks, BLOCK).sum(axis=(2, 4))


def _darkest(fields: np.ndarray, ink: np.ndarray) -> np.ndarray:
    """Bitmaps [N, 32, 32] that set the fraction ink[i] of the pixels, those with the smallest values.

    The same on every processor: values that differ in the last digits are equal, and equal ones are taken in a fixed order
    (which a sort that is not stable, or another vector unit, would change).
    """
    order = np.random.default_rng(0).permutation(SIDE * SIDE)
    values = np.round(fields.reshape(len(fields), -1)[:, order], 9)
    ranks = np.empty(values.shape, np.intp)
    ranks[:, order] = values.argsort(axis=1, kind="stable").argsort(axis=1, kind="stable")
    return ranks.reshape(fields.shape) < (ink * SIDE * SIDE)[:, None, None]


@cache
def _digit_split(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Levels 0..16 [N, 8, 8] and labels [N] of one split.

    In a fixed pseudo-random order the classes are interleaved in proportion to their sizes; the splits are
    runs of that order, which makes them stratified. PCG64's raw stream is the same in every numpy release.
    """
    from sklearn.datasets import load_digits  # late: importing scikit-learn takes a second

    data = load_digits()
    labels = data.target.astype(np.int64)
    shuffled = np.random.PCG64(0).random_raw(len(labels)).argsort()
    place = np.empty(len(labels))
    for digit in range(10):
        members = shuffled[labels[shuffled] == digit]
        place[members] = (np.arange(len(members)) + 0.5) / len(members)
    interleaved = np.lexsort((labels, place))
    stops = np.cumsum(list(SPLIT_SIZES.values()))
    members = np.sort(np.split(interleaved, stops)[list(SPLIT_SIZES).index(split)])
    return data.images[members].astype(np.int64), labels[members]


def digits(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels [N] of a split: train (1,000), validation (197) or test (600)."""
    counts, labels = _digit_split(split)
    return _images(counts), labels.copy()


def letters(count: int, seed: int) -> np.ndarray:
    """Latin letters from the fonts that matplotlib ships, with varying font, stroke, rotation, shear and width.

    As with the digits, the letter's box fills the height and stands in the middle of the width. Letters that
    look like a digit are left out, see LETTERS.
    """
    generator = np.random.default_rng([seed, 1])
    font_folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    fonts = [ImageFont.truetype(str(font_folder / f"{name}.ttf"), 64) for name in FONTS]
    bitmaps = np.zeros((count, SIDE, SIDE), dtype=bool)
    for bitmap in bitmaps:
        canvas = Image.new("L", (160, 160))
        which, letter = generator.integers(len(FONTS)), LETTERS[generator.integers(len(LETTERS))]
        stroke = 0 if "Bol" in FONTS[which] else int(generator.integers(1, 4))
        style = {"fill": 255, "font": fonts[which], "anchor": "mm", "stroke_width": stroke}
        ImageDraw.Draw(canvas).text((80, 80), letter, **style)
        turn, shear = generator.normal(0, 0.10), generator.normal(0, 0.15)
        rotation = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
        linear = rotation @ [[1, shear], [0, 1]]
        offset = 80 - linear @ [80, 80]
        affine = (*linear[0], offset[0], *linear[1], offset[1])
        canvas = canvas.transform(canvas.size, Image.Transform.AFFINE, affine, Image.Resampling.BILINEAR)
        box = canvas.point(lambda value: 255 * (value >= 128)).getbbox()
        aspect = (box[2] - box[0]) / (box[3] - box[1])
        width = int(np.clip(SIDE * aspect * generator.uniform(0.65, 0.95), 12, 24))
        glyph = np.asarray(canvas.resize((width, SIDE), Image.Resampling.BILINEAR, box=box)) >= 128
        left = int(np.clip((SIDE - width) // 2 + generator.integers(-2, 3), 0, SIDE - width))
        bitmap[:, left : left + width] = glyph
    return _images(_block_counts(bitmaps))


def chimeras(count: int, seed: int) -> np.ndarray:
    """Halves of two test digits of different classes: upper and lower, or left and right.

    Now and then two halves make a digit by chance (the top of a 7 on the bottom of a 9), so no detector can
    separate this set completely.
    """
    generator = np.random.default_rng([seed, 2])
    counts, labels = _digit_split("test")
    first = generator.integers(len(labels), size=count)
    # A second digit of another class: one of the images of the other classes, the classes in cyclic order.
    by_class = np.argsort(labels, kind="stable")
    sizes = np.bincount(labels)
    stops = np.cumsum(sizes)[labels[first]]
    second = by_class[(stops + generator.integers(len(labels) - sizes[labels[first]])) % len(labels)]
    chimera = counts[first].copy()
    sideways = generator.random(count) < 0.5
    chimera[sideways, :, 4:] = counts[second[sideways], :, 4:]
    chimera[~sideways, 4:, :] = counts[second[~sideways], 4:, :]
    return _images(chimera)


def jigsaw(count: int, seed: int) -> np.ndarray:
    """Validation digits whose four quarters are put together in another order."""
    generator = np.random.default_rng([seed, 6])
    counts, _ = _digit_split("validation")
    # [N, 2, 4, 2, 4] -> quarters [N, 4, 4, 4] and back
    quarters = counts[generator.integers(len(counts), size=count)]
    quarters = quarters.reshape(-1, 2, 4, 2, 4).swapaxes(2, 3).reshape(-1, 4, 4, 4)
    orders = np.array([order for order in permutations(range(4)) if order != (0, 1, 2, 3)])
    chosen = orders[generator.integers(len(orders), size=count)]
    quarters = np.take_along_axis(quarters, chosen[:, :, None, None], axis=1)
    return _images(quarters.reshape(-1, 2, 2, 4, 4).swapaxes(2, 3).reshape(-1, 8, 8))


def photographs(count: int, seed: int) -> np.ndarray:
    """Patches of scikit-learn's two sample photographs at random scale, split at the patch's mean brightness.

    The smaller part is the ink. Patches almost without contrast (sky), or with less or more ink than digits
    have, are drawn again.
    """
    generator = np.random.default_rng([seed, 3])
    from sklearn.datasets import load_sample_images

    photos = [Image.fromarray(photo).convert("L") for photo in load_sample_images().images]
    bitmaps = np.zeros((count, SIDE, SIDE), dtype=bool)
    for bitmap in bitmaps:
        contrast = ink = 0.0
        while contrast < 12 or not 0.15 <= ink <= 0.42:
            photo = photos[generator.integers(len(photos))]
            side = 2 ** generator.uniform(6, np.log2(min(photo.size)))  # 64 pixels to the whole height
            left, top = generator.random(2) * (np.array(photo.size) - side)
            box = (left, top, left + side, top + side)
            patch = np.asarray(photo.resize((SIDE, SIDE), Image.Resampling.BOX, box=box), dtype=np.float64)
            contrast, dark = patch.std(), patch < patch.mean()
            bitmap[:] = dark if dark.mean() <= 0.5 else ~dark
            ink = bitmap.mean()
    return _images(_block_counts(bitmaps))


def textures(count: int, seed: int) -> np.ndarray:
    """Procedural patterns in equal parts: gratings, checkerboards, rings, blobs and cells (Voronoi walls)."""
    generator = np.random.default_rng([seed, 4])
    period = 2 ** generator.uniform(np.log2(7), np.log2(20), count)[:, None, None]
    angle = generator.uniform(0, np.pi, count)[:, None, None]
    phase = generator.uniform(0, 2 * np.pi, (2, count, 1, 1))
    y, x = np.mgrid[:SIDE, :SIDE] + 0.5
    along = 2 * np.pi * (x * np.cos(angle) + y * np.sin(angle)) / period + phase[0]
    across = 2 * np.pi * (y * np.cos(angle) - x * np.sin(angle)) / period + phase[1]
    centre = generator.uniform(0, SIDE, (2, count, 1, 1))
    radius = np.hypot(x - centre[0], y - centre[1])

    kind = np.arange(count) % 5
    fields = np.sin(along)
    fields = np.where((kind == 1)[:, None, None], np.clip(9 * np.sin(along) * np.sin(across), -1, 1), fields)
    fields = np.where((kind == 2)[:, None, None], np.sin(2 * np.pi * radius / period + phase[0]), fields)
    for i in np.flatnonzero(kind == 3):
        white = generator.standard_normal((SIDE, SIDE))
        fields[i] = gaussian_filter(white, period[i].item() / 6, mode="wrap")
    for i in np.flatnonzero(kind == 4):
        seeds = generator.uniform(-4, SIDE + 4, (2, generator.integers(5, 14), 1, 1))
        nearest_two = np.partition(np.hypot(x - seeds[0], y - seeds[1]), 1, axis=0)[:2]
        fields[i] = nearest_two[1] - nearest_two[0]
    return _images(_block_counts(_darkest(fields, generator.uniform(0.2, 0.42, count))))


def noise(count: int, seed: int) -> np.ndarray:
    """Random bitmaps: pixels correlated over 0, 0.7 or 1.4 pixels, or independent with a density per block."""
    generator = np.random.default_rng([seed, 5])
    ink = generator.uniform(0.15, 0.47, count)
    fields = generator.standard_normal((count, SIDE, SIDE))
    kind = np.arange(count) % 4
    for number, length in ((1, 0.7), (2, 1.4)):
        fields[kind == number] = gaussian_filter(fields[kind == number], (0, length, length), mode="wrap")
    counts = _block_counts(_darkest(fields, ink))
    # Density per block: Beta with mean ink, broad enough to reach all 17 levels.
    density = generator.beta(1.2 * ink[:, None, None], 1.2 * (1 - ink[:, None, None]), (count, 8, 8))
    by_block = generator.binomial(BLOCK * BLOCK, density)
    return _images(np.where((kind == 3)[:, None, None], by_block, counts))


GENERATORS = {make.__name__: make for make in (letters, chimeras, jigsaw, photographs, textures, noise)}
