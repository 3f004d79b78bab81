"""Resolution binning, as PixArt and SANA do it: the network works at the nearest size that it was trained on.

Sizes of about the model's own area are listed by their aspect ratio. The size that is asked for is moved to the nearest of them; the
decoded image is enlarged or reduced until it covers what was asked for, and its middle is cut out. Every size is possible then.
The stock argument use_resolution_binning=False turns it off.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor

from diffalign.backbone import Size

ARGUMENT = "use_resolution_binning"


@dataclass(frozen=True)
class BinnedSize(Size):
    """A size together with how it is made: a call may decide otherwise than the pipeline's defaults, which a plain Size goes by."""

    binned: bool = True
    """False: the network works at this very size."""


class ResolutionBinning:
    """Mixin, to stand before AlignedPipeline."""

    bins: ClassVar[Mapping[int, Mapping[str, Sequence[float]]]]
    """The network's sample_size -> aspect ratio (height over width, as text) -> [height, width] in pixels."""

    def size_of(self, arguments: Mapping[str, Any]) -> BinnedSize:
        default, binned = self.default_size(), arguments.get(ARGUMENT)
        height, width = (arguments.get(name) for name in ("height", "width"))
        size = BinnedSize(
            default.height if height is None else height,
            default.width if width is None else width,
            binned=self._binned(default) if binned is None else bool(binned),
        )
        self.made_size(size)
        return size

    def made_size(self, size: Size | None = None) -> Size:
        """The size that the network and the decoder work at for images of `size`. ValueError for one that they cannot make."""
        size = size or self.default_size()
        if not self._binned(size):
            self._check_size(size)
            return Size(size.height, size.width)
        own = self.transformer.config.sample_size
        if own not in self.bins:
            known = ", ".join(map(str, self.bins))
            raise ValueError(f"{ARGUMENT} knows sizes for networks of sample_size {known}, and this one's is {own}; pass {ARGUMENT}=False")
        return Size(*self.image_processor.classify_height_width_bin(size.height, size.width, ratios=self.bins[own]))

    def noise_shape(self, size: Size | None = None) -> tuple[int, ...]:
        """(channels, rows, columns) of the size that is made."""
        made = self.made_size(size)
        return (self.transformer.config.in_channels, made.height // self.vae_scale_factor, made.width // self.vae_scale_factor)

    def cropped(self, images: Float[Tensor, "b c h w"], size: Size | None) -> Float[Tensor, "b c H W"]:
        """Decoded images, at the size that was asked for; as they are where that is not known."""
        if size is None or not self._binned(size):
            return images
        return self.image_processor.resize_and_crop_tensor(images, size.width, size.height)

    def _binned(self, size: Size) -> bool:
        return size.binned if isinstance(size, BinnedSize) else bool(self.defaults.get(ARGUMENT, True))
