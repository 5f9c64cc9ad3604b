"""The throughput benchmark, on a few samples."""

import io
import sys

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from experiments.benchmarks.networks import __main__ as bench

pytest.importorskip("lmdb")


@pytest.mark.slow
def test_the_benchmark_writes_a_rate_for_every_way_of_reading(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SECATEUR_DATA", str(tmp_path / "elsewhere"))
    monkeypatch.setattr(bench, "LAYERS", {"hidden_size": 384, "num_hidden_layers": 1, "num_attention_heads": 2})
    words = ["--samples", "8", "--batch", "4", "--repeats", "1", "--pixels", "16", "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["bench", *words])
    bench.main()
    table = pd.read_csv(tmp_path / "out" / "results.csv")
    assert list(table["part"]) == ["inputs"] * 2 + ["training"] * 2 + ["sources, JPEGs of 16 pixels"] * 3
    assert list(table["what"]) == ["pictures", "latents"] * 2 + ["folder", "shards", "lmdb"]
    assert (table["samples_per_s"] > 0).all() and table["samples"].eq(8).all()
    rates = table.set_index(["part", "what"])["samples_per_s"]
    for _, row in table.iterrows():
        quotient = rates[row["part"], row["what"]] / rates[row["part"], row["of"]]
        assert row["ratio"] == pytest.approx(quotient, rel=0.02, abs=0.02)
    assert (tmp_path / "out" / "bench.png").stat().st_size > 5_000
    assert "precomputation of 12 samples" in capsys.readouterr().out
    assert not (tmp_path / "elsewhere").exists()


def test_every_source_holds_the_same_pictures(tmp_path, monkeypatch):
    monkeypatch.setenv("SECATEUR_DATA", str(tmp_path / "cache"))
    pictures = []
    for level in range(0, 240, 20):
        file = io.BytesIO()
        Image.new("RGB", (8, 8), (level, level, level)).save(file, "jpeg")
        pictures.append(file.getvalue())
    for name, source in bench.write_sources(pictures, tmp_path / "sources", 8).items():
        found = np.sort(source.take(np.arange(len(source)))["image"].mean((1, 2, 3)))
        np.testing.assert_allclose(found, range(0, 240, 20), atol=2, err_msg=name)


def test_fewer_samples_than_a_batch_are_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench", "--samples", "3", "--batch", "4"])
    with pytest.raises(SystemExit):
        bench.main()
    assert "--samples 3 is less than --batch 4" in capsys.readouterr().err
