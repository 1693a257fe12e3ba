"""Settings: frozen, typed, and told what is wrong all at once; what is written is read again as it was."""

import os
import re
import stat
import time
from itertools import pairwise

import pytest
import torch
import yaml
from pydantic import ValidationError

from streamflow._files import read_yaml, replacing
from streamflow.app import config
from streamflow.app.commands import options
from streamflow.app.config import Acceleration, ConfigError, Settings, SimilarImages
from streamflow.app.wrapper_config import load_config

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


TAGGED = [
    "!!bool foo",
    "!!int ''",
    "!!timestamp foo",
    "!!str a",
    "! a",
    "!!float x",
    "!!map {}",
    "!!seq []",
    "!a b",
    "!!null x",
]


@pytest.mark.parametrize("text", [one for tag in TAGGED for one in (tag, f"a: {tag}", f"[1, {tag}]", f"{{{tag} : 1}}")])
def test_tags_are_refused(text):
    with pytest.raises(ValueError, match=r"^line 1, column \d+: a tag \(!name\) is not allowed: leave it out$"):
        read_yaml(text)


@pytest.mark.parametrize("text", ["a: [", "a: b: c", "%", "a\0", "- a\nb", "'", "\ud800", "{a: 1, a: 2}", "@"])
def test_what_is_no_yaml_is_one_line(text):
    with pytest.raises(ValueError, match=r"^[^\n]+\Z"):
        read_yaml(text)


@pytest.mark.parametrize("number", [".nan", ".inf", "-.inf"])
@pytest.mark.parametrize(
    "text",
    [
        "guidance_scale: {}",
        "delta: {}",
        "prompt: [[a, {}]]",
        "loras: {{a.safetensors: {}}}",
        "acceleration: {{options: {{a: [1.0, {{b: {}}}]}}}}",
        "live: {{target_fps: {}}}",
        "server: {{max_fps: {}}}",
        "server: {{request_seconds: {}}}",
        "control: {{mappings: [{{address: 'osc:/a', field: delta, range: [0.0, {}]}}]}}",
    ],
)
def test_numbers_are_finite(text, number):
    with pytest.raises(ConfigError, match="(?i)finite number|not JSON compliant"):
        config.parse(yaml.safe_load(text.format(number)))


@pytest.mark.parametrize("seed", [0, 2**53 + 1, 2**64 - 1])
def test_a_seed_is_what_torch_takes(seed):
    torch.Generator().manual_seed(config.parse({"seed": seed}).seed)
    with pytest.raises(ConfigError, match="seed: Input should be less than or equal to 18446744073709551615"):
        config.parse({"seed": seed + 2**64})


@pytest.mark.parametrize("flag", ["--server.host", "--negative-prompt", "--model", "--family"])
def test_a_bracket_opens_a_list_only_where_a_field_takes_one(flag):
    p = options.parser("x", "", "", "server")
    settings = options.settings(p, p.parse_args([flag, "[::2] a", "--prompt", "[[a cat, 0.6]]", "--cfg-type", "full"]))
    assert settings.prompt == (("a cat", 0.6),)
    assert "[::2] a" in (settings.server.host, settings.negative_prompt, settings.model, settings.family)


def test_saving_keeps_links_and_permissions(tmp_path):
    file, link, dangling = tmp_path / "folder/a.yaml", tmp_path / "link.yaml", tmp_path / "dangling.yaml"
    file.parent.mkdir()
    file.touch(0o640)
    link.symlink_to("folder/a.yaml")
    dangling.symlink_to(file.with_name("new.yaml"))
    for path in (link, dangling):
        config.save(Settings(seed=5), path)
        assert path.is_symlink() and config.load(path) == Settings(seed=5)
    assert stat.S_IMODE(file.stat().st_mode) == 0o640
    assert sorted(one.name for one in file.parent.iterdir()) == ["a.yaml", "new.yaml"]


@pytest.mark.skipif(os.name != "posix", reason="named pipes and devices of POSIX")
def test_only_a_regular_file_is_replaced(tmp_path):
    fifo, loop, device = tmp_path / "fifo", tmp_path / "loop", tmp_path / "device"
    os.mkfifo(fifo)
    loop.symlink_to(loop)
    device.symlink_to("/dev/null")
    read, write = os.pipe()
    for path in (tmp_path, fifo, loop, device, f"/proc/self/fd/{write}"):
        with pytest.raises(FileExistsError, match=re.escape(f"{path} is there already and is no regular file")):
            config.save(Settings(), path)
    os.close(read)
    os.close(write)
    assert loop.is_symlink() and device.is_symlink() and fifo.is_fifo()


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
        ({"strength": 0.0, "mode": "img2img"}, "greater than 0"),
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
    with pytest.raises(ConfigError, match="a.yaml is not YAML"):
        config.load(tmp_path / "a.yaml")
    (tmp_path / "b.yaml").write_text("model: 2026-11-23")
    with pytest.raises(ConfigError, match="b.yaml:\n  a value is of a kind"):
        config.load(tmp_path / "b.yaml")


