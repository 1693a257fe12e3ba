"""Settings: frozen, typed, and told what is wrong all at once; what is written is read again as it was."""

import pytest
import yaml
from pydantic import ValidationError

from streamflow import config
from streamflow.config import Acceleration, ConfigError, Settings, SimilarImages

SETTINGS = [
    Settings(),
    Settings(
        model="org/name",
        mode="img2img",
        prompt=(("a cat: one, #1", 0.6), ("null", 0.4)),
        strength=0.5,
        cfg_type="full",
        guidance_scale=4,
        negative_prompt="yes",
        devices=("cuda:0", "cuda:1"),
        loras={"file: a.safetensors": 0.7},
        acceleration=Acceleration(kind="compile", options={"quantize": "fp8", "limit": 3, "options": {"a": None}}),
        similar_image_filter=SimilarImages(threshold=0.9),
    ),
    Settings(t_index_list=(0, 2), prompt="été 🍎\nsecond line", tiny_vae="folder"),
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_what_is_saved_is_loaded_as_it_was(settings, tmp_path):
    path = tmp_path / "settings.yaml"
    config.save(settings, path)
    assert config.load(path) == settings
    assert [one.name for one in tmp_path.iterdir()] == ["settings.yaml"]


def test_every_key_has_its_comment_above_it():
    lines = config.commented(SETTINGS[1]).splitlines()
    for name in (*Settings.model_fields, *(f"  {name}" for name in Acceleration.model_fields)):
        (at,) = [i for i, line in enumerate(lines) if line.startswith(f"{name}:")]
        assert lines[at - 1].lstrip().startswith("# "), name


def test_a_part_of_the_keys_is_enough(tmp_path):
    (tmp_path / "a.yaml").write_text("prompt: a fox\n")
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    assert config.load(tmp_path / "a.yaml") == Settings(prompt="a fox")
    assert config.load(tmp_path / "empty.yaml") == Settings()


def test_all_mistakes_are_told_at_once_with_their_paths(tmp_path):
    wrong = {
        "promt": "a fox",
        "num_inference_steps": "four",
        "seed": -1,
        "acceleration": {"kind": "fast", "option": {}},
        "similar_image_filter": {"threshold": 1.5},
    }
    path = tmp_path / "wrong.yaml"
    path.write_text(yaml.safe_dump(wrong))
    with pytest.raises(ConfigError) as caught:
        config.load(path)
    said = str(caught.value)
    assert str(path) in said
    for part in (
        "promt: there is no such key",
        "num_inference_steps: Input should be a valid integer, not 'four'",
        "seed: Input should be greater than or equal to 0, not -1",
        "acceleration.kind: Input should be 'none', 'auto'",
        "acceleration.option: there is no such key",
        "similar_image_filter.threshold: Input should be less than or equal to 1, not 1.5",
    ):
        assert part in said


@pytest.mark.parametrize(
    "wrong,says",
    [
        ({"t_index_list": [0], "strength": 0.5, "mode": "img2img"}, "leave one out"),
        ({"strength": 0.5, "mode": "txt2img"}, "strength is of mode img2img"),
        ({"negative_prompt": "x"}, "needs guidance"),
        ({"seed": True}, "seed: Input should be a valid integer"),
        (["seed"], "keys and values, not list"),
    ],
)
def test_what_does_not_go_together_is_refused(wrong, says):
    with pytest.raises(ConfigError, match=says):
        config.parse(wrong)


def test_what_is_no_yaml_is_named(tmp_path):
    (tmp_path / "a.yaml").write_text("a: [1")
    with pytest.raises(ConfigError, match="a.yaml is no YAML"):
        config.load(tmp_path / "a.yaml")
    (tmp_path / "b.yaml").write_text("model: 2026-11-23")
    with pytest.raises(ConfigError, match="b.yaml:\n  a value is of a kind"):
        config.load(tmp_path / "b.yaml")


def test_settings_are_frozen():
    with pytest.raises(ValidationError, match="frozen"):
        Settings().seed = 3
