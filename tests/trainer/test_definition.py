"""Sweeps as data: what a file and a command line make of runs, and what is refused."""
from __future__ import annotations

import pytest

from trainer.cli import sweep_configs
from trainer.sweep import definition

TINY = "common: data=synthetic batch_size=4 seq_len=16 schedule=constant\n"


@pytest.fixture
def sweep(tmp_path):
    """sweep(text, *overrides): the configs of a sweep file with that text."""

    def compose(text: str, *overrides: str):
        (tmp_path / "sweep").mkdir(exist_ok=True)
        (tmp_path / "sweep" / "mine.yaml").write_text(TINY + text)
        return sweep_configs(["sweep=mine", *overrides], str(tmp_path))[0]

    return compose


def test_axes_multiply_and_zips_go_together(sweep):
    configs = sweep("axes: {seed: range(2), precision.bits: [3, 4], precision: int}\n"
                    "zip:\n  - {model: [2k, 6k, 14k], optimizer.lr: [0.03, 0.02, 0.01], steps: [5, 6, 7]}\n")  # fmt: skip
    found = {(c.model.name, c.optimizer.lr, c.steps, c.precision.weights.first.bits, c.seed) for c in configs}
    sizes = {("2k", 0.03, 5), ("6k", 0.02, 6), ("14k", 0.01, 7)}
    assert len(configs) == 12 and found == {(*size, bits, seed) for size in sizes for bits in (3, 4) for seed in (0, 1)}
    assert {c.data.name for c in configs} == {"synthetic"} and {c.batch_size for c in configs} == {4}


def test_lines_are_multiplied_by_axes_too(sweep):
    configs = sweep("runs: [model=2k steps=3, model=6k steps=4]\naxes: {seed: [7, 8]}\n")
    assert [(c.model.name, c.steps, c.seed) for c in configs] == [("2k", 3, 7), ("2k", 3, 8), ("6k", 4, 7), ("6k", 4, 8)]


def test_the_command_line_takes_the_place_of_an_axis_and_of_part_of_a_zip(sweep):
    text = "axes: {seed: range(3), steps: 3}\nzip:\n  - {model: [2k, 6k], optimizer.lr: [0.03, 0.02]}\n"
    assert {(c.model.name, c.optimizer.lr, c.seed) for c in sweep(text, "seed=9", "optimizer.lr=0.5")} == {("2k", 0.5, 9), ("6k", 0.5, 9)}
    assert {(c.model.name, c.optimizer.lr) for c in sweep(text, "model=14k", "optimizer.lr=0.1,0.2", "seed=0")} == {("14k", 0.1), ("14k", 0.2)}


@pytest.mark.parametrize("line, left", [
    ("model=6k precision.bits=2", {("2k", 2), ("2k", 4), ("6k", 4)}), ("model=2k,6k precision.bits!=4", {("2k", 4), ("6k", 4)}),
    ("precision.bits<4 n_params>3000", {("2k", 2), ("2k", 4), ("6k", 4)}), ("tokens>=1e9", {("2k", 2), ("2k", 4), ("6k", 2), ("6k", 4)}),
])  # fmt: skip
def test_what_meets_all_conditions_of_a_line_is_left_out(sweep, line, left):
    configs = sweep(f"axes: {{model: [2k, 6k], precision: int, precision.bits: [2, 4], steps: 3}}\nexclude: ['{line}']\n")
    assert {(c.model.name, c.precision.weights.first.bits) for c in configs} == left


def test_derived_quantities_are_those_of_the_run_table(sweep):
    (config,) = sweep("axes: {model: 2k, steps: 3}\n")
    assert [definition.DERIVED[name](config) for name in ("tokens", "steps")] == [3 * 4 * 16, 3]
    # 6 (parameters + vocabulary * width, of the head) a token, and attention: 12 layers * width * length (the arithmetic of `test_sweep`).
    m = config.model
    matmuls = m.num_layers * (4 * m.d_model**2 + 3 * m.d_model * m.d_ff) + config.data.vocab_size * m.d_model
    assert definition.DERIVED["flops"](config) == 192 * (6 * matmuls + 12 * m.num_layers * m.d_model * 16)


@pytest.mark.parametrize("text, words", [
    ("axis: {seed: 3}\n", ["mine.yaml", "'axis'", "common, runs, axes, zip, exclude, budget_flops"]),
    ("axes: [seed]\n", ["axes=['seed']", "map keys to values"]),
    ("axes: {steps: 3}\nzip:\n  - {model: [2k, 6k], optimizer.lr: [1, 2, 3]}\n", ["2 values of model, 3 values of optimizer.lr", "as many of each"]),
    ("runs: [model=2k steps=3 seed=1]\naxes: {seed: [1, 2]}\n", ["seed is in a line and in axes or zip"]),
    ("axes: {model: 2k, steps: 3}\nexclude: [seed=1]\n", ["exclude asks for seed", "the keys that it sets"]),
    ("axes: {model: 2k, steps: 3}\nexclude: [model>3]\n", ["exclude compares model=2k with 3"]),
    ("axes: {model: 2k, steps: 3}\nexclude: [steps]\n", ["exclude has 'steps'", "KEY<NUMBER"]),
    ("axes: {model: 2k, steps: 3}\nexclude: [steps=3]\n", ["no runs left"]),
    ("axes: {model: [2k, 6k], steps: 3}\nbudget_flops: 1e6\n", ["FLOPs, more than its budget_flops=1e+06"]),
    ("axes: {model: 2k, steps: 3}\nbudget_flops: lots\n", ["budget_flops='lots'", "above 0"]),
])  # fmt: skip
def test_refusals_are_one_line(sweep, text, words):
    with pytest.raises(ValueError) as caught:
        sweep(text)
    assert "\n" not in str(caught.value) and all(word in str(caught.value) for word in words), caught.value


def test_an_axis_that_names_nothing_is_refused(sweep, tmp_path, capsys):
    import bitlaw

    assert bitlaw.main(["sweep", "model=2k", "steps=3", "colour=1,2"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
