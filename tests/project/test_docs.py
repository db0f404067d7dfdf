"""The examples in the documentation run, and give what they say."""

import runpy
import sys
from pathlib import Path

import torch

from moedistill.flow.process import jump

DOCS = Path(__file__).parents[2] / "docs"


def test_the_bare_transformer_example():
    torch.manual_seed(0)
    before = set(sys.modules)
    names = runpy.run_path(str(DOCS / "examples" / "bare_transformer.py"))
    assert not {"moedistill.model", "moedistill.recipe", "moedistill.runs"} & (set(sys.modules) - before)
    # By hand: two steps of each expert.
    x, sigmas = names["noise"], names["sigmas"].tolist()
    with torch.no_grad():
        for k, expert in enumerate(["semantic", "semantic", "detail", "detail"]):
            velocity = names["experts"][expert](x, torch.tensor([1000 * sigmas[k]]), **names["text"])[0]
            x = jump(x, velocity, sigmas[k], sigmas[k + 1])
    assert torch.allclose(names["latents"], x, atol=1e-5)
    core = (DOCS / "examples" / "bare_transformer.py").read_text().split("# This is all:\n")[1]
    assert len(core.splitlines()) == 5
