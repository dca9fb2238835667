"""Slow float64 reference for the subspace algebra of KeepLoRA, written from the equations alone.

Weights, gradients and updates are (d_out, d_in); features are rows (n, d_in); a basis holds orthonormal columns
(d_in, k); A is (r, d_in) and B is (d_out, r). Equation numbers are those of the method specification.
"""

import numpy as np

NEGLIGIBLE = 1e-6  # a singular value below this share of the largest one of the unprojected matrix is rounding noise


def as_float64(matrix):
    """Copy a matrix into float64; refuse values that are not finite."""
    matrix = np.array(matrix, dtype=np.float64)
    if not np.isfinite(matrix).all():
        raise ValueError("matrix holds a value that is not finite")
    return matrix


def empty_basis(d_in):
    """Basis of the zero subspace, (d_in, 0)."""
    return np.zeros((d_in, 0))


def energy(matrix):
    """Squared Frobenius norm ||M||_F^2, summed entry by entry."""
    return float(sum(value * value for value in as_float64(matrix).ravel()))


def select(sigma, E, c0, eps):
    """Energy rank selection (section 1): smallest m >= 0 with c0 + (sigma_1^2 + ... + sigma_m^2) / E >= eps.

    All len(sigma) directions if rounding keeps the sum just below eps. Nothing is selected if E is zero.
    """
    if E <= 0.0:
        return 0
    covered = float(c0)
    m = 0
    while covered < eps and m < len(sigma):
        covered += float(sigma[m]) ** 2 / E
        m += 1
    return m


def select_below_legacy(sigma, E, eps):
    """Option D4: count of partial sums strictly below eps, at least 1; one direction fewer than `select`."""
    partial_sums = [sum(float(s) ** 2 for s in sigma[: i + 1]) / E for i in range(len(sigma))]
    return max(sum(1 for share in partial_sums if share < eps), 1)


def gram_schmidt(vectors, basis):
    """Orthonormal columns for the span of `vectors` outside `basis`, in order, each projected twice."""
    done = [basis[:, i] for i in range(basis.shape[1])]
    num_kept = len(done)
    for i in range(vectors.shape[1]):
        v = vectors[:, i].copy()
        for _ in range(2):
            for u in done:
                v = v - u * np.dot(u, v)
        done.append(v / np.linalg.norm(v))
    new = done[num_kept:]
    return np.stack(new, axis=1) if new else empty_basis(basis.shape[0])


def principal_subspace(weight, eps_w, legacy=False):
    """Equation (1): W_p = U[:, :p] with W = U S V^T and p = select(S, ||W||_F^2, 0, eps_w), input side.

    `weight` is (d_out, d_in), so the input side is that of its right singular vectors. Returns (d_in, p).
    """
    weight = as_float64(weight)
    _, sigma, right = np.linalg.svd(weight, full_matrices=False)
    total = energy(weight)
    p = select_below_legacy(sigma, total, eps_w) if legacy else select(sigma, total, 0.0, eps_w)
    return right[:p].T.copy()


def output_subspace_legacy(weight, eps_w):
    """Option D1: the leading left singular vectors of a square weight (d_out, d_in), as many as by option D4.

    They live on the output side, W W^T u = sigma^2 u, but are taken for directions of the input. Returns (d, p).
    """
    weight = as_float64(weight)
    squares, vectors = np.linalg.eigh(weight @ weight.T)
    p = select_below_legacy(np.sqrt(np.clip(squares[::-1], 0.0, None)), energy(weight), eps_w)
    return vectors[:, ::-1][:, :p].copy()


def residual_gradient(gradient, basis):
    """Equation (3): (I - Q Q^T) G, which for a (d_out, d_in) gradient reads G (I - Q Q^T)."""
    gradient, basis = as_float64(gradient), as_float64(basis)
    return gradient @ (np.eye(gradient.shape[1]) - basis @ basis.T)


def residual_features(features, basis):
    """Equation (8), left part: every row of X (n, d_in) without its component in span(Q)."""
    return residual_gradient(features, basis)


def initial_a(gradient, basis, rank):
    """Equation (4): rows of A = top `rank` input-side singular directions of the residual gradient.

    Only directions really outside span(Q) are returned: a singular value of the residual below 1e-6 of the largest
    one of G is rounding noise, whose vectors may lie inside span(Q) (section 9). So A is (r', d_in) with r' <= rank.
    """
    gradient, basis = as_float64(gradient), as_float64(basis)
    largest = np.linalg.svd(gradient, compute_uv=False)[0]
    _, sigma, right = np.linalg.svd(residual_gradient(gradient, basis), full_matrices=False)
    num_free = gradient.shape[1] - basis.shape[1]
    num_real = sum(1 for s in sigma if s > NEGLIGIBLE * largest)
    keep = min(rank, num_free, num_real)
    return gram_schmidt(right[:keep].T, basis).T


def initial_b_gradient(gradient, basis, a):
    """Equation (5a): B0 = S V^T of the residual gradient, which equals (residual G) A^T; the base loses s g_l B0 A."""
    return residual_gradient(gradient, basis) @ as_float64(a).T


