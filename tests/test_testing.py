"""The public fakes are real models: they run, cache and learn; only their size is a fake."""

from typing import Any

import torch

import templora
from templora.events import ChunkLearned, Token
from templora.testing import END, ByteTokenizer, ScriptedModel, tiny_llama

CIRCLE = {i: (i + 1) % 250 for i in range(257)}


def test_a_byte_tokenizer_has_one_token_for_each_byte() -> None:
    tokenizer = ByteTokenizer()
    assert len(tokenizer) == 257
    text = "naïve – “字” 👧\r\n\t\0"
    assert len(tokenizer.encode(text, add_special_tokens=False)) == len(text.encode())
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
    assert tokenizer.convert_tokens_to_ids(END) == tokenizer.bos_token_id == tokenizer.eos_token_id == 256


def test_a_tiny_llama_is_the_same_for_the_same_seed_and_leaves_torchs_generator_alone() -> None:
    before = torch.random.get_rng_state()
    prints = [templora.load(model=tiny_llama(seed)).fingerprint() for seed in (0, 0, 1)]
    assert prints[0] == prints[1] != prints[2]
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_tiny_llama_takes_changes_to_its_config() -> None:
    model = tiny_llama(num_hidden_layers=1, max_position_embeddings=64)
    assert model.config.num_hidden_layers == 1
    assert templora.load(model=model).positions == 64


def test_a_scripted_model_says_what_its_script_says() -> None:
    base = templora.load(model=ScriptedModel(CIRCLE), tokenizer=ByteTokenizer())
    session = base.session(seed=1, window=16, chunk=8, context=16, guard=False, learning_rate=1e-4)
    session.extend([5], "")
    events = list(session.write(30, temperature=0.0, repetition_penalty=1.0))
    assert [e.id for e in events if isinstance(e, Token)] == list(range(6, 36))
    assert any(isinstance(e, ChunkLearned) for e in events)


def test_a_scripted_model_generates_with_transformers_own_loop() -> None:
    ids = torch.tensor([[5, 6]])
    model: Any = ScriptedModel(CIRCLE)
    written = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
    assert written[0].tolist() == [5, 6, 7, 8, 9, 10]


def test_a_fake_can_be_saved_and_loaded_as_any_other_model(tmp_path: object) -> None:
    tiny_llama().save_pretrained(str(tmp_path))
    ByteTokenizer().save_pretrained(str(tmp_path))
    base = templora.load(str(tmp_path))
    assert base.fingerprint() == templora.load(model=tiny_llama()).fingerprint()
    assert base.encode("é") == ByteTokenizer().encode("é", add_special_tokens=False)
