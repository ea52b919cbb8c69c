"""docs/scale_propagation.md says what the code does."""
from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import trainer
from docs import scale_propagation as page
from trainer import ScaledArray, propagate_scales, scaled, unscaled


def test_page_is_current():
    assert (page.HERE / "scale_propagation.md").read_text(encoding="utf-8") == page.page(), "run python -m docs.scale_propagation"


def test_the_example_of_a_rule_runs():
    example = re.search(r"```python\n(@trainer\.scale_rule.*?)```", page.page(), re.DOTALL).group(1)
    found = {"trainer": trainer, "jax": jax, "ScaledArray": ScaledArray, "unscaled": unscaled}
    exec(example, found)  # noqa: S102 - our own page
    x = np.float32([[1.0, 2.0, 4.0]])
    got = propagate_scales(found["softmax"], on_fallback="raise")(scaled(x))
    np.testing.assert_allclose(unscaled(got), jax.nn.softmax(x), rtol=1e-6)
    assert got.exponent == 0


@pytest.mark.slow
def test_the_figure_shows_data_near_unit_scale():
    """What the page says of it: values of the backward pass below float16's normal numbers, data within 2**-8 and 2**8."""
    points = page.sizes()
    assert min(value for value, _, backward in points if backward) < -14
    assert all(-8 <= data <= 8 for _, data, _ in points)
    assert len(points) > 200 and jnp.isfinite(jnp.asarray([p[:2] for p in points])).all()
