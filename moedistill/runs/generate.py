"""Makes a set of the teacher's own samples: their latents and prompts, to distil it on what it makes itself.

    DEST/.work/1f2e….safetensors             a sample: latents as the VAE would give them, and the prompt's conditioning
    DEST/.work/texts-0/6a5b….safetensors     conditioning of a prompt, for the samples of the first process

A piece's name is a hash of all that it depends on. So whoever makes it, and however often they are stopped, the set is
the same bit for bit, and nothing is sampled twice. In a set that is there the samples are known by the same names.
"""

import os
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

from moedistill.data.latents import LATENTS, Store, open_store
from moedistill.data.pieces import WORK, Pieces, key_of
from moedistill.data.writing import INDEX, Item, write_set
from moedistill.errors import UserError, user_errors
from moedistill.flow.sampling_points import SampleConfig
from moedistill.model import conditioning
from moedistill.model.backbone import Backbone
from moedistill.model.mixture import Mixture
from moedistill.recipe.keys import Recipe
from moedistill.recipe.sampling import trajectory_of
from moedistill.runs.build import build_mixture
from moedistill.runs.launch import launch, tell_launcher
from moedistill.runtime.devices import cpu_threads, find_device
from moedistill.runtime.integrity import read_json
from moedistill.runtime.lock import claimed
from moedistill.runtime.randomness import Draws
from moedistill.runtime.signals import Interruption
from moedistill.stages.share import Share

NEGATIVE = "negative"
"""What the negative prompt's piece is called beside those of prompts."""


