"""Command lines of `bitlaw table|fit|compare|predict|plan|stats|report`: parsers that refuse in one line, and the name=value lists they take."""
from __future__ import annotations

import argparse
import math
import re

from scaling.plugins import module_names


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are ValueErrors of one line instead of an exit."""

    def error(self, message: str):
        raise ValueError(f"{self.prog.split()[-1]}: {message} (`{self.prog} --help` lists what is accepted)")


class Merge(argparse.Action):
    """NAME=VALUE lists of an option that is given more than once, together. A name that is there twice is an error."""

    def __call__(self, parser, namespace, values, option_string=None):
        before = getattr(namespace, self.dest) or {}
        twice = next((name for name in values if name in before), None)
        if twice:
            raise ValueError(f"{option_string}: {twice} is given twice: {before[twice]} and {values[twice]}")
        setattr(namespace, self.dest, before | values)


LISTS = ("--fix", "--tie", "--prior", "--at")  # not --columns: SQL has signs of its own


def joined(argv: list[str]) -> list[str]:
    """["--fix", "a=4", "b=8"] -> ["--fix", "a=4,b=8"]: one more NAME=VALUE after a list of them belongs to it."""
    made: list[str] = []
    for text in argv:
        if len(made) > 1 and made[-2] in LISTS and re.match(r"\w+(\[[^\[\]]+\])?=", text):
            made[-1] += f",{text}"
        else:
            made.append(text)
    return made


def parser(verb: str) -> Parser:
    """The parser of a verb. ValueError for a verb that is not of this part."""
    if verb not in _BUILDERS:
        raise ValueError(f"{verb}: unknown; scaling has {', '.join(_BUILDERS)}")
    about, build = _BUILDERS[verb]
    made = Parser(prog=f"bitlaw {verb}", description=about, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    build(made)
    made.add_argument("--plugins", type=module_names, default=[], metavar="NAME,...", help="modules to import first, which register laws of yours")
    return made


def _table(p: Parser) -> None:
    p.add_argument("sources", nargs="+", metavar="SOURCE", help="folders of runs, or one .csv, .parquet, .json or DuckDB query")
    p.add_argument("--columns", type=assignments, action=Merge, default={}, metavar="n_params=SQL,...",
                   help="SQL expression of each column of a run table that has another name here; N, D stand for n_params, tokens")
    p.add_argument("--where", metavar="SQL", help="rows to write")
    p.add_argument("--out", required=True, metavar="FILE", help="FILE.parquet or FILE.csv")


def _rows(p: Parser) -> None:
    p.add_argument("table", metavar="TABLE", help="folder of runs, .csv, .parquet, .json, or a DuckDB query: \"FROM 'runs/*.parquet'\"")
    p.add_argument("--columns", type=assignments, action=Merge, default={}, metavar="N=SQL,...",
                   help='SQL expression of each input, e.g. N=n_params,D=\'"Training FLOP"/6/"Model Size"\'')
    p.add_argument("--where", metavar="SQL", help='rows to use; window functions may be used: "row_number() OVER (ORDER BY loss DESC) > 5"')
    p.add_argument("--holdout", metavar="SQL", help='rows to predict and not to fit, e.g. "N = max(N) OVER ()"')
    p.add_argument("--loss", default="huber", help="huber (default), least_squares or lad (least absolute deviations)")
    p.add_argument("--delta", type=float, default=1e-3, help="of the Huber loss of ln loss (default 1e-3)")
    p.add_argument("--fix", type=assignments, action=Merge, default={}, metavar="n_w=0,...", help='hold parameters at values; "effN[FP8]=1" '
                   'makes FP8 the baseline')
    p.add_argument("--base", metavar="SQL", help="rows that alone fit all constants they determine, which are then held (a first stage)")
    p.add_argument("--weights", metavar="SQL", help="how much each row counts beside the others; only ratios matter")
    p.add_argument("--bootstrap", type=int, default=0, metavar="K", help="cell resamples for the intervals (default 0: linearised only)")
    p.add_argument("--seed", type=int, default=0, help="of the bootstrap and of --coverage")


def _fit(p: Parser) -> None:
    _rows(p)
    p.add_argument("--law", required=True, metavar="NAME|FORMULA", help="chinchilla, kumar, ...; variants after a colon: kumar:tied+plain; or a "
                   'formula, "E + A/N^alpha + B/D^beta", with further inputs and boxes after semicolons: "...; width; alpha=0:1"')
    p.add_argument("--tie", type=assignments, action=Merge, default={}, metavar="beta=alpha,...", help="make one parameter equal another")
    p.add_argument("--prior", type=assignments, action=Merge, default={}, metavar="alpha=0.35:0.05,...",
                   help="Gaussian priors, mean:deviation (relative for E)")
    p.add_argument("--level", type=float, default=0.95, help="of the intervals (default 0.95)")
    p.add_argument("--resample", default="cells", metavar="KIND", help="of --bootstrap: cells (default) or wild")
    p.add_argument("--profile", type=names, default=[], metavar="NAME,...", help="profile-likelihood intervals of these constants or functionals")
    p.add_argument("--check", action="store_true", help="minimise the same objective with SciPy, from other starts, and say how far apart "
                   "the two are")
    p.add_argument("--coverage", type=int, default=0, metavar="S", help="simulate S tables from the fit and tell how often its intervals cover")
    p.add_argument("--at", type=assignments, action=Merge, default={}, metavar="N=1e9,...", help="inputs of what follows from the constants (D/N, P*, "
                   "D_crit, ...): "
                   "compute=1e21,bits=8,block=128 (default: the largest fitted N, D, compute; the narrowest widths; each level)")
    p.add_argument("--out", metavar="FIT.json", help="everything needed to predict")
    p.add_argument("--checklist", action="store_true", help="print the checklist of (Mis)Fitting, filled in as far as the fit and the table know")


def _compare(p: Parser) -> None:
    _rows(p)
    p.add_argument("--laws", required=True, metavar="A,B,...", help="laws, with variants if wanted: chinchilla,kumar:tied,kumar")
    p.add_argument("--leave", type=names, default=[], metavar="SPLIT,...", help="also score each law on runs left out: largest-N, largest-D, "
                   "largest-compute, largest-COLUMN:25%% (share of the rows), each-precision, each-COLUMN")
    p.add_argument("--guard", metavar="GUARD.json", help="answer for the --holdout rows through Thresholdout, whose state this file keeps")
    p.add_argument("--guard-threshold", type=float, metavar="T", help="difference of training and held-out rms error that is told (default 0.01)")
    p.add_argument("--guard-scale", type=float, metavar="S", help="of the noise (default 0.0025)")
    p.add_argument("--guard-budget", type=int, metavar="B", help="answers from the held-out rows before they are used up (default 20)")


def _predict(p: Parser) -> None:
    p.add_argument("fit", metavar="FIT.json")
    p.add_argument("inputs", nargs="+", metavar="[QUANTITY] NAME=VALUE", help="N=1e9 D=2e10 weights_bits=4; or, instead of the loss, a "
                   "constant or functional of the "
                   "law and what it depends on: optimal_bits, optimal_params compute=1e21, best_layout bits=8")
    _extrapolate(p)


def _plan(p: Parser) -> None:
    p.add_argument("fit", metavar="FIT.json")
    p.add_argument("--compute", type=float, metavar="FLOP", help="budget of training and inference, in FLOP of 16 bits: 1e21")
    p.add_argument("--cost-model", metavar="NAME", help="bits (default: 6 N D bits/16), bit_operations, flops, a100, h100, h200, "
                   "b200, v5p, v6e (each also :int or :float), or your own speed-ups: speedups:4=2,8=1.6")
    p.add_argument("--fix", type=assignments, action=Merge, default={}, metavar="N=1e9,...", help="hold N, D, or inputs of the law: weights_bits=4")
    p.add_argument("--bits", type=widths, metavar="4,8,16", help="widths to choose from (default: any within those trained)")
    p.add_argument("--precision", action="append", default=[], metavar="NAME:INPUT=VALUE,...", help="a precision to choose from, by law inputs "
                   "and widths of costs: w4a8:weights_bits=4,activations_bits=8; give it again for each")
    p.add_argument("--inference-tokens", type=float, default=0.0, metavar="D", help="tokens to be served, at 2 N FLOP each, from the same budget")
    p.add_argument("--memory", type=float, metavar="BYTES", help="of the weights: N weights_bits/8 at most; the table is then the "
                   "iso-memory frontier")
    regions = p.add_argument_group("regions of forward and backward precision (Quartet), instead of a plan")
    regions.add_argument("--regions", nargs="?", const="training+inference", metavar="BUDGET", help="the D/N at which the best --scheme "
                         "changes, for each size: for a budget of training+inference (default), or training alone")
    regions.add_argument("--scheme", action="append", default=[], metavar="NAME:KEY=VALUE,...", help="FP8:FP8, FP4:FP8:forward_speedup=2,eff_N=0.64; "
                         "keys: forward_speedup, backward_speedup (over the base precision, default 1), eff_N, eff_D, or inputs of the law, such as "
                         "forward=QuEST,backward=RTN or weights_bits=4; give it again for each")
    regions.add_argument("--sizes", type=positives, metavar="1e8,1e9", help="parameters N_max (default: the powers of ten that may be predicted)")
    regions.add_argument("--out", metavar="FILE", help="the map as .png, .pdf or .svg")
    runs = p.add_argument_group("the next runs to train, instead of a plan")
    runs.add_argument("--next", metavar="QUANTITY", help="rank --candidates by how much each is expected to shrink the interval of a constant, a "
                      "functional of the law, or loss: optimal_bits, alpha, loss")
    runs.add_argument("--at", type=assignments, action=Merge, default={}, metavar="compute=1e15,...", help="what the quantity depends on")
    runs.add_argument("--candidates", nargs="+", default=[], metavar="NAME=V1,V2", help="the runs that could be trained, all combinations: "
                      "N=1e6,2e6 D=2e7,4e7 bits=4,8; bits stands for all widths of the law")
    runs.add_argument("--count", type=int, metavar="K", help="choose K, each given those before it (default: rank each by itself)")
    _extrapolate(p)


def _extrapolate(p: Parser) -> None:
    p.add_argument("--extrapolate", action="store_true", help="answer more than 30 times outside of the fitted range of N, D or compute")


def _report(p: Parser) -> None:
    p.add_argument("table", metavar="TABLE", help="folder of runs, .csv, .parquet, .json, or a DuckDB query")
    p.add_argument("--columns", type=assignments, action=Merge, default={}, metavar="n_params=SQL,...",
                   help="SQL expression of each column of a run table that has another name here; N, D stand for n_params, tokens")
    p.add_argument("--where", metavar="SQL", help="rows to use")
    p.add_argument("--laws", type=names, metavar="A,B,...", help="laws, or formulas, to choose that of all runs from (default: the variants "
                   "of kumar)")
    p.add_argument("--out", required=True, metavar="FILE.html")
    p.add_argument("--bootstrap", type=int, default=200, metavar="K", help="cell resamples for the intervals (default 200)")
    _tuned(p)
    p.add_argument("--refresh", type=int, metavar="SECONDS", help="the page loads itself anew that often: for one that is made again while "
                   "a sweep goes on")


def _tuned(p: Parser) -> None:
    p.add_argument("--tuned", type=names, default=["lr"], metavar="COLUMN,...", help="columns that searches went over, for the best of "
                   "k (default lr)")


def _stats(p: Parser) -> None:
    p.add_argument("table", metavar="TABLE", help="folder of runs, .csv, .parquet, .json, or a DuckDB query")
    p.add_argument("--columns", type=assignments, action=Merge, default={}, metavar="n_params=SQL,...",
                   help="SQL expression of each column that has another name here: of "
                   "a run table (N, D stand for n_params, tokens), or correct, questions, question, model of accuracies")
    p.add_argument("--where", metavar="SQL", help="rows to use")
    _tuned(p)
    p.add_argument("--independent-evaluation", action="store_true", help="runs were evaluated on different tokens: the evaluation's error "
                   "is taken off the variance between seeds")
    p.add_argument("--reference", metavar="MODEL", help="the model that the others are paired with, question by question (default: the first)")
    p.add_argument("--level", type=float, default=0.95, help="of the intervals (default 0.95)")


_BUILDERS = {
    "table": ("Writes the run table of folders of runs, or a table of yours with the columns of one (absent ones NULL, its own kept).", _table),
    "fit": ("Fits a scaling law to runs and prints its constants with intervals.\nExit code 1 when the fit did not converge.", _fit),
    "compare": ("Fits several laws on the same rows with the same rows held out, side by side.", _compare),
    "predict": ("Predicts the loss of a run, or a number that follows from the law, with its interval.\nExit code 1 when the design does "
                "not identify the number.",
                _predict),
    "plan": ("Plans a training: the N, D and precision of the lowest loss for a budget, with intervals.\nOr, with --regions, which forward and "
             "backward precision is the best for which size and data; with --next, which runs to train next.", _plan),
    "stats": ("Statistics of a sweep that need no law: variance between seeds and cells, loss gaps by matched seed, expected best of k runs of a "
              "search, accuracies with their intervals.", _stats),
    "report": ("Writes one self-contained HTML page about a folder or a table of runs.\nExit code 1 when no candidate of a law converged.", _report),
}


def assignments(text: str) -> dict[str, str]:
    """'N=a,D=f(b, c)' -> {"N": "a", "D": "f(b, c)"}: commas and signs inside brackets and quotes belong to the expression."""
    parts, depth, quote, start = [], 0, "", 0
    for i, character in enumerate(text):
        if quote:
            quote = "" if character == quote else quote
        elif character in "\"'":
            quote = character
        elif character in "([":
            depth += 1
        elif character in ")]":
            depth -= 1
        elif character == "," and not depth:
            parts.append(text[start:i])
            start = i + 1
    parts.append(text[start:])
    result = {}
    for part in parts:
        name, sign, value = (piece.strip() for piece in part.partition("="))
        if not sign or not value or not re.fullmatch(r"\w+(\[[^\[\]]+\])?", name):
            raise argparse.ArgumentTypeError(f"{part.strip()!r} is not NAME=VALUE")
        if name in result:
            raise argparse.ArgumentTypeError(f"{name} is given twice: {result[name]} and {value}")
        result[name] = value
    return result


def names(text: str) -> list[str]:
    """"a, b" -> ["a", "b"], as an argparse type."""
    return [part.strip() for part in text.split(",") if part.strip()]


def priors(pairs: dict[str, str]) -> dict[str, tuple[float, float]]:
    """Values of NAME=MEAN:DEVIATION pairs. ValueError naming the pair that is none."""
    result = {}
    for name, value in pairs.items():
        mean, _, deviation = value.partition(":")
        try:
            result[name] = (float(mean), float(deviation))
        except ValueError:
            raise ValueError(f"--prior {name}={value}: not MEAN:DEVIATION, such as {name}=0.35:0.05") from None
    return result


def numbers(pairs: dict[str, str], what: str) -> dict[str, float]:
    """Values of NAME=VALUE pairs as floats. ValueError naming the pair that is not a number."""
    result = {}
    for name, value in pairs.items():
        try:
            result[name] = float(value)
        except ValueError:
            raise ValueError(f"{what} {name}={value}: not a number") from None
    return result


def mixed(pairs: dict[str, str]) -> dict[str, float | str]:
    """Values of NAME=VALUE pairs as floats where they are numbers, as they are where not (the name of a scheme)."""
    result: dict[str, float | str] = {}
    for name, value in pairs.items():
        try:
            result[name] = float(value)
        except ValueError:
            result[name] = value
    return result


def widths(text: str) -> list[float]:
    """"4,8,16" -> [4.0, 8.0, 16.0], as an argparse type."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not numbers of bits; give 4,8,16") from None


def positives(text: str) -> list[float]:
    """"1e8,1e9" -> [1e8, 1e9], as an argparse type."""
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(0 < value < math.inf for value in found):
        raise argparse.ArgumentTypeError(f"{text!r} is not positive numbers; give 1e8,1e9")
    return found


def keyed(texts: list[str], option: str, bare: bool = False) -> dict[str, dict[str, float | str]]:
    """["w4:weights_bits=4,activations_bits=16"] -> {"w4": {"weights_bits": 4.0, ...}}. bare: a name alone will do. ValueError naming the
    text that is none, or a name that is there twice."""
    found = {}
    for text in texts:
        name, sign, rest = text.rpartition(":")
        if bare and "=" not in rest:
            name, rest = text, ""
        elif not (name and sign):
            raise ValueError(f"{option} {text}: not NAME:INPUT=VALUE,..., such as w4a8:weights_bits=4,activations_bits=8")
        if name in found:
            raise ValueError(f"{option} {text}: the name {name} is given twice")
        try:
            found[name] = mixed(assignments(rest)) if rest else {}
        except (argparse.ArgumentTypeError, ValueError) as error:
            raise ValueError(f"{option} {text}: {error}") from None
    return found
