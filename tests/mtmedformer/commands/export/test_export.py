"""The ONNX graph has the outputs of the model for any batch and size, and the folder matches its description."""

import json
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import yaml
from safetensors.torch import load_file

import mtmedformer
from mtmedformer.calibration import TaskCalibration, plain
from mtmedformer.commands.export.command import export
from mtmedformer.commands.export.onnx_check import TOLERANCE, compare
from mtmedformer.commands.export.onnx_graph import ExportedOutputs, _traced, export_graph
from mtmedformer.commands.export.onnx_outputs import decode, read_heads
from mtmedformer.commands.load.stored_model import build_model, read_model
from mtmedformer.errors import ConfigError
from mtmedformer.heads import DETRHead, SegmentationHead
from mtmedformer.storage.hashing import weights_digest
from tests.fixtures.stored_models import HEADS, description, write_checkpoint

TASKS = [task for task in HEADS if task != "found"]  # queries cannot be traced and take long; see below
CALIBRATION = plain({"health": TaskCalibration(10, 3.0), "organ": TaskCalibration(10, 0.4)})


@pytest.fixture(scope="module")
def handed_on(tmp_path_factory):
    """Heads of every kind, calibrated, and the folder they were exported to."""
    folder = tmp_path_factory.mktemp("export")
    file = write_checkpoint(folder / "run", description(*TASKS), calibration=CALIBRATION)
    return file, folder / "out", export(file, folder / "out")


def run(folder, image):
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(None, {"image": image.numpy()}), strict=True))


@pytest.mark.parametrize("shape", [(1, 1, 64, 96), (4, 1, 32, 32), (2, 1, 77, 203), (1, 1, 160, 131)])
def test_the_graph_has_the_predictions_of_the_model(handed_on, shape):
    file, folder, _ = handed_on
    image = torch.rand(shape, generator=torch.Generator().manual_seed(1))
    module = mtmedformer.load(file).module
    with torch.inference_mode():
        expected = module.predict(image)
    found = decode(run(folder, image), read_heads(folder), shape[2:])
    assert found.keys() == expected.keys() == dict.fromkeys(TASKS).keys()
    for task in ("health", "signs", "organ", "parts"):
        assert found[task].shape == expected[task].shape
        assert torch.allclose(found[task], expected[task], rtol=0, atol=TOLERANCE)
    same_boxes(expected["nodules"], found["nodules"])


def same_boxes(expected, found):
    assert len(expected) == len(found)
    for ours, theirs in zip(expected, found, strict=True):
        assert len(ours["boxes"]) > 0
        assert torch.equal(ours["labels"], theirs["labels"])
        assert torch.allclose(ours["scores"], theirs["scores"], rtol=0, atol=TOLERANCE)
        assert torch.allclose(ours["boxes"], theirs["boxes"], rtol=0, atol=1e-2)


def test_the_differences_are_reported_and_small(handed_on):
    _, folder, graph = handed_on
    outputs = {one.output for one in graph.differences}
    assert outputs == set(graph.outputs) == set(json.loads((folder / "model.json").read_text())["outputs"])
    assert {"health", "health.attention", "nodules.scores", "nodules.boxes", "organ", "parts"} <= outputs
    assert all(one.allowed <= 1 and one.absolute < 1e-3 for one in graph.differences)
    assert graph.size is None
    assert len({shape[0] for shape in graph.shapes}) > 1
    assert len({shape[2:] for shape in graph.shapes}) > 1


def test_the_check_detects_a_changed_weight(handed_on):
    file, _, graph = handed_on
    module = build_model(read_model(file))
    module.heads["organ"].logits.bias.data += 1e-2
    answers = ExportedOutputs(module).eval()
    seen = {one.output: one.allowed for one in compare(graph.content, answers.names, answers, graph.shapes)}
    assert seen["organ"] > 1
    assert all(allowed <= 1 for name, allowed in seen.items() if name != "organ")


class Stem(torch.nn.Module):
    """A pyramid of pooled grey values: no encoder to wait for."""

    channels, strides, in_chans, fixed_size = 8, (4, 8, 16, 32, 64), 1, None

    def forward(self, image):
        pooled = [torch.nn.functional.avg_pool2d(image, s, s, ceil_mode=True) for s in self.strides]
        return [level.expand(-1, self.channels, -1, -1) * 2 for level in pooled]


@pytest.mark.slow
def test_queries_are_exported_with_symbolic_sizes():
    """If a trace is wrong for other sizes, the other exporter is used, and the graph has a remark."""
    torch.manual_seed(0)
    head = DETRHead(["round", "spiky"], num_queries=6, num_layers=1, num_heads=2)
    module = mtmedformer.MultiTaskModule(Stem(), {"found": head}).eval()
    graph = export_graph(module, (64, 96))
    assert graph.size is None
    assert [remark.split(":")[0] for remark in graph.remarks] == ["traced, any size"]
    image = torch.rand(2, 1, 50, 70)
    session = onnxruntime.InferenceSession(graph.content, providers=["CPUExecutionProvider"])
    found = dict(zip(graph.outputs, session.run(list(graph.outputs), {"image": image.numpy()}), strict=True))
    with torch.inference_mode():
        outputs = head(module.encoder(image), (50, 70))
        same_boxes(head.predict(outputs, (50, 70)), decode(found, {"found": head}, (50, 70))["found"])


