"""What the tests of objectives on real networks share."""

import pytest

from diffalign.training.contract import PromptBatch
from tests.families.tiny import ROWS
from tests.training.chained import Weights


@pytest.fixture(scope="module", params=["sd15", "sd3-medium"])
def pipelines(request):
    """A policy that learns and its reference, and a batch of two prompts."""
    row = ROWS[request.param]
    policy, reference = (row.pipeline(row.aligned_class()) for _ in range(2))
    for pipe in (policy, reference):
        pipe.vae.requires_grad_(False)
        getattr(pipe, pipe.denoiser).requires_grad_(pipe is policy)
    batch = PromptBatch(policy.encode(["a red circle", "two blue cups"], size=policy.size_of(row.call)), (4, 9))
    return Weights(policy), Weights(reference), batch
