from experiments.pipeline import prune


def test_a_tiny_job_runs(configure, overrides, tmp_path):
    prune(configure(*overrides))
    (run,) = (tmp_path / "runs" / "debug").iterdir()
    assert (run / "finished.json").exists()
