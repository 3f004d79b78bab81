"""The network of `shapes-watch`: a convolutional net whose blocks the prompt modulates (FiLM, Perez et al., arXiv 1709.07871).

    h = GRU(tokens),  x <- x + relu(gamma_k(h) * conv(x, place) + beta_k(h)),  score = linear(max over cells, mean over cells)

Nothing of it is shared with the rewards that methods optimise: no transformer, no likelihood, no cosine.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

SIZE = 64  # pixels
CELLS = 8  # a side


@dataclass(frozen=True)
class FilmConfig:
    """The sizes of the network; config.json of a `shapes-watch` folder holds them."""

    vocabulary: int  # tokens
    end: int  # id of the end token, also the padding
    channels: int = 80  # of the feature map
    text: int = 112  # of the word vectors and of the GRU's state
    blocks: int = 3  # modulated blocks


class FilmScorer(nn.Module):
    """Log-odds that a prompt is true of an image. Images are "m 3 64 64" in [0, 1], prompts token ids "b l"."""

    def __init__(self, config: FilmConfig) -> None:
        super().__init__()
        self.config = config
        c = config.channels
        self.stem = nn.Sequential(
            nn.Conv2d(3, 32, 5, stride=2, padding=2),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(64, 64, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(64, c, 3, stride=2, padding=1),
            nn.ReLU(),
        )
        self.words = nn.Embedding(config.vocabulary, config.text)
        self.reader = nn.GRU(config.text, config.text, batch_first=True)
        self.films = nn.ModuleList([nn.Linear(config.text, 2 * c) for _ in range(config.blocks)])
        self.convs = nn.ModuleList([nn.Conv2d(c + 2, c, 3, padding=1) for _ in range(config.blocks)])
        self.head = nn.Sequential(nn.Linear(2 * c, c), nn.ReLU(), nn.Linear(c, 1))
        axis = (torch.arange(CELLS) - (CELLS - 1) / 2) / (CELLS / 2)
        y, x = torch.meshgrid(axis, axis, indexing="ij")
        self.register_buffer("grid", torch.stack([x, y]).unsqueeze(0), persistent=False)

    def encode_image(self, images: Float[Tensor, "m 3 64 64"]) -> Float[Tensor, "m c 8 8"]:
        return self.stem(2 * images - 1)

    def read(self, ids: Int[Tensor, "b l"]) -> Float[Tensor, "b t"]:
        """The GRU's state at each prompt's end token."""
        end = (ids == self.config.end).int().argmax(dim=1)
        states = self.reader(self.words(ids[:, : int(end.max()) + 1]))[0]
        return states[torch.arange(len(ids), device=ids.device), end]

    def forward(
        self, maps: Float[Tensor, "m c 8 8"], prompts: Float[Tensor, "b t"], rows: Int[Tensor, " b"] | None = None
    ) -> Float[Tensor, " b"]:
        """Scores in float32; rows: which image's map each prompt is asked of (its own without)."""
        x = maps if rows is None else maps[rows]
        places = self.grid.to(x.dtype).expand(len(x), -1, -1, -1)
        for film, conv in zip(self.films, self.convs, strict=True):
            gamma, beta = film(prompts)[..., None, None].chunk(2, dim=1)
            x = x + ((1 + gamma) * conv(torch.cat([x, places], dim=1)) + beta).relu()
        pooled = torch.cat([x.amax(dim=(2, 3)), x.mean(dim=(2, 3))], dim=1)
        return self.head(pooled).squeeze(1).float()
