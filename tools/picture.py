"""The README's picture: the thumbnails of the first chapters, side by side.

python -m tools.picture
"""

from __future__ import annotations

import base64
import io

from PIL import Image

from tools import notebooks as nbs

SLUGS = ("optimization/bradley_terry", "sketching/fast_johnson_lindenstrauss", "inference/incremental_gmm")


def main() -> None:
    """Write book/_static/chapters.png."""
    height, gap = 240, 24
    pictures = []
    for slug in SLUGS:
        nb = nbs.read(nbs.NOTEBOOKS / f"{slug}.ipynb")
        cell = next(c for c in nbs.code_cells(nb) if "thumbnail" in nbs.tags(c))
        png = next(o.data["image/png"] for o in cell.outputs if "data" in o and "image/png" in o.data)
        image = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
        pictures.append(image.resize((round(image.width * height / image.height), height), Image.Resampling.LANCZOS))
    strip = Image.new("RGB", (sum(p.width for p in pictures) + gap * (len(pictures) + 1), height + 2 * gap), "white")
    left = gap
    for picture in pictures:
        strip.paste(picture, (left, gap))
        left += picture.width + gap
    strip.quantize(64).save(nbs.ROOT / "book" / "_static" / "chapters.png", optimize=True)


if __name__ == "__main__":
    main()
