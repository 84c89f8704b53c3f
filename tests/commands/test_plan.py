"""`jaxserve plan` against arithmetic done by hand, and its answers where a model does not fit."""

import json
from pathlib import Path

import pytest

from jaxserve.checkpoints.description import describe_config, describe_model
from jaxserve.checkpoints.tensors import CheckpointError
from jaxserve.cli import main
from jaxserve.device.devices import DEVICES, parse_device
from jaxserve.models.published import PUBLISHED

FAMILIES = Path(__file__).parents[1] / "fixtures" / "families"


def plan(capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, dict]:
    status = main(["plan", "--json", *options])
    return status, json.loads(capsys.readouterr().out)


def test_llama_8b_on_one_v6e_has_the_floors_done_by_hand(capsys: pytest.CaptureFixture[str]):
    status, found = plan(
        capsys,
        "--model",
        "llama-3.1-8b",
        "--device",
        "v6e-1",
        "--slots",
        "64",
        "--context",
        "1024",
        "--attention",
        "xla",
    )
    assert status == 0 and found["fits"]
    parameters = 8_030_261_248
    norms = (2 * 32 + 1) * 4096
    assert found["weights_bytes"] == 2 * parameters + 2 * norms  # norms are float32
    assert found["cache_bytes_per_token"] == 2 * 32 * 8 * 128 * 2 == 131072
    memory = found["memory"]
    assert memory["num_pages"] == memory["wanted_pages"] == 64 * 64 + 1
    taken = sum(memory[name] for name in ("weights", "state", "temporaries", "headroom", "cache"))
    assert taken <= memory["limit"] == found["device"]["memory"]
    one, *_, sixty_four = found["decode"]
    read = found["weights_bytes"] - 2 * 128256 * 4096
    for row, rows in ((one, 1), (sixty_four, 64)):
        cache = rows * 1024 * 131072
        products = 2 * rows * (parameters - norms - 128256 * 4096) / 918e12
        seconds = cache / 1638e9 + max(products, read / 1638e9)
        assert row["rows"] == rows and row["bytes"] == read + cache
        assert row["floor_ms"] == pytest.approx(seconds * 1e3, rel=1e-9)
        assert row["tokens_per_s"] == pytest.approx(rows / seconds, rel=1e-9)


@pytest.mark.parametrize(("quantization", "rate"), [("none", 918e12), ("int8", 1836e12), ("int4", 918e12)])
def test_products_of_int8_have_the_floor_of_their_own_rate(
    capsys: pytest.CaptureFixture[str], quantization: str, rate: float
):
    options = ("--device", "v6e-1", "--context", "8192", "--attention", "xla", "--quantization", quantization)
    _, found = plan(capsys, "--model", "llama-3.1-8b", *options)
    head, norms = 128256 * 4096, (2 * 32 + 1) * 4096
    products = 2 * (8192 * (8_030_261_248 - norms - 2 * head) + head)
    attention = 4 * 32 * 4096 * 8192 * 8193 / 2
    floor = products / rate + attention / 918e12
    assert found["prefill"]["floor_ms"] == pytest.approx(floor * 1e3, rel=1e-9)


def test_shares_divide_weights_and_cache_and_replicas_multiply_the_rate(capsys: pytest.CaptureFixture[str]):
    common = ("--model", "qwen3-8b", "--slots", "8", "--context", "4096", "--attention", "xla")
    _, one = plan(capsys, *common, "--device", "h100-1")
    _, shared = plan(capsys, *common, "--device", "h100-8", "--tensor-parallel", "4")
    assert shared["replicas"] == 2 and shared["tensor_parallel"] == 4
    assert shared["memory"]["weights"] == pytest.approx(one["memory"]["weights"] / 4, rel=1e-3)
    assert shared["memory"]["page"] == one["memory"]["page"] // 4
    assert shared["decode"][-1]["tokens_per_s"] == pytest.approx(8 * one["decode"][-1]["tokens_per_s"], rel=2e-2)


def test_what_does_not_fit_is_a_clear_no_with_what_would(capsys: pytest.CaptureFixture[str]):
    common = ("--model", "llama-3.1-8b", "--slots", "64", "--attention", "xla")
    status, found = plan(capsys, *common, "--device", "v5e-1")
    assert status == 4 and not found["fits"]
    assert "does not fit: 17 pages of 16 tokens have room, and one request at full context takes 512" in found["reason"]
    assert found["would_fit"][:2] == [
        "--device v5e-2 --tensor-parallel 2",
        "--device v5e-1 --tensor-parallel 1 --quantization int8",
    ]
    for options in found["would_fit"]:
        status, again = plan(capsys, *common, *options.split())
        assert status == 0 and again["fits"]


