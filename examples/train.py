"""Training of a small network: after any crash the loss curve is the same, to the last bit.

    ckptctl submit --python examples/train.py:train --input '{"epochs": 200}'
    python examples/train.py 200                                # without a daemon; needs numpy

What a training is made of comes back as a whole: weights and momentum as a file of the checkpoint,
the state of the random numbers (they shuffle the data), the epoch and the curve so far as state.
`on_checkpoint` collects all that when the strategy wants to save; nothing is ever pickled.
"""

import sys
from typing import Any

import numpy as np

from ckptd.sdk import Progress, SyncResumableContext, run_local, task

HIDDEN, BATCH, RATE, INERTIA = 64, 50, 0.2, 0.9
Arrays = dict[str, np.ndarray]


@task(strategy=Progress(0.02))
def train(ctx: SyncResumableContext, epochs: int = 200, seed: int = 1) -> list[float]:
    """Learn to tell two spirals apart; return the loss of each epoch."""
    inputs, wanted = spirals(np.random.default_rng(0))
    chance = np.random.default_rng(seed)
    weights = fresh_weights(chance)
    momentum = {name: np.zeros_like(one) for name, one in weights.items()}
    state = ctx.state
    state.setdefault("losses", [])

    @ctx.on_restore
    def _() -> None:
        chance.bit_generator.state = state["chance"]
        for kind, arrays in (("weights", weights), ("momentum", momentum)):
            with np.load(str(ctx.saved_file(f"{kind}.npz"))) as saved:
                arrays.update(saved)

    def collect() -> None:
        state["chance"] = chance.bit_generator.state
        np.savez(ctx.file("weights.npz"), **weights)
        np.savez(ctx.file("momentum.npz"), **momentum)

    ctx.on_checkpoint(collect, background=True)  # synced while the next epoch is computed
    while len(state["losses"]) < epochs:
        state["losses"].append(epoch(weights, momentum, inputs, wanted, chance))
        print(f"epoch {len(state['losses'])}: loss {state['losses'][-1]:.4f}", flush=True)
        ctx.checkpoint_if_needed(progress=(len(state["losses"]), epochs))
    return list(state["losses"])


def epoch(
    weights: Arrays, momentum: Arrays, inputs: Any, wanted: Any, chance: np.random.Generator
) -> float:
    """Go through the data once, in a random order; return the mean loss."""
    total = 0.0
    for chosen in np.split(chance.permutation(len(inputs)), len(inputs) // BATCH):
        hidden = np.tanh(inputs[chosen] @ weights["in"] + weights["in_bias"])
        guess = 1 / (1 + np.exp(-(hidden @ weights["out"] + weights["out_bias"])))
        total -= float(np.log(np.where(wanted[chosen], guess, 1 - guess)).mean())
        error = (guess - wanted[chosen]) / BATCH
        back = error @ weights["out"].T * (1 - hidden**2)
        slopes = {
            "in": inputs[chosen].T @ back,
            "in_bias": back.sum(axis=0),
            "out": hidden.T @ error,
            "out_bias": error.sum(axis=0),
        }
        for name, slope in slopes.items():
            momentum[name] = INERTIA * momentum[name] - RATE * slope
            weights[name] += momentum[name]
    return total * BATCH / len(inputs)


def fresh_weights(chance: np.random.Generator) -> Arrays:
    """Return the weights to begin with."""
    return {
        "in": chance.normal(size=(2, HIDDEN)),
        "in_bias": np.zeros(HIDDEN),
        "out": chance.normal(size=(HIDDEN, 1)) / HIDDEN**0.5,
        "out_bias": np.zeros(1),
    }


def spirals(chance: np.random.Generator) -> tuple[Any, Any]:
    """Return points of two spirals, and which of the two each belongs to."""
    angle = np.linspace(0.5, 9, 1000)
    one = np.stack([angle * np.cos(angle), angle * np.sin(angle)], axis=1) / 3
    points = np.concatenate([one, -one]) + chance.normal(scale=0.05, size=(2000, 2))
    return points, np.repeat([[True], [False]], 1000, axis=0)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: train.py EPOCHS")
    losses = run_local(train, "train.task", epochs=int(sys.argv[1]))
    print(f"{len(losses)} epochs, the last loss is {losses[-1]!r}")
