"""Whatever a later stage needs is tried before the first one trains: nothing is loaded, trained or left for nothing."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner
from helpers import dcm_recipe, distil, equal, evaluate, tiny_recipe, trees
from saved_pipelines import pipeline_recipe, save_pipeline

from moedistill import cli
from moedistill.analysis.study import analyze
from moedistill.components.plugins import load_plugins
from moedistill.errors import RecipeError, UserError
from moedistill.losses.base import HuberConfig
from moedistill.losses.optim import OptimizerConfig
from moedistill.recipe.loading import load_recipe
from moedistill.recipe.yaml_tree import dump_yaml
from moedistill.runs import ahead
from moedistill.runs.loop import run
from moedistill.stages.rehearsal import needed
from moedistill.stages.training import Training
from moedistill_digits.backbone import DigitsBackboneConfig

BOTH = [distil(steps=2), distil("detail", steps=2)]


def gan(**changes):
    """Both stages, the second with a critic."""
    probing = {"probe": {"block_stride": 1}, "losses": [{"kind": "huber"}, {"kind": "gan", **changes}]}
    return tiny_recipe([distil(steps=2), distil("detail", steps=2, **probing)])


def refused(recipe, folder, **options):
    """What a run says that begins nothing and leaves nothing."""
    with pytest.raises(UserError) as caught:
        run(recipe, output=folder, device="cpu", **options)
    assert not Path(folder).exists()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -- what is missing --------------------------------------------------------------------------------------------------


def test_data_that_are_not_there_are_refused_before_anything_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr("moedistill.runs.loop.build_run", lambda *_, **__: pytest.fail("something is loaded"))
    settings = ["backbone.pretrained=null", f"data.path={tmp_path / 'none'}"]
    recipe = load_recipe("dcm_wan_1_3b", settings)
    message = refused(recipe, tmp_path / "run")
    assert message.startswith(f"data: there is no file or folder {tmp_path / 'none'}")
    (tmp_path / "empty").mkdir()
    settings[1] = f"data.path={tmp_path / 'empty'}"
    assert refused(load_recipe("dcm_wan_1_3b", settings), tmp_path / "run").startswith(f"data: {tmp_path / 'empty'}")
    (tmp_path / "index.json").write_text("[]")
    settings[1] = f"data.path={tmp_path / 'index.json'}"
    assert "lists no samples" in refused(load_recipe("dcm_wan_1_3b", settings), tmp_path / "run")
    prompts = {"kind": "prompts", "path": str(tmp_path / "none.txt")}
    message = refused(tiny_recipe([evaluate()], {"data": prompts}), tmp_path / "run")
    assert message.startswith(f"data: there is no file {tmp_path / 'none.txt'}")
    monkeypatch.setattr("moedistill.analysis.study.build_run", lambda *_, **__: pytest.fail("something is loaded"))
    with pytest.raises(UserError, match="data: there is no file or folder"):
        analyze(recipe, output=tmp_path / "analysis")
    assert not (tmp_path / "analysis").exists()


def test_all_that_is_missing_is_said_at_once(tmp_path):
    stages = [*BOTH, evaluate(prompts="a.txt"), {"name": "samples", "kind": "sample", "prompts": "b.txt"}]
    recipe = tiny_recipe(stages, {"data": {"kind": "latents", "path": "nowhere"}})
    with pytest.raises(UserError) as caught:
        run(recipe, output=tmp_path / "run", device="cpu")
    starts = ["data: there is no file or folder nowhere", "stage evaluate: there is no file a.txt"]
    starts.append("stage samples: there is no file b.txt")
    for line, start in zip(str(caught.value).splitlines(), starts, strict=True):
        assert line.startswith(start)
    assert not (tmp_path / "run").exists()


def test_validate_notes_what_is_missing_and_a_miniature_does_without(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(dump_yaml(tiny_recipe(BOTH, {"data": {"kind": "latents", "path": "nowhere"}})))
    done = CliRunner().invoke(cli.cli, ["validate", str(recipe)], catch_exceptions=False)
    assert done.exit_code == 0
    assert done.output.splitlines()[0] == f"{recipe}: valid"
    assert (
        "  not to be run as it is: data: there is no file or folder nowhere; give a videos2caption.json" in done.output
    )
    assert load_recipe(recipe).data.tiny().look_ahead() is None


def test_a_batch_is_shared_out_before_anything_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr("moedistill.runs.loop.build_run", lambda *_, **__: pytest.fail("something is loaded"))
    accelerator = SimpleNamespace(num_processes=3, is_main_process=False, device=torch.device("cpu"))
    monkeypatch.setattr("moedistill.runs.loop.make_accelerator", lambda *_: accelerator)
    monkeypatch.setattr("moedistill.runs.loop.on_main", lambda _, work: work())
    assert refused(tiny_recipe(BOTH), tmp_path / "run") == (
        "this run: training.batch_size 4 cannot be shared evenly among 3 processes × 1 accumulation steps; make it a "
        "multiple of 3"
    )


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("vae", "cannot load its VAE"),
        ("scheduler", "cannot make its pipeline"),
        ("text_encoder", "has no text_encoder"),
    ],
)
def test_the_parts_of_a_model_that_sampling_needs(part, message, tmp_path):
    model = save_pipeline(tmp_path / "model", "wan")
    recipe = pipeline_recipe("wan", model)
    recipe["stages"].append({"name": "samples", "kind": "sample", "prompts": ["a dog runs"]})
    if part == "vae":  # its config stays: latents are scaled by it
        for file in (model / "vae").glob("*.safetensors"):
            file.unlink()
    else:
        shutil.rmtree(model / part)
    assert message in refused(recipe, tmp_path / "run")
    recipe["stages"][-1] = evaluate(prompts=["a dog runs"], metrics=[], pictures=1)
    if part != "scheduler":
        assert message in refused(recipe, tmp_path / "run")


def test_a_prompt_that_the_model_does_not_take(tmp_path):
    stages = [*BOTH, {"name": "samples", "kind": "sample", "prompts": ["seven, going up"]}]
    assert refused(tiny_recipe(stages), tmp_path / "run").startswith("stage samples: prompt ")


def test_a_tracker_that_cannot_be_started(tmp_path, monkeypatch):
    def fail(*_):
        raise PermissionError("no place for events")

    monkeypatch.setattr("accelerate.Accelerator.init_trackers", fail)
    recipe = tiny_recipe(BOTH, {"training.trackers": ["tensorboard"]})
    message = "training.trackers: tensorboard cannot be started: no place for events"
    assert refused(recipe, tmp_path / "run") == message


# -- training stages on the meta device -------------------------------------------------------------------------------


@dataclass(kw_only=True)
class LateConfig(HuberConfig):
    """Cannot be built."""

    def build(self, layout):
        raise ValueError("a file of mine is missing")


@dataclass(kw_only=True)
class ReadingConfig(HuberConfig):
    """Reads a number when it is built."""

    def build(self, layout):
        assert torch.ones(()).item() == 1
        return super().build(layout)


@pytest.fixture
def plugins():
    loaded = load_plugins()
    loaded.components.begin("test")
    loaded.components.register("loss", "late", LateConfig)
    loaded.components.register("loss", "reading", ReadingConfig)
    return loaded


def test_a_later_stages_losses_and_optimisers_are_built_first(tmp_path, plugins, monkeypatch):
    stages = [distil(steps=2), distil("detail", losses=[{"kind": "late"}])]
    message = "stage detail: a file of mine is missing"
    assert refused(tiny_recipe(stages), tmp_path / "run", plugins=plugins) == message

    def build(self, parameters, steps, usual=OptimizerConfig.build):
        if self.lr == 0.5:
            raise ValueError("torch refuses it")
        return usual(self, parameters, steps)

    monkeypatch.setattr(OptimizerConfig, "build", build)
    stages = [distil(steps=2), distil("detail", optimizer={"lr": 0.5})]
    assert refused(tiny_recipe(stages), tmp_path / "run") == "stage detail: torch refuses it"
    assert refused(gan(width=8, groups=2, optimizer={"lr": 0.5}), tmp_path / "run") == "stage detail: torch refuses it"
    stages = [distil(steps=1, losses=[{"kind": "reading"}])]
    assert run(tiny_recipe(stages), output=tmp_path / "run", device="cpu", plugins=plugins).cost["semantic"]["steps"]


def test_a_critic_of_any_width_is_built_without_memory_and_refused(tmp_path):
    message = refused(gan(width=1_000_000, groups=2), tmp_path / "run")
    # conv2 has 10^12 weights of 4 bytes, on each of two taps: with a gradient and two moments 32 · 10^12.
    assert message.startswith("stage detail: 29.1 TiB of gradients, moments and weights are needed beside the model's ")
    assert "most of it for 'gan', and cpu has " in message
    assert message.endswith("; try a smaller critic of 'gan', or use a device with more")


def test_the_memory_that_is_counted(tmp_path, monkeypatch):
    """The whole of what training then holds, to the byte; and the message names what could be less."""
    stages = [distil(ema_decay=0.9), distil("detail", ema_decay=0.9, probe={"block_stride": 1})]
    stages[1]["losses"] = [{"kind": "huber"}, {"kind": "gan", "width": 8, "groups": 2}]
    counted = {}

    def look(run_, parts, usual=ahead._check_memory):
        counted.update(parts)
        usual(run_, parts)

    monkeypatch.setattr(ahead, "_check_memory", look)
    done = run(tiny_recipe(stages), output=tmp_path / "run", device="cpu")
    saved = trees(done.checkpoint)

    def size(tree):
        if isinstance(tree, torch.Tensor):
            return tree.numel() * tree.element_size()
        return sum(map(size, tree.values() if isinstance(tree, dict) else tree)) if isinstance(tree, dict | list) else 0

    for part in counted[1]:
        state = saved["training"]["trained"][part.name]["optimizer"]["state"]
        moments = [value for one in state.values() for key, value in one.items() if key != "step"]
        critic = saved["training"]["critics"].get(part.name, {})
        assert part.state == size(moments) + size(critic)
        assert part.memory == size(moments) * 3 // 2 + size(critic) + part.averaged
        assert part.averaged == (size(saved["ema"]["detail"]) if part.name == "student" else 0)

    expert = size(saved["experts"]["semantic"])
    monkeypatch.setattr(ahead, "memory_of", lambda _: 5 * expert)
    message = refused(tiny_recipe(stages), tmp_path / "small")
    assert message.startswith("stage semantic: ")
    assert "most of it for 'student'" in message
    tried = (
        "try experts.semantic.kind: lora in place of full, backbone.dtype: bfloat16, stages.semantic.ema_decay: null"
    )
    assert tried in message


@pytest.mark.parametrize("accumulation", [1, 2])
def test_no_more_is_needed_than_what_training_then_holds(tmp_path, monkeypatch, accumulation):
    """Measured at every update of two steps, with its gradients: equal at most, or what fits would be refused."""
    stage = distil("detail", ema_decay=0.9, probe={"block_stride": 1})
    stage["losses"] = [{"kind": "huber"}, {"kind": "gan", "width": 8, "groups": 2}]
    counted, measured = [], []

    def look(run_, parts, usual=ahead._check_memory):
        counted.append(needed(parts[0], accumulating=accumulation > 1))
        usual(run_, parts)

    def clip(self, trainable, parameters, limit, usual=Training._clip):
        held = {}
        for each in self.trained.values():
            states = [value for one in each.optimizer.state.values() for key, value in one.items() if key != "step"]
            gradients = [one.grad for one in each.parameters.values() if one.grad is not None]
            critic = [] if each.bare is None else [*each.bare.parameters(), *each.bare.buffers()]
            average = [] if each.average is None else list(each.average.average.values())
            for tensor in [*states, *gradients, *critic, *average]:
                held[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        measured.append(sum(held.values()))
        return usual(self, trainable, parameters, limit)

    monkeypatch.setattr(ahead, "_check_memory", look)
    monkeypatch.setattr(Training, "_clip", clip)
    changes = {"training.gradient_accumulation_steps": accumulation}
    run(tiny_recipe([stage], changes), output=tmp_path / "run", device="cpu")
    assert len(measured) == 4  # student and critic, in two steps
    assert counted == [max(measured)]


def test_the_memory_of_a_machine(monkeypatch):
    there = ahead.memory_of(torch.device("cpu"))
    assert 2**28 < there < 2**50
    files = {"meminfo": "MemTotal: 1000 kB\nMemFree: 7 kB\nHugePages_Total: 0\nSwapTotal: 500 kB\n"}

    def read_text(path, encoding):
        if path.name not in files:
            raise FileNotFoundError
        return files[path.name]

    monkeypatch.setattr(Path, "read_text", read_text)
    assert ahead.memory_of(torch.device("cpu")) == 1500 * 1024
    files |= {"memory.max": "max\n", "memory.swap.max": "max\n"}
    assert ahead.memory_of(torch.device("cpu")) == 1500 * 1024
    files |= {"memory.max": "2048\n", "memory.swap.max": "1024\n"}
    assert ahead.memory_of(torch.device("cpu")) == 3 * 1024
    files.clear()  # a system whose swap grows
    assert ahead.memory_of(torch.device("cpu")) is None


def test_rehearsing_changes_nothing_of_what_is_learned(tmp_path, monkeypatch):
    recipe = dcm_recipe(2)
    rehearsed = run(recipe, output=tmp_path / "a", device="cpu")
    monkeypatch.setattr("moedistill.runs.loop.look_ahead", lambda *_: None)
    assert equal(trees(run(recipe, output=tmp_path / "b", device="cpu").checkpoint), trees(rehearsed.checkpoint))


def test_room_for_checkpoints(tmp_path, monkeypatch):
    recipe = tiny_recipe(BOTH, {"training.checkpoint_every": 1, "training.keep_checkpoints": 5})
    done = run(recipe, output=tmp_path / "run", device="cpu")
    taken = sum(file.stat().st_size for file in (tmp_path / "run/checkpoints").rglob("*.safetensors"))
    assert len(list((tmp_path / "run/checkpoints").iterdir())) == 4

    def disk(free):
        monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=free, total=2**60))

    # Two of semantic and the same with an adapter: what is counted is a little less than what is written.
    disk(taken)
    run(recipe, output=tmp_path / "other", device="cpu")
    disk(0)
    message = refused(recipe, tmp_path / "third")
    assert message.startswith("stage semantic: a checkpoint takes ")
    assert "there have to be 2 at a time, the newest one being written; " in message
    assert f"{tmp_path / 'third'} has room for 0 bytes. Choose another --output" in message
    run(recipe, output=done.output, resume=True, device="cpu")  # what lies there already has its room
    disk(taken * 3 // 4)  # all four are kept
    message = refused(recipe, tmp_path / "third")
    assert message.startswith("stage detail: a checkpoint takes ")
    assert "there have to be 4 at a time, " in message


def test_only_what_will_be_removed_gives_room(tmp_path, monkeypatch):
    """Of three checkpoints two are kept: the next has the place of none, and the last one's of one."""
    recipe = tiny_recipe([distil(steps=4)], {"training.checkpoint_every": 1})
    done = run(recipe, output=tmp_path / "run", device="cpu")
    folder = done.checkpoint.parent
    third, last = sorted(folder.iterdir())
    for name in ("00_semantic_00000004.set-aside-1", "mine", "00_semantic_00000001"):
        shutil.copytree(last, folder / name)
    (folder / "00_semantic_00000001" / "state.json").unlink()  # damaged: never removed
    shutil.copytree(last, folder / "00_semantic_00000009")
    run_ = SimpleNamespace(output=done.output, recipe=load_recipe(recipe))
    one = sum(file.stat().st_size for file in third.iterdir())
    assert ahead._sizes(run_, (0, 3)) == [one]
    assert ahead._sizes(run_, (0, 4)) == [one, sum(file.stat().st_size for file in last.iterdir())]
    shutil.rmtree(folder / "00_semantic_00000009")
    shutil.rmtree(last)

    free = [0]
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=free[0], total=2**60))
    with pytest.raises(UserError, match="there have to be 2 at a time"):
        run(recipe, output=done.output, resume_from=third, device="cpu")
    assert third.is_dir()
    free[0] = one
    assert run(recipe, output=done.output, resume_from=third, device="cpu").checkpoint == last


