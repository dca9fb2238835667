"""Rows with a falling spectrum, in every form a basis can grow from; and measures of a basis, made in float64."""

import torch

from mllm_keeplora.linalg import Basis, FrequentDirections, MomentAccumulator

D_IN = 24


def rows_of(n, seed, d_in=D_IN, rank=None, decay=1.5):
    """Rows (n, d_in) with a falling spectrum; of the given rank if one is named."""
    generator = torch.Generator().manual_seed(seed)
    rank = d_in if rank is None else rank
    mixing = torch.randn(rank, d_in, generator=generator)
    return torch.randn(n, rank, generator=generator) * torch.logspace(0, -decay, rank) @ mixing


def basis_of(rank, seed, d_in=D_IN):
    generator = torch.Generator().manual_seed(seed)
    return Basis.from_columns(torch.linalg.qr(torch.randn(d_in, rank, generator=generator))[0])


def gram_error(basis):
    columns = basis.columns.double()
    if basis.rank == 0:
        return 0.0
    return float(torch.linalg.matrix_norm(columns.mT @ columns - torch.eye(basis.rank), 2))


def moments_of(rows, dtype=torch.float32):
    moments = MomentAccumulator(rows.shape[1], dtype=dtype)
    moments.update(rows)
    return moments


def sketch_of(rows, size):
    sketch = FrequentDirections(rows.shape[1], size)
    sketch.update(rows)
    return sketch


def share_covered(basis, rows):
    rows = rows.double()
    return float((rows @ basis.columns.double()).square().sum() / rows.square().sum())


SOURCES = {
    "rows": lambda rows: rows,
    "moments": moments_of,
    "moments64": lambda rows: moments_of(rows, torch.float64),
    "sketch": lambda rows: sketch_of(rows, rows.shape[1]),
}
