"""The commands that draw: they write images, say what was wrong, and their flags are the settings' own."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from streamflow._version import __version__
from streamflow.app import config
from streamflow.app.cli import COMMANDS, main
from streamflow.app.commands import options
from streamflow.app.config import Settings
from streamflow.wrapper import StreamFlowWrapper

QUICK = ["--device", "cpu", "--warmup", "0", "--num-inference-steps", "1", "--acceleration.kind", "none"]


@pytest.fixture(autouse=True)
def there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_images_of_text_and_of_images(capsys, tmp_path):
    assert main(["txt2img", *QUICK, "--count", "2", "--output", "drawn", "--json"]) == 0
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert said["files"] == ["drawn/0000.png", "drawn/0001.png"]
    first, second = (Image.open(one) for one in said["files"])
    assert first.size == (128, 128) and first.tobytes() != second.tobytes()
    steps = ["--num-inference-steps", "2", "--strength", "0.5"]
    with pytest.raises(SystemExit):
        main(["img2img", *said["files"], "gone.png", *QUICK, *steps, "--output", "restyled", "--json"])
    assert "there is no file gone.png" in capsys.readouterr().err and not os.path.exists("restyled")
    with open("torn.png", "wb") as file:
        file.write(open(said["files"][0], "rb").read()[:300])
    code = main(["img2img", *said["files"], "torn.png", *QUICK, *steps, "--output", "restyled", "--json"])
    again = capsys.readouterr()
    assert code == 1 and "torn.png cannot be read" in again.err
    assert json.loads(again.out.splitlines()[-1])["files"] == ["restyled/0000.png", "restyled/0001.png"]
    restyled = Image.open("restyled/0001.png")
    assert restyled.size == (128, 128) and restyled.tobytes() != second.tobytes()


def test_a_file_of_settings_is_written_checked_and_shown(capsys):
    assert main(["config", "init", "a.yaml"]) == 0 and config.load("a.yaml") == Settings()
    assert main(["config", "init", "a.yaml"]) == 1 and "there already" in capsys.readouterr().err
    assert main(["config", "check", "a.yaml"]) == 0
    with open("a.yaml", "a") as file:
        file.write("sede: 3\n")
    assert main(["config", "check", "a.yaml"]) == 1 and "sede: there is no such key" in capsys.readouterr().err
    assert main(["config", "init", "a.yaml", "--force"]) == 0 and main(["config", "show", "a.yaml", "--json"]) == 0
    assert config.parse(json.loads(capsys.readouterr().out.splitlines()[-1])) == Settings()


def of(*argv, mode="txt2img"):
    p = options.parser("txt2img", "", "")
    return options.settings(p, p.parse_args([*argv]), mode=mode)


def test_flags_win_over_the_file_and_texts_stay_texts():
    config.save(Settings(seed=5, guidance_scale=2.0), "a.yaml")
    made = of(
        "--config", "a.yaml", "--seed", "9", "--prompt", "yes: no", "--t-index-list", "[0, 2]", "--devices", "[cpu, cpu]"
    )
    assert (made.seed, made.guidance_scale, made.prompt) == (9, 2.0, "yes: no")
    assert (made.t_index_list, made.devices) == ((0, 2), ("cpu", "cpu"))
    assert of("--prompt", "[[a cat, 0.6], [a dog, 0.4]]").prompt == (("a cat", 0.6), ("a dog", 0.4))
    assert of("--acceleration.options", "{limit: 3}", "--tiny-vae", "true").acceleration.options == {"limit": 3}
    assert of("--similar-image-filter.threshold", "0.5").similar_image_filter.threshold == 0.5


def test_a_mistake_names_the_option_as_it_was_typed(capsys):
    for argv, said in (
        (["--steps", "x"], "--steps: Input should be a valid integer, not 'x'"),
        (["--num-inference-steps", "x"], "--num-inference-steps: Input should be a valid integer, not 'x'"),
        (["--accelerate", "fast"], "--accelerate: Input should be 'none', 'auto'"),
        (["--t-index-list", "[0"], "--t-index-list: line 1, column 3: expected"),
        (["--loras", "{a:1}"], "--loras: Input should be a valid number, not None"),
        (["--t-index-list", "[0]", "--strength", "0.5"], "--t-index-list and --strength both say where to start"),
        (["--negative-prompt", "x"], "--negative-prompt needs guidance, and --cfg-type is none"),
        (["--device", "toaster"], "--device: torch cannot use toaster: "),
    ):
        with pytest.raises(SystemExit) as ended:
            of(*argv, mode="img2img")
        assert ended.value.code == 2 and f"error: {said}" in capsys.readouterr().err, argv


def test_a_mistake_that_the_model_finds_is_one_line_too(capsys):
    for argv, said in (
        (["--width", "100"], "--width must be a positive multiple of 16 pixels, not 100: try 96"),
        (
            ["--steps", "2", "--t-index-list", "[5]"],
            "--t-index-list ends at 5, but the schedule has 2 steps, 0 to 1: raise --steps or lower the index\n",
        ),
    ):
        assert main(["txt2img", "--device", "cpu", *argv]) == 2
        assert capsys.readouterr().err.startswith(f"streamflow txt2img: error: {said}"), argv


def test_image_to_image_starts_half_way_unless_a_start_is_given():
    for flags, start in (
        ([], (None, 0.5)),
        (["--strength", "0.7"], (None, 0.7)),
        (["--t-index-list", "[0, 2]"], ((0, 2), None)),
    ):
        settings = of(*flags, "--steps", "4", mode="img2img").wrapper_arguments()
        with StreamFlowWrapper(**{**settings, "width": 64, "height": 64}) as wrapper:
            request = wrapper.stream.request
        assert (request.t_index_list, request.strength) == start
    with StreamFlowWrapper(**{**of().wrapper_arguments(), "width": 64, "height": 64}) as wrapper:
        assert wrapper.stream.request.strength is None


def test_all_mistakes_are_told_at_once_with_exit_code_2(capsys):
    with pytest.raises(SystemExit) as ended:
        of("--seed", "many", "--cfg-type", "half", "--acceleration.kind", "fast")
    said = capsys.readouterr().err
    assert ended.value.code == 2 and all(flag in said for flag in ("--seed:", "--cfg-type:", "--acceleration.kind:"))
    for argv in (["img2img", "a/x.png", "b/x.png"], ["txt2img", "--count", "0"], ["txt2img", "--config", "gone.yaml"]):
        with pytest.raises(SystemExit) as ended:
            main(argv)
        assert ended.value.code == 2 and capsys.readouterr().err


@pytest.mark.parametrize("command", ["txt2img", "img2img", "config"])
def test_help_has_an_example(command, capsys):
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    said = capsys.readouterr().out
    assert ended.value.code == 0 and f"streamflow {command}" in said[said.rindex("example") :]


LIGHT = """
import sys
from streamflow.app.cli import main
try:
    main(sys.argv[1:])
