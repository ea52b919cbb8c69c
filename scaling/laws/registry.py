"""Laws by name: a read-only mapping with aliases and a one-line refusal of unknown names."""
from __future__ import annotations

from collections.abc import Iterator, Mapping

from scaling.laws.busbridge import busbridge
from scaling.laws.chinchilla import chinchilla
from scaling.laws.free_efficiency import free_efficiency
from scaling.laws.kumar import kumar
from scaling.laws.law import Law
from scaling.laws.quartet import quartet


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


laws = Registry(chinchilla, busbridge, kumar, quartet, free_efficiency)


def resolve(spec: str | Law, inputs: tuple[str, ...] = ()) -> tuple[Law, dict[str, str], dict[str, float], str]:
    """"kumar:tied+plain" -> (law, ties, fixed, label). ValueError for a law or variant that does not exist."""
    if isinstance(spec, Law):
        return spec, {}, {}, spec.name
    name, _, wanted = spec.partition(":")
    law, ties, fixed = laws[name], {}, {}
    for variant in filter(None, wanted.split("+")):
        if variant not in law.variants:
            raise ValueError(f"variant {variant!r} of law {law.name}: unknown; it has {', '.join(law.variants) or 'none'}")
        ties |= law.variants[variant].get("ties", {})
        fixed |= law.variants[variant].get("fixed", {})
    return law, ties, fixed, law.name + (f":{wanted}" if wanted else "")