class Generation:
    """Samples of a recipe's teacher, guided as the recipe says, along its trajectory; see `moedistill data generate`.

    Args:
        prompts: as the backbone understands them; `num` samples of each.
        dest: the set's folder.
        steps: evenly over the trajectory; all of its, if not given.
        seed: of the noise, which also depends on a sample's place: 0, 1, … through all copies of all prompts.

    Raises:
        UserError: the model makes videos from images, `steps` does not fit, or `dest` holds another set.
    """

    def __init__(
        self,
        recipe: Recipe,
        prompts: Sequence[str],
        dest: Path,
        *,
        num: int = 1,
        seed: int = 0,
        steps: int | None = None,
    ) -> None:
        _refuse_images(recipe)
        self.recipe = replace(recipe, experts={}, router=None, stages=[])
        self.dest, self.seed, self._pieces = dest, seed, Pieces(dest / WORK)
        self.prompts = [prompt for prompt in prompts for _ in range(num)]
        with user_errors("--steps"):
            trajectory = trajectory_of(recipe)
            self.sigmas = SampleConfig(steps=steps or trajectory.num_steps).resolve(trajectory)
        self._stored = self._in_the_set()

    # -- pieces -------------------------------------------------------------------------------------------------------

    @cached_property
    def skeleton(self) -> Backbone:
        """The backbone without weights."""
        with user_errors("backbone"):
            return self.recipe.backbone.skeleton()

    @cached_property
    def made_for(self) -> dict[str, Any]:
        """All that samples depend on, but for their prompts and places."""
        plain = self.recipe.resolved()
        with user_errors("backbone"):
            revisions = self.skeleton.revisions()
        return {
            "backbone": plain["backbone"],
            "trajectory": plain["trajectory"],
            "weights_seed": self.recipe.seed,
            "revisions": revisions,
            "sigmas": self.sigmas.tolist(),
            "latents": list(self.skeleton.latent_shape()),
        }

    def name(self, place: int) -> str:
        """The name of a sample's piece."""
        return key_of(self.made_for, self.seed, place, self.prompts[place])

    @cached_property
    def _names(self) -> list[str]:
        return [self.name(place) for place in range(len(self.prompts))]

    def is_there(self, place: int) -> bool:
        """Whether a sample is made."""
        return self._names[place] in self._stored or self._names[place] in self._pieces

    def done(self) -> str:
        """How many are made, for people."""
        return f"{sum(map(self.is_there, range(len(self.prompts))))} of {len(self.prompts)} samples are made"

    def _in_the_set(self) -> dict[str, int]:
        """Where in the set that is there samples are, by name."""
        if not (self.dest / INDEX).exists():
            return {}
        found: dict[str, int] = {}
        for number, entry in enumerate(read_json(self.dest / INDEX).get("samples", [])):
            name = entry.get("piece") if isinstance(entry, Mapping) else None
            if name is None:
                raise UserError(f"{self.dest} holds a set that was not generated; choose another folder")
            found[name] = number
        return found

    # -- the command --------------------------------------------------------------------------------------------------

    def run(self, device: str | None, processes: int, arguments: Sequence[str]) -> int:
        """Samples what is missing, in so many processes, and packs it; gives the exit code.

        Args:
            arguments: of the command, for its processes.

        Raises:
            UserError: the model's files are not here, a prompt is not one, the disk is full, or a process was lost.
        """
        with claimed(self.dest):
            if processes == 1 or all(map(self.is_there, range(len(self.prompts)))):
                self.sample(device)
            else:
                again = shlex.join(["moedistill", *arguments, "--num-processes", str(processes)])
                timeout = self.recipe.training.timeout
                if code := launch(arguments, processes, device, timeout, again):
                    return code
            self.pack()
        return 0

    def sample_share(self, device: str | None, processes: int) -> None:
        """What one of so many processes does that `run` has started."""
        process = int(os.environ["LOCAL_RANK"])
        if process == 0:
            tell_launcher("what is made is kept, and the same command goes on from there")
        if (where := find_device(device)).type == "cuda":
            device = f"{where.type}:{process}"
        self.sample(device, Share(process, processes))

    # -- sampling -----------------------------------------------------------------------------------------------------

    def sample(self, device: str | None = None, share: Share | None = None) -> None:
        """Makes what this process has to make, and is not there yet."""
        share = share or Share()
        places = range(share.process, len(self.prompts), share.processes)
        own = [place for place in places if not self.is_there(place)]
        if not own:
            return
        where = find_device(device)
        texts = Pieces(self._pieces.folder / f"texts-{share.process}")
        texts.make_folder()
        stop = Interruption(lambda: f"stopped; {self.done()}, and the same command goes on from there")
        with stop, cpu_threads(self.recipe.training.num_threads), user_errors("generate"):
            self.skeleton.stored(torch.zeros(1, *self.skeleton.latent_shape()))  # raises where it could not, in the end
            self._encode(texts, [self.prompts[place] for place in own], where)
            mixture = build_mixture(self.recipe, where, inference=True)
            if mixture.backbone.takes_null:
                mixture.backbone.set_null(texts.read(self._text_name(NEGATIVE)))
            for number, place in enumerate(own, 1):
                text = texts.read(self._text_name("prompt", self.prompts[place]))
                latents = self._sampled(mixture, place, text)
                self._pieces.write(self._names[place], {LATENTS: latents, **text})
                if number * 10 // len(own) > (number - 1) * 10 // len(own):
                    click.echo(f"{number} of {len(own)} samples", err=True)

    def _encode(self, texts: Pieces, prompts: Sequence[str], device: torch.device) -> None:
        """Makes the conditioning of prompts, and of the negative one, before the network takes the memory."""
        names = {self._text_name("prompt", prompt): prompt for prompt in prompts}
        new = {name: prompt for name, prompt in names.items() if name not in texts}
        self.skeleton.placed = device
        for name, encoded in zip(new, self.skeleton.encode_each(new.values()), strict=True):
            texts.write(name, encoded)
        negative = self._text_name(NEGATIVE)
        if self.skeleton.takes_null and negative not in texts:
            encoded = self.skeleton.encode_negative(self.recipe.backbone.guidance.negative_prompt)
            texts.write(negative, {name: value[0] for name, value in encoded.items()})

    def _text_name(self, kind: str, prompt: str = "") -> str:
        return key_of(self.made_for, kind, prompt)

    def _sampled(self, mixture: Mixture, place: int, text: Mapping[str, Tensor]) -> Tensor:
        """A sample's latents `[C, T, H, W]` as the VAE would give them, float32."""
        backbone, device = mixture.backbone, mixture.device
        cond = conditioning.to(backbone.unpack({name: value[None] for name, value in text.items()}), device)
        # As `moedistill sample` addresses it, one by one: no sample depends on another.
        noise = Draws(self.seed, "sample", 0, [place], device).normal("noise", backbone.latent_shape())
        latents = mixture.generate(noise, cond, self.sigmas, guidance=mixture.guidance)
        if not latents.isfinite().all():
            raise ValueError(
                f'the teacher\'s sample of "{self.prompts[place]}" is not finite; try backbone.dtype float32'
            )
        return backbone.stored(latents)[0].float().cpu()

    # -- packing ------------------------------------------------------------------------------------------------------

    def pack(self) -> None:
        """Writes the set of all samples, which are made, in the order of prompts; then what it is made of goes."""
        if list(self._stored) != self._names:
            store = open_store(self.dest) if self._stored else None
            items = [Item(self._entry(place), self._loader(store, place)) for place in range(len(self.prompts))]
            write_set(self.dest, items, negative=self._negative(store), made_for=self.made_for)
        self._pieces.remove()

    def _entry(self, place: int) -> dict[str, Any]:
        return {
            "caption": self.prompts[place],
            "fps": self.skeleton.fps,
            "seed": self.seed,
            "place": place,
            "piece": self._names[place],
        }

    def _loader(self, store: Store | None, place: int) -> Callable[[], Mapping[str, Tensor]]:
        if store is not None and self._names[place] in self._stored:
            return partial(_of_the_set, store, self._stored[self._names[place]])
        return partial(self._pieces.read, self._names[place])

    def _negative(self, store: Store | None) -> Mapping[str, Tensor] | None:
        name = self._text_name(NEGATIVE)
        found = next((texts for texts in map(Pieces, self._pieces.folder.glob("texts-*")) if name in texts), None)
        return found.read(name) if found is not None else store.negative() if store is not None else None


def _refuse_images(recipe: Recipe) -> None:
    with user_errors("backbone"):
        layout = recipe.backbone.layout()
    needed = (
        []
        if layout is None
        else [name for name in layout.required() if layout.conditioning[name].role in ("image", "video")]
    )
    if needed:
        raise UserError(
            f"the recipe's model makes videos from images ({', '.join(needed)}), and prompts have none: nothing can be "
            "generated; encode videos instead"
        )


def _of_the_set(store: Store, number: int) -> dict[str, Tensor]:
    latents, cond = store.read(number)
    return {LATENTS: latents, **cond}
