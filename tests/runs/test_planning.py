"""A plan against what real steps take, counted; its JSON and its exit codes; shipped recipes."""

import json
import re
from pathlib import Path

import pytest
from torch.nn import functional

from moedistill.cli import main
from moedistill.data.latents import SyntheticDataset
from moedistill.data.loading import Batch, collate
from moedistill.errors import UserError
from moedistill.recipe.loading import load_recipe
from moedistill.runs import loop
from moedistill.runs.build import build_mixture, make_accelerator
from moedistill.runs.planning import fake_step as fake_step_module
from moedistill.runs.planning.count import check_before_loading, count
from moedistill.runs.planning.fake_step import (
    AVERAGES,
    MOMENTS,
    WATCHED,
    WEIGHTS,
    Watched,
    empty_mixture,
    fake_forward,
    fake_step,
    peaks,
)
from moedistill.runs.planning.plan import GIB, Planner
from moedistill.runs.planning.tracker import Tracker
from moedistill.stages.run import Run
from moedistill_hunyuan_video.backbone import HunyuanVideoConfig

FULL = '{"kind": "full"}'
MIB = 2**20
LORA = '{"kind": "lora", "rank": 16, "alpha": 32}'


@pytest.fixture
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """A miniature as wide against its latents as the real network is, and deep enough to be cut."""
    tiny = HunyuanVideoConfig.tiny_network

    def network(self):
        return {
            **tiny(self), "num_attention_heads": 4, "attention_head_dim": 32, "num_layers": 4, "num_single_layers": 8,
            "mlp_ratio": 4.0, "rope_axes_dim": (8, 12, 12),
        }  # fmt: skip

    monkeypatch.setattr(HunyuanVideoConfig, "tiny_network", network)


def recipe_of(*settings: str):
    return load_recipe(
        "dcm_hunyuan",
        [
            "backbone.pretrained=null", "backbone.dtype=float32", "training.batch_size=1", "training.num_workers=0",
            "data.path=null", "backbone.video.num_frames=13", "backbone.video.height=96", "backbone.video.width=128",
            "experts.detail.rank=16", "stages.detail.losses.gan.width=64", *settings,
        ],
    )  # fmt: skip


def counted(recipe, config, steps: int = 2):
    """What real steps take, by the kinds of bytes, where they take the most; and all that stands between steps."""
    mixture, accelerator = build_mixture(recipe), make_accelerator(recipe, "cpu")
    mixture.settle(*config.trained_experts())
    dataset = SyntheticDataset(mixture.backbone)
    tracker = Tracker(WATCHED)
    for tensor in [*mixture.parameters(), *mixture.buffers()]:
        tracker.hold(tensor, WEIGHTS)
    stage = config.build()
    training = Watched(Run(recipe, Path(), accelerator, mixture, dataset), config, tracker)
    latents, cond = collate([dataset[0]])
    with tracker:
        stage.setup(training)
        for step in range(steps):
            training.step = step
            tracker.passages.clear()
            batch = training.begin(Batch(latents.clone(), dict(cond), [0], True))
            with training.micro_batch(), tracker.passage("between"):
                stage.step(training, batch)
            for trainable in training.trained.values():
                for moments in trainable.optimizer.state.values():
                    for value in moments.values():
                        tracker.hold(value, MOMENTS)
            del batch
    seen = peaks(tracker.passages)
    most = max(sum(alive) for (_, _, by), alive in seen.items() if by == "all")
    activations = max(alive[0] for (_, _, by), alive in seen.items() if by == "activations")
    return most, activations, {kind: tracker.bytes[kind] for kind in (WEIGHTS, MOMENTS, AVERAGES)}


