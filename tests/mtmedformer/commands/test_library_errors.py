"""Mistakes found by a library become one sentence; faults of the code keep their traceback."""

import lightning as L
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import EarlyStopping
from torch.utils.data import DataLoader

from mtmedformer import ClassificationHead, SharedEncoder
from mtmedformer.commands.library_errors import mistake
from mtmedformer.commands.messages import explain
from mtmedformer.errors import ConfigError
from mtmedformer.module import MultiTaskModule


def as_command_line(code, **names):
    """Run code whose frames belong to the command line, as far as the rule sees it."""
    space = {"__name__": "mtmedformer.commands.lightning_cli", "torch": torch, "L": L, **names}
    exec(code, space)


def raised(function, *arguments, **options):
    with pytest.raises(BaseException) as caught:
        function(*arguments, **options)
    return caught.value


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("L.Trainer(strategy='nonsense', accelerator='cpu')", "invalid strategy name: 'strategy='nonsense''"),
        ("L.Trainer(accelerator='nonsense')", "invalid accelerator name"),
        ("L.Trainer(accelerator='cpu', devices=-1)", "should be an int > 0"),
        ("torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=-1.0)", "Invalid learning rate: -1.0"),
    ],
)
def test_a_check_of_a_library_reached_from_the_command_line_is_a_mistake(code, words):
    # the frames of <string> stand for methods of CommandLine
    message, exit_code = explain(raised(as_command_line, code))
    assert words in message
    assert exit_code == 2


@pytest.mark.parametrize(
    "error",
    [
        ConfigError("x: y"),
        MisconfigurationException("`x` cannot be y"),
        ModuleNotFoundError("psutil is missing; pip install psutil"),
    ],
)
def test_types_for_mistakes_count_wherever_they_are_raised(error):
    def fail():
        raise error

    assert mistake(raised(fail))[1] == 2


def test_a_mistake_wrapped_by_another_exception_is_found():
    def fail():
        try:
            raise ConfigError("data.x: no")
        except ConfigError as error:
            raise ValueError("a page of text") from error

    assert mistake(raised(fail)) == ("data.x: no", 2)


def test_a_mistake_handled_before_a_fault_does_not_hide_it():
    def fail():
        try:
            raise ConfigError("data.x: no")
        except ConfigError:
            raise ValueError("a fault in the handler")  # noqa: B904

    assert mistake(raised(fail)) is None


@pytest.mark.parametrize("code", ["torch.zeros(2) @ torch.zeros(3)", "[].no_such_name", "{}['key']", "int('x')"])
def test_exceptions_of_compiled_code_and_of_our_own_are_faults(code):
    assert explain(raised(as_command_line, code)) == ("", None)


def test_a_check_of_a_library_reached_from_a_computing_function_is_a_fault():
    space = {"__name__": "mtmedformer.losses.hybrid", "torch": torch}
    code = "torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=-1.0)"
    assert mistake(raised(lambda: exec(code, space))) is None


class Plain(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def training_step(self, batch, batch_idx):
        self.log("train/loss", 1.0)
        return self.layer(batch).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_a_missing_metric_is_a_mistake_and_the_metrics_are_named(tmp_path):
    trainer = L.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path, callbacks=EarlyStopping("val_loss"),
    )  # fmt: skip
    module, loader = Plain(), DataLoader(torch.zeros(2, 1))
    code = "trainer.fit(module, loader)"
    message, exit_code = explain(raised(as_command_line, code, trainer=trainer, module=module, loader=loader))
    assert exit_code == 2
    assert "'val_loss'" in message
    assert "train/loss" in message


def test_a_wrong_setting_of_the_optimizer_is_found_through_the_module():
    encoder, heads = SharedEncoder("mtmedformer_tiny", channels=16), {"health": ClassificationHead(["well", "sick"])}
    module = MultiTaskModule(encoder, heads, optimizer=lambda groups: torch.optim.AdamW(groups, lr=-1.0))
    assert explain(raised(module.check_optimizer)) == ("Invalid learning rate: -1.0", 2)


def test_signals_have_the_exit_codes_of_a_shell():
    assert explain(KeyboardInterrupt())[1] == 130

    def interrupted():
        try:
            raise KeyboardInterrupt("stopped by Ctrl-C in epoch 3")
        except KeyboardInterrupt:
            raise SystemExit(1)  # noqa: B904

    assert explain(raised(interrupted)) == ("stopped by Ctrl-C in epoch 3", 130)
    assert explain(raised(lambda: exec("raise SystemExit(1)"))) == ("", None)
