"""Stream what passes through target layers into `linalg` accumulators: features going in, gradients coming out.

Hooks live only inside the functions here; they are removed and the model's mode restored when anything raises. No
parameter ever requires a gradient, so quantised and partitioned weights work and no `.grad` of a base weight exists.
"""
