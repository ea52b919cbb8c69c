"""What carrying scales costs, as ratios over the same step without: python -m benchmarks.scale_propagation [--only decoder|mlp|rescales]

decoder: the 1m decoder's training step (batch 16 x 128 bytes, AdamW, all host devices) through the program that every run uses, data in float32
with an exponent beside every tensor, in float16, and with propagated FP8 scales; and `propagate_scales` applied to loss and gradients alone, by
the rules of primitives only, with ScaledArray parameters. mlp: 20 steps of SGD in one dispatch, the transform around all of them; around
each, which brings every argument to unit scale at every step (a kernel or two for each, to run and to compile); and around each with
unit_inputs=True, which saves that. rescales: what a calibration places. Tracing and compiling is timed from empty caches, for the trainer's
step with the program that makes its first state.
A peer, for scale: jax-scalify took 1.15 to 1.47 times the plain step on MLPs of these sizes (on jax 0.4.33, the last that it runs on).
"""
from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace

from benchmarks import timing

GOALS = {"decoder": 1.10, "mlp 64": 1.25, "build": 1.6}
MLP_SIZES = {"mlp 64": ((64, 64, 64, 10), 32), "mlp 784": ((784, 512, 512, 10), 128)}  # widths, batch
MLP_STEPS = 20


def built(make) -> tuple[timing.Program, float]:
    """(make(), seconds from nothing to its first result, without those of a call): tracing, lowering and compiling."""
    import jax

    jax.clear_caches()
    began = time.perf_counter()
    program = make()
    program.work()
    first = time.perf_counter() - began
    return program, first - timing.timed(program.work)


def decoder_programs() -> dict:
    """Name -> what makes the training program under a policy."""
    from benchmarks import our_step
    from trainer import policy
    from trainer.model import ModelConfig

    config = ModelConfig(5, 128, 4, 352, our_step.VOCABULARY)
    policies = {"plain": our_step.FLOAT32, "float32": replace(our_step.FLOAT32, data_dtype="float32"),
                "float16": policy("fp16_scaled"), "fp8": policy("fp8_scaled"), "fp8 current, no propagation": policy("fp8")}
    return {name: lambda p=p: our_step.program(config, p, steps=2) for name, p in policies.items()}


def decoder_gradients(policy) -> tuple:
    """(function, arguments) of the loss and gradients of the same decoder, not transformed; with rules of its own where the policy has a
    data_dtype."""
    import jax

    from benchmarks import our_step
    from trainer import model
    from trainer.model import ModelConfig

    config = ModelConfig(5, 128, 4, 352, our_step.VOCABULARY)
    graphdef, call = model.blueprint(config)[0], model.Call(policy)

    def loss(params, tokens):
        return jax.numpy.mean(model.next_token_losses(graphdef, params, tokens, call))

    return jax.value_and_grad(loss), (model.init_params(config, jax.random.key(0)), our_step.tokens().astype("int32"))


