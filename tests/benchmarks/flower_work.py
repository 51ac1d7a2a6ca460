"""Two sites, three rounds of FedAvg, one local epoch of a toy module: here and in Flower's simulation engine.

    python tests/benchmarks/flower_work.py ours|flower

Both train the same module on the same images with Lightning's Trainer at each site and print the final weights' sum.
"""

import sys
import tempfile

import lightning as L
import torch

from tests.fixtures.toy_sites import ToySite, toy_module

SITES, ROUNDS = 2, 3
QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}


def site(number: int) -> ToySite:
    return ToySite(n=16, seed=number)


def ours() -> dict[str, torch.Tensor]:
    """Train in rounds with the federation of this project."""
    from callbacks.federation.callback import Federation
    from federation import FedAvg, FederatedDataModule

    module = toy_module()
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=ROUNDS,
        limit_val_batches=0,
        default_root_dir=tempfile.mkdtemp(),
        callbacks=[Federation(FedAvg())],
        **QUIET,
    )
    trainer.fit(module, datamodule=FederatedDataModule(sites={f"site{i}": site(i) for i in range(SITES)}))
    return module.state_dict()


def flower() -> dict[str, torch.Tensor]:
    """Train in rounds with Flower, as its Lightning example does."""
    from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.serverapp import ServerApp
    from flwr.serverapp.strategy import FedAvg
    from flwr.simulation import run_simulation

    client, server, final = ClientApp(), ServerApp(), {}

    @client.train()
    def train(message, context):
        module = toy_module()
        module.load_state_dict(message.content["arrays"].to_torch_state_dict())
        data = site(int(context.node_config["partition-id"]))
        trainer = L.Trainer(accelerator="cpu", devices=1, max_epochs=1, limit_val_batches=0, **QUIET)
        trainer.fit(module, train_dataloaders=data.train_dataloader())
        content = {
            "arrays": ArrayRecord(module.state_dict()),
            "metrics": MetricRecord({"num-examples": len(data.samples)}),
        }
        return Message(content=RecordDict(content), reply_to=message)

    @server.main()
    def serve(grid, context):
        strategy = FedAvg(fraction_train=1.0, fraction_evaluate=0.0, min_available_nodes=SITES)
        result = strategy.start(grid=grid, initial_arrays=ArrayRecord(toy_module().state_dict()), num_rounds=ROUNDS)
        final.update(result.arrays.to_torch_state_dict())

    resources = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}}
    run_simulation(server, client, num_supernodes=SITES, backend_config=resources)
    return final


if __name__ == "__main__":
    weights = {"ours": ours, "flower": flower}[sys.argv[1]]()
    assert weights, "nothing was trained"
    print(sum(float(value.double().sum()) for value in weights.values()))