def test_settings_are_frozen():
    with pytest.raises(ValidationError, match="frozen"):
        Settings().seed = 3


LAUGHS = "a: &a [ha, ha]\n" + "".join(f"{b}: &{b} [*{a}, *{a}, *{a}, *{a}]\n" for a, b in pairwise("abcdefghijklmnop"))
REFUSED = {
    "billion laughs": (LAUGHS, "an alias"),
    "one alias": ("prompt: &x a fox\nnegative_prompt: *x\n", "an alias"),
    "an alias of itself": ("acceleration: &x {options: *x}\n", "an alias"),
    "a merge": ("live: {<<: {target_fps: 3}}\n", "merge key"),
    "a key twice": ("seed: 1\nprompt: a\nseed: 2\n", "the key 'seed' is given more than once"),
    "a key twice below": ("live: {mode: fed, mode: free}\n", "the key 'mode' is given more than once"),
    "a number twice": ("loras: {1: 0.5, '1': 0.6}\n", "the key '1' is given more than once"),
    "33 lists": ("prompt: " + "[" * 32 + "]" * 32, "more than 32 levels"),
    "lists without end": ("prompt: " + "[" * 100_000, "more than 32 levels"),
    "mappings without end": ("".join(" " * k + "a:\n" for k in range(500)), "more than 32 levels"),
    "a huge integer": ("seed: " + "9" * 100_000, "more than 64 characters"),
    "a huge integer in base 16": ("seed: 0x" + "f" * 100_000, "more than 64 characters"),
    "a huge integer in base 60": ("seed: 1" + ":1" * 100_000, "more than 64 characters"),
    "a huge float": ("delta: " + "9" * 100_000 + ".5", "more than 64 characters"),
    "a huge file": ("prompt: " + "a" * 2**20, "more than 1,048,576 bytes"),
    "an object of Python": ("prompt: !!python/object/apply:os.getcwd []", "a tag"),
    "a mapping as a key": ("? {a: 1}\n: 2\n", "unhashable"),
    "no UTF-8": (b"prompt: \xff", "utf-8"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_that_would_grow_or_loses_something_is_refused(name, tmp_path):
    text, says = REFUSED[name]
    path = tmp_path / "a.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    began = time.process_time()
    with pytest.raises(ConfigError, match=f"a.yaml is not YAML: (.|\n)*{re.escape(says)}"):
        config.load(path)
    with pytest.raises(ValueError, match=re.escape(says)):
        load_config(path)
    assert time.process_time() - began < 20


def test_what_is_within_the_limits_is_read(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(
        "\ufeffcontrol: {keys: {1: pause, =: freeze}}\nacceleration: {options: " + "{a: " * 20 + "1" + "}" * 20 + "}"
    )
    read = config.load(path)
    assert read.control.keys == {"1": "pause", "=": "freeze"} and "a" in read.acceleration.options


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[" * 100_000, "nested too deeply"),
        ('{"model_id": "a", "seed": 1, "seed": 2}', "the key 'seed' is given more than once"),
        ('{"model_id": "a", "seed": ' + "9" * 5000 + "}", "digits"),
        ('{"model_id": ', "Expecting value"),
        (" " * 2**20 + "{}", "more than 1,048,576 bytes"),
    ],
)
def test_json_has_the_same_limits(text, says, tmp_path):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=f"a.json cannot be read: .*{says}"):
        load_config(tmp_path / "a.json")


@pytest.mark.parametrize("value", ["[" * 10_000, "&x [*x]", "1" + ":1" * 10_000, "2001-99-99"])
def test_a_flag_has_the_same_limits(value, capsys):
    parser = options.parser("image", "", "")
    with pytest.raises(SystemExit) as caught:
        options.settings(parser, parser.parse_args(["--t-index-list", value]))
    assert caught.value.code == 2 and "error: " in capsys.readouterr().err


def test_a_file_is_whole_or_not_there(tmp_path):
    path = tmp_path / "a"
    path.write_text("before")
    with pytest.raises(KeyError), replacing(path) as file:
        file.write(b"half")
        raise KeyError
    assert path.read_text() == "before" and [one.name for one in tmp_path.iterdir()] == ["a"]
    with replacing(path) as file:
        file.write(b"whole")
        assert path.read_text() == "before"
    assert path.read_text() == "whole" and [one.name for one in tmp_path.iterdir()] == ["a"]