except SystemExit as ended:
    assert ended.code == 0
heavy = {"torch", "diffusers", "transformers", "streamdiffusion", "numpy"} & set(sys.modules)
assert not heavy, heavy
"""


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_imports_nothing_heavy_and_prints_nothing_else(command):
    start = [sys.executable, "-c", LIGHT, *command.split(), "--help"]
    run = subprocess.run(start, check=True, capture_output=True, text=True, timeout=100)
    assert run.stderr == "" and run.stdout.startswith(f"usage: streamflow {command}".rstrip())


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="reads the installed handlers in /proc")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("command", [["serve", "--port", "0"], ["live", "--out", "null"]], ids=lambda command: command[0])
def test_a_signal_during_the_imports_ends_it_with_exit_code_0_and_one_line(command, number):
    """The signal is sent half a second after the start, or later where a busy machine has not yet started Python."""
    if command[0] == "serve":
        pytest.importorskip("fastapi", reason="needs the extra web")
    program = "import sys; from streamflow.app.cli import main; sys.exit(main(sys.argv[1:]))"
    start = [sys.executable, "-c", program, *command, "--device", "cpu", "--warmup", "0"]
    with subprocess.Popen(start, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        time.sleep(0.5)
        while process.poll() is None and not handles(process.pid, signal.SIGTERM):
            time.sleep(0.01)
        process.send_signal(number)
        out, err = process.communicate(timeout=20)
    assert process.returncode == 0 and out == ""
    assert err == f"ended by {number.name} before anything was open\n"


def handles(pid, number):
    """Whether the process has a handler of its own for this signal."""
    with open(f"/proc/{pid}/status") as status:
        caught = next(line for line in status if line.startswith("SigCgt:"))
    return bool(int(caught.split()[1], 16) >> (number - 1) & 1)


def helped(capsys, *argv):
    with pytest.raises(SystemExit) as ended:
        main([*argv])
    assert ended.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("command", ["txt2img", "img2img", "video", "morph", "live", "serve"])
def test_help_shows_what_matters_and_help_all_the_rest(command, capsys):
    short, long = helped(capsys, command, "--help"), helped(capsys, command, "--help-all")
    assert short.count("\n") <= 75 and short.count("\n") < long.count("\n")
    assert "--steps N" in short and "--seed N" in short and "(default: 2)" in short and "--help-all" in short
    assert "--delta" not in short and "--delta" in long and "--num-inference-steps" in long and "{none,full" in short
    for section, readers in {"--server.": ["serve"], "--live.": ["live"], "--control.": ["live"]}.items():
        assert (section in long) == (command in readers)
    assert "--mode " not in long or command == "live"
    assert "  VALUE" not in short and "empty:" not in long


def test_the_version_and_a_typo(capsys):
    assert helped(capsys, "--version") == f"streamflow {__version__}\n"
    module = subprocess.run([sys.executable, "-m", "streamflow", "--version"], capture_output=True, text=True, check=True)
    assert module.stdout == f"streamflow {__version__}\n"
    with pytest.raises(SystemExit) as ended:
        main(["txt2img", "--promt", "a fox"])
    assert ended.value.code == 2 and "unrecognized arguments: --promt a fox" in capsys.readouterr().err


def test_steps_and_accelerate_are_settings_by_shorter_names():
    made = of("--steps", "7", "--accelerate", "none")
    assert made.num_inference_steps == 7 and made.acceleration.kind == "none"
    assert of("--num-inference-steps", "6", "--acceleration.kind", "compile").acceleration.kind == "compile"


def test_without_a_prompt_the_images_are_different_examples(capsys):
    assert main(["txt2img", "--count", "3", "--steps", "1", *QUICK, "--output", "four", "--json"]) == 0
    files = json.loads(capsys.readouterr().out.splitlines()[-1])["files"]
    a, b, c = (np.asarray(Image.open(one), np.float32) for one in files)
    assert min(np.abs(a - b).mean(), np.abs(b - c).mean(), np.abs(a - c).mean()) > 10


def test_the_sample_drawing_is_restyled_by_default(capsys):
    assert main(["img2img", *QUICK, "--num-inference-steps", "2", "--output", "sample"]) == 0
    said = capsys.readouterr()
    assert "1 image in" in said.out and "in sample" in said.out and os.listdir("sample") == ["apple.png"]
    assert said.err.count("\r") <= 4 and "Loading" not in said.err  # one progress bar, of the images


def test_the_mode_is_the_commands_whatever_the_file_says(capsys):
    with open("text.yaml", "w") as file:
        file.write("mode: txt2img\n")
    assert of("--config", "text.yaml", mode="img2img").mode == "img2img"
    with open("image.yaml", "w") as file:
        file.write("mode: img2img\nstrength: 0.5\n")
    with pytest.raises(SystemExit) as ended:
        of("--config", "image.yaml")
    assert ended.value.code == 2 and "strength is of mode img2img" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_one_line_before_a_model_is_loaded(capsys):
    open("file", "w").close()
    for command in (["txt2img"], ["img2img"]):
        assert main([*command, *QUICK, "--model", "no such model", "--output", "file/folder"]) == 1
        assert capsys.readouterr().err.startswith(f"streamflow {command[0]}: error: ")


def test_the_help_has_the_commands_own_defaults(capsys):
    assert "(default: example prompts)" in helped(capsys, "txt2img", "--help")
    assert "(default: 0.5)" in helped(capsys, "img2img", "--help").replace("\n", " ").replace("  ", " ")
    assert "(default: full)" in helped(capsys, "serve", "--help")


def test_with_verbose_a_mistake_shows_where_it_was_raised(capsys, tmp_path):
    with pytest.raises(ValueError, match="multiple of 16 pixels"):
        main(["txt2img", "--width", "100", "--count", "1", "--output", str(tmp_path), "-v"])


DOWNLOAD = """
import sys
from streamflow._command_line import say_download
for model in sys.argv[1:]:
    say_download(model)
