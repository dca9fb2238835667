"""`max_kept`: kept bases stay below a share of the inputs, and give up what past domains used least."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mllm_keeplora.adapters.stored import kept_of, parts_of, save_growth
from mllm_keeplora.linalg import Basis
from mllm_keeplora.runs import RunDir, Unit
from mllm_keeplora.system.files import write_tensors
from tests.support.keeplora import columns_of
from tests.support.variants import opened

SHARE = 0.75


def shares(columns, tokens):
    """Energy share of tokens (n, d_in) along each column, by plain products."""
    return ((tokens @ columns) ** 2).sum(axis=0) / (tokens**2).sum()


@pytest.fixture
def bounded(new_base, tiny_records):
    return opened(new_base(), tiny_records["Alpha"], max_kept=SHARE, energy_features=0.9999)


def test_no_basis_exceeds_the_bound_and_directions_of_the_weights_stay(bounded):
    after = bounded.finish()
    plain = {layer: columns.shape[1] for layer, columns in bounded.kept_before.items()}
    assert any(len(columns) for columns in bounded.context.forgotten.values())
    for layer, columns in after.items():
        assert columns.shape[1] <= max(SHARE * columns.shape[0], plain[layer])
        assert np.array_equal(columns[:, : plain[layer]], bounded.kept_before[layer])
        assert np.linalg.norm(columns.T @ columns - np.eye(columns.shape[1])) < 1e-5


def test_what_is_given_up_was_used_least(bounded, new_base, tiny_records):
    tokens = bounded.tokens()
    free = opened(new_base(), tiny_records["Alpha"], energy_features=0.9999).finish()
    after = bounded.finish()
    for layer, columns in after.items():
        pinned = bounded.kept_before[layer].shape[1]
        used = shares(free[layer], tokens[layer])[pinned:]
        expected = np.sort(np.argsort(used)[len(used) - (columns.shape[1] - pinned) :])
        assert np.array_equal(columns[:, pinned:], free[layer][:, pinned + expected]), layer
        assert np.allclose(bounded.strategy.usage[layer], used[expected], rtol=1e-4, atol=1e-9)


def test_use_adds_up_over_domains_and_survives_a_restart(bounded):
    bounded.finish()
    first = {layer: use.clone() for layer, use in bounded.strategy.state_dict().items()}
    again = type(bounded.strategy)(bounded.strategy.options)
    again.load_state_dict(first)
    kept = {layer: Basis.from_columns(basis.columns) for layer, basis in bounded.kept.items()}
    tokens = bounded.tokens()
    for strategy, bases in ((bounded.strategy, bounded.kept), (again, kept)):
        bounded.context.kept, bounded.context.forgotten = bases, {}
        strategy.after_domain(bounded.context)
    for layer, use in bounded.strategy.usage.items():
        assert torch.equal(use, again.usage[layer])
        assert torch.equal(bounded.kept[layer].columns, kept[layer].columns)
        pinned = bounded.kept_before[layer].shape[1]
        both = shares(bounded.kept[layer].columns.double().numpy()[:, pinned:], tokens[layer])
        assert (use.numpy() > both * 1.5).any() or not len(use), "use of the first domain counts too"


def test_forgotten_columns_are_gone_when_a_run_is_read_back(bounded, tmp_path):
    run, units = RunDir(tmp_path), [Unit(1, "Alpha", ("Alpha",)), Unit(2, "Beta", ("Beta",))]
    write_tensors(
        run.kept_by_prepare, {layer: torch.tensor(each).float() for layer, each in bounded.kept_before.items()}
    )
    for unit in units:
        before = {layer: basis.rank for layer, basis in bounded.kept.items()}
        bounded.context.forgotten = {}
        bounded.strategy.options.__dict__["max_kept"] = SHARE / unit.index  # the second domain gives up the first's
        bounded.strategy.after_domain(bounded.context)
        save_growth(run.folder(unit), bounded.kept, before, bounded.context.forgotten)
        stored = columns_of(kept_of(run, units[: unit.index]))
        assert all(np.array_equal(stored[layer], each) for layer, each in columns_of(bounded.kept).items())
        for layer, parts in parts_of(run, units[: unit.index]).items():
            assert parts[0] == bounded.kept_before[layer].shape[1]
            assert sum(parts) == bounded.kept[layer].rank and len(parts) == unit.index + 1


def test_without_a_bound_nothing_is_forgotten(new_base, tiny_records):
    domain = opened(new_base(), tiny_records["Alpha"], energy_features=0.9999)
    domain.finish()
    assert domain.context.forgotten == {} and domain.strategy.state_dict() == {}


def test_a_basis_refuses_to_forget_what_it_has_not():
    basis = Basis.from_columns(torch.eye(4)[:, :2])
    with pytest.raises(ValueError, match=r"must be in 0..1, got \[2\]"):
        basis.forget([2])
    assert basis.rank == 2
