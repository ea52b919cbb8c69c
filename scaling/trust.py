"""What `bitlaw fit` adds about itself when asked: --check, --resample wild, --profile, --coverage."""
from __future__ import annotations

from argparse import Namespace

from scaling.coverage import coverage
from scaling.independent import scipy_check
from scaling.profile import profile
from scaling.resample import KINDS, resample
from scaling.result import Fit


def check_trust(arguments: Namespace) -> None:
    """ValueError for options that cannot be meant, before anything is fitted."""
    if arguments.resample not in KINDS:
        raise ValueError(f"--resample {arguments.resample}: unknown; use {' or '.join(KINDS)}")
    if arguments.resample == "wild" and not arguments.bootstrap > 0:
        raise ValueError(f"--resample wild: needs resamples, and --bootstrap is {arguments.bootstrap}; give --bootstrap 200")
    beside = [name for name, given in (("--profile", arguments.profile), ("--coverage", arguments.coverage), ("--check", arguments.check)) if given]
    if arguments.base and (beside or arguments.resample == "wild"):
        raise ValueError(f"{(beside or ['--resample wild'])[0]} refits all constants at once, and --base holds those of its rows; give one of the two")
    if arguments.check and (arguments.prior or (arguments.weights and arguments.loss != "least_squares")):
        raise ValueError("--check: scipy's least_squares has neither priors nor a Huber loss of weighted rows; use --loss least_squares, without --prior")
    if arguments.coverage and arguments.coverage < 20:
        raise ValueError(f"--coverage {arguments.coverage}: need at least 20 simulations")


def trusted(fitted: Fit, arguments: Namespace, progress) -> tuple[Fit, list[str]]:
    """The fit, with wild draws if these were asked for, and the lines of --check, --profile and --coverage."""
    if arguments.resample == "wild":
        fitted = resample(fitted, arguments.table, arguments.bootstrap, "wild", arguments.seed, progress)
    lines = [str(scipy_check(fitted, arguments.table))] if arguments.check else []
    lines += [f"profile of {name}: {profile(fitted, arguments.table, name).estimate}" for name in arguments.profile]
    if arguments.coverage:
        lines += coverage(fitted, arguments.table, arguments.coverage, seed=arguments.seed, progress=progress).lines()
    return fitted, lines
