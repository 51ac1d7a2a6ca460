"""Outputs that are NaN or infinite."""

import numpy as np
import pytest
import torch

from mtmedformer import MultiTaskModule
from mtmedformer.batch import Meta
from mtmedformer.commands.load.stored_model import MODEL_HOMES, build
from mtmedformer.errors import ConfigError, DataError
from mtmedformer.inference.predictor import TiledPredictor
from mtmedformer.inference.results import check_finite, image_result
from tests.fixtures.stored_models import HEADS, description


@pytest.fixture(scope="module", params=list(HEADS))
def module(request):
    return build(description(request.param), MultiTaskModule, MODEL_HOMES).eval()


@pytest.mark.parametrize("predictor", [TiledPredictor(), TiledPredictor((32, 32)), TiledPredictor(flip_tta=True)])
@torch.no_grad()
def test_an_image_whose_outputs_are_nan_is_refused_and_the_others_are_not(module, predictor):
    module.predictor = predictor
    images = torch.rand(3, 1, 64, 64)
    images[1, 0, 5, 5] = torch.nan
    predictions = module.predict_whole(images)
    meta = Meta("x", "", original_size=(64, 64))
    for i in (0, 2):
        image_result(predictions, i, meta, module.tasks)
    with pytest.raises(DataError, match="is NaN or infinite"):
        image_result(predictions, 1, meta, module.tasks)


@torch.no_grad()
def test_finite_predictions_are_unchanged(module):
    images = torch.rand(2, 1, 64, 64)
    module.predictor = TiledPredictor()
    (name, head), *_ = module.heads.items()
    predicted, plain = module.predict(images)[name], head.predict(module(images)[name], (64, 64))
    for a, b in zip(predicted, plain, strict=True):
        pairs = [(a, b)] if isinstance(a, torch.Tensor) else [(a[key], b[key]) for key in b]
        for one, other in pairs:
            np.testing.assert_array_equal(one.numpy(), other.numpy())
    for i in range(2):
        check_finite(module.predict(images), i, module.tasks)


def test_weights_that_are_not_finite_are_refused(module):
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    module.check_checkpoint({"state_dict": state}, resumed=False)
    next(one for one in state.values() if one.is_floating_point()).view(-1)[0] = torch.inf
    with pytest.raises(ConfigError, match="NaN or infinite"):
        module.check_checkpoint({"state_dict": state}, resumed=False)