"""


def test_a_download_is_announced_with_its_source_and_place():
    """The hub is a port that refuses connections. A model that is in its cache whole is not downloaded."""
    cached = "cache/models--a--cached"
    os.makedirs(f"{cached}/snapshots/1")
    os.makedirs(f"{cached}/refs")
    os.makedirs(f"{cached}/blobs")
    for path, text in {f"{cached}/refs/main": "1", f"{cached}/snapshots/1/model_index.json": "{}"}.items():
        with open(path, "w") as file:
            file.write(text)
    os.makedirs("a/folder")
    environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_CACHE": "cache", "HF_HUB_OFFLINE": "0"}

    def said(*models, **changes):
        start = [sys.executable, "-c", DOWNLOAD, *models]
        return subprocess.run(start, check=True, capture_output=True, text=True, env={**environment, **changes}).stderr

    line = "downloading an/other from http://127.0.0.1:9 to cache/models--an--other\n"
    assert said("embedded", "a/folder", "a/cached", "no model", "an/other") == line
    assert said("an/other", HF_HUB_OFFLINE="1") == ""
    open(f"{cached}/blobs/0.incomplete", "w").close()  # of a download that was interrupted
    assert said("a/cached").startswith("downloading a/cached from http://127.0.0.1:9")


@pytest.mark.slow
def test_a_command_says_what_it_downloads():
    program = "import sys; from streamflow.app.cli import main; sys.exit(main(sys.argv[1:]))"
    environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_CACHE": "cache", "HF_HUB_OFFLINE": "0"}
    start = [sys.executable, "-c", program, "txt2img", "--model", "an/other", "--device", "cpu"]
    run = subprocess.run(start, capture_output=True, text=True, env=environment, timeout=100)
    first, *_ = run.stderr.splitlines()
    assert run.returncode == 1 and first == "downloading an/other from http://127.0.0.1:9 to cache/models--an--other"
