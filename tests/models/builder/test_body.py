# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Modules that say what their head receives."""

import pytest
import torch
from transformers import PreTrainedConfig

from tests.models.builder.models import PLAIN_FIELDS, CappedGPT, PlainGPT
from vllm.model_executor.models.builder.body import Body
from vllm.model_executor.models.builder.spec import BuilderOptions
from vllm.training import check_servable
from vllm.training.parity.score import Scorer

IDS = [5, 3, 200, 7, 7, 12]
CONFIG = PreTrainedConfig(**PLAIN_FIELDS)


class HalfGPT(PlainGPT):
    """Has no `logits`, so that its head is found; `forward` is not what is served."""

    hidden_states = CappedGPT.hidden_states

    def forward(self, input_ids, positions):
        raise AssertionError("not called")


@pytest.mark.parametrize(
    ("kind", "head"), [(CappedGPT, "logits"), (HalfGPT, "to_vocab")]
)
@torch.no_grad()
def test_the_methods_are_called(kind, head):
    torch.manual_seed(0)
    model = kind(CONFIG)
    scorer = Scorer(model)
    assert scorer.body.head_path == head
    (rows,) = scorer.full_logprobs(scorer.hidden_states([IDS], [range(len(IDS))]), 1.0)
    ids, positions = torch.tensor([IDS]), torch.arange(len(IDS))[None]
    plain = CappedGPT(CONFIG) if kind is CappedGPT else PlainGPT(CONFIG)
    plain.load_state_dict(model.state_dict())
    expected = plain(ids, positions)[0].log_softmax(-1)
    torch.testing.assert_close(rows, expected, atol=1e-4, rtol=1e-4)
    chosen = torch.tensor(IDS)
    picked = scorer.token_logprobs(
        scorer.hidden_states([IDS], [range(len(IDS))]), chosen, 1.0
    )
    assert torch.equal(picked, rows.gather(1, chosen[:, None])[:, 0])
    check_servable(model, CONFIG)
    assert dict(model.named_modules()).keys() == dict(plain.named_modules()).keys()


def test_a_method_that_mixes_tokens_is_refused():
    class Mixing(CappedGPT):
        def hidden_states(self, input_ids, positions):
            return super().hidden_states(input_ids, positions).cumsum(1)

    with pytest.raises(ValueError, match=r"\(Mixing.hidden_states\) mixes tokens"):
        check_servable(Mixing(CONFIG), CONFIG)


def test_wrong_methods_are_refused():
    with pytest.raises(TypeError, match="names the head 'to_vocab', and CappedGPT has"):
        Body(CappedGPT(CONFIG), BuilderOptions(head="to_vocab"), "b").find_head("b")

    class Tuple(CappedGPT):
        def hidden_states(self, input_ids, positions):
            return (super().hidden_states(input_ids, positions),)

    with pytest.raises(TypeError, match="hidden_states .* returned tuple"):
        check_servable(Tuple(CONFIG), CONFIG)


class Doubled(CappedGPT):
    """Trains other logits than it serves."""

    def forward(self, input_ids, positions):
        return 2 * super().forward(input_ids, positions)


class CappedAfterHead(PlainGPT):
    """Caps its logits where no engine does."""

    hidden_states = CappedGPT.hidden_states

    def forward(self, input_ids, positions):
        return super().forward(input_ids, positions).clamp(-0.01, 0.01)


@pytest.mark.parametrize(
    ("kind", "served"), [(Doubled, "logits"), (CappedAfterHead, "to_vocab")]
)
def test_a_forward_that_is_not_what_is_served_is_refused(kind, served):
    torch.manual_seed(0)
    with pytest.raises(ValueError, match=rf"return {served}\(hidden_states\(...\)\)"):
        check_servable(kind(CONFIG), CONFIG)


def test_a_forward_that_cannot_be_compared_is_warned_of(caplog_vllm):
    check_servable(HalfGPT(CONFIG), CONFIG)
    assert "could not be compared with the method hidden_states" in caplog_vllm.text
    assert "AssertionError: not called" in caplog_vllm.text
