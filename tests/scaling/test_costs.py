"""Cost models: units, the price of a width, and vendor rates against each other."""
from __future__ import annotations

import numpy as np
import pytest

from scaling.costs import DEVICES, cost_model, speedups

ALL = ("flops", "bits", "bit_operations", *DEVICES, "speedups:8=2")


@pytest.mark.parametrize("name", ALL)
def test_sixteen_bits_cost_six_flop_per_parameter_and_token_everywhere(name):
    model = cost_model(name)
    assert model.training(1e9, 2e10) == pytest.approx(1.2e20, rel=1e-12)
    assert model.inference(1e9, 3e10) == pytest.approx(6e19, rel=1e-12)
    assert model.training(1e9, 2e10, {"weights_bits": 16, "activations_bits": 16, "output_gradients_bits": 16}) == pytest.approx(1.2e20, rel=1e-12)


@pytest.mark.parametrize(("name", "precision", "share"), [
    ("flops", {"bits": 4}, 1.0),
    ("bits", {"bits": 4}, 4 / 16),
    ("bits", {"weights_bits": 4}, 1.0),  # 16-bit activations: no product gets narrower
    ("bits", {"weights_bits": 4, "activations_bits": 8}, 8 / 16),
    ("bits", {"weights_bits": 4, "activations_bits": 4, "output_gradients_bits": 16}, (4 + 16 + 16) / 48),
    ("bit_operations", {"bits": 4}, 1 / 16),
    ("bit_operations", {"weights_bits": 4, "activations_bits": 8}, (4 * 8 + 4 * 8 + 8 * 8) / (3 * 256)),
    ("h100", {"bits": 8}, 0.5), ("h100", {"bits": 5}, 0.5), ("h100", {"bits": 9}, 1.0),
    ("a100", {"bits": 4}, 0.25), ("a100:float", {"bits": 8}, 1.0), ("a100:int", {"bits": 8}, 0.5),
    ("b200", {"bits": 4}, 0.25), ("b200:float", {"bits": 6}, 0.5), ("b200:int", {"bits": 4}, 0.5),
    ("v5p", {"bits": 8}, 0.5), ("v5p:float", {"bits": 8}, 1.0), ("v6e:int", {"bits": 8}, 0.5),
    ("speedups:4=2,8=1.6", {"bits": 4}, 1 / 2), ("speedups:4=2,8=1.6", {"bits": 6}, 1 / 1.6), ("speedups:4=2,8=1.6", {"bits": 12}, 1.0),
])
def test_price_of_a_precision(name, precision, share):
    assert cost_model(name).training(1e9, 1e9, precision) == pytest.approx(6e18 * share, rel=1e-4 if name == "h100" else 1e-12)  # 1978.9 is not twice 989.4


def test_bits_are_kumars_cost():
    """C = (6/16) N D P."""
    bits = np.array([2.0, 7.0, 12.0])
    np.testing.assert_allclose(cost_model("bits").training(1e8, 1e9, {"bits": bits}), 6 / 16 * 1e8 * 1e9 * bits)


def test_a_device_says_how_long():
    """6 * 7e9 * 1.4e11 FLOP of which each H100 does 989.4e12 in a second, at 8 bits in half of the time."""
    h100 = cost_model("h100")
    assert h100.seconds(h100.training(7e9, 1.4e11)) == pytest.approx(5.88e21 / 989.4e12)
    assert h100.seconds(h100.training(7e9, 1.4e11, {"bits": 8})) == pytest.approx(5.88e21 / 1978.9e12, rel=1e-4)
    assert cost_model("bits").seconds(1e20) is None


def test_rates_are_dense_ones():
    """A datasheet's number with sparsity is twice the rate; halving the width doubles a dense rate, up to what vendors round."""
    for name, device in DEVICES.items():
        assert device.source and device.rates["bfloat16"][1] < 2.3e15, name
        if "int8" in device.rates:
            assert device.rates["int8"][1] == pytest.approx(2 * device.rates["bfloat16"][1], rel=1e-3), name


@pytest.mark.parametrize(("spec", "message"), [
    ("v100", "cost model 'v100': unknown; accepted are flops, bits, bit_operations, a100"),
    ("bits:4", "cost model 'bits:4': unknown"), ("h100:fp", "cost model 'h100:fp': unknown; devices are a100"),
    ("speedups:", "'' is not WIDTH=FACTOR"), ("speedups:4", "'4' is not WIDTH=FACTOR"), ("speedups:4=0", "4=0: need a positive width"),
])
def test_unknown_models_are_refused(spec, message):
    with pytest.raises(ValueError, match="^cost model") as caught:
        cost_model(spec)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_width_without_a_rate_is_refused():
    with pytest.raises(ValueError, match="cost model v6e: has no rate for 32 bits; the widths that it has are 8, 16"):
        cost_model("v6e").training(1e6, 1e6, {"bits": 32})
    assert speedups({32: 0.2}).training(1.0, 1.0, {"bits": 32}) == pytest.approx(30.0)


@pytest.mark.parametrize(("name", "dtype", "units", "per_clock", "gigahertz"), [
    # tensor cores x multiply-adds of one per clock, and CUDA cores; boost clocks of the whitepapers
    ("a100", "bfloat16", 108 * 4, 256, 1.41), ("a100", "int8", 108 * 4, 512, 1.41), ("a100", "int4", 108 * 4, 1024, 1.41), ("a100", "tf32", 108 * 4, 128, 1.41),
    ("a100", "float32", 108 * 64, 1, 1.41), ("h100", "bfloat16", 132 * 4, 512, 1.83), ("h100", "float8", 132 * 4, 1024, 1.83), ("h100", "int8", 132 * 4, 1024, 1.83),
    ("h100", "tf32", 132 * 4, 256, 1.83), ("h100", "float32", 132 * 128, 1, 1.98),
])
def test_whitepaper_rates_follow_from_units_and_clocks(name, dtype, units, per_clock, gigahertz):
    assert DEVICES[name].rates[dtype][1] == pytest.approx(2 * units * per_clock * gigahertz * 1e9, rel=1e-3)


def test_a_rate_that_is_not_certain_is_told_where_it_is_used():
    v5p = cost_model("v5p")
    assert [text[:10] for text in v5p.doubts_of({"bits": 8})] == ["v5p's INT8"] == [text[:10] for text in v5p.doubts_of({"weights_bits": 4, "activations_bits": 8})]
    assert v5p.doubts_of({"bits": 16}) == [] == v5p.doubts_of({"weights_bits": 4})  # 16-bit activations: no product is an INT8 one
    assert cost_model("v5p:float").doubts_of({"bits": 8}) == [] == cost_model("h100").doubts_of({"bits": 8})
    assert cost_model("b200").doubts_of({"bits": 8}) == [] and "75 TFLOPS" in cost_model("b200").doubts_of({"bits": 32})[0]
    assert cost_model("v6e:float").training(1e9, 1e9, {"bits": 8}) == cost_model("v6e").training(1e9, 1e9, {"bits": 16})
