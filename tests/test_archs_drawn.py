"""Slow: configs that nobody chose, beside transformers' own classes.

`JAXFT_EXAMPLES=20 pytest tests/test_archs_drawn.py -m slow` draws so many other ones of each family.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, note, settings
from hypothesis import strategies as st

from arch_cases import families, tokens
from drawn_configs import configs
from models import decoder_of, train_everything
from test_archs_live import compare_gradients_and_logits, torch_model

pytestmark = pytest.mark.slow
_MORE = os.environ.get("JAXFT_EXAMPLES")
_WAYS = (("none", [[0], [1]]), ("full,unroll=all", [[0, 1]]))


@pytest.mark.parametrize("family", families())
@settings(
    max_examples=int(_MORE or 2),
    derandomize=_MORE is None,
    database=None,
    deadline=None,
    phases=(Phase.generate,),  # a smaller config that fails as well would take minutes to find
    suppress_health_check=(HealthCheck.too_slow,),
)
@given(data=st.data())
def test_logits_and_gradients_of_drawn_configs_equal_transformers(family: str, data: st.DataObject) -> None:
    config: dict[str, Any] = data.draw(configs(family))
    remat, rows = data.draw(st.sampled_from(_WAYS))
    note(str(config))
    model, decoder = torch_model(config), train_everything(decoder_of(config, remat=remat))
    compare_gradients_and_logits(decoder, model, config, tokens(config), rows)
