"""A pipeline by what a person writes; and what cannot be loaded says why."""

import pytest
import torch

from streamflow import models


def test_the_embedded_model_by_its_name_and_by_its_folder(tmp_path):
    pipe = models.load(dtype=torch.float16)
    assert (pipe.transformer.dtype, pipe.vae.dtype, pipe.text_encoder_3) == (torch.float16, torch.float16, None)
    pipe.save_pretrained(tmp_path)
    again = models.load(str(tmp_path))  # though it was saved without a third text encoder
    weights = pipe.transformer.state_dict()
    assert all(torch.equal(value, weights[name].float()) for name, value in again.transformer.state_dict().items())


def test_what_cannot_be_loaded(tmp_path):
    (tmp_path / "weights.ckpt").touch()
    (tmp_path / "weights.safetensors").touch()
    cases = [
        (tmp_path / "nothing", FileNotFoundError, "no file or folder.*'embedded' or 'embedded-video', a hub id"),
        ("embeded", FileNotFoundError, "no file or folder embeded"),
        (tmp_path, FileNotFoundError, "no model_index.json"),
        (tmp_path / "weights.ckpt", ValueError, "pickled weights can run code"),
        (tmp_path / "weights.safetensors", ValueError, "pass family=, one of .*sd3"),
    ]
    for model, error, says in cases:
        with pytest.raises(error, match=says):
            models.load(str(model))
