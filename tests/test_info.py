"""``info`` and ``selftest``: every operator named, every slower backend with its reason."""

import json

import pytest
import torch

from croc_kernels import backend, cli, info, ops, selftest

OPERATORS = {*info.TRITON_OPS, "linear_assignment"}
HOPPER = {"name": "cuda:0", "model": "test", "capability": [9, 0]}
TURING = {"name": "cuda:0", "model": "test", "capability": [7, 5]}


def test_json_and_text_have_the_same_content(capsys):
    assert cli.main(["info", "--json"]) == 0
    about = json.loads(capsys.readouterr().out)
    assert about == json.loads(json.dumps(info.collect()))
    assert cli.main(["info"]) == 0
    text = capsys.readouterr().out
    assert text.strip() == info.render(about)
    for choices in about["operators"].values():
        for choice in choices.values():
            assert choice["backend"] in text
            assert choice["reason"] in text


def test_every_operator_on_every_device():
    about = info.collect()
    names = {d["name"] for d in about["devices"]}
    assert "cpu" in names
    assert len(names) == 1 + (torch.cuda.device_count() if torch.cuda.is_available() else 0)
    assert set(about["operators"]) == OPERATORS
    assert all(set(choices) == names for choices in about["operators"].values())
    assert about["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]


def test_cpu_says_why_it_is_not_triton(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    choice, reason = info.triton_choice({"name": "cpu"})
    assert (choice, reason) == (
        "cpu",
        "CPU tensors: PyTorch; the Triton kernel runs on CUDA tensors",
    )


def test_interpreter_is_named(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(backend, "triton_missing", lambda: None)
    assert info.triton_choice({"name": "cpu"})[0] == "triton"
    assert "interpreter" in info.triton_choice({"name": "cpu"})[1]


def test_gpu_takes_triton(monkeypatch):
    monkeypatch.setattr(backend, "triton_missing", lambda: None)
    assert info.triton_choice(HOPPER) == ("triton", "")


@pytest.mark.parametrize(
    ("device", "missing", "reason"),
    [
        (TURING, None, 'compute capability must be >= 8.0, got 7.5; backend="reference"'),
        (HOPPER, "triton is not installed", "triton is not installed"),
    ],
    ids=["old-gpu", "no-triton"],
)
def test_gpu_without_kernels_says_why(monkeypatch, device, missing, reason):
    monkeypatch.setattr(backend, "triton_missing", lambda: missing)
    assert info.triton_choice(device) == ("unavailable", reason)


@pytest.mark.parametrize(
    ("device", "missing", "choice"),
    [
        ({"name": "cpu"}, {}, "native"),
        ({"name": "cpu"}, {"cpu": "no _C"}, "reference"),
        (HOPPER, {"cuda": "built without CUDA"}, "unavailable"),
        (HOPPER, {}, "native"),
    ],
)
def test_assignment_follows_the_extension(monkeypatch, device, missing, choice):
    monkeypatch.setattr(ops, "ASSIGNMENT_MISSING", missing)
    got, reason = info.assignment_choice(device)
    assert got == choice
    for why in missing.values():
        assert why in reason
        assert "pip install --no-build-isolation" in reason


def test_absent_packages_are_reported_absent(monkeypatch):
    about = info.collect()
    about["versions"]["triton"] = None
    assert "triton        absent" in info.render(about)
    assert info.version_of("surely-not-a-package") is None


def test_selftest_passes_on_the_cpu(capsys):
    assert cli.main(["selftest", "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == f"{len(selftest.CHECKS)} passed, 0 failed"


@pytest.mark.gpu
def test_selftest_passes_on_the_gpu():
    assert cli.main(["selftest", "--device", "cuda"]) == 0


def test_selftest_without_the_device_says_so(monkeypatch, capsys):
    monkeypatch.setattr(selftest.torch.cuda, "is_available", lambda: False)
    assert cli.main(["selftest", "--device", "cuda"]) == 2
    assert "--device must be a device of this machine, got cuda" in capsys.readouterr().err


def test_selftest_fails_on_a_wrong_result(monkeypatch, capsys):
    right = selftest.token_cost
    monkeypatch.setattr(selftest, "token_cost", lambda t, p, **k: right(t, p, **k) + 1e-2 * (not k))
    assert cli.main(["selftest", "--device", "cpu"]) == 1
    printed = capsys.readouterr().out
    assert "token_cost           cpu    FAILED  AssertionError: cost: error" in printed
    assert printed.splitlines()[-1] == f"{len(selftest.CHECKS) - 1} passed, 1 failed"


@pytest.mark.parametrize(("version", "told"), [("5.17.0", False), ("5.99.1", True)])
def test_transformers_out_of_range_is_told(monkeypatch, version, told):
    monkeypatch.setattr(info, "version_of", lambda package: version)
    faults = info.transformers_faults()
    assert any("flash_attention" in fault for fault in faults)
    assert ("transformers must be >=4.57" in faults[0]) == told
    assert faults[0] in info.render(info.collect())
