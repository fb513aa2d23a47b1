"""Rounds in Flower's simulation: its FedAvg on Ray, one actor for each core, PyTorch models."""

import os
import sys

os.environ |= {"FLWR_TELEMETRY_ENABLED": "0", "RAY_USAGE_STATS_ENABLED": "0"}

from flwr.app import (  # pyright: ignore[reportMissingImports]
    ArrayRecord,
    ConfigRecord,
    Message,
    MetricRecord,
    RecordDict,
)
from flwr.clientapp import ClientApp  # pyright: ignore[reportMissingImports]
from flwr.serverapp import ServerApp  # pyright: ignore[reportMissingImports]
from flwr.serverapp.strategy import FedAvg  # pyright: ignore[reportMissingImports]
from flwr.simulation import run_simulation  # pyright: ignore[reportMissingImports]

from benchmarks.peers import common


def client_app(path: str) -> ClientApp:
    app = ClientApp()

    @app.train()
    def train(message, context):
        del context
        task, model = common.task_and_model(path)
        model.load_state_dict(message.content["arrays"].to_torch_state_dict())
        index, place = (message.content["config"][name] for name in ("index", "place"))
        images, labels = common.rows(task, index, place)
        common.train(model, images, labels, task)
        content = {
            "arrays": ArrayRecord(model.state_dict()),
            "metrics": MetricRecord({"num-examples": len(labels)}),
        }
        return Message(content=RecordDict(content), reply_to=message)

    return app


def server_app(path: str) -> ServerApp:
    """Build the server; it owns the answers, so it is not to be pickled."""
    app = ServerApp()
    task, model = common.task_and_model(path)
    num_rounds, cohort_size = task.cohorts.shape
    present = [ArrayRecord(model.state_dict())]

    def params():
        return [value.numpy() for value in present[0].to_torch_state_dict().values()]

    class InTurns(FedAvg):
        """Waits before every round, and says which rows a node is to train on."""

        def configure_train(self, server_round, arrays, config, grid):
            del server_round, config
            present[0] = arrays
            if not turns.next():
                raise SystemExit
            nodes = list(grid.get_node_ids())
            cohort = task.cohorts[turns.index].tolist()
            messages = []
            for place, client in enumerate(cohort):
                where = ConfigRecord({"index": turns.index, "place": place})
                record = RecordDict({"arrays": arrays, "config": where})
                messages.append(Message(record, nodes[client], "train"))
            return messages

    @app.main()
    def main(grid, context):
        del context
        while len(list(grid.get_node_ids())) < len(task.labels):
            pass
        strategy = InTurns(fraction_train=cohort_size / len(task.labels), fraction_evaluate=0.0)
        result = strategy.start(grid, present[0], num_rounds=num_rounds)
        present[0] = result.arrays
        turns.next()

    turns = common.Turns(params, family=True)
    return app


def main(path: str) -> None:
    task, _ = common.task_and_model(path)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    run_simulation(
        server_app(path),
        client_app(path),
        num_supernodes=len(task.labels),
        backend_config={
            "init_args": {"num_cpus": cores},
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
        },
    )


if __name__ == "__main__":
    main(sys.argv[1])
