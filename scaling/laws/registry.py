"""Laws by name: a read-only mapping with aliases and a one-line refusal of unknown names."""
from __future__ import annotations

from collections.abc import Iterator, Mapping

from scaling.laws import formula
from scaling.laws.busbridge import busbridge
from scaling.laws.chinchilla import chinchilla
from scaling.laws.coverage import coverage
from scaling.laws.data_constrained import data_constrained
from scaling.laws.free_efficiency import free_efficiency
from scaling.laws.kaplan import kaplan
from scaling.laws.kumar import kumar
from scaling.laws.law import Law
from scaling.laws.mse_efficiency import mse_efficiency, mse_efficiency_tanh
from scaling.laws.ptq import kumar_ptq, kumar_unified, ptq_power
from scaling.laws.qat import qat
from scaling.laws.quartet import quartet
from scaling.laws.sun import sun


class Registry(Mapping[str, Law]):
    """name or alias -> Law. Iterates over names only. `add` registers a law of one's own."""

    def __init__(self, *known: Law):
        self._laws: dict[str, Law] = {}
        for law in known:
            self.add(law)

    def add(self, law: Law) -> Law:
        """Registers `law` under its name and aliases. ValueError when a name is taken by another law."""
        for key in (law.name, *law.aliases):
            if self._laws.get(key, law) != law:
                raise ValueError(f"law {key!r}: already registered; choose another name")
        self._laws |= {key: law for key in (law.name, *law.aliases)}
        return law

    def __getitem__(self, name: str) -> Law:
        if name not in self._laws:
            raise ValueError(f"law {name!r}: unknown; known laws are {', '.join(sorted(self._laws))}")
        return self._laws[name]

    def __contains__(self, name: object) -> bool:
        return name in self._laws

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys(law.name for law in self._laws.values()))

    def __len__(self) -> int:
        return len({law.name for law in self._laws.values()})


laws = Registry(chinchilla, kaplan, busbridge, kumar, kumar_ptq, kumar_unified, sun, quartet, free_efficiency, mse_efficiency,
                mse_efficiency_tanh, qat, ptq_power, data_constrained, coverage)


def resolve(spec: str | Law, inputs: tuple[str, ...] = ()) -> tuple[Law, dict[str, str], dict[str, float], str]:
    """"kumar:tied+plain" -> (law, ties, fixed, label), or a law from a formula, "E + A/N^alpha" (`inputs`: further names that are columns).

    ValueError for a law or variant that does not exist, or a formula that is none.
    """
    if isinstance(spec, Law):
        return spec, {}, {}, spec.name
    if formula.is_formula(spec):
        made = formula.law(spec, inputs)
        return made, {}, {}, made.name
    name, _, wanted = spec.partition(":")
    law, ties, fixed = laws[name], {}, {}
    for variant in filter(None, wanted.split("+")):
        if variant not in law.variants:
            raise ValueError(f"variant {variant!r} of law {law.name}: unknown; it has {', '.join(law.variants) or 'none'}")
        ties |= law.variants[variant].get("ties", {})
        fixed |= law.variants[variant].get("fixed", {})
    return law, ties, fixed, law.name + (f":{wanted}" if wanted else "")