def mlp(widths, batch: int):
    """(step, parameters, data): one step of SGD, ReLU between layers, cross-entropy."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    rng = np.random.default_rng(0)
    params = [(jnp.asarray(rng.normal(size=(m, n)) / m**0.5, jnp.float32), jnp.zeros((n,), jnp.float32)) for m, n in zip(widths, widths[1:])]
    data = (jnp.asarray(rng.normal(size=(batch, widths[0])), jnp.float32), jnp.asarray(rng.integers(0, widths[-1], batch)))

    def loss(params, x, labels):
        for index, (weight, bias) in enumerate(params):
            x = x @ weight + bias[None, :]
            x = jax.nn.relu(x) if index < len(params) - 1 else x
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(x), labels[:, None], axis=1))

    def step(params, x, labels):
        value, grads = jax.value_and_grad(loss)(params, x, labels)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), value

    return step, params, data


def many(step):
    """MLP_STEPS steps in one dispatch."""
    from jax import lax

    return lambda params, *data: lax.scan(lambda p, _: step(p, *data), params, None, length=MLP_STEPS)


def compiled(function, args):
    """The compiled function as a program that runs on these arguments."""
    import jax

    ready = jax.jit(function).lower(*args).compile()
    return timing.Program(lambda: jax.block_until_ready(ready(*args)))


def compare(makers: dict, rounds: int, builds: int) -> dict:
    """Ratios over "plain": of a step, and of tracing plus compiling."""
    programs, seconds = {}, {name: [] for name in makers}
    for _ in range(builds):
        for name, make in makers.items():
            programs[name], build = built(make)
            seconds[name].append(build)
    samples = timing.interleave({name: lambda p=p: timing.visit(p, 1) for name, p in programs.items()}, rounds)
    builds_ = {name: timing.Samples(tuple(values)) for name, values in seconds.items()}
    others = [name for name in makers if name != "plain"]
    return {"step": {name: timing.ratio(samples, name, "plain") | samples[name].milliseconds() for name in others},
            "plain": samples["plain"].milliseconds() | {"trace and compile, seconds": round(builds_["plain"].median, 2)},
            "trace and compile": {name: timing.ratio(builds_, name, "plain") | {"seconds": round(builds_[name].median, 2)} for name in others}}


def decoder(rounds: int) -> dict:
    """The 1m decoder: the trainer's own step, then the bare transform of loss and gradients, by the rules of primitives alone."""
    import jax

    from benchmarks import our_step
    from trainer import propagate_scales, scaled

    result = compare(decoder_programs(), rounds, builds=3)
    result["judged"] = {"step, float32": timing.judged(result["step"]["float32"], at_most=GOALS["decoder"]),
                        "trace and compile, float32": timing.judged(result["trace and compile"]["float32"], at_most=GOALS["build"])}
    gradients, (params, tokens) = decoder_gradients(our_step.FLOAT32)
    given = (scaled(params), tokens)
    makers = {"plain": lambda: compiled(gradients, (params, tokens)), "bare": lambda: compiled(propagate_scales(gradients), given)}
    result["equations of loss and gradients"] = {}
    for name, policy in (("rules of primitives", our_step.FLOAT32), ("rules of the decoder", replace(our_step.FLOAT32, data_dtype="float32"))):
        report = propagate_scales(decoder_gradients(policy)[0]).report(jax.eval_shape(lambda: scaled(params)), tokens)
        result["equations of loss and gradients"][name] = {
            "before": report.equations_before, "after": report.equations_after, "fall-backs": sum(report.fallbacks.values())}
    return result | {"bare transform of loss and gradients": compare(makers, rounds, builds=5)}


def rescales(_) -> dict:
    """How many rescales a calibration places in the 100k decoder, float16, by threshold (powers of two)."""
    from docs.scale_propagation import decoder as text_decoder
    from trainer.propagation import calibrate

    results = {}
    for precision, thresholds in (("float32", (6, 8, 10)), ("fp16_scaled", (6, 8))):
        function, args = text_decoder(precision)
        for threshold in thresholds:
            began = time.perf_counter()
            plan = calibrate(function, *args, data_dtype="float16", threshold=threshold)
            rules = "rules of the decoder" if precision == "fp16_scaled" else "rules of primitives"
            results[f"{rules}, 2**+-{threshold}"] = {"rescales, 2 layers": len(plan.places), "drift before": plan.drift, "drift after": plan.remaining,
                                                     "seconds": round(time.perf_counter() - began, 1)}
    return results


def mlps(rounds: int) -> dict:
    """The MLPs, by size."""
    from trainer import propagate_scales, scaled

    results = {}
    for name, (widths, batch) in MLP_SIZES.items():
        step, params, data = mlp(widths, batch)
        given = (scaled(params), scaled(data[0]), data[1])
        makers = {"plain": lambda: compiled(many(step), (params, *data)),
                  "around the loop": lambda: compiled(propagate_scales(many(step)), given),
                  "around each step": lambda: compiled(many(propagate_scales(step)), given),
                  "around each step, unit inputs": lambda: compiled(many(propagate_scales(step, unit_inputs=True)), given)}
        result = compare(makers, 3 * rounds, builds=9)
        reports = {f"one step{', unit inputs' * promised}": propagate_scales(step, unit_inputs=promised).report(*given) for promised in (False, True)}
        result["equations"] = {"before": reports["one step"].equations_before} | {name: report.equations_after for name, report in reports.items()}
        if name in GOALS:
            result["judged"] = {arm: {"step": timing.judged(result["step"][arm], at_most=GOALS[name]),
                                      "trace and compile": timing.judged(result["trace and compile"][arm], at_most=GOALS["build"])} for arm in makers if arm != "plain"}
        results[name] = result
    return results


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale_propagation", description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=("decoder", "mlp", "rescales"))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--devices", type=int, default=timing.cores(), help="host devices (default: one per core)")
    options = parser.parse_args()
    import jax

    jax.config.update("jax_num_cpu_devices", options.devices)
    result = {"machine": timing.machine(("jax", "jaxlib", "numpy"))}
    for name, run in (("mlp", mlps), ("decoder", decoder), ("rescales", rescales)):
        if options.only in (None, name):
            print(f"{name}: compiling, then {options.rounds} rounds", file=sys.stderr, flush=True)
            result[name] = run(options.rounds)
    timing.print_json(result)


if __name__ == "__main__":
    main()
