"""The table of generation speed: its arithmetic under a clock of the test's own, and a tiny run."""

import sys
from collections.abc import Callable

import pandas as pd
import pytest
import torch
from support.language import tiny_language, tiny_llama

from experiments.benchmarks.generation_speed import __main__ as speed

CPU = torch.device("cpu")


@pytest.fixture
def clock(monkeypatch) -> Callable[[float], Callable[[], None]]:
    """clock(seconds) -> a call that takes so many seconds more each time: 1, 2, 3 times as many."""
    now = [0.0]
    monkeypatch.setattr(speed.time, "perf_counter", lambda: now[0])

    def make(each: float) -> Callable[[], None]:
        calls = [0]

        def call() -> None:
            calls[0] += 1
            now[0] += calls[0] * each

        return call

    return make


def test_models_take_turns_and_the_warm_up_does_not_count(clock):
    order = []
    slow, fast = clock(2.0), clock(1.0)
    calls = {"slow": lambda: (order.append("slow"), slow()), "fast": lambda: (order.append("fast"), fast())}
    times = speed.time_in_turns(calls, runs=4, warmup=2, device=CPU, description="some")
    assert order == ["slow", "fast"] * 4
    assert times == {"slow": [6.0, 8.0], "fast": [3.0, 4.0]}


def test_rows_have_means_over_runs_and_ratios_to_the_first_model():
    first, second = speed.make_rows({"a": [2.0, 4.0], "b": [1.0, 1.0]}, batch=3, length=8)
    assert first == {
        **{"model": "a", "batch": 3, "length": 8, "runs": 2, "latency_s": 3.0, "latency_std": 1.0},
        **{"throughput": (12 + 6) / 2, "throughput_std": 3.0, "latency_ratio": 1.0},
    }
    assert (second["throughput"], second["latency_std"], second["latency_ratio"]) == (24, 0, 1 / 3)


def test_every_prompt_gets_exactly_the_requested_length():
    model = tiny_language()
    model.network.config.eos_token_id = model.network.generation_config.eos_token_id = list(range(60))
    torch.manual_seed(0)
    made = speed.make_generation(model, batch=3, length=9, device=CPU)()
    prompt = speed.encode_prompt(model)
    assert made.shape == (3, prompt.shape[1] + 9) and (made[:, : prompt.shape[1]] == prompt).all()
    assert not torch.equal(made[0], made[1])  # sampled


def test_models_are_named_by_their_runs_and_their_folders():
    assert speed.shorten_names(["stories15m", "/r/one/export", "/models/llama/", "/other/llama"]) == [
        *("stories15m", "one"),
        *("llama (3)", "llama (4)"),
    ]


def test_a_tiny_run_leaves_a_table_and_a_picture(tmp_path, monkeypatch, capsys):
    for layers in (4, 2):
        tiny_llama(layers).save_pretrained(tmp_path / f"{layers}")
    words = ["--batch", "1", "2", "--length", "3", "5", "--runs", "2", "--warmup", "1", "--device", "cpu"]
    given = [*(str(tmp_path / name) for name in "42"), *words, "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["generation_speed", *given])
    speed.main()
    table = pd.read_csv(tmp_path / "out" / "results.csv")
    assert list(zip(table["length"], table["batch"], table["model"], strict=True)) == [
        (length, batch, model) for length in (3, 5) for batch in (1, 2) for model in (4, 2)
    ]
    assert (table["layers"] == table["model"]).all() and (table["width"] == 16).all() and (table["runs"] == 1).all()
    assert (table["params"] == table["layers"].map({n: tiny_language(n).params() for n in (4, 2)})).all()
    written = table["batch"] * table["length"] / table["latency_s"]
    assert table["throughput"].tolist() == pytest.approx(written.tolist()) and (table["latency_s"] > 0).all()
    assert (table["latency_ratio"][::2] == 1).all() and table["peak_bytes"].isna().all()
    assert (tmp_path / "out" / "speed.png").stat().st_size > 10_000
    assert "latency_ratio" in capsys.readouterr().out


def test_too_many_tokens_and_missing_runs_are_refused(capsys):
    model = tiny_language()
    room = 64 - speed.encode_prompt(model).shape[1]
    speed.check_lengths({"tiny": model}, [1, room])
    with pytest.raises(ValueError, match=rf"--length {room + 1}: after the prompt, tiny has room for {room} tokens"):
        speed.check_lengths({"tiny": model}, [1, room + 1])
    with pytest.raises(SystemExit):
        speed.read_options(["a", "--runs", "3", "--warmup", "3"])
    assert "--warmup 3 leaves no run of --runs 3" in capsys.readouterr().err
    with pytest.raises(ValueError, match="ddpm_cifar10 is a UNetBackbone, not a language model"):
        speed.load_model("ddpm_cifar10")
