"""Runs whose networks are cut among processes (FSDP2 over gloo): the same as with one, in what is logged and saved."""

import json
import re
import shutil
import signal

import pytest
import torch
from helpers import dcm_recipe, equal
from saved_pipelines import pipeline_recipe, save_pipeline
from started_commands import start_together

from moedistill.errors import UserError
from moedistill.recipe.loading import load_recipe
from moedistill.runs.asked_sharding import AskedSharding, asked_sharding
from moedistill.runs.loop import run
from moedistill.runs.sample import load_mixture
from moedistill.runtime.checkpoint import find_checkpoint, load_tree, verify
from moedistill.runtime.integrity import Damaged
from moedistill.runtime.shards import read_shards

SHARDED = ["--set", "training.sharding=fsdp2"]
STEPS = 3


def recipe(**changes):
    """Both stages of DCM with a critic, averages that targets are made of, accumulation and an export."""
    made = dcm_recipe(STEPS, **{"training.batch_size": 24, **changes})
    for stage in made["stages"]:
        stage["target"] = "ema"
    made["stages"].append({"name": "export", "kind": "export"})
    return made


def start(arguments, folder, processes, **environment):
    """A command in so many processes, to its end."""
    folder.mkdir(exist_ok=True)
    group = start_together(arguments, folder, processes, **environment)
    codes = [command.exit_code() for command in group]
    assert codes == [0] * processes, "\n".join(command.output for command in group)
    return group


