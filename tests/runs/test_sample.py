"""`moedistill sample`: from a run, a checkpoint or an export, with the recipe's steps or others."""

import json
from itertools import count

import av
import numpy as np
import pytest
import torch
from helpers import distil, tiny_recipe
from PIL import Image

from moedistill.cli import main
from moedistill.errors import UserError
from moedistill.model import conditioning
from moedistill.recipe.loading import load_recipe
from moedistill.recipe.sampling import sampling_sigmas, untrained_notes
from moedistill.runs.loop import run
from moedistill.runs.sample import load_mixture, sample_run
from moedistill.runtime.randomness import Draws

LR = {"lr": 0.02}
EXPERTS = ("semantic", "detail")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A finished run: two trained experts, one of them with an average, and their export."""
    stages = [
        distil(optimizer=LR, ema_decay=0.5),
        distil("detail", optimizer=LR),
        {"name": "export", "kind": "export"},
    ]
    return run(tiny_recipe(stages), output=tmp_path_factory.mktemp("run"), device="cpu").output


@pytest.fixture
def videos(folder, tmp_path):
    """Samples of the run, each call's in a folder of its own."""
    numbers = count()
    return lambda source=folder, **options: sample_run(source, output=tmp_path / str(next(numbers)), **options).videos


def test_a_run_its_checkpoint_and_its_export_give_the_same(folder, videos):
    newest = folder / "checkpoints" / "01_detail_00000002"
    from_run, from_checkpoint, from_export = (
        videos(source, prompts=["3 right", "7 up"]) for source in (folder, newest, folder / "export")
    )
    assert from_run.shape == (2, 1, 8, 24, 24)
    assert torch.equal(from_run, from_checkpoint)
    assert torch.equal(from_run, from_export)
    earlier = folder / "checkpoints" / "00_semantic_00000002"
    assert not torch.equal(from_run, videos(earlier, prompts=["3 right", "7 up"]))


@pytest.mark.parametrize("weights", ["trained", "ema"])
def test_samples_are_what_the_mixture_generates(folder, videos, weights):
    _, mixture = load_mixture(folder, weights=weights)
    backbone, points = mixture.backbone, mixture.trajectory.points
    noise = Draws(5, "sample", 0, range(2)).normal("noise", backbone.latent_shape())
    cond = conditioning.to(backbone.encode(["3 right"] * 2), "cpu")
    latents = mixture.generate(noise, cond, torch.tensor([points[8], points[4], 0.0]), weights=weights)
    sampled = videos(prompts=["3 right"], num=2, seed=5, weights=weights)
    assert torch.allclose(sampled, backbone.decode(latents), atol=1e-5)
    assert not torch.equal(sampled[0], sampled[1])
    assert not torch.equal(sampled, videos(prompts=["3 right"], num=2, seed=6, weights=weights))
    other = {"trained": "ema", "ema": "trained"}[weights]
    assert not torch.equal(sampled, videos(prompts=["3 right"], num=2, seed=5, weights=other))


def test_a_sample_depends_on_its_prompt_and_place_alone(videos):
    one, both = videos(prompts=["3 right"], num=2), videos(prompts=["3 right", "7 up"], num=2)
    assert torch.allclose(one, both[:2], atol=1e-5)
    assert not torch.allclose(both[:2], both[2:], atol=1e-2)
    assert torch.equal(videos(), videos(prompts=[""]))  # no prompt: the null condition


def test_steps_that_were_not_trained_for_are_said(folder, tmp_path, capsys):
    trained = sample_run(folder, output=tmp_path / "a")
    other = sample_run(folder, output=tmp_path / "b", steps=4)
    fewer = sample_run(folder / "export", output=tmp_path / "c", sigmas=[1.0, 0.5])
    assert trained.notes == []
    assert [note.split(" at ")[0] for note in other.notes] == [f"stage {name}: sampling stops" for name in EXPERTS]
    assert [note.split(",")[0] for note in fewer.notes] == ["stage semantic: sampling goes beyond the end of a phase"]
    with pytest.raises(SystemExit, match="0"):
        main(["sample", str(folder), "--steps", "4", "--output", str(tmp_path / "d")])
    said = capsys.readouterr()
    assert said.err.count("note: stage ") == 2
    assert said.out.splitlines()[-1] == str(tmp_path / "d")


def test_other_steps_take_the_edges_that_are_trained(tmp_path):
    """More steps than phases are spread over them; fewer say which jumps were never trained."""
    stages = [distil(phases="sampling"), distil("detail", phases="sampling")]
    source = run(tiny_recipe(stages, {"sample.points": [8, 6, 4, 1]}), output=tmp_path / "run", device="cpu").output

    def sampled(steps):
        result = sample_run(source, output=tmp_path / str(steps), steps=steps)
        return json.loads((result.output / "samples.json").read_text())["sigmas"], result.notes

    trajectory = load_recipe(source / "recipe.yaml").trajectory.build()
    at = trajectory.sigma
    assert sampled(4) == (pytest.approx([1.0, at(6), at(4), at(1), 0.0]), [])
    assert sampled(5)[0] == pytest.approx([1.0, at(6), at(4), at(3), at(1), 0.0])
    sigmas, notes = sampled(2)
    assert sigmas == pytest.approx([1.0, at(4), 0.0])
    assert notes == [
        f"stage {name}: sampling goes beyond the end of a phase, where no jump is trained to go: {jump}"
        for name, jump in (
            ("semantic", f"from sigma 1 to {at(4):.4g} (ends at {at(6):.4g})"),
            ("detail", f"from sigma {at(4):.4g} to 0 (ends at {at(1):.4g})"),
        )
    ]


