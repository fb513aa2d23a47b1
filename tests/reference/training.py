"""Local training and federated rounds of linear least squares in plain NumPy loops."""

import numpy as np


def gradient(weights, inputs, targets):
    """Gradient of the mean of 1/2 (x w - y)^2."""
    return inputs.T @ (inputs @ weights - targets) / len(targets)


def descend(start, inputs, targets, *, rate, num_steps, strength=0.0, shift=0.0, momentum=0.0):
    """Full-batch descent with a proximal term, a shift of the gradient, and momentum."""
    current, velocity = start.copy(), np.zeros_like(start)
    for _ in range(num_steps):
        slope = gradient(current, inputs, targets) + strength * (current - start) + shift
        velocity = momentum * velocity + slope
        current = current - rate * velocity
    return current


def scaffold_round(model, control, controls, clients, cohort, *, rate, num_steps):
    """One round of SCAFFOLD, option II; `clients` is a list of (inputs, targets)."""
    controls, moves, changes = controls.copy(), [], []
    for k in cohort:
        shift = control - controls[k]
        new = descend(model, *clients[k], rate=rate, num_steps=num_steps, shift=shift)
        own = controls[k] - control + (model - new) / (num_steps * rate)
        moves.append(new - model)
        changes.append(own - controls[k])
        controls[k] = own
    model = model + np.mean(moves, axis=0)
    control = control + len(cohort) / len(clients) * np.mean(changes, axis=0)
    return model, control, controls


def fednova_round(model, clients, steps, *, rate, momentum):
    """One round of FedNova from the definition of a_k as the sum of the weights of gradients."""
    sizes = np.array([len(targets) for _, targets in clients])
    shares = sizes / sizes.sum()
    directions, works = [], []
    for (inputs, targets), count in zip(clients, steps, strict=True):
        new = descend(model, inputs, targets, rate=rate, num_steps=count, momentum=momentum)
        work = sum(sum(momentum**i for i in range(count - t)) for t in range(count))
        directions.append((new - model) / work)
        works.append(work)
    return model + shares @ works * np.einsum("k,ki->i", shares, directions)