def logged(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {(line.pop("stage"), line.pop("step")): line for line in lines}


def check_same(one, other):
    """Logged numbers and the weights of all checkpoints that both have, to rounding."""
    expected, found = logged(one), logged(other)
    assert found.keys() == expected.keys()
    for place, line in expected.items():
        assert found[place].keys() == line.keys()
        for name, value in line.items():
            rel = 5e-5 if name == "loss/feature_matching" else 1e-5
            assert found[place][name] == pytest.approx(value, rel=rel), (place, name)
        assert all(line[name] > 0 for name in line if name.startswith("grad_norm"))
    names = {path.name for path in (one / "checkpoints").iterdir()}
    names &= {path.name for path in (other / "checkpoints").iterdir()}
    assert names
    for name in names:
        for tree in ("experts", "ema"):
            check_close(*(load_tree(folder / "checkpoints" / name, tree) for folder in (one, other)))


def check_close(one, other):
    assert one.keys() == other.keys()
    for expert in one:
        assert one[expert].keys() == other[expert].keys()
        for name, weight in one[expert].items():
            torch.testing.assert_close(other[expert][name], weight, rtol=0, atol=1e-6)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder of the same run by one process (`one`) and by two (`two`)."""
    folder = tmp_path_factory.mktemp("sharded")
    (folder / "recipe.yaml").write_text(json.dumps(recipe()))
    run(recipe(), output=folder / "one", device="cpu")
    arguments = ["run", folder / "recipe.yaml", "--device", "cpu", "--output", folder / "two", *SHARDED]
    [main, _] = start(arguments, folder / "logs", 2)
    assert main.output.startswith("2 processes (FSDP2 over gloo), cpu, float32\n")
    return folder


def test_two_processes_make_the_run_of_one(runs):
    check_same(runs / "one", runs / "two")


def test_each_process_writes_its_part_of_a_checkpoint(runs):
    for checkpoint in (runs / "two" / "checkpoints").iterdir():
        verify(checkpoint)
        shards = sorted(path.name for path in checkpoint.glob("*.safetensors"))
        assert shards == [f"shard-0000{k}-model-00001-of-00001.safetensors" for k in (1, 2)]
        pieces = [each for each in read_shards(checkpoint).values() if len(each.shape)]
        cut = [each for each in pieces if len(each.pieces) == 2]
        assert sum(each.whole().numel() for each in cut) > 0.9 * sum(each.whole().numel() for each in pieces)
        sums = json.loads((checkpoint / "sums.json").read_text())
        assert set(shards) < set(sums)


@pytest.mark.parametrize(
    ("source", "stage", "processes"),
    [("two", "00_semantic", 1), ("two", "01_detail", 1), ("one", "00_semantic", 2), ("one", "01_detail", 2),
     ("two", "01_detail", 3), ("two", "00_semantic", 4)],
)  # fmt: skip
def test_any_number_of_processes_goes_on(runs, tmp_path, source, stage, processes):
    checkpoint = runs / source / "checkpoints" / f"{stage}_00000001"
    arguments = ["run", runs / "recipe.yaml", "--device", "cpu", "--output", tmp_path / "run"]
    arguments += ["--resume-from", checkpoint, *(SHARDED if processes > 1 else [])]
    if processes == 1:
        run(recipe(), output=tmp_path / "run", device="cpu", resume_from=checkpoint)
    else:
        start(arguments, tmp_path / "logs", processes)
    check_same(runs / "one", tmp_path / "run")


def test_processes_in_replicas_make_the_run_of_one(runs, tmp_path):
    """As an accelerate config asks for it: two groups of two processes, which each hold the whole."""
    asked = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "ACCELERATE_USE_PARALLELISM_CONFIG": "true"}
    asked |= {"PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "2", "PARALLELISM_CONFIG_DP_SHARD_SIZE": "2"}
    arguments = ["run", runs / "recipe.yaml", "--device", "cpu", "--output", tmp_path / "run"]
    [main, *_] = start(arguments, tmp_path / "logs", 4, **asked)
    assert main.output.startswith("4 processes (FSDP2 over gloo), cpu, float32\n")
    check_same(runs / "one", tmp_path / "run")
    [last] = [path for path in (tmp_path / "run/checkpoints").iterdir() if path.name == "01_detail_00000003"]
    assert {len(each.pieces) for each in read_shards(last).values()} <= {1, 2}


def test_exports_of_one_checkpoint_are_the_same_bytes(runs, tmp_path):
    last = runs / "two/checkpoints/01_detail_00000003"
    run(recipe(), output=tmp_path / "alone", device="cpu", resume_from=last)
    arguments = ["run", runs / "recipe.yaml", "--device", "cpu", "--resume-from", last, "--output", tmp_path / "pair"]
    start([*arguments, *SHARDED], tmp_path / "logs", 2)
    for name in ("semantic.safetensors", "detail.safetensors"):
        files = [folder / "export" / name for folder in (runs / "two", tmp_path / "alone", tmp_path / "pair")]
        assert len({file.read_bytes() for file in files}) == 1


def test_others_read_what_several_processes_saved(runs):
    _, mixture = load_mixture(find_checkpoint(runs / "two"))
    for expert, weights in load_tree(find_checkpoint(runs / "two"), "experts").items():
        for name, weight in weights.items():
            assert torch.equal(mixture.experts[expert].parameters[name], weight)


@pytest.mark.parametrize("harm", ["a byte", "a file"])
def test_a_damaged_shard_is_refused(runs, tmp_path, harm):
    copy = tmp_path / "00_semantic_00000001"
    shutil.copytree(runs / "two/checkpoints/00_semantic_00000001", copy)
    shard = copy / "shard-00002-model-00001-of-00001.safetensors"
    if harm == "a byte":
        content = bytearray(shard.read_bytes())
        content[-1] ^= 1
        shard.write_bytes(content)
    else:
        shard.unlink()
    with pytest.raises(Damaged, match="shard-00002"):
        verify(copy, "experts")


KILLER = """
import os, signal
from moedistill import hookimpl
from moedistill.runs.loop import _Runner
from moedistill.runtime import saving
from moedistill.stages.export import ExportStage

RANK, WHEN = os.environ.get("KILL", "- -").split()


def before(place, name, when, counts=lambda *arguments: True):
    usual = getattr(place, name)

    def method(*arguments, **options):
        if (RANK, WHEN) == (os.environ["RANK"], when) and counts(*arguments):
            os.kill(os.getpid(), signal.SIGKILL)
        return usual(*arguments, **options)

    setattr(place, name, method)


before(_Runner, "_save", "save", lambda runner, number, training: (number, training.step) == (0, 2))
before(saving, "write_shards", "begin", lambda folder, *others: folder.name.endswith("00_semantic_00000002"))
before(saving, "sum_of", "write", lambda path: path.parent.name.endswith("00_semantic_00000002"))
before(ExportStage, "execute", "export")


@hookimpl
def on_step_end(training, metrics):
    if (RANK, WHEN) == (os.environ["RANK"], "step") and training.step == 2:
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("kill", ["0 step", "1 save", "0 begin", "0 write", "1 write", "1 export"])
def test_a_process_that_is_lost(runs, tmp_path, kill):
    (tmp_path / "killer.py").write_text(KILLER)
    arguments = ["run", runs / "recipe.yaml", "--device", "cpu", "--output", tmp_path / "run", *SHARDED]
    group = start_together([*arguments, "-p", tmp_path / "killer.py"], tmp_path, 2, KILL=kill)
    lost, left = int(kill[0]), 1 - int(kill[0])
    assert group[lost].exit_code(60) == -signal.SIGKILL
    assert group[left].exit_code(60) == 3, group[left].output
    assert "Traceback" not in group[left].output
    assert "go on with: moedistill run" in " ".join(group[left].output.split())
    start([*arguments, "--resume"], tmp_path / "again", 2)
    for path in (tmp_path / "run/checkpoints").iterdir():
        verify(path)
    for tree in ("experts", "ema", "training"):
        assert equal(*(load_tree(find_checkpoint(folder), tree) for folder in (runs / "two", tmp_path / "run")))


FAULTS = """
import errno, os, time
from moedistill import hookimpl
from moedistill.errors import UserError
from moedistill.runtime import saving

usual = saving.sum_of


def slowly(path):
    if path.parent.name.endswith("00_semantic_00000002"):
        if os.environ["FAULT"] == "disk" and os.environ["RANK"] == "1":
            raise OSError(errno.ENOSPC, "full")
        time.sleep(1)
    return usual(path)


saving.sum_of = slowly


@hookimpl
def on_step_end(training, metrics):
    if os.environ["FAULT"] == "later" and (training.config.name, training.step) == ("semantic", 3):
        raise UserError("something else is wrong" if os.environ["RANK"] == "0" else "")
"""


@pytest.mark.parametrize(("fault", "saved"), [("disk", 1), ("later", 2)])
def test_a_fault_while_a_checkpoint_is_written(runs, tmp_path, fault, saved):
    """A disk that one process finds full stops all, with nothing half-written; another fault loses no checkpoint."""
    (tmp_path / "faults.py").write_text(FAULTS)
    arguments = ["run", runs / "recipe.yaml", "--device", "cpu", "--output", tmp_path / "run", *SHARDED]
    group = start_together([*arguments, "-p", tmp_path / "faults.py"], tmp_path, 2, FAULT=fault)
    codes = [command.exit_code(60) for command in group]
    assert codes == [2, 2], "\n".join(command.output for command in group)
    said = " ".join(group[0].output.split())
    assert "Traceback" not in said
    if fault == "disk":
        assert "cannot write" in said
        assert f"saved is {tmp_path}/run/checkpoints/00_semantic_{saved:08d}" in said
    names = sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir())
    assert names == [f"00_semantic_{step:08d}" for step in range(1, saved + 1)]


