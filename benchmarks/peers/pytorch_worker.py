"""Rounds as a plain PyTorch loop: the reference of the parameters, and what peers add to."""

import sys

import torch  # pyright: ignore[reportMissingImports]

from benchmarks.peers import common


def main(path: str) -> None:
    task = common.load(path)
    model = common.torch_model(task)
    parameters = list(model.parameters())
    turns = common.Turns(lambda: common.parameters(model))
    while turns.next():
        start = [parameter.detach().clone() for parameter in parameters]
        total = [torch.zeros_like(value) for value in start]
        cohort_size = task.cohorts.shape[1]
        for place in range(cohort_size):
            common.train(model, *common.rows(task, turns.index, place), task)
            with torch.no_grad():
                for parameter, value, added in zip(parameters, start, total, strict=True):
                    added += parameter
                    parameter.copy_(value)
        with torch.no_grad():
            for parameter, added in zip(parameters, total, strict=True):
                parameter.copy_(added / cohort_size)


if __name__ == "__main__":
    main(sys.argv[1])