@pytest.mark.parametrize(
    ("stage", "settings"),
    [
        ("semantic", [f"experts.semantic={FULL}", "training.gradient_checkpointing=false"]),
        ("semantic", [f"experts.semantic={FULL}", "training.gradient_checkpointing=true"]),
        ("semantic", [f"experts.semantic={LORA}", "training.gradient_checkpointing=false"]),
        ("detail", [f"experts.semantic={LORA}", "training.gradient_checkpointing=true"]),
        ("detail", [f"experts.semantic={LORA}", "training.gradient_checkpointing=false"]),
        ("detail", [f"experts.semantic={FULL}", "training.gradient_checkpointing=true"]),
        ("detail", [f"experts.semantic={LORA}", "backbone.dtype=bfloat16", "training.gradient_checkpointing=true"]),
        ("detail", [f"experts.semantic={FULL}", "backbone.dtype=bfloat16", "training.gradient_checkpointing=true"]),
    ],
)
def test_a_plan_is_what_a_real_step_takes(
    stage: str, settings: list[str], wide: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    # With a mask a CPU keeps all scores in bfloat16, and not in float32.
    attend = functional.scaled_dot_product_attention

    def unmasked(query, key, value, attn_mask=None, **options):
        return attend(query, key, value, **options)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", unmasked)
    recipe = recipe_of(*settings, f"stages.{stage}.ema_decay=0.9", "training.offload.idle=null")
    config = next(each for each in recipe.stages if each.name == stage)
    most, activations, standing = counted(recipe, config)
    skeleton = recipe.backbone.skeleton()
    step = fake_step(recipe, config, skeleton, 1, as_cuda=False)
    planned = max(each.activations + each.gradients + each.of_critics for each in step.moments)
    of_them = max(each.activations for each in step.moments)
    print(f"{stage} {settings}: planned {planned / MIB:.2f} and {of_them / MIB:.2f} MiB,")
    print(f"  counted {most / MIB:.2f} and {activations / MIB:.2f}")
    assert planned == pytest.approx(most, rel=0.1)
    assert of_them == pytest.approx(activations, rel=0.1)

    stands = count(recipe, empty_mixture(recipe, skeleton), 1)[stage]
    assert stands.weights + stands.trained == pytest.approx(standing[WEIGHTS], rel=0.001)
    assert stands.moments == pytest.approx(standing[MOMENTS], rel=0.001)
    assert stands.averages == standing[AVERAGES] > 0


def planned(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    with pytest.raises(SystemExit) as exit_info:
        main(["plan", *arguments])
    return exit_info.value.code, capsys.readouterr().out


def test_json_is_one_object_and_adds_up(capsys: pytest.CaptureFixture[str]) -> None:
    code, out = planned(capsys, "dcm_digits", "--json", "--gpu-memory", "24")
    made = json.loads(out)
    assert (code, made["recipe"], made["gpus"], made["gpu_memory"], made["fits"]) == (0, "dcm_digits", 1, 24.0, True)
    assert [stage["name"] for stage in made["stages"]][:2] == ["semantic", "detail"]
    parts = ("weights", "trained", "moments", "averages", "distribution", "activations", "gradients_at_peak")
    for stage in made["stages"]:
        assert stage["peak"] == sum(stage[part] for part in parts), stage["name"]
        assert stage["where"]
    semantic = made["stages"][0]
    assert semantic["trained"] == semantic["gradients"] == semantic["moments"] / 2 > 0
    assert semantic["evaluations"] == 4 * semantic["micro_batch"]  # a guided teacher counts twice


def test_what_does_not_fit_is_an_answer_and_a_mistake_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    code, out = planned(capsys, "dcm_digits", "--gpu-memory", "0.05")
    assert code == 0
    assert "does not fit: at most" in out
    assert "training.gradient_checkpointing=true" in out
    assert max(map(len, out.splitlines())) <= 100
    assert planned(capsys, "dcm_digits", "--gpus", "7")[0] == 2
    assert planned(capsys, "dcm_digits", "--set", "training.batch_size=0")[0] == 2


def test_the_largest_recipe_for_one_gpu_fits_80_gib(capsys: pytest.CaptureFixture[str]) -> None:
    made = json.loads(planned(capsys, "dcm_hunyuan_1gpu", "--json")[1])
    semantic, detail, samples, _ = made["stages"]
    assert made["fits"]
    assert detail["peak"] <= 60 * GIB
    assert semantic["weights"] == pytest.approx(2 * 12.821e9, rel=0.005)
    assert samples["flops"] == pytest.approx(852e12, rel=0.03)  # one forward of 25,440 tokens, with attention


def test_a_forward_at_the_published_size_computes_what_is_published() -> None:
    recipe = load_recipe("dcm_hunyuan", ["backbone.video.height=720", "backbone.video.width=1280"])
    flops = fake_forward(recipe, recipe.backbone.skeleton()).flops
    assert flops == pytest.approx(11_397e12, rel=0.01)  # 115,200 tokens


def test_a_few_blocks_tell_of_all(wide: None, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_of(f"experts.semantic={LORA}")
    config = recipe.stages[1]
    skeleton = recipe.backbone.skeleton()
    few = fake_step(recipe, config, skeleton, 1)
    monkeypatch.setattr(fake_step_module, "depths_to_try", lambda backbone, stride: [{}])
    whole = fake_step(recipe, config, skeleton, 1)
    most = [max(m.activations + m.gradients + m.of_critics for m in step.moments) for step in (few, whole)]
    assert most[0] == pytest.approx(most[1], rel=0.01)
    assert few.flops == pytest.approx(whole.flops, rel=1e-6)


def test_what_cannot_fit_an_accelerator_stops_before_loading(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    recipe = load_recipe("dcm_hunyuan", ["training.sharding=none"])
    said = check_before_loading(recipe, 1, 300 * GIB)
    assert re.fullmatch(r"plan: at least 2\d\d\.\d GiB of 300\.0 GiB on each process \(stage semantic\)", said)
    with pytest.raises(UserError, match=r"stage semantic cannot fit: .*kind: lora.*fsdp2.*--force"):
        check_before_loading(recipe, 1, 80 * GIB)
    assert "80.0 GiB" in check_before_loading(recipe, 1, 80 * GIB, force=True)

    monkeypatch.setattr(loop, "_accelerator_memory", lambda device: 100)
    with pytest.raises(UserError, match="cannot fit"):
        loop.run("dcm_digits", output=tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()
    loop.run("dcm_digits", output=tmp_path / "smoke", device="cpu", smoke=True)
    assert "plan:" not in capsys.readouterr().out


def test_sharding_cuts_what_stands() -> None:
    planner, stages = Planner(), {}
    for gpus in (1, 2):
        recipe = recipe_of("training.sharding=fsdp2", "training.batch_size=2", f"experts.semantic={FULL}")
        stages[gpus] = planner.stages(recipe, gpus)[0]
    assert stages[2].moments == stages[1].moments / 2
    assert stages[2].trained == stages[1].trained / 2
    assert stages[2].distribution > 0 == stages[1].distribution
    assert stages[2].micro_batch == 1