# -- values that make no sense ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "rule"),
    [
        ("stages.detail.optimizer.betas=[0.9, 1.0]", "must be less than 1, not 1"),
        ("stages.detail.optimizer.lr=1e39", "must be at most 1e+06, not 1e+39"),
        ("training.num_threads=1000000", "must be at most 1024, not 1000000"),
        ("training.num_workers=1000000", "must be at most 1024, not 1000000"),
        ("training.batch_size=1000000000", "must be at most 1e+06, not 1000000000"),
        ("training.gradient_accumulation_steps=3", "3 does not divide batch_size"),
        ("stages.semantic.steps=1000000000000", "must be at most 2.14748e+09, not 1000000000000"),
        ("stages.detail.losses.gan.width=1000000000", "must be at most 1e+06, not 1000000000"),
        ("experts.detail.rank=1000000", "must be at most 16384, not 1000000"),
        ("experts.detail.alpha=1e300", "must be at most 3.40282e+38, not 1e+300"),
        ("backbone.width=1000000000", "must be at most 16384, not 1000000000"),
        ("backbone.num_layers=1000000000", "must be at most 1000, not 1000000000"),
    ],
)
def test_values_beyond_any_sense_are_refused_by_validate(setting, rule):
    with pytest.raises(RecipeError) as caught:
        load_recipe("dcm_digits", [setting])
    assert rule in " ".join(problem.message for problem in caught.value.problems)