# -- what a process holds ---------------------------------------------------------------------------------------------

COUNTER = """
import os
from pathlib import Path
from moedistill.runs import build
from moedistill.runs.planning.tracker import Tracker
from moedistill.runtime.sharding import part, units

usual = build.build_mixture


class Held(Tracker):
    def hold(self, tensor, kind=None):  # of all but what has no memory, and what a sharded tensor holds
        if tensor.device.type != "meta" and not hasattr(tensor, "full_tensor"):
            super().hold(tensor, kind)


def counted(*arguments, **options):
    with Held() as counter:
        mixture = usual(*arguments, **options)
    own = sum(part(p).untyped_storage().nbytes() for p in mixture.parameters())
    whole = sum(p.numel() * p.element_size() for p in mixture.parameters())
    blocks = [unit for network in mixture.networks for unit in units(network)]
    blocks = [sum(p.numel() * p.element_size() for p in block.parameters()) for block in blocks]
    Path(__file__).with_name(f"held-{os.environ['RANK']}").write_text(f"{counter.peak} {own} {whole} {max(blocks)}")
    return mixture


build.build_mixture = counted
"""


@pytest.mark.parametrize("weights", ["stored", "random"])
def test_no_process_holds_more_than_its_part_and_a_block(tmp_path, weights):
    """While HunyuanVideo is built, its weights are read or drawn, and its full expert is made."""
    (tmp_path / "counter.py").write_text(COUNTER)
    settings = ["--smoke", "--device", "cpu", "--set", "backbone.dtype=float32", *SHARDED]
    if weights == "stored":
        save_pipeline(tmp_path / "model", "hunyuan_video")
        recipe = pipeline_recipe("hunyuan_video", tmp_path / "model", training={"batch_size": 2})
        (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
        settings = ["--device", "cpu", *SHARDED]
    source = tmp_path / "recipe.yaml" if weights == "stored" else "dcm_hunyuan"
    start(["run", source, *settings, "--output", tmp_path / "run", "-p", tmp_path / "counter.py"], tmp_path, 2)
    for rank in range(2):
        made, own, whole, block = map(int, (tmp_path / f"held-{rank}").read_text().split())
        assert own < 0.51 * whole
        assert made <= block, (made, own, whole, block)


@pytest.mark.parametrize("name", ["dcm_hunyuan", "dcm_hunyuan_1gpu", "dcm_wan22_a14b"])
def test_recipes_of_large_models(tmp_path, name):
    changes = {"training.gradient_accumulation_steps": 2, "training.gradient_checkpointing": "true"}
    for stage in ("semantic", "detail"):
        changes |= {f"stages.{stage}.ema_decay": 0.9, f"stages.{stage}.target": "ema"}
    changes |= {"backbone.dtype": "float32", "training.batch_size": 8}
    settings = [f"{key}={value}" for key, value in changes.items()]
    run(load_recipe(name, settings), output=tmp_path / "one", device="cpu", smoke=True)
    given = [item for setting in settings for item in ("--set", setting)]
    start(["run", name, "--smoke", "--device", "cpu", *given, *SHARDED, "--output", tmp_path / "two"], tmp_path, 2)
    check_same(tmp_path / "one", tmp_path / "two")


# -- what a launcher asks for -----------------------------------------------------------------------------------------

FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


def test_settings_of_a_launcher():
    assert asked_sharding({}) == AskedSharding()
    assert asked_sharding(FSDP2) == AskedSharding(sharded=True)
    sizes = {"PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "2", "PARALLELISM_CONFIG_DP_SHARD_SIZE": "4"}
    assert asked_sharding(sizes) == AskedSharding()  # not in use
    assert asked_sharding(sizes | {"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}) == AskedSharding(True, 2)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"FSDP_VERSION": "1"}, "set fsdp_version: 2"),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, "param_dtype policy"),
        ({"FSDP_OFFLOAD_PARAMS": "true"}, "fsdp_offload_params"),
        ({"FSDP_ACTIVATION_CHECKPOINTING": "true"}, "training.gradient_checkpointing: true"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed, which takes one model"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "Megatron-LM"),
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_CP_SIZE": "2"}, "cp_size 2"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, reason):
    with pytest.raises(UserError, match=re.escape(reason)):
        asked_sharding({**FSDP2, **settings})


def test_experts_start_with_weights_cut_as_they_are_read(runs, tmp_path):
    """Of an export that one process wrote, and of a checkpoint that two did."""
    changes = {"experts.semantic.init": str(runs / "one" / "export"), "experts.detail.init": str(runs / "two")}
    made = recipe(**changes)
    made["stages"] = [{**made["stages"][0], "steps": 1}]
    (tmp_path / "recipe.yaml").write_text(json.dumps(made))
    run(made, output=tmp_path / "one", device="cpu")
    arguments = ["run", tmp_path / "recipe.yaml", "--device", "cpu", "--output", tmp_path / "two", *SHARDED]
    start(arguments, tmp_path / "logs", 2)
    check_same(tmp_path / "one", tmp_path / "two")
    detail, given = (
        load_tree(find_checkpoint(folder), "experts")["detail"] for folder in (tmp_path / "two", runs / "two")
    )
    assert equal(detail, given)
