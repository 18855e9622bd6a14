"""What is timed and how it is told; how long anything takes is no matter of tests."""

from __future__ import annotations

import json
import re

import pytest
import torch
from click.testing import CliRunner
from conftest import converted, tiny_config
from transformers import BertForMultipleChoice, BertModel

from fffconvert import latency, onnx_runtime
from fffconvert.cli import main
from fffconvert.errors import UserError
from fffconvert.families import random_ids
from fffconvert.onednn import ONEDNN
from fffconvert.quantization import quantize
from fffconvert.tables import show_latency
from fffconvert.twins import LIMIT

BY_ONEDNN = {"dense oneDNN"} if ONEDNN else set()
MODEL = {"dense", "converted", "narrow", "FFNs removed", "converted int8"} | BY_ONEDNN
LAYER = {"dense", "converted", "narrow", "reference"} | BY_ONEDNN
COMPILED = {"dense compiled", "converted compiled"}


@pytest.fixture
def student(classifier, tokenizer, quick_latency):
    return converted(classifier, tokenizer)


@pytest.fixture
def uncompiled(monkeypatch):
    """Leaves the compiler out: what it gives has a test of its own."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)


def measure(model, dense=None, **changes):
    few = {"sizes": ((1, 4), (2, 8)), "layer_tokens": (1, 5), "others": False, "seconds_per_row": 0.0}
    return latency.benchmark(model, dense, **{**few, **changes})


def test_every_row_times_the_same_things_for_each_number_of_threads(student, classifier):
    torch.set_num_threads(2)
    try:
        found = measure(student, classifier)
    finally:
        torch.set_num_threads(1)
    assert [(row.what, row.size, row.threads) for row in found.rows] == [
        (what, size, threads)
        for what, sizes in (("layer", ("1", "5")), ("model", ("1 x 4", "2 x 8")))
        for threads in (1, 2)
        for size in sizes
    ]
    for row in found.rows:
        assert row.medians.keys() == (MODEL if row.what == "model" else LAYER)
        assert row.medians.keys() == row.spreads.keys()
        assert all(median > 0 for median in row.medians.values())
        assert row.steady == (max(row.spreads.values()) < latency.WIDE_SPREAD)
        assert (row.to_limit is None) == (row.what == "layer")
    assert json.loads(json.dumps(found.to_dict())) == found.to_dict()
    assert not student.training


def test_a_model_in_half_precision_has_no_int8_and_no_onednn_beside_it(student):
    found = measure(student.bfloat16(), sizes=((1, 4),), layer_tokens=())
    assert found.rows[0].medians.keys() == MODEL - {"converted int8"} - BY_ONEDNN


def test_the_distance_to_the_limit_is_taken_within_a_round(monkeypatch):
    # the machine was busy in the second round
    rounds = {"converted": [2.0, 30.0, 3.0], LIMIT: [1.0, 10.0, 2.0]}
    monkeypatch.setattr(latency, "time_in_turn", lambda *_: list(rounds.values()))
    row = latency.time_row("model", "1 x 4", 1, dict.fromkeys(rounds, list), 0.0)
    assert row.to_limit == 2.0


def test_without_onnxruntime_the_reason_stands_in_the_report(student, monkeypatch, uncompiled):
    monkeypatch.setattr(onnx_runtime, "find_spec", lambda name: None if name == "onnxruntime" else object())
    found = measure(student, sizes=((1, 4),), layer_tokens=(3,), others=True)
    assert found.absent.keys() == set(onnx_runtime.NAMES)
    assert "onnxruntime not installed; pip install 'fffconvert[onnx]'" in found.absent["ONNX Runtime"]
    assert found.rows[1].medians.keys() == MODEL | COMPILED
    assert "dense compiled" in found.rows[0].medians


def test_what_cannot_be_compiled_has_a_reason(student, monkeypatch, capsys):
    def compile_all_but_whole_models(function, **_):
        def fail(_x):
            raise RuntimeError("no way.\nReally")

        return fail if hasattr(function, "config") else function

    monkeypatch.setattr(torch, "compile", compile_all_but_whole_models)
    monkeypatch.setattr(onnx_runtime, "missing", lambda: "not here")
    found = measure(student, sizes=((1, 4),), layer_tokens=(3,), others=True)
    assert found.absent.keys() == COMPILED | set(onnx_runtime.NAMES)
    assert found.absent["converted compiled"] == "not compiled: RuntimeError no way"
    assert found.rows[1].medians.keys() == MODEL
    assert "dense compiled" in found.rows[0].medians


def test_what_onnx_runtime_runs_is_timed_and_what_it_cannot_run_has_a_reason(
    student, monkeypatch, uncompiled
):
    pytest.importorskip("onnxruntime")
    tried = []

    def write(model, file):
        tried.append(file.name)
        if model is student:
            raise ValueError("no way.\nReally")
        file.write_bytes(b"no graph")

    monkeypatch.setattr(onnx_runtime, "write_optimized", write)
    monkeypatch.setattr(
        onnx_runtime, "write_int8", lambda file, output: output.write_bytes(file.read_bytes())
    )
    monkeypatch.setattr(onnx_runtime, "check", lambda *_: None)
    monkeypatch.setattr(onnx_runtime, "runner", lambda *_: lambda: [None])
    found = measure(student, sizes=((1, 4),), layer_tokens=(), others=True)
    assert tried == ["ONNX-Runtime.onnx", "converted-ONNX-Runtime.onnx"]
    assert found.absent == {"converted ONNX Runtime": "not exported: ValueError no way"}
    assert found.rows[0].medians.keys() == MODEL | COMPILED | {"ONNX Runtime", "ONNX Runtime int8"}


def test_an_int8_model_is_compared_with_an_int8_limit(student):
    found = measure(quantize(student), sizes=((1, 4),), layer_tokens=())
    assert found.rows[0].medians.keys() == MODEL - {"converted int8"}


def test_layers_are_called_in_turn_each_on_tokens_of_its_own():
    seen: list[tuple[str, list[float]]] = []
    layers = [lambda x, name=name: seen.append((name, x.flatten().tolist())) for name in ("first", "second")]
    inputs = [torch.arange(5.0)[:, None], 10 + torch.arange(5.0)[:, None]]
    run = latency.in_turn(layers, latency.in_pieces(inputs, 2))  # the fifth token fills no piece
    for _ in range(5):
        run()
    assert seen == [
        ("first", [0, 1]),
        ("second", [10, 11]),
        ("first", [2, 3]),
        ("second", [12, 13]),
        ("first", [0, 1]),
    ]


def test_layers_get_what_they_get_in_the_model(student):
    layers = student.bert.encoder.layer
    ids = random_ids(student, 1, 64)
    with torch.no_grad():
        first, second = latency.inputs_of_layers(student, 10)
        states = student(ids, output_hidden_states=True).hidden_states
        torch.testing.assert_close(first, layers[0].attention(states[0])[0][0, :10])
        torch.testing.assert_close(second, layers[1].attention(states[1])[0][0, :10])


def test_a_wide_spread_is_no_confident_number(capsys):
    row = {"what": "model", "size": "1 x 8", "threads": 1, "to_limit": 1.066}
    quiet = {"dense": 0.0, "converted": 0.1, LIMIT: 0.0}
    row |= {
        "medians": {"dense": 2.0, "converted": 1.0, LIMIT: 0.9},
        "spreads": quiet | {"converted": 0.6},
    }
    report = {"machine": "m", "absent": {"ONNX Runtime": "not installed"}, "rows": [{**row, "steady": False}]}
    show_latency(report)
    out, err = capsys.readouterr()
    assert "1 ± 60.0%" in out
    assert "(2x)" not in out
    assert "busy" in err
    assert "~1.07" in out
    assert "ONNX Runtime was not timed: not installed" in err
    show_latency({**report, "rows": [{**row, "spreads": quiet, "steady": True}]})
    out, err = capsys.readouterr()
    assert "1 (2x)" in out
    assert re.search(r"converted ÷ FFNs removed +│ +1\.07 ", out)
    assert "busy" not in err


def test_a_head_that_chooses_among_texts_is_timed(tokenizer, quick_latency):
    model = BertForMultipleChoice(tiny_config()).eval()
    student = converted(model, tokenizer)
    assert measure(student, model).rows[-1].medians.keys() == MODEL


def test_lengths_are_cut_to_what_the_model_reads(capsys):
    assert latency.sizes_that_fit([(1, 16), (1, 128), (1, 500), (2, 128)], 64) == [(1, 16), (1, 64), (2, 64)]
    assert "Texts are timed at 64 tokens" in capsys.readouterr().err
    assert latency.sizes_that_fit([[1, 16]], 64) == [(1, 16)]  # as JSON has it
    assert not capsys.readouterr().err


def test_what_cannot_be_compared_is_refused(student, classifier):
    with pytest.raises(UserError, match="is dense; expected a converted model"):
        measure(classifier)
    with pytest.raises(UserError, match="num_hidden_layers"):
        measure(student, BertModel(tiny_config(num_hidden_layers=1)))
    with pytest.raises(UserError, match="is a BertModel; expected a BertForSequenceClassification"):
        measure(student, BertModel(tiny_config()))  # whose head would not be timed


@pytest.mark.parametrize("size", ["8", "8x", "x8", "0x8", "8x-1", "axb"])
def test_a_size_that_is_none_is_one_line(size):
    result = CliRunner().invoke(main, ["benchmark", "model", "--size", size])
    assert result.exit_code != 0
    assert f"--size {size}: expected batch and length" in result.output


def test_the_command_writes_what_it_prints(student, folder_of, tmp_path, monkeypatch):
    real = latency.benchmark
    monkeypatch.setattr(latency, "benchmark", lambda *args, **kw: real(*args, **kw, others=False))
    file = tmp_path / "latency.json"
    result = CliRunner().invoke(
        main, ["benchmark", folder_of(student), "--size", "1x4", "--seconds", "0", "--json", str(file)]
    )
    assert result.exit_code == 0, result.output
    report = json.loads(file.read_text())
    assert [row["size"] for row in report["rows"]] == ["1 x 4"]
    assert "converted int8" in result.output