def test_a_model_bound_to_a_size_is_exported_for_that_size(monkeypatch):
    from mtmedformer.commands.export import onnx_graph

    traced = onnx_graph._traced
    monkeypatch.setattr(onnx_graph, "_traced", lambda answers, image, free: traced(answers, image, free=False))
    monkeypatch.setattr(onnx_graph, "_symbolic", lambda *args: 1 / 0)
    bound = Stem()
    bound.fixed_size = (64, 96)
    module = mtmedformer.MultiTaskModule(bound, {"organ": SegmentationHead(["organ"])}).eval()
    graph = export_graph(module, (64, 96))
    assert graph.size == (64, 96)
    assert {shape[2:] for shape in graph.shapes} == {(64, 96)}


def test_a_graph_with_other_outputs_is_not_written(tmp_path, monkeypatch):
    from mtmedformer.commands.export import onnx_graph

    file = write_checkpoint(tmp_path / "run", description("organ"))
    wrong = export_graph(build_model(read_model(write_checkpoint(tmp_path / "b", description("organ"), 1))), (64, 64))
    for way in ("_traced", "_symbolic"):
        monkeypatch.setattr(onnx_graph, way, lambda *args: wrong.content)
    with pytest.raises(ConfigError, match="organ differs by"):
        export(file, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_folder_describes_the_model(handed_on):
    file, folder, _ = handed_on
    about = json.loads((folder / "model.json").read_text())
    weights = load_file(folder / "model.safetensors")
    stored = torch.load(file, weights_only=True)["state_dict"]
    assert about["note"] == "research use only"
    assert about["weights"] == weights_digest(weights) == weights_digest(stored)
    assert about["tasks"]["nodules"]["classes"] == ["round", "spiky"]
    assert about["preparation"]["image_size"] == [64, 96]
    assert about["calibration"] == CALIBRATION
    texts = {prop.key: prop.value for prop in onnx.load(folder / "model.onnx").metadata_props}
    assert texts["note"] == "research use only"
    assert json.loads(texts["tasks"]) == about["tasks"]
    assert "onnx_outputs.decode" in texts["decoding"]
    assert set(json.loads(texts["outputs"])) == set(about["outputs"])
    graph = onnx.load(folder / "model.onnx").graph
    assert [(d.dim_param or d.dim_value) for d in graph.input[0].type.tensor_type.shape.dim] == [
        "batch",
        1,
        "height",
        "width",
    ]


def test_each_format_alone(tmp_path):
    file = write_checkpoint(tmp_path / "run", description("organ"))
    assert export(file, tmp_path / "a", "safetensors") is None
    assert {f.name for f in (tmp_path / "a").iterdir()} == {"model.json", "config.yaml", "model.safetensors"}
    assert export(file, tmp_path / "b", "onnx") is not None
    assert {f.name for f in (tmp_path / "b").iterdir()} == {"model.json", "config.yaml", "model.onnx"}
    with pytest.raises(ConfigError, match="format=safetensors"):
        mtmedformer.load(tmp_path / "b")


def test_an_export_can_be_exported_again_and_no_other_model_overwrites_it(tmp_path):
    export(write_checkpoint(tmp_path / "a", description("organ")), tmp_path / "out", "safetensors")
    export(tmp_path / "out", tmp_path / "again", "safetensors")
    for name in ("model.json", "model.safetensors", "config.yaml"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    with pytest.raises(ConfigError, match="another model"):
        export(write_checkpoint(tmp_path / "b", description("organ"), seed=1), tmp_path / "out", "safetensors")


def test_training_continues_from_the_model_section(handed_on):
    """``config.yaml`` is a configuration the command line takes, and the weights fill all of it."""
    from mtmedformer.encoders.pretrained import load_weights

    _, folder, _ = handed_on
    section = yaml.safe_load((folder / "config.yaml").read_text())["model"]
    assert "init_weights" in section["init_args"]
    module = build_model(read_model(folder))
    for parameter in module.parameters():
        parameter.data.zero_()
    assert load_weights(module, folder / "model.safetensors").complete


def test_a_trace_that_fails_is_not_printed(capfd):
    """Torch would print the whole graph, from C++."""

    class Odd(SegmentationHead):
        def predict(self, outputs, size):
            return torch.nn.functional.interpolate(outputs, size, mode="bicubic", antialias=True)

    module = mtmedformer.MultiTaskModule(Stem(), {"organ": Odd(["organ"])}).eval()
    with pytest.raises(Exception, match="upsample_bicubic2d_aa"):
        _traced(ExportedOutputs(module).eval(), torch.rand(1, 1, 64, 96), free=True)
    print("after")
    assert capfd.readouterr().out == "after\n"


def test_a_head_without_tensors_is_refused_with_a_reason(tmp_path):
    class Listed(SegmentationHead):
        def predict(self, outputs, size):
            return list(outputs)

    module = mtmedformer.MultiTaskModule(Stem(), {"organ": Listed(["organ"])}).eval()
    with pytest.raises(ConfigError, match="Listed predicts no tensors"):
        export_graph(module, (64, 64))


def test_a_missing_package_is_named_with_its_extra(monkeypatch, handed_on, tmp_path):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ConfigError, match=r"onnxscript; pip install 'mtmedformer\[export\]'"):
        export(handed_on[0], tmp_path / "out")
    assert export(handed_on[0], tmp_path / "out", "safetensors") is None


def test_damaged_descriptions_are_refused(handed_on, tmp_path):
    for text in ("", "[]", "{}", '{"model": 3}', "[" * 100_000):
        (tmp_path / "model.json").write_text(text)
        for read in (mtmedformer.load, read_heads):
            with pytest.raises(ConfigError, match=r"model\.json"):
                read(tmp_path)
    assert np.isfinite(handed_on[2].differences[0].absolute)
