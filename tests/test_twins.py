"""Models of a converted one's size."""

from __future__ import annotations

import torch
from conftest import converted
from torch import nn

from fffconvert.fff import FFF
from fffconvert.quantization import quantize
from fffconvert.twins import without_ffns


def test_the_limit_has_no_ffn_at_all(classifier, tokenizer):
    student = converted(classifier, tokenizer)
    limit = without_ffns(student)
    assert not any(isinstance(module, FFF) for module in limit.modules())
    assert isinstance(limit.bert.encoder.layer[0].intermediate, nn.Identity)
    assert limit(input_ids=torch.tensor([[2, 7, 3]])).logits.shape == (1, 2)
    assert without_ffns(quantize(student)).config.int8_projections
