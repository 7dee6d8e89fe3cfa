"""The base: how many positions it has, how it ends and begins a text, what it refuses."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import templora
from templora import loading
from templora.errors import InvalidRecipe, MissingExtra, ModelNotFound, UnsupportedModel
from templora.probe import PACKS
from templora.testing import ByteTokenizer, tiny_llama
from tests.architectures import ARCHITECTURES, MORE, POSITIONS, Architecture

BY_NAME = {str(a): a for a in (*ARCHITECTURES, *MORE)}
# Other frequencies from there on, which cached keys do not follow.
LONGROPE: dict[str, Any] = {
    "original_max_position_embeddings": 24,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 4,
        "long_factor": [4.0] * 4,
    },
}


@pytest.mark.parametrize(
    ("architecture", "positions"),
    [
        (BY_NAME["llama"], POSITIONS),
        (BY_NAME["gpt2"], POSITIONS),
        (BY_NAME["mpt"], POSITIONS),
        (Architecture("bloom", BY_NAME["bloom"].values | {"seq_length": 77}), 77),
        (BY_NAME["bloom"], None),
        (Architecture("phi3", BY_NAME["phi3"].values | LONGROPE), 24),
    ],
    ids=["llama", "gpt2", "mpt", "bloom", "bloom-without-limit", "longrope"],
)
def test_the_positions_a_base_was_trained_for_are_found(
    architecture: Architecture, positions: int | None
) -> None:
    assert templora.load(model=architecture.build()).positions == positions


def test_loading_freezes_the_model_and_leaves_dropout_off() -> None:
    model = tiny_llama().train()
    templora.load(model=model)
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())


def test_a_text_begins_with_the_tokenizers_first_token_and_ends_with_the_models() -> None:
    base = templora.load(model=tiny_llama(), tokenizer=ByteTokenizer())
    assert base.prefix_ids == [256]
    assert base.eos_ids == [256]
    assert base.decode(base.encode("naïve – 字")) == "naïve – 字"


def test_several_tokens_may_end_a_document() -> None:
    model = tiny_llama()
    assert model.generation_config is not None
    model.generation_config.eos_token_id = [3, 4]
    assert templora.load(model=model).eos_ids == [3, 4]


def test_what_transformers_takes_is_taken(tmp_path: Path) -> None:
    tiny_llama().bfloat16().save_pretrained(tmp_path)
    with pytest.raises(ModelNotFound, match="tokenizer"):
        templora.load(tmp_path)
    own = ByteTokenizer()
    base = templora.load(tmp_path, tokenizer=own, device=torch.device("cpu"))
    assert base.tokenizer is own
    assert (base.dtype, base.name) == ("float32", str(tmp_path))
    assert templora.load(tmp_path, tokenizer=own, dtype=torch.bfloat16).dtype == "bfloat16"


def test_a_compiled_model_is_told_its_positions() -> None:
    model: Any = torch.compile(tiny_llama(), backend="eager")
    base = templora.load(model=model)
    assert base.runs_rows and base.rotary is not None


def test_a_model_that_cannot_be_differentiated_is_refused() -> None:
    with torch.inference_mode():
        model = tiny_llama()
    with pytest.raises(UnsupportedModel, match="load it outside"):
        templora.load(model=model)


LOADED_IN_LITTLE = """
import resource, sys, templora
templora.load(sys.argv[1])  # what is imported on the way needs memory, too
lines = open("/proc/self/status").read().splitlines()
size = next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmSize"))
resource.setrlimit(resource.RLIMIT_AS, (size + 2**20, size + 2**20))
try:
    templora.load(sys.argv[2])
except templora.TemploraError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_model_that_memory_does_not_hold_is_refused(tmp_path: Path) -> None:
    for name, width in (("small", 32), ("large", 512)):
        tiny_llama(hidden_size=width, intermediate_size=16 * width).save_pretrained(tmp_path / name)
        ByteTokenizer().save_pretrained(tmp_path / name)
    command = [sys.executable, "-c", LOADED_IN_LITTLE, tmp_path / "small", tmp_path / "large"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert f"{tmp_path / 'large'} does not fit on cpu" in done.stdout, done.stderr


def test_a_model_in_the_place_of_a_name_is_told_where_to_go() -> None:
    for wrong in ({"name": tiny_llama()}, {"model": "novelist"}):
        with pytest.raises(InvalidRecipe, match="a loaded model by model="):
            templora.load(**wrong)  # pyright: ignore[reportArgumentType]


def test_a_damaged_model_is_an_error_in_one_line(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path)
    ByteTokenizer().save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ModelNotFound, match="cannot load"):
        templora.load(str(tmp_path))


def test_a_model_in_which_weights_are_missing_is_refused(tmp_path: Path) -> None:
    """transformers would put random numbers there."""
    tiny_llama().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    ByteTokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelNotFound, match=r"not whole: 1 of its weights .*layers\.1\.mlp\.up_proj"):
        templora.load(str(tmp_path))


def test_a_base_in_four_bits_learns_too_and_is_known_again(tmp_path: Path) -> None:
    whole, quantized = templora.load("novelist"), templora.load("novelist", dtype="4bit", device="cpu")
    before, text = quantized.fingerprint(), (Path(__file__).parent.parent / "LICENSE").read_text("utf-8")
    sizes: dict[str, Any] = {"window": 256, "context": 256, "seed": 1}
    found, expected = (templora.score(each, text, tokens=700, **sizes) for each in (quantized, whole))
    assert found.base.perplexity == pytest.approx(expected.base.perplexity, rel=0.05)
    assert found.adapted.perplexity == pytest.approx(expected.adapted.perplexity, rel=0.05)
    assert found.change is not None and found.change < -0.2
    assert quantized.fingerprint() == before
    with quantized.session(dir=tmp_path / "s", **sizes) as session:
        session.read(text[:600])
        weights = session.adapter.flat.clone()
    with templora.resume(tmp_path / "s", device="cpu") as session:
        assert session.base.dtype == "4bit"
        assert torch.equal(session.adapter.flat, weights)
    quantized.model.save_pretrained(tmp_path / "stored")
    quantized.tokenizer.save_pretrained(tmp_path / "stored")
    assert templora.load(str(tmp_path / "stored"), device="cpu").dtype == "4bit"


def test_four_bits_that_a_cpu_has_packed_for_writing_alone_are_refused() -> None:
    model, tokenizer = loading.load_pretrained("novelist", "4bit", "cpu")
    if not any(getattr(module, PACKS, False) for module in model.modules()):
        pytest.skip("bitsandbytes packs nothing on this CPU")
    with torch.no_grad():
        model(torch.tensor([[1, 2, 3]]))
    with pytest.raises(UnsupportedModel, match="in a form that has no gradients; load it afresh"):
        templora.load(model=model, tokenizer=tokenizer)


def test_a_model_on_several_devices_is_refused() -> None:
    model = tiny_llama()
    model.model.layers[1].to("meta")
    with pytest.raises(UnsupportedModel, match="lies on cpu, meta; load all of it on one device"):
        templora.load(model=model)


def test_without_bitsandbytes_four_bits_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r'pip install "templora\[quantize\]"'):
        templora.load("novelist", dtype="4bit", device="cpu")
