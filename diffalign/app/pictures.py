"""Images as the page shows them: inside the page's own text, so that nothing is written to disk and no picture is ever half there."""

from __future__ import annotations

import base64
import io
from html import escape

from jaxtyping import Float
from PIL import Image
from torch import Tensor

SMALL = 256  # an image with a shorter side is shown with its real pixels, not blurred
CSS = """
.picture {margin: 0}
.picture img, .picture .empty {width: 100%; display: block; border-radius: 8px; background: var(--background-fill-secondary)}
.picture img.small {image-rendering: pixelated}
.picture .empty {aspect-ratio: 1}
.picture figcaption {display: flex; justify-content: space-between; padding: 6px 2px; color: var(--body-text-color)}
"""


def picture(image: Float[Tensor, "3 h w"] | None, name: str) -> str:
    """The HTML of an image in [0, 1] under its name, with a link that saves it; an empty frame for None."""
    label = escape(name)
    if image is None:
        return f'<figure class="picture"><div class="empty"></div><figcaption><b>{label}</b></figcaption></figure>'
    data = data_url(image)
    kind = ' class="small"' if min(image.shape[1:]) < SMALL else ""
    save = f'<a download="{label.lower()}.png" href="{data}">save</a>'
    return f'<figure class="picture"><img{kind} alt="{label}" src="{data}"><figcaption><b>{label}</b>{save}</figcaption></figure>'


def data_url(image: Float[Tensor, "3 h w"]) -> str:
    """The image as a PNG inside a URL."""
    pixels = (image.float().permute(1, 2, 0) * 255).round().clamp(0, 255).byte().cpu().numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
