"""Out of memory is one line: where, what to change in the recipe at hand, and what is saved."""

import pytest
import torch
from helpers import distil, evaluate, tiny_recipe

from moedistill.errors import UserError
from moedistill.runs.loop import run
from moedistill.stages.consistency import ConsistencyStage
from moedistill.stages.evaluate import EvaluateStage
from moedistill_digits.backbone import DigitsBackboneConfig


def too_much(*_):
    torch.empty(10**15)  # of a float each


def numpys(*_):
    raise MemoryError("Unable to allocate 7.11 PiB for an array with shape (1000000000000000,)")


def a_gpus(*_):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of …")


def a_bug(*_):
    raise RuntimeError("a bug")


def said(recipe, folder, **options):
    with pytest.raises(UserError) as caught:
        run(recipe, output=folder, device="cpu", **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("fail", "reason"),
    [(too_much, "DefaultCPUAllocator: can't allocate memory"), (numpys, "7.11 PiB"), (a_gpus, "CUDA out of memory")],
)
def test_a_step(fail, reason, tmp_path, monkeypatch):
    usual, steps = ConsistencyStage.step, []

    def step(self, training, batch):
        steps.append(training.step)
        return fail() if len(steps) == 3 else usual(self, training, batch)

    monkeypatch.setattr(ConsistencyStage, "step", step)
    message = said(tiny_recipe([distil(steps=5)], {"training.checkpoint_every": 1}), tmp_path)
    assert message.startswith("stage semantic, step 3: out of memory (")
    assert reason in message
    assert message.endswith(
        "; try training.gradient_accumulation_steps: 2, training.batch_size below 4, "
        "training.gradient_checkpointing: true, stages.semantic.latent_frames below 8, "
        "experts.semantic.kind: lora in place of full, backbone.dtype: bfloat16, or use a device with more; "
        f"saved is {tmp_path / 'checkpoints/00_semantic_00000002'}; "
        f"go on with: moedistill run {tmp_path}/recipe.yaml --resume-from {tmp_path} --device cpu"
    )


def test_only_what_applies_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(ConsistencyStage, "step", too_much)
    stage = distil("detail", steps=2, ema_decay=0.9)
    changes = {
        "training.batch_size": 2,
        "training.gradient_accumulation_steps": 2,
        "training.gradient_checkpointing": True,
        "backbone.dtype": "bfloat16",
    }
    assert said(tiny_recipe([stage], changes), tmp_path).endswith(
        "; try stages.detail.latent_frames below 8, stages.detail.ema_decay: null, or use a device with more; "
        "nothing is saved yet; "
        f"begin it anew with: moedistill run {tmp_path}/recipe.yaml --output {tmp_path} --device cpu"
    )


def test_an_evaluation(tmp_path, monkeypatch):
    monkeypatch.setattr(EvaluateStage, "execute", too_much)
    message = said(tiny_recipe([distil(steps=1), evaluate(batch_size=7)]), tmp_path)
    assert message.startswith("stage evaluate: out of memory (")
    assert message.endswith(
        "; try stages.evaluate.batch_size below 7, or use a device with more; "
        f"saved is {tmp_path / 'checkpoints/00_semantic_00000001'}; "
        f"go on with: moedistill run {tmp_path}/recipe.yaml --resume-from {tmp_path} --device cpu"
    )


def test_loading(tmp_path, monkeypatch):
    monkeypatch.setattr(DigitsBackboneConfig, "build", too_much)
    message = said(tiny_recipe([distil()]), tmp_path / "run")
    assert message.startswith("loading the model: out of memory (")
    ways = "experts.semantic.kind: lora in place of full, backbone.dtype: bfloat16"
    assert message.endswith(f"; try {ways}, or use a device with more")
    assert not (tmp_path / "run").exists()


def lost(reason, monkeypatch):
    """A step that a data worker does not outlive; the recipe."""

    def fail(*_):
        raise RuntimeError(f"DataLoader worker (pid 7) {reason}")

    monkeypatch.setattr(ConsistencyStage, "step", fail)
    return tiny_recipe([distil()], {"training.num_workers": 2})


def test_a_worker_that_is_killed(tmp_path, monkeypatch):
    message = said(lost("is killed by signal: Killed.", monkeypatch), tmp_path)
    assert ", training.num_workers below 2, " in message


def test_a_worker_without_shared_memory(tmp_path, monkeypatch):
    reason = "is killed by signal: Bus error. It is possible that dataloader's workers are out of shared memory."
    assert said(lost(reason, monkeypatch), tmp_path).endswith(
        "; try training.num_workers below 2, or allow more shared memory (/dev/shm); nothing is saved yet; "
        f"begin it anew with: moedistill run {tmp_path}/recipe.yaml --output {tmp_path} --device cpu"
    )


@pytest.mark.parametrize("reason", ["is killed by signal: Segmentation fault.", "exited unexpectedly"])
def test_a_worker_that_breaks_otherwise(reason, tmp_path, monkeypatch):
    with pytest.raises(RuntimeError, match=reason):
        run(lost(reason, monkeypatch), output=tmp_path, device="cpu")


def test_a_bug_stays_one(tmp_path, monkeypatch):
    monkeypatch.setattr(ConsistencyStage, "step", a_bug)
    with pytest.raises(RuntimeError, match="a bug"):
        run(tiny_recipe([distil()]), output=tmp_path, device="cpu")
