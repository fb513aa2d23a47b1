"""Rounds in pfl: `FederatedAveraging` on its simulated backend, PyTorch models."""

import sys
from collections.abc import Iterator
from typing import Any

import torch  # pyright: ignore[reportMissingImports]
from pfl.aggregate.simulate import SimulatedBackend  # pyright: ignore[reportMissingImports]
from pfl.algorithm.base import NNAlgorithmParams  # pyright: ignore[reportMissingImports]
from pfl.algorithm.federated_averaging import (  # pyright: ignore[reportMissingImports]
    FederatedAveraging,
)
from pfl.callback.base import TrainingProcessCallback  # pyright: ignore[reportMissingImports]
from pfl.data.dataset import Dataset  # pyright: ignore[reportMissingImports]
from pfl.data.federated_dataset import FederatedDataset  # pyright: ignore[reportMissingImports]
from pfl.hyperparam import (  # pyright: ignore[reportMissingImports]
    NNEvalHyperParams,
    NNTrainHyperParams,
)
from pfl.metrics import Metrics, Weighted  # pyright: ignore[reportMissingImports]
from pfl.model.pytorch import PyTorchModel  # pyright: ignore[reportMissingImports]

from benchmarks.peers import common


class Classifier(torch.nn.Module):
    """The model with the loss and the metrics that pfl asks for."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model

    def loss(self, images, labels):
        return torch.nn.functional.cross_entropy(self.model(images), labels)

    def metrics(self, images, labels):
        with torch.no_grad():
            return {"loss": Weighted(len(labels) * self.loss(images, labels).item(), len(labels))}


def main(path: str) -> None:
    task = common.load(path)
    num_rounds, cohort_size = task.cohorts.shape
    model = common.torch_model(task)
    turns = common.Turns(lambda: common.parameters(model))

    def members() -> Iterator[tuple[int, int]]:
        for index in range(num_rounds):
            for place in range(cohort_size):
                yield index, place

    def user(member):
        images, labels = common.rows(task, *member)
        return Dataset((torch.from_numpy(images), torch.from_numpy(labels)), user_id=str(member))

    class Turn(TrainingProcessCallback):
        """Waits where a round has ended."""

        def after_central_iteration(self, aggregate_metrics, model, *, central_iteration):
            del aggregate_metrics, model, central_iteration
            return not turns.next(), Metrics()

    upcoming = members()
    dataset = FederatedDataset(user, lambda: next(upcoming))
    if not turns.next():
        return
    FederatedAveraging().run(
        NNAlgorithmParams(
            central_num_iterations=num_rounds,
            evaluation_frequency=num_rounds,
            train_cohort_size=cohort_size,
            val_cohort_size=0,
        ),
        SimulatedBackend(dataset, dataset),
        PyTorchModel(
            Classifier(model),
            torch.optim.SGD,
            central_optimizer=torch.optim.SGD(model.parameters(), lr=1.0),
        ),
        NNTrainHyperParams(
            local_num_epochs=1, local_learning_rate=task.rate, local_batch_size=task.batch_size
        ),
        NNEvalHyperParams(local_batch_size=None),
        callbacks=[Turn()],
        send_metrics_to_platform=False,
    )


if __name__ == "__main__":
    main(sys.argv[1])
