"""A filled cache is as deep as asked in every sequence, whichever way it was filled, and a step goes on from there."""

from __future__ import annotations

import pytest
from support import VOCAB, write_tiny_model

from hylra_gguf import engine, fill
from hylra_gguf.errors import HylraError, ModelFileError
from hylra_gguf.session import Context, Model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    with Model(str(write_tiny_model(tmp_path_factory.mktemp("tiny") / "tiny.gguf"))) as model:
        yield model


@pytest.mark.parametrize("depth, copies", [(0, False), (256, False), (257, True), (640, True)])
@pytest.mark.parametrize("flash_attn", [True, False])
def test_copies_fill_one_sequence_with_as_many_cells_as_text(model, depth, copies, flash_attn):
    tokens, _ = fill.make_tokens(model, 641)
    with Context(model, 641, flash_attn=flash_attn, scratch=True) as copied, Context(model, 641, flash_attn=flash_attn) as read:
        assert fill.fill(copied, tokens, depth, synthetic=True) is copies
        assert fill.fill(read, tokens, depth, synthetic=False) is False
        sizes = [model.api.llama_state_seq_get_size(context.ctx, 0) for context in (copied, read)]
        assert sizes[0] == sizes[1] and last_position(copied, 0) == depth - 1 and last_position(copied, 1) == -1
        copied.step(tokens[0], depth)
        assert last_position(copied, 0) == depth


def test_every_sequence_gets_the_text_in_a_cache_of_its_own(model):
    tokens, _ = fill.make_tokens(model, 301)
    with Context(model, 301, n_seq=3) as context:
        fill.fill(context, tokens, 300, synthetic=False)
        context.step(tokens[300], 300)
        assert [last_position(context, seq) for seq in range(3)] == [300] * 3
        logits = context.logits(3)
        assert (logits[0] == logits[1]).all() and (logits[0] == logits[2]).all() and logits[0].std() > 0


def test_a_cache_that_cannot_shift_is_read(model, monkeypatch):
    monkeypatch.setattr(model.api, "llama_memory_can_shift", lambda memory: False)
    with Context(model, 400, scratch=True) as context:
        assert fill.fill(context, [1] * 400, 400, synthetic=True) is False and last_position(context, 0) == 399


def test_a_failed_copy_starts_again_with_text(model, monkeypatch):
    monkeypatch.setattr(model.api, "llama_state_seq_set_data", lambda *args: 0)
    with Context(model, 400, scratch=True) as context:
        assert fill.fill(context, [1] * 400, 400, synthetic=True) is False and last_position(context, 0) == 399


def test_copies_need_a_scratch_sequence(model):
    with Context(model, 300, n_seq=2) as context, pytest.raises(HylraError, match="for one sequence, not 2; fill with text"):
        fill.fill(context, [1] * 300, 300, synthetic=True)


def test_a_model_without_tokenizer_gets_random_tokens(model):
    tokens, kind = fill.make_tokens(model, 500)
    assert kind == "random" and len(tokens) == 500 and len(set(tokens)) > VOCAB // 2 and 0 <= min(tokens) <= max(tokens) < VOCAB
    assert fill.make_tokens(model, 500)[0] == tokens
    with pytest.raises(ModelFileError, match="tiny.gguf: this model has no tokenizer"):
        model.tokenize("text")


def last_position(context: Context, seq: int) -> int:
    return engine.activate().llama_memory_seq_pos_max(context.memory, seq)
