"""A training with a file of intensity changes goes on without the file."""

import yaml

from mtmedformer.commands.main import main
from tests.fixtures.small_set import small_config, write_config

AUGMENTATION = """
transform:
  __class_fullname__: Compose
  p: 1.0
  transforms:
  - {__class_fullname__: RandomGamma, gamma_limit: [80.0, 120.0], p: 0.5}
"""


def test_fit_resume_test_and_predict_do_not_need_the_file_again(images, tmp_path, capsys):
    file = tmp_path / "aug.yaml"
    config = small_config(images, tmp_path, max_epochs=1, limit_train_batches=2)
    preset = {"class_path": "datamodules.ChestPreset", "init_args": {"intensity": str(file)}}
    config["data"]["init_args"]["preset"] = preset
    path = write_config(config, tmp_path / "c.yaml")
    assert main(["fit", "--config", path]) == 2, "the file is missing"
    assert "no such file" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run").exists()

    file.write_text(AUGMENTATION)
    assert main(["fit", "--config", path]) == 0
    stored = yaml.safe_load((tmp_path / "run/config.yaml").read_text())["data"]["init_args"]["preset"]
    assert stored["init_args"]["intensity"] == AUGMENTATION
    file.unlink()
    checkpoint = ["--ckpt_path", str(tmp_path / "run/checkpoints/best.ckpt")]
    assert main(["test", *checkpoint]) == 0
    image = str(next((images / "images").iterdir()))
    plain = ["--overlays=false", "--data.num_workers=0", "--trainer.enable_progress_bar=false"]
    assert main(["predict", *checkpoint, "--images", image, "--output", str(tmp_path / "out"), *plain]) == 0
