"""torch.compile of a pipeline with experts: the same frames, one graph for each expert, or a refusal by name."""

import copy
import pickle

import pytest
import torch
from diffusers import DiffusionPipeline, WanTransformer3DModel
from saved_pipelines import PROMPT, VIDEO, pipeline_recipe, save_pipeline
from torch._dynamo.testing import CompileCounterWithBackend

from moedistill.errors import UserError
from moedistill.integrations.diffusers.apply import apply
from moedistill.integrations.diffusers.loading import keep_float32_islands
from moedistill.runs.loop import run


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a family's pipeline, and that of a finished run on it, made once."""
    made = {}

    def find(family, dtype="float32"):
        if (family, dtype) not in made:
            folder = save_pipeline(tmp_path_factory.mktemp(family) / "pipeline", family)
            recipe = pipeline_recipe(family, folder)
            recipe["backbone"]["dtype"] = dtype
            made[family, dtype] = folder, run(recipe, output=tmp_path_factory.mktemp("run"), device="cpu").output
        return made[family, dtype]

    return find


@pytest.fixture
def backend():
    """Counts what it compiles."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield CompileCounterWithBackend("eager")
    torch._dynamo.reset()


def load(folder, dtype="float32"):
    pipeline = DiffusionPipeline.from_pretrained(folder, dtype=getattr(torch, dtype))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def latents(pipeline):
    noise = torch.Generator().manual_seed(3)
    return pipeline(PROMPT, **VIDEO, generator=noise, output_type="latent").frames.float()


def wrapped(pipeline, backend):
    pipeline.transformer = torch.compile(pipeline.transformer, backend=backend, fullgraph=True)


def in_place(pipeline, backend):
    pipeline.transformer.compile(backend=backend)


def blocks(pipeline, backend):
    pipeline.transformer.compile_repeated_blocks(backend=backend, fullgraph=True)


@pytest.mark.parametrize(
    ("family", "dtype", "compiling", "graphs"),
    [
        ("wan", "float32", wrapped, 3),  # semantic, detail, and what an expert has for an unconditional pass
        ("cogvideox_2b", "float32", in_place, 2),
        ("wan", "bfloat16", blocks, 2),  # one for all blocks of each; equal bits say that islands are islands
    ],
)
def test_a_compiled_pipeline_gives_the_same(family, dtype, compiling, graphs, trained, backend):
    """A graph for each expert, without a break, whatever number of steps it serves."""
    folder, source = trained(family, dtype)
    pipeline = load(folder, dtype)
    network, teacher = pipeline.transformer, latents(pipeline)
    with apply(pipeline, source):
        wanted = latents(pipeline)  # guided by default: Wan asks for a second pass, CogVideoX for both in one
        compiling(pipeline, backend)
        for _ in range(2):
            assert (latents(pipeline) - wanted).abs().max() <= 1e-6
        assert backend.frame_count == graphs
        assert not torch._dynamo.utils.counters["graph_break"]
        with pytest.raises(UserError, match="carries experts already"):
            apply(pipeline, source)
    assert (teacher - wanted).abs().max() > 1e-3
    assert pipeline.transformer is network
    assert torch.equal(latents(pipeline), teacher)


@pytest.mark.parametrize("compiling", [wrapped, in_place, blocks])
def test_what_was_compiled_before_is_refused(compiling, trained, backend):
    """Experts would change it, or, in a network of their own, run uncompiled without a word."""
    folder, source = trained("wan")
    pipeline = load(folder)
    compiling(pipeline, backend)
    with pytest.raises(
        UserError, match=r"compiled already.*apply the experts first, then compile: pipeline.transformer"
    ):
        apply(pipeline, source)


def test_equal_blocks_share_a_graph(backend):
    """However many there are: of each class that stays in float32, one class is made."""
    network = WanTransformer3DModel(
        num_attention_heads=1, attention_head_dim=12, num_layers=12, ffn_dim=12, freq_dim=12, text_dim=12,
        in_channels=4, out_channels=4,
    ).bfloat16().eval()  # fmt: skip
    keep_float32_islands(network)
    first, *others = network.blocks
    assert type(first.norm1).__mro__[1].__name__ == "_Island"
    assert {type(block.norm1) for block in others} == {type(first.norm1)}
    given = {
        "hidden_states": torch.ones(1, 4, 1, 4, 4, dtype=torch.bfloat16), "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": torch.ones(1, 3, 12, dtype=torch.bfloat16),
    }  # fmt: skip
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        wanted = network(**given).sample
        network.compile_repeated_blocks(backend=backend, fullgraph=True)
        assert torch.equal(network(**given).sample, wanted)
    assert backend.frame_count == 1


def test_islands_are_copied_and_pickled_with_their_network(trained):
    network = load(trained("wan")[0]).transformer
    keep_float32_islands(network)
    for again in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        embedder = again.condition_embedder.time_embedder
        assert type(embedder) is type(network.condition_embedder.time_embedder)
        with torch.autocast("cpu", torch.bfloat16):
            assert embedder(torch.ones(1, 32)).dtype == torch.float32
        same = zip(again.state_dict().values(), network.state_dict().values(), strict=True)
        assert all(torch.equal(one, other) for one, other in same)


def test_an_island_keeps_its_class_s_name_and_gives_it_back(trained):
    network = load(trained("wan")[0]).transformer
    embedder = network.condition_embedder.time_embedder
    cls, names = type(embedder), list(network.state_dict())
    undo = keep_float32_islands(network)
    assert keep_float32_islands(network) == []
    assert (type(embedder).__name__, type(embedder).__module__) == (cls.__name__, cls.__module__)
    assert isinstance(embedder, cls)
    assert list(network.state_dict()) == names
    with torch.autocast("cpu", torch.bfloat16):
        assert embedder(torch.ones(1, 32)).dtype == torch.float32
    for each in undo:
        each()
    assert type(embedder) is cls
    with torch.autocast("cpu", torch.bfloat16):
        assert embedder(torch.ones(1, 32)).dtype == torch.bfloat16
