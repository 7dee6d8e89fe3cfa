"""llama.cpp's files: what is read from one is the model that it was made from."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter, quants

import templora
from templora import loading
from templora.base import Base
from templora.errors import MissingExtra, ModelNotFound, TemploraError, UnsupportedModel

TEXT = "It was the last night of October – naïve, said the keeper, 字.\n\nAnd he had 365 stairs."
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def write_gguf(
    path: Path, base: Base, kind: str = "F32", architecture: str = "llama", without: str = ""
) -> Path:
    """As llama.cpp's converter writes a Llama. kind: of its matrices. without: the tensor to leave out."""
    config, writer = base.model.config, GGUFWriter(path, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    rules = json.loads(base.tokenizer.backend_tokenizer.to_str())["model"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(sorted(rules["vocab"], key=rules["vocab"].get))
    writer.add_token_types([3] + [1] * (config.vocab_size - 1))  # 3: control, 1: plain
    writer.add_token_merges([" ".join(pair) for pair in rules["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_add_bos_token(False)

    def add(name: str, values: np.ndarray[Any, Any]) -> None:
        if name == without:
            return
        if values.ndim == 1 or kind == "F32":
            writer.add_tensor(name, values)
        else:
            packed = GGMLQuantizationType[kind]
            writer.add_tensor(name, quants.quantize(values, packed), raw_dtype=packed)

    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    add("token_embd.weight", base.model.model.embed_tokens.weight.numpy())
    add("output_norm.weight", base.model.model.norm.weight.numpy())
    for number, block in enumerate(base.model.model.layers):
        for theirs, name in NAMES.items():
            values = block.get_submodule(theirs).weight.numpy()
            if name in heads:  # llama.cpp turns neighbours, transformers halves
                values = (
                    values.reshape(heads[name], 2, -1, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
                )
            add(f"blk.{number}.{name}.weight", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def novelist() -> Base:
    return templora.load("novelist", device="cpu")


@pytest.fixture(scope="module")
def file(novelist: Base, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "novelist.gguf", novelist)


def test_it_is_the_model_it_was_made_from(novelist: Base, file: Path) -> None:
    base, ids = templora.load(str(file), device="cpu"), novelist.encode(TEXT)
    assert base.dtype == "float32"
    assert base.encode(TEXT) == ids
    assert base.decode(ids) == TEXT
    assert base.eos_ids == novelist.eos_ids
    rows = torch.tensor([ids])
    with torch.no_grad():
        assert torch.equal(base.model(rows).logits, novelist.model(rows).logits)
    assert templora.load(str(file), device="cpu", dtype="bfloat16").dtype == "bfloat16"


def test_a_quantised_one_is_unpacked_and_learns(novelist: Base, tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "novelist-Q8_0.GGUF", novelist, "Q8_0")
    assert file.stat().st_size < 12_000_000
    base, text = (
        templora.load(str(file), device="cpu"),
        (Path(__file__).parent.parent / "LICENSE").read_text("utf-8"),
    )
    sizes: dict[str, Any] = {"window": 256, "context": 256, "seed": 1, "tokens": 500, "start": "random"}
    found, expected = (templora.score(each, text, **sizes) for each in (base, novelist))
    assert found.base.perplexity == pytest.approx(expected.base.perplexity, rel=0.02)
    assert found.adapted.perplexity == pytest.approx(expected.adapted.perplexity, rel=0.02)
    assert found.change is not None
    assert found.change < -0.2


def test_a_session_finds_its_file_again(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(file.parent)
    with templora.load(file.name, device="cpu").session(dir=tmp_path / "s", window=64, context=64) as session:
        session.read(TEXT)
    monkeypatch.chdir(tmp_path)
    with templora.resume(tmp_path / "s", device="cpu") as session:
        assert session.text == TEXT


@pytest.mark.parametrize(
    ("name", "dtype", "error", "says"),
    [
        ("novelist-00001-of-00003.gguf", None, UnsupportedModel, "llama-gguf-split --merge"),
        ("novelist.gguf", "4bit", UnsupportedModel, "leave out --dtype 4bit"),
        ("nothing.gguf", None, ModelNotFound, "no file .*nothing.gguf"),
        ("", None, ModelNotFound, r"no config\.json; name the file, as in .*novelist"),
    ],
)
def test_what_cannot_be_read_says_why(
    file: Path, name: str, dtype: str | None, error: type[TemploraError], says: str
) -> None:
    part = file.parent / "novelist-00001-of-00003.gguf"
    if not part.exists():
        shutil.copy(file, part)
    with pytest.raises(error, match=says):
        templora.load(str(file.parent / name), device="cpu", dtype=dtype)


def test_damaged_and_strange_files_are_errors_in_one_line(novelist: Base, file: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.gguf"
    short.write_bytes(file.read_bytes()[:-1_000_000])
    lacking = write_gguf(tmp_path / "lacking.gguf", novelist, without="blk.3.ffn_up.weight")
    strange = write_gguf(tmp_path / "strange.gguf", novelist, architecture="starfish")
    for path, says in (
        (short, "cannot load"),
        (lacking, r"not whole: 1 of its weights .* model\.layers\.3\.mlp\.up_proj\.weight"),
        (strange, "starfish"),
    ):
        with pytest.raises(ModelNotFound, match=says) as caught:
            templora.load(str(path), device="cpu")
        assert "\n" not in str(caught.value)


def test_without_gguf_it_says_what_to_install(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r'pip install "templora\[gguf\]"'):
        templora.load(str(file), device="cpu")