def covered_share(features, basis):
    """Equation (9), c_0 = (E - ||residual||_F^2) / E; 1 for features without energy."""
    total = energy(features)
    return 1.0 if total == 0.0 else (total - energy(residual_features(features, basis))) / total


def num_new_directions(features, basis, eps_f, reference="total"):
    """Equation (9): m = select(S, E, c_0, eps_f) before any cap.

    reference="total": E = ||X||_F^2 and what Q covers counts. reference="residual" (option D8): E = ||residual||_F^2
    and c_0 = 0. Directions whose singular value is rounding noise are never counted.
    """
    features, basis = as_float64(features), as_float64(basis)
    residual = residual_features(features, basis)
    sigma = np.linalg.svd(residual, compute_uv=False)
    largest = np.linalg.svd(features, compute_uv=False)[0]
    sigma = [s for s in sigma if s > 1e-12 * largest]
    if reference == "total":
        return select(sigma, energy(features), covered_share(features, basis), eps_f)
    return select(sigma, energy(residual) if sigma else 0.0, 0.0, eps_f)


def grow(basis, features, eps_f, cap=None, reference="total"):
    """Equations (8)-(10): Q_t = [Q, U[:, :m]] from stacked rows X (n, d_in) by a full SVD of the residual.

    At most `cap` columns (default d_in), the last new ones are dropped; old columns are never touched or dropped.
    """
    features, basis = as_float64(features), as_float64(basis)
    d_in = features.shape[1]
    cap = d_in if cap is None else min(cap, d_in)
    m = num_new_directions(features, basis, eps_f, reference)
    m = min(m, max(cap - basis.shape[1], 0))
    _, _, right = np.linalg.svd(residual_features(features, basis), full_matrices=False)
    return np.concatenate([basis, gram_schmidt(right[:m].T, basis)], axis=1)


def coverage(basis, matrix):
    """Invariants 5 and 6: ||M Q||_F^2 / ||M||_F^2 for rows (n, d_in) or a weight (d_out, d_in); 1 if M is zero."""
    total = energy(matrix)
    return 1.0 if total == 0.0 else energy(as_float64(matrix) @ as_float64(basis)) / total


def delta_weight(a, b, scale):
    """Delta weight of equation (7) in (d_out, d_in) layout: scale * B A, with scale = s * g_l."""
    return float(scale) * (as_float64(b) @ as_float64(a))


def merge(weight, adapters):
    """Equation (7) over all domains: pristine weight plus the delta of every (A, B, s * g_l) in `adapters`."""
    merged = as_float64(weight)
    for a, b, scale in adapters:
        merged = merged + delta_weight(a, b, scale)
    return merged


def layer_scale(layer, first_layer, num_layers, gamma=0.2):
    """Equation (11): g_l = gamma + (1 - gamma) (l - l_0) / (L - 1); 1 for a single adapted layer."""
    if num_layers == 1:
        return 1.0
    return gamma + (1.0 - gamma) * (layer - first_layer) / (num_layers - 1)


def capture_split(gradient, basis, a):
    """Section 8: shares of ||G||_F^2 that are (protected by Q, captured by A, discarded); they sum to 1."""
    protected, captured = coverage(basis, gradient), coverage(as_float64(a).T, gradient)
    return protected, captured, 1.0 - protected - captured


def span_basis(columns):
    """Orthonormal basis of a column span by full SVD, rank decided at 1e-10 of the largest singular value."""
    columns = as_float64(columns)
    if columns.shape[1] == 0:
        return columns
    left, sigma, _ = np.linalg.svd(columns, full_matrices=False)
    return left[:, sigma > 1e-10 * sigma[0]]


def projector(columns):
    """Orthogonal projector (d, d) onto the span of arbitrary columns (d, k)."""
    basis = span_basis(columns)
    return basis @ basis.T


def projector_difference(first, second):
    """Spectral norm of the difference of two span projectors: 0 for equal spans, 1 if the dimensions differ."""
    return float(np.linalg.norm(projector(first) - projector(second), 2))


def principal_angles(first, second):
    """Principal angles between two column spans in radians, ascending, accurate near 0 and near pi / 2."""
    first, second = span_basis(first), span_basis(second)
    if first.shape[1] < second.shape[1]:
        first, second = second, first
    if second.shape[1] == 0:
        return np.zeros(0)
    cosines = np.linalg.svd(first.T @ second, compute_uv=False)  # descending
    sines = np.linalg.svd(second - first @ (first.T @ second), compute_uv=False)[::-1]  # ascending
    return np.arctan2(sines, cosines)


def leak(delta, basis):
    """Section 8: ||DeltaW Q||_F / ||DeltaW||_F for an update (d_out, d_in); 0 for a zero update."""
    size = np.linalg.norm(as_float64(delta))
    return 0.0 if size == 0.0 else float(np.linalg.norm(as_float64(delta) @ as_float64(basis)) / size)
