"""Writes docs/formats.md and its pictures from the catalogue: python -m docs.formats"""

from __future__ import annotations

import pathlib

import numpy as np

import formats
from formats.elements import Element
from formats.scaled import Scaled

HERE = pathlib.Path(__file__).parent
DRAWN = ("float8_e4m3fn", "float8_e5m2", "float4_e2m1fn", "int8", "lns8", "dybit8")
BLOCKS = ("mxfp8_e4m3", "mxfp6_e2m3", "mxfp4", "nvfp4", "mxint8", "bfp8")
_INTRO = """# Number formats

Every format that `formats.get(name)` knows by a name of its own, from the code (`python -m docs.formats` writes this page).
Besides these: `intN`, `uintN`, `intN_full`, `intN_fK` (fixed point), `floatB_eEmM[bBIAS][fn|fnuz]` of any widths, `lnsN[_gGAMMA]`, `dybitN`,
`bfpN[_bSIZE]`; and in Python any element with any scale:

```python
formats.scaled("int4", "channel", axis=0)                                # one float32 scale per column
formats.scaled("float8_e4m3fn", "block", block=(128, 128), axis=(-2, -1))  # tiles
formats.scaled("int4", "token", amax="mse")                              # a scale searched for least squared error
formats.block("float4_e2m1fn", 32, rule="rceil", pre_scale=0.75)         # an MX format with another rule
formats.scaled("uint4", "token", zero_point=True)                        # affine
formats.codebook([-1.0, -0.3, 0.0, 0.3, 1.0])                            # any table of values
```
"""
_RULES = """## What is defined where others differ

- NaN stays NaN under every rounding, also where the format has no code for it, so that a diverged tensor shows. `encode` stores code 0 for
  it there and counts (`num_nan`); in a format with scales the block's scale says NaN instead.
- A block with a NaN or an infinity is NaN as a whole (with two levels, the tensor). A block of zeros has scale 1 (exact rule) or 2**-127 (power-of-two rules).
- Ties of `nearest_even` go to the even significand; without mantissa bits up, as ml_dtypes has it; in codebooks to the even place, and
  between -a and a to a.
- Logarithmic numbers have no zero: zeros go to the smallest value of their sign, except in blocks of zeros, whose scale is 0.
- The scale of NVFP4: tensor scale s = amax / (448 * 6) in float32, block scale (amax_b / 6) / s rounded to float8_e4m3fn, never to zero
  (2**-9 is the least), values x * (1 / (block scale * s)).
- Scales of the exact rule multiply by the float32 reciprocal, as PyTorch's fake-quantize does.
"""


def _number(value) -> str:
    return "" if value is None else f"{value:.6g}"


def table(header: tuple[str, ...], rows) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows]) + "\n"


def catalogue() -> str:
    """The catalogue with each format's error on Gaussian data."""
    rows = []
    for row in formats.table():
        errors = [] if row["name"] == "float8_e8m0fnu" else [f"{error:.3g}" for error in _gaussian_errors(row["name"])]
        rows.append((f"`{row['name']}`", f"{row['bits']:g}", *(_number(row[key]) for key in ("max", "smallest_normal", "smallest_subnormal")),
                     row["native"] or "", *errors, *[""] * (2 - len(errors))))
    return table(("name", "bits", "max", "smallest normal", "smallest subnormal", "native dtype", "Gaussian error", "best scale"), rows)


def _gaussian_errors(name: str) -> list[float]:
    """Relative squared errors on Gaussian data; of elements with one exact scale per tensor (row of 1024), by amax and by search."""
    fmt = formats.get(name)
    return [formats.gaussian_mse(f) for f in ([fmt] if isinstance(fmt, Scaled) else [formats.scaled(fmt, amax=a) for a in ("current", "mse")])]


def values() -> str:
    """The nonnegative values of every element of at most 6 bits."""
    rows = []
    for name in formats.names():
        fmt = formats.get(name)
        if isinstance(fmt, Scaled) or name == "float8_e8m0fnu" or formats.describe(name)["bits"] > 6:
            continue
        rows.append((f"`{name}`", ", ".join(f"{value:.6g}" for value in _nonnegative(fmt))))
    return table(("name", "values from 0 up"), rows)


