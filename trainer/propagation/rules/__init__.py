"""The rules: what each primitive does to data and exponents. A rule is found by the primitive's name.

Families: elementwise (products, sums), transcendental (functions whose values have a scale of their own), selecting (comparisons,
maxima, masks), reducing (sums, products of matrices), moving (shapes, slices, gathers), collective.
"""
from trainer.propagation.rules import collective, elementwise, moving, reducing, selecting, transcendental
from trainer.propagation.rules.registry import RULES, Call, describe_rules

__all__ = ["RULES", "Call", "collective", "describe_rules", "elementwise", "moving", "reducing",
           "selecting", "transcendental"]