def test_an_expert_that_is_not_trained_is_named(folder, tmp_path, capsys):
    """Where it runs: not in a whole run or an export, and not where every step is another's."""
    numbers = count()

    def notes(source, **options):
        return sample_run(source, output=tmp_path / f"samples-{next(numbers)}", **options).notes

    early = folder / "checkpoints" / "00_semantic_00000002"
    note = "expert 'detail' is not trained: it is still a copy of 'semantic'"
    assert notes(early) == [note]
    assert notes(early, weights="ema") == [note]
    assert notes(folder) == notes(folder / "export") == []
    assert note not in notes(early, sigmas=[1.0])
    with pytest.raises(SystemExit):
        main(["sample", str(early), "--output", str(tmp_path / "out")])
    assert capsys.readouterr().err == f"note: {note}\n"


def test_untrained_experts_are_copies_of_the_nearest_trained_one():
    recipe = load_recipe(tiny_recipe([distil(), distil("detail")]))
    sigmas = sampling_sigmas(recipe)
    assert untrained_notes(recipe, {"semantic", "detail"}, sigmas) == []
    assert untrained_notes(recipe, set(), sigmas) == [
        "expert 'semantic' is not trained: it is still a copy of 'teacher'",
        "expert 'detail' is not trained: it is still a copy of 'teacher'",
    ]
    assert untrained_notes(recipe, {"semantic"}, sigmas, {"detail": "teacher"}) == []
    frozen = load_recipe(tiny_recipe([distil()], {"experts.detail": {"kind": "frozen", "from": "semantic"}}))
    assert untrained_notes(frozen, {"semantic"}, sigmas) == []


def test_files(folder, tmp_path):
    result = sample_run(folder, prompts=["3 right", ""], num=2, seed=4, fps=5.0, output=tmp_path / "deep" / "out")
    assert result.output == tmp_path / "deep" / "out"
    with Image.open(result.output / "samples.png") as sheet:
        sheet.load()
    with Image.open(result.output / "samples.webp") as animation:
        assert animation.n_frames == 8
    sidecar = json.loads((result.output / "samples.json").read_text())
    assert sidecar.pop("sigmas") == pytest.approx([1.0, 5 / 6, 0.0])
    assert sidecar.pop("timesteps") == pytest.approx([1000.0, 5000 / 6])
    assert sidecar == {
        "made_from": str(folder),
        "recipe": "tiny",
        "files": ["000.mp4", "001.mp4", "002.mp4", "003.mp4"],
        "prompts": ["3 right", "3 right", "", ""],
        "seed": 4,
        "eta": 0.0,
        "experts": ["semantic", "detail"],
        "weights": "trained",
        "fps": 5.0,
        "num_frames": 8,
        "height": 24,
        "width": 24,
        "torch": torch.__version__,
    }
    for file, video in zip(sidecar["files"], result.videos, strict=True):
        with av.open(result.output / file) as container:
            assert float(container.streams.video[0].average_rate) == 5.0
            frames = [frame.to_ndarray(format="gray") for frame in container.decode(video=0)]
        assert abs(torch.from_numpy(np.stack(frames)) / 255 - video[0]).mean() < 0.03


def test_of_many_videos_the_pictures_show_the_first_and_none_is_kept_in_memory(folder, tmp_path):
    result = sample_run(folder, prompts=["3 right"], num=10, output=tmp_path, keep=False)
    assert result.videos is None
    assert len(list(tmp_path.glob("*.mp4"))) == 10
    with Image.open(tmp_path / "samples.webp") as animation:
        assert animation.width < 9 * 198


def test_without_an_output_samples_lie_in_the_source(folder):
    assert sample_run(folder / "export").output == folder / "export" / "samples"


def test_steps_and_sigmas(videos):
    """Points of the recipe's own list: p_8 = 1 and p_4 = 5/6; the final 0 goes without saying, as in a recipe."""
    usual = videos()
    for options in ({"steps": 2}, {"sigmas": [1.0, 0.833]}, {"sigmas": [1.0, 0.833, 0.0]}):
        assert torch.equal(videos(**options), usual), options
    for options in ({"steps": 1}, {"steps": 8}, {"sigmas": [1.0, 0.833, 0.4]}):
        assert not torch.allclose(videos(**options), usual, atol=1e-3), options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 2, "sigmas": [1.0]}, "--steps or --sigmas, not both"),
        ({"steps": 9}, "--steps: steps 9 is more than the trajectory's 8"),
        ({"sigmas": [0.5, 0.9]}, "--sigmas: values must descend strictly"),
        ({"sigmas": [1.5, 0.5]}, r"--sigmas: sigma 1.5 is outside \[0, 1\]"),
        ({"sigmas": [0.0]}, "--sigmas: no step can start at sigma 0"),
        ({"prompts": ["3 sideways"]}, 'sample: prompt "3 sideways": give a digit'),
        ({"video": {"height": 48}}, "videos have one size; leave --height, --width and --frames away"),
    ],
)
def test_mistakes_are_the_user_s(videos, options, message):
    with pytest.raises(UserError, match=message):
        videos(**options)


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("nowhere", {}, "there is no such folder"),
        ("checkpoints", {}, "no checkpoint in"),
        ("export", {"weights": "ema"}, "holds no averaged weights"),
    ],
)
def test_sources_that_hold_nothing(folder, videos, source, options, message):
    with pytest.raises(UserError, match=message):
        videos(folder / source, **options)


def test_a_recipe_without_a_sample_list_needs_steps(tmp_path):
    recipe = tiny_recipe([distil(steps=1)], {"sample": None})
    source = run(recipe, output=tmp_path / "run", device="cpu").output
    with pytest.raises(UserError, match="no sample list; give --steps or --sigmas"):
        sample_run(source, output=tmp_path / "samples")
    assert sample_run(source, output=tmp_path / "samples", steps=1).videos.isfinite().all()
