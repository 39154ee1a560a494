"""Options of the pretraining command: flags, config files, and what is refused with which words."""

import argparse
import json
from pathlib import Path

import pytest
import yaml
from transformers import TrainingArguments

from croc_kernels.recipes.command import add_arguments, run
from croc_kernels.recipes.options import (
    DEMO_DEFAULTS,
    STAGE_DEFAULTS,
    OptionError,
    StageArguments,
    read_config,
    resolve,
)

REQUIRED = {"model": "m", "data": "d.json", "image_folder": "i", "output": "o", "use_cpu": True}
FLAGS = [
    "--model", "m", "--data", "d.json", "--image-folder", "i", "--output", "o", "--use_cpu",
    "--recipe", "victor", "--pool-learning-rate", "1e-3", "--learning-rate", "2e-4",
    "--skip-bad-samples", "--max_steps", "7", "--save-steps", "3", "--train_vision_tower",
    "--adam_beta2", "0.95", "--lr_scheduler_kwargs", '{"num_cycles": 0.4}',
]  # fmt: skip
VALUES = {
    **REQUIRED, "recipe": "victor", "pool-learning-rate": 1e-3, "learning_rate": "2e-4",
    "skip_bad_samples": True, "max-steps": 7, "save_steps": 3, "train-vision-tower": True,
    "adam_beta2": 0.95, "lr_scheduler_kwargs": {"num_cycles": 0.4}, "max_length": None,
}  # fmt: skip


def parse(flags: list[str]) -> dict:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return vars(parser.parse_args(flags))


def comparable(arguments: tuple[StageArguments, TrainingArguments]) -> tuple[dict, dict]:
    stage, training = (vars(part).copy() for part in arguments)
    stage.pop("config")
    for name in ("distributed_state", "_n_gpu", "deepspeed_plugin"):
        training.pop(name, None)
    return stage, {key: str(value) for key, value in training.items()}


def test_flags_not_given_are_absent() -> None:
    assert parse(["--output", "o"]) == {"output": "o"}


@pytest.mark.parametrize("kind", ["yaml", "json"])
def test_config_file_means_what_the_flags_mean(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"stage.{kind}"
    path.write_text(yaml.safe_dump(VALUES) if kind == "yaml" else json.dumps(VALUES))
    from_file = comparable(resolve(parse(["--config", str(path)])))
    assert from_file == comparable(resolve(parse(FLAGS)))
    assert from_file[0]["pool_learning_rate"] == 1e-3
    assert from_file[1]["learning_rate"] == "0.0002"


def test_flags_win_over_the_config_file(tmp_path: Path) -> None:
    path = tmp_path / "stage.yaml"
    path.write_text(yaml.safe_dump(VALUES))
    stage, training = resolve(
        parse(["--config", str(path), "--recipe", "croc", "--learning_rate", "1"])
    )
    assert (stage.recipe, training.learning_rate, training.max_steps) == ("croc", 1.0, 7)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param("leanring_rate: 1", "unknown key .*did you mean learning_rate", id="typo"),
        pytest.param("zzz: 1", "unknown key 'zzz'", id="unknown"),
        pytest.param("config: a", "unknown key 'config'", id="config-in-config"),
        pytest.param("max_steps: many", "key 'max_steps': .*invalid int value: 'many'", id="type"),
        pytest.param("lr_scheduler_type: up", "key 'lr_scheduler_type'", id="choice"),
        pytest.param("- 1", "must hold keys and values, got list", id="list"),
        pytest.param("a: [", "can't be read", id="syntax"),
    ],
)  # fmt: skip
def test_config_file_errors_name_file_and_key(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "stage.yaml"
    path.write_text(text)
    with pytest.raises(OptionError, match=rf"pretrain: config .*stage\.yaml:? .*{message}"):
        read_config(path)


def test_config_file_missing(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"none\.yaml can't be read"):
        read_config(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"output": None}, "--output must be given", id="output"),
        pytest.param({"output_dir": "p"}, "output must equal output_dir, got o and p", id="two"),
        pytest.param({"data": None}, "--data must be given, or --demo", id="data"),
        pytest.param({"image_folder": None}, "--image-folder must be given", id="images"),
        pytest.param({"recipe": "x"}, "recipe must be one of .*, got 'x'", id="recipe"),
        pytest.param(
            {"label_smoothing_factor": 0.1}, "label_smoothing_factor must be 0", id="smoothing"
        ),
        pytest.param({"demo": True}, "demo must go without --model", id="demo"),
        pytest.param({"model_dtype": "int8"}, "model_dtype must be float32, .*'int8'", id="dtype"),
        pytest.param(
            {"vision_learning_rate": 1e-6}, "must go with --train_vision_tower", id="vision"
        ),
    ],
)
def test_options_that_contradict_are_refused(change: dict, message: str) -> None:
    explicit = {k: v for k, v in {**REQUIRED, **change}.items() if v is not None}
    with pytest.raises(OptionError, match=message):
        resolve(explicit)


def test_demo_needs_no_other_option() -> None:
    stage, training = resolve({"demo": True})
    assert stage.output == training.output_dir == "croc-demo"


def test_defaults_are_the_published_stage() -> None:
    stage, training = resolve(dict(REQUIRED))
    assert (stage.recipe, stage.pool_size, stage.mask_ratio, stage.loss_weight) == (
        "croc", 2048, 0.75, 10.0,
    )  # fmt: skip
    for name, value in STAGE_DEFAULTS.items():
        expected = [] if name == "report_to" else value
        assert getattr(training, name) == expected, name
    assert training.get_warmup_steps(1000) == 30
    assert training.remove_unused_columns is False


def test_demo_defaults_and_what_overrides_them() -> None:
    stage, training = resolve({"demo": True, "output": "o", "use_cpu": True, "max_steps": 3})
    assert stage.pool_size == DEMO_DEFAULTS["pool_size"]
    assert training.learning_rate == DEMO_DEFAULTS["learning_rate"]
    assert training.max_steps == 3


def test_command_prints_errors_and_returns_two(tmp_path, capsys) -> None:
    assert run(argparse.Namespace(output=str(tmp_path))) == 2
    assert capsys.readouterr().err == (
        "croc-kernels pretrain: error: pretrain: --model must be given, or --demo\n"
    )


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("data", "--data must be a file that exists, got "),
        ("image_folder", "--image-folder must be a directory that exists, got "),
        ("model", "--model must be a directory that transformers saved, or a name that it finds, "),
    ],
)
def test_what_is_not_there_is_told_before_anything_is_loaded(
    missing: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "data.json").write_text("[]")
    paths = {"model": tmp_path, "data": tmp_path / "data.json", "image_folder": tmp_path}
    paths[missing] = tmp_path / "nowhere"
    options = {name: str(path) for name, path in paths.items()}
    assert run(argparse.Namespace(**options, output=str(tmp_path / "run"), use_cpu=True)) == 2
    assert f"pretrain: {message}" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
