"""Slow float64 reference for gradients of a toy network and for one optimiser step on B.

The network is a list of one or two weights (d_out, d_in) without biases: out = W2 act(W1 x), or out = W1 x.
"""

import numpy as np

from tests.oracles.subspace import as_float64, delta_weight


def activate(values, activation):
    """Elementwise activation: "identity", "tanh" or "relu"."""
    if activation == "identity":
        return values
    if activation == "tanh":
        return np.tanh(values)
    if activation == "relu":
        return np.maximum(values, 0.0)
    raise ValueError(f"activation must be identity, tanh or relu, got {activation}")


def activation_slope(values, activation):
    """Derivative of `activate` at the same values; 0 at the kink of relu."""
    if activation == "identity":
        return np.ones_like(values)
    if activation == "tanh":
        return 1.0 - np.tanh(values) ** 2
    return (values > 0.0).astype(np.float64)


def layer_inputs(weights, x, activation="tanh"):
    """Inputs of every layer for one sample x (d_in,), then the network output, as a list."""
    inputs = [as_float64(x)]
    for i, weight in enumerate(weights):
        value = as_float64(weight) @ inputs[-1]
        inputs.append(value if i == len(weights) - 1 else activate(value, activation))
    return inputs


def collect_features(weights, samples, activation="tanh"):
    """Features of every layer: one (n, d_in) matrix per weight, one row per sample."""
    rows = [layer_inputs(weights, x, activation) for x in samples]
    return [np.stack([row[i] for row in rows]) for i in range(len(weights))]


def softmax(logits):
    """Softmax of one vector."""
    powers = np.exp(logits - np.max(logits))
    return powers / np.sum(powers)


def sample_loss(out, target, loss):
    """Loss of one sample: "squared" = ||out - target||^2 / 2, "softmax" = cross entropy with an integer target."""
    if loss == "squared":
        return 0.5 * float(np.sum((out - as_float64(target)) ** 2))
    if loss == "softmax":
        return -float(np.log(softmax(out)[int(target)]))
    raise ValueError(f"loss must be squared or softmax, got {loss}")


def output_error(out, target, loss):
    """Derivative of `sample_loss` with respect to the output."""
    if loss == "squared":
        return out - as_float64(target)
    error = softmax(out)
    error[int(target)] -= 1.0
    return error


def mean_loss(weights, samples, targets, loss="squared", activation="tanh"):
    """Mean of `sample_loss` over all samples, one sample at a time."""
    losses = [
        sample_loss(layer_inputs(weights, x, activation)[-1], y, loss) for x, y in zip(samples, targets, strict=True)
    ]
    return sum(losses) / len(losses)


def sample_gradient(weights, x, target, loss="squared", activation="tanh"):
    """Gradient of one sample's loss with respect to every weight, by the chain rule from the last layer down."""
    inputs = layer_inputs(weights, x, activation)
    error = output_error(inputs[-1], target, loss)
    gradients = [None] * len(weights)
    for i in reversed(range(len(weights))):
        gradients[i] = np.outer(error, inputs[i])
        if i > 0:
            before_activation = as_float64(weights[i - 1]) @ inputs[i - 1]
            error = (as_float64(weights[i]).T @ error) * activation_slope(before_activation, activation)
    return gradients


def mean_gradient(weights, samples, targets, loss="squared", activation="tanh"):
    """Equation (2): gradient of every weight, (d_out, d_in), averaged over samples by an explicit loop."""
    total = [np.zeros_like(as_float64(weight)) for weight in weights]
    for x, y in zip(samples, targets, strict=True):
        for i, gradient in enumerate(sample_gradient(weights, x, y, loss, activation)):
            total[i] = total[i] + gradient
    return [matrix / len(samples) for matrix in total]


def finite_difference(function, matrix, step=1e-5):
    """Gradient of a scalar function of one matrix by central differences, entry by entry."""
    matrix = as_float64(matrix)
    gradient = np.zeros_like(matrix)
    for index in np.ndindex(*matrix.shape):
        up, down = matrix.copy(), matrix.copy()
        up[index] += step
        down[index] -= step
        gradient[index] = (function(up) - function(down)) / (2.0 * step)
    return gradient


def mean_gradient_by_differences(weights, samples, targets, loss="squared", activation="tanh"):
    """Equation (2) once more, with no calculus: central differences of the mean loss in every weight."""
    gradients = []
    for i in range(len(weights)):

        def loss_of(matrix, i=i):
            changed = [matrix if j == i else weights[j] for j in range(len(weights))]
            return mean_loss(changed, samples, targets, loss, activation)

        gradients.append(finite_difference(loss_of, weights[i]))
    return gradients


def gradient_of_b(gradient, a, scaling, layer_scale=1.0):
    """Equation (6), left part: dL/dB = s g_l G A^T for a (d_out, d_in) gradient G at the merged weight."""
    return scaling * layer_scale * (as_float64(gradient) @ as_float64(a).T)


def sgd_step_on_b(b, gradient, a, scaling, layer_scale, lr):
    """One plain gradient step on B, (d_out, r)."""
    return as_float64(b) - lr * gradient_of_b(gradient, a, scaling, layer_scale)


def sgd_delta_weight(gradient, a, scaling, layer_scale, lr):
    """Equation (6): DeltaW = -lr (s g_l)^2 A A^T G, which in (d_out, d_in) layout is -lr (s g_l)^2 G A^T A."""
    a = as_float64(a)
    return -lr * (scaling * layer_scale) ** 2 * (as_float64(gradient) @ a.T @ a)


def delta_weight_after_step(gradient, a, scaling, layer_scale, lr):
    """The same update the long way round: step B away from zero, then s g_l B A."""
    b = np.zeros((as_float64(gradient).shape[0], as_float64(a).shape[0]))
    b = sgd_step_on_b(b, gradient, a, scaling, layer_scale, lr)
    return delta_weight(a, b, scaling * layer_scale)
