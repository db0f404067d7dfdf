"""The experts of a recipe that files by noise level are for."""

from moedistill.model.backbone import TEACHER
from moedistill.model.mixture import Mixture
from moedistill.recipe.keys import Recipe


def routed_experts(recipe: Recipe, mixture: Mixture) -> list[str]:
    """Those that the router names, from high noise to low, without the teacher.

    Raises:
        ValueError: there is none, or one that starts from another.
    """
    names = [name for name in (mixture.router.experts if mixture.router else ()) if name != TEACHER]
    if not names:
        raise ValueError("the recipe's router names no expert that could be given weights")
    for name in names:
        if (parent := recipe.experts[name].parent) != TEACHER:
            raise ValueError(
                f"experts.{name} starts from {parent!r}, and the weights are a change of the pretrained ones; let it "
                "start from the teacher"
            )
    return names


def base_of(recipe: Recipe, expert: str) -> str:
    """The pretrained network that an expert from the teacher changes."""
    return recipe.experts[expert].base or recipe.backbone.bases()[0]