def test_rows_whose_cache_does_not_fit_are_marked(capsys: pytest.CaptureFixture[str]):
    _, found = plan(
        capsys, "--model", "llama-3.1-8b", "--device", "v6e", "--slots", "64", "--context", "8192", "--attention", "xla"
    )
    at_once = found["memory"]["requests_at_full_context"]
    assert 1 < at_once < 64
    assert [row["fits"] for row in found["decode"]] == [row["rows"] <= at_once for row in found["decode"]]


def test_it_reads_as_text(capsys: pytest.CaptureFixture[str]):
    assert main(["plan", "--model", "smollm2-135m", "--device", "v5e-1", "--attention", "xla"]) == 0
    text = capsys.readouterr().out
    assert "1 x 1 v5e" in text and "floor of a decode step at 8,192 tokens" in text and "tokens/s" in text


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--device", "v9-1"), "device: must be a kind and a number, as v6e-4"),
        (("--device", "v6e-4", "--tensor-parallel", "3"), "tensor_parallel: must divide the 4 devices, got 3"),
        (("--device", "v6e-16", "--tensor-parallel", "16"), "must divide the model's num_kv_heads of 8, got 16"),
        (("--device", "v6e-1", "--attention", "none-such"), "no attention 'none-such' on tpu"),
        (("--device", "a100-1", "--compile"), "a100: no topology is known to compile for"),
    ],
)
def test_what_cannot_be_is_refused_by_name(capsys: pytest.CaptureFixture[str], options: tuple[str, ...], words: str):
    assert main(["plan", "--model", "llama-3.1-8b", *options]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("device", DEVICES)
def test_every_device_has_a_plan(capsys: pytest.CaptureFixture[str], device: str):
    options = ("--model", "smollm2-135m", "--device", device, "--slots", "8", "--context", "4096")
    status, found = plan(capsys, *options)
    assert status == 0 and found["fits"]
    hopper = device in ("h100", "h200")
    own = "mosaic_tpu" if found["device"]["platform"] == "tpu" else "mosaic_gpu" if hopper else "xla"
    assert found["attention"] == own
    assert all(row["tokens_per_s"] > 0 for row in found["decode"])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("v6e-1", "--page-size", "24"), r"page_size must be a power of two in [16, 256] on a TPU, got 24"),
        (("h100-1", "--kv-dtype", "int8"), "page_size of a int8 cache on mosaic_gpu must be at least 32, got 16"),
        (
            ("h100-1", "--dtype", "float32", "--attention", "mosaic_gpu"),
            "attention mosaic_gpu: the tensor cores have no",
        ),
        (("a100-1", "--attention", "mosaic_gpu"), "its kernels are for Hopper GPUs, and this is 'A100'"),
        (
            ("v6e-1", "--attention", "cpu_native"),
            "no attention 'cpu_native' on tpu; there are mosaic_tpu, xla, reference",
        ),
        (("v5e-3", "--tensor-parallel", "3"), "must divide the model's num_kv_heads of 8, got 3"),
    ],
)
def test_sizes_that_kernels_do_not_serve_are_refused_before_anything_is_traced(
    capsys: pytest.CaptureFixture[str], options: tuple[str, ...], words: str
):
    assert main(["plan", "--model", "llama-3.2-1b", "--device", *options]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("name", ["llama3", "qwen3", "mistral"])
def test_a_configuration_is_enough(tmp_path: Path, name: str):
    (tmp_path / "config.json").write_bytes((FAMILIES / name / "config.json").read_bytes())
    (tmp_path / "generation_config.json").write_bytes((FAMILIES / name / "generation_config.json").read_bytes())
    whole = describe_model(str(FAMILIES / name))[0]
    assert describe_config(str(tmp_path)) == describe_config(str(tmp_path / "config.json")) == whole


def test_a_published_shape_is_that_of_the_packaged_model():
    packaged, published = describe_model("smollm2-135m")[0], PUBLISHED["smollm2-135m"]
    for name in ("hidden_size", "intermediate_size", "num_layers", "num_q_heads", "num_kv_heads", "vocab_size", "rope"):
        assert getattr(packaged, name) == getattr(published, name)


def test_an_unknown_model_is_refused_with_the_names_that_there_are():
    with pytest.raises(CheckpointError, match=rf"none-such is neither a file.*\({', '.join(PUBLISHED)}\)"):
        describe_config("none-such")


def test_devices_are_parsed():
    assert parse_device("v6e-4") == (DEVICES["v6e"], 4)
    assert parse_device("H100") == (DEVICES["h100"], 1)
    for text in ("v6e-0", "", "-4", "v6e-x"):
        with pytest.raises(ValueError, match="device: must be a kind and a number"):
            parse_device(text)