def test_more_threads_than_a_machine_can_start_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 20)
    with pytest.raises(UserError, match="num_threads 81: this machine has 20 processors; give 80 or less"):
        run(tiny_recipe([distil()], {"training.num_threads": 81}), output=tmp_path / "run", device="cpu")


def test_a_rank_above_the_width_is_refused_of_real_weights(tmp_path):
    random = {"experts.detail.rank": 17}
    assert run(tiny_recipe(BOTH, random), output=tmp_path / "random", device="cpu").checkpoint
    weights = tmp_path / "weights.safetensors"
    from safetensors.torch import save_file

    built = DigitsBackboneConfig(pretrained=None, width=16, num_layers=2, num_heads=2).build()
    save_file({name: value.contiguous() for name, value in built.network.state_dict().items()}, weights)
    message = refused(tiny_recipe(BOTH, {**random, "backbone.pretrained": str(weights)}), tmp_path / "run")
    assert message == (
        "experts: expert detail: rank 17 is above the width of the linears, 16: more than that adds nothing; give 16 "
        "or less, or kind: full"
    )
    run(
        tiny_recipe(BOTH, {"experts.detail.rank": 16, "backbone.pretrained": str(weights)}),
        output=tmp_path / "real",
        device="cpu",
    )


# -- what stages make of the data -------------------------------------------------------------------------------------


def test_frames_that_a_later_stage_cannot_use_are_found_first(tmp_path):
    """The digits network takes eight latent frames and no other number."""
    stages = [distil(steps=1), distil("detail", steps=1, latent_frames=3)]
    with pytest.raises(UserError, match=r"^stage detail: latents \[1, 12, 3, 4, 4\]: the digits network takes"):
        run(tiny_recipe(stages), output=tmp_path / "run", device="cpu")
    assert not (tmp_path / "run/metrics.jsonl").exists()


def test_a_metric_that_has_nothing_to_measure_is_found_first(tmp_path):
    changes = {"data": {"kind": "latents", "path": None}}  # whose conditioning is none
    stages = [distil(steps=1), evaluate(metrics=[{"kind": "digit_accuracy"}])]
    with pytest.raises(UserError, match=r"^stage evaluate: no sample asked for anything: accuracy needs conditioning"):
        run(tiny_recipe(stages, changes), output=tmp_path / "run", device="cpu")
    assert not (tmp_path / "run/metrics.jsonl").exists()
