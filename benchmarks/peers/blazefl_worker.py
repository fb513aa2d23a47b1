"""Rounds in BlazeFL: its FedAvg with a pool of threads, one for each core, PyTorch models."""

import copy
import os
import sys
from typing import Any

import torch  # pyright: ignore[reportMissingImports]
from blazefl.contrib.fedavg import (  # pyright: ignore[reportMissingImports]
    FedAvgBaseServerHandler,
    FedAvgThreadPoolClientTrainer,
)

from benchmarks.peers import common


class Federation:
    """The models and the data in the form that BlazeFL asks for."""

    def __init__(self, task: common.Task):
        self.task = task
        self.model = common.torch_model(task)
        self.index = 0

    def select_model(self, model_name: str) -> Any:
        del model_name
        return copy.deepcopy(self.model)

    def get_dataloader(self, type_, cid, batch_size, generator) -> list[Any]:
        """Return ready batches, which is less work than a loader that collates examples."""
        del type_, generator
        place = self.task.cohorts[self.index].tolist().index(cid)
        images, labels = map(torch.from_numpy, common.rows(self.task, self.index, place))
        return list(zip(images.split(batch_size), labels.split(batch_size), strict=True))


def main(path: str) -> None:
    task = common.load(path)
    num_rounds, cohort_size = task.cohorts.shape
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    torch.set_num_threads(1)
    federation = Federation(task)
    options = {
        "model_selector": federation,
        "model_name": "model",
        "dataset": federation,
        "num_clients": len(task.labels),
        "batch_size": task.batch_size,
        "device": "cpu",
        "seed": 0,
    }
    server = FedAvgBaseServerHandler(
        global_round=num_rounds, sample_ratio=cohort_size / len(task.labels), **options
    )
    trainer = FedAvgThreadPoolClientTrainer(epochs=1, lr=task.rate, num_parallels=cores, **options)
    trainer.progress_fn = lambda jobs: jobs  # without a bar
    turns = common.Turns(lambda: common.parameters(server.model))
    while turns.next():
        federation.index = turns.index
        trainer.local_process(server.downlink_package(), task.cohorts[turns.index].tolist())
        for package in trainer.uplink_package():
            server.load(package)


if __name__ == "__main__":
    main(sys.argv[1])