def _nonnegative(fmt) -> np.ndarray:
    if not isinstance(fmt, Element):
        levels = fmt.values(np.arange(2 ** int(fmt.bits))) if isinstance(fmt, formats.Midrise) else fmt.levels
        return np.asarray([level for level in levels if level >= 0])
    grid = np.arange(0, float(fmt.max_value) + 1e-9, 2.0 ** int(fmt.quantum_exp), dtype=np.float32)
    return np.unique(np.asarray(formats.quantize(grid, fmt)))


def draw() -> None:
    """formats-elements.png and formats-blocks.png: relative error against magnitude."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    edges = np.exp2(np.arange(-20, 10.01, 0.25))
    x_BS = np.geomspace(edges[:-1], edges[1:], 512, axis=1).astype(np.float32)  # bins of a quarter octave
    figure, axes = pyplot.subplots(2, 3, figsize=(11, 5.6), sharex=True, sharey=True, constrained_layout=True)
    for ax, name in zip(axes.flat, DRAWN, strict=True):
        error_BS = np.abs(np.asarray(formats.quantize(x_BS, name)) - x_BS) / x_BS
        for label, error in (("largest", error_BS.max(axis=1)), ("root mean square", np.sqrt((error_BS**2).mean(axis=1)))):
            ax.stairs(error, edges, label=label, baseline=None)
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        ax.set_ylim(1e-3, 3)
        ax.set_title(name)
        ax.grid(alpha=0.3)
    axes[0, 0].legend(loc="lower left", title="in a quarter octave")
    figure.supxlabel("magnitude of x, no scale (log2 axis)")
    figure.supylabel("relative error |q(x) - x| / |x|")
    figure.savefig(HERE / "formats-elements.png", dpi=110)
    sigma = np.exp2(np.linspace(-12, 6, 145)).astype(np.float32)
    noise = np.random.default_rng(0).standard_normal((1, 16384)).astype(np.float32) * sigma[:, None]
    figure, ax = pyplot.subplots(figsize=(8, 4.4), constrained_layout=True)
    for name in BLOCKS:
        y = np.stack([np.asarray(formats.quantize(row, name)) for row in noise])
        ax.semilogx(sigma, np.sqrt(((y - noise) ** 2).mean(axis=1)) / sigma, base=2, label=f"{name} ({formats.describe(name)['bits_effective']:g} bits)")
    ax.set(xlabel="standard deviation of Gaussian data (log2 axis)", ylabel="root mean square error / standard deviation", yscale="log", ylim=(5e-3, 0.4))
    ax.grid(alpha=0.3)
    ax.legend(ncols=3, fontsize=8, loc="upper center")
    figure.savefig(HERE / "formats-blocks.png", dpi=110)


def page() -> str:
    """The text of docs/formats.md."""
    return "\n".join([
        _INTRO,
        "## Catalogue\n\nBits count the share of block scales. Gaussian error: mean squared error over variance of N(0, 1) data, nearest-even; element"
        "\nformats with one exact scale for 1024 values, from their largest magnitude or searched for the least error (best scale); block"
        "\nformats as they are, averaged over the phase of power-of-two scales.\n",
        catalogue(),
        "## Values\n\nOf the elements of at most 6 bits; negative ones mirror them (`nf4` apart).\n",
        values(),
        "## Error against magnitude\n\n![Relative error of six element formats](formats-elements.png)\n",
        "Floats keep their relative error down to the subnormals, where it grows to 1; integers lose it from the top; logarithmic numbers keep one\n"
        "error over their whole range and have no zero; DyBit is finest around 1.\n",
        "![Error of block formats on Gaussian data](formats-blocks.png)\n",
        "Block formats do not care about the size of the data; the ripple is the phase of the power-of-two scale, which NVFP4's fractional\n"
        "scales do not have.\n",
        _RULES,
    ])


def main() -> None:
    (HERE / "formats.md").write_text(page(), encoding="utf-8")
    draw()


if __name__ == "__main__":
    main()
