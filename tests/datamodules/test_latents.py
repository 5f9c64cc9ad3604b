"""Stored latents and text states: the same training as from pictures, and refused where they are of something else."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.pipelines import FACTOR, LATENT, tiny_pipeline

from conf.schema import ConfigError
from datamodules.latents import TextTable, read_manifest
from datamodules.readers import folder as folders
from datamodules.readers.base import MissingData
from experiments.engine.inputs import build_data, build_teacher
from experiments.engine.pipeline import run_pipeline
from experiments.tools.precompute import check_latents, identify_latents, precompute
from lightning_modules.backbones.diffusion.pipeline_parts import PipelineParts


def tensors(nested: dict) -> dict[str, torch.Tensor]:
    found = {}
    for key, value in nested.items():
        found |= {f"{key}.{k}": v for k, v in tensors(value).items()} if isinstance(value, dict) else {key: value}
    return found


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pipeline("sdxl", tmp_path_factory.mktemp("sdxl"))


@pytest.fixture
def stored(text_job: list[str], configure, tmp_path: Path) -> tuple[list[str], Path]:
    """A text job's arguments and the folder of its latents, stored with mirrored pictures, in several shards."""
    job = [*text_job, "precompute.dtype=float32", "precompute.batch_size=4", "precompute.samples_per_shard=12"]
    job = [*job, "data.flip=true", f"latents={tmp_path}/latents"]
    return job, precompute(configure(*job))


def batches(cfg, count: int):
    loader = iter(build_data(cfg).train_dataloader())
    return [next(loader) for _ in range(count)]


def equal(one: dict, other: dict) -> None:
    one, other = tensors(one), tensors(other)
    assert one.keys() == other.keys()
    assert all(torch.equal(value, other[key]) for key, value in one.items())


def test_training_from_stored_latents_is_training_from_pictures(stored, configure):
    job, _ = stored
    cfg, raw = configure(*job), configure(*job, "latents=null")
    teacher = build_teacher(cfg)
    for with_latents, with_pictures in zip(batches(cfg, 9), batches(raw, 9), strict=True):  # more than two epochs
        assert "image" not in with_latents and with_latents["caption"] == with_pictures["caption"]
        found = []
        for batch in (with_latents, with_pictures):
            torch.manual_seed(0)
            found.append(teacher.training_inputs(batch))
        equal(*found)


@pytest.mark.parametrize("split", ["train", "holdout"])
def test_calibration_from_stored_latents_is_that_from_pictures(stored, configure, split):
    job, _ = stored
    teacher, found = build_teacher(configure(*job)), []
    for extra in ((), ("latents=null",)):
        batch = next(iter(build_data(configure(*job, *extra)).subset(split, 4, 3, 4)))
        found.append(teacher.calibration_inputs(batch, seed=5))
    equal(*found)


@pytest.mark.slow
def test_sizes_and_crops_go_along_for_sdxl(text_job, sdxl, configure, tmp_path):
    job = [*text_job, f"teacher.path={sdxl}", f"latents={tmp_path}/latents", "precompute.dtype=float32"]
    job += ["precompute.batch_size=4"]
    precompute(configure(*job))
    teacher, found = build_teacher(configure(*job)), []
    for extra in ((), ("latents=null",)):
        torch.manual_seed(0)
        found.append(teacher.training_inputs(batches(configure(*job, *extra), 1)[0]))
    equal(*found)
    assert found[0]["conditions"]["added_cond_kwargs"]["time_ids"][0, :2].tolist() == [20, 16]


def test_posterior_draws_differ_between_epochs_and_not_between_calls(stored, configure):
    job, _ = stored
    teacher, drawn = build_teacher(configure(*job)), []
    for _ in range(2):
        found = {}
        for batch in batches(configure(*job, "data.flip=false"), 8):  # 16 samples in batches of 4: two epochs
            for i, index in enumerate(batch["index"].tolist()):
                one = {key: value[i : i + 1] for key, value in batch.items() if key.startswith(("latent", "posterior"))}
                generators = [torch.Generator().manual_seed(int(one["posterior"]))]
                found.setdefault(index, []).append(teacher.latents(one, generators))
        drawn.append(found)
    assert all(len(twice) == 2 and not torch.equal(*twice) for twice in drawn[0].values())
    assert all(torch.equal(a, b) for index in drawn[0] for a, b in zip(drawn[0][index], drawn[1][index], strict=True))


@pytest.mark.slow
def test_a_job_on_stored_latents_needs_no_vae_or_text_encoder(stored, configure, quick_end, monkeypatch):
    job, _ = stored

    def refuse(*args, **kwargs):
        raise AssertionError("a VAE or text encoder was asked")

    cfg = configure(*job, "distillation=output_only")
    with monkeypatch.context() as patched:
        patched.setattr(PipelineParts, "encode_posterior", refuse)
        patched.setattr(PipelineParts, "encode_captions", refuse)
        run_pipeline(cfg)
    run = next(Path(cfg.paths.runs).glob("debug/*/finished.json")).parent
    assert (run / "networks" / "distilled").exists()


def test_moved_latents_are_the_same_run(stored, configure, tmp_path):
    from experiments.engine.identity import get_effective_settings

    job, folder = stored
    shutil.copytree(folder, tmp_path / "elsewhere")
    here, there, none = (configure(*job, f"latents={at}") for at in (folder, tmp_path / "elsewhere", "null"))
    assert get_effective_settings(here) == get_effective_settings(there) != get_effective_settings(none)


def test_what_was_stopped_goes_on(stored, configure):
    job, folder = stored
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.glob("*.safetensors")}
    for name in ("train-00001.json", "train-00001.safetensors", "manifest.json"):
        (folder / name).unlink()
    with pytest.raises(MissingData, match=r"manifest\.json"):
        build_data(configure(*job))
    precompute(configure(*job))
    for path in folder.glob("*.safetensors"):
        content, time = before[path.name]
        assert path.read_bytes() == content
        assert (path.stat().st_mtime_ns == time) == (path.name != "train-00001.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("vae", "another VAE"),
        ("text_encoder", "another text encoder"),
        ("data", "another data set"),
        ("pictures", "other samples"),
        ("captions", "other samples"),
    ],
)
def test_latents_of_something_else_are_refused(
    stored, configure, tmp_path, text_teacher, captioned, monkeypatch, change, message
):
    job, _ = stored
    if change == "data":
        job = [*job, "data.holdout_images=7"]
    elif change == "pictures":  # under the same path
        decoded = folders.PictureForm.decode
        monkeypatch.setattr(
            folders.PictureForm, "decode", lambda *of: (record := decoded(*of)) | {"image": 0 * record["image"]}
        )
    elif change == "captions":
        read_jsonl = folders.read_jsonl
        monkeypatch.setattr(folders, "read_jsonl", lambda *of: ((file, f"{text}!") for file, text in read_jsonl(*of)))
    else:
        other = tmp_path / "other"
        shutil.copytree(text_teacher, other)
        file = next((other / change).glob("*.safetensors"))
        weights = load_file(file)
        name = next(iter(weights))
        save_file(weights | {name: weights[name] + 1}, file, {"format": "pt"})
        job = [*job, f"teacher.path={other}"]
    cfg = configure(*job)
    with pytest.raises(ValueError, match=message):
        check_latents(cfg, build_data(cfg), build_teacher(cfg))
    with pytest.raises(ValueError, match=rf"started\.json was begun with {message}.*another folder, or delete it$"):
        precompute(cfg)


def test_shards_of_another_size_are_no_continuation(stored, configure):
    job, folder = stored
    (folder / "manifest.json").unlink()
    (folder / "train-00001.json").unlink()
    with pytest.raises(
        ValueError, match=r"another precompute\.samples_per_shard \(samples_per_shard: \d+, this job's 20\)"
    ):
        precompute(configure(*job, "precompute.samples_per_shard=20"))


@pytest.mark.parametrize("name", ["train-00000", "text-00000"])
def test_a_damaged_shard_is_named_with_its_remedy(stored, configure, name):
    job, folder = stored
    file = folder / f"{name}.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match=rf"{name}\.safetensors cannot be read .*delete it, .*experiments\.precompute"):
        batches(configure(*job), 1)


def test_text_states_of_other_captions_are_no_continuation(stored, configure, monkeypatch):
    job, folder = stored
    for name in ("manifest.json", "started.json"):
        (folder / name).unlink()
    read_jsonl = folders.read_jsonl
    monkeypatch.setattr(folders, "read_jsonl", lambda *of: ((file, f"{text}!") for file, text in read_jsonl(*of)))
    with pytest.raises(ValueError, match=r"text-00000\.safetensors has other captions"):
        precompute(configure(*job))


@pytest.mark.slow
def test_latents_of_pictures_that_are_gone_can_still_be_used(stored, configure, captioned, tmp_path):
    job, _ = stored
    folder = tmp_path / "pictures"
    shutil.copytree(captioned, folder)
    job = [*job, f"data.path={folder}", f"latents={tmp_path}/others"]
    precompute(configure(*job))
    shutil.rmtree(folder)
    cfg = configure(*job)
    check_latents(cfg, build_data(cfg), build_teacher(cfg))
    assert len(batches(cfg, 2)) == 2


def test_held_out_latents_are_stored_without_mirrored_copies(stored):
    _, folder = stored
    for split, mirrored in (("train", True), ("holdout", False)):
        names = load_file(folder / f"{split}-00000.safetensors").keys()
        assert ("flipped_latent_mean" in names) == mirrored and "latent_mean" in names


def test_sounds_of_another_mel_are_other_data(configure):
    job = ["task=uag", "data=sound_folder", "data.path=/sounds"]
    cfg = [configure(*job, f"data.mel.hop={hop}") for hop in (128, 64)]
    teacher = build_teacher(cfg[0])
    one, other = (identify_latents(c, teacher, "the same") for c in cfg)
    assert one["data"] != other["data"] and one["vae"] == other["vae"]


def test_mirrored_pictures_have_to_be_stored(text_job, configure, tmp_path):
    job = [*text_job, f"latents={tmp_path}/latents"]
    precompute(configure(*job))
    with pytest.raises(ValueError, match=r"data\.flip=true, but .* has no mirrored pictures"):
        build_data(configure(*job, "data.flip=true"))
    with pytest.raises(ValueError, match=r"data\.crop=2"):
        build_data(configure(*job, "++data.crop=2"))
    with pytest.raises(ConfigError, match=r"precompute\.dtype='int8'.*float16, float32"):
        configure(*job, "precompute.dtype=int8")


@pytest.mark.slow
def test_bad_samples_are_left_out_and_counted(text_job, captioned, configure, tmp_path):
    folder = tmp_path / "pictures"
    shutil.copytree(captioned, folder)
    (folder / "3.png").write_bytes(b"")
    job = [*text_job, f"data.path={folder}", "data.holdout_images=4"]
    with pytest.raises(ValueError, match=r"(?s)max_bad_fraction=0 .*3\.png"):
        precompute(configure(*job, "++data.max_bad_fraction=0", f"latents={tmp_path}/strict"))
    assert not (tmp_path / "strict" / "manifest.json").exists()
    manifest = read_manifest(precompute(configure(*job, f"latents={tmp_path}/lenient")))
    shards = [shard for split in manifest["splits"].values() for shard in split["shards"]]
    assert sum(shard["skipped"] for shard in shards) == 1
    assert sum(shard["rows"] for shard in shards) == 23


def test_text_states_are_stored_once_a_caption(text_job, captioned, configure, tmp_path):
    folder = tmp_path / "pictures"
    shutil.copytree(captioned, folder)
    lines = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    same = [line | {"text": f"cat {i % 2}, cut"} for i, line in enumerate(lines)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, same)))
    job = [*text_job, f"data.path={folder}", f"latents={tmp_path}/latents"]
    table = TextTable(precompute(configure(*job)))
    assert sorted(table) == ["", "cat 0, cut", "cat 1, cut"]
    states = build_teacher(configure(*job)).pipeline_parts.encode_text(["cat 1, cut"], torch.device("cpu"))
    found = table.find(["cat 1, cut"])["encoder_hidden_states"]
    assert torch.equal(found, states["encoder_hidden_states"].half().float())
    with pytest.raises(ValueError, match="no stored text state for the caption 'dog'"):
        table.find(["dog"])


def test_pictures_of_another_size_are_refused(text_job, configure, tmp_path):
    job = [*text_job, f"data.size={LATENT * FACTOR * 2}", f"latents={tmp_path}/latents"]
    with pytest.raises(ValueError, match="the VAE belongs to"):
        precompute(configure(*job))


def test_stored_values_that_are_not_finite_are_named(stored, configure):
    job, folder = stored
    for shard, name in (("train-00000", "latent_mean"), ("text-00000", "encoder_hidden_states")):
        file = folder / f"{shard}.safetensors"
        whole, state = file.read_bytes(), load_file(file)
        with safe_open(file, "pt") as content:
            metadata = content.metadata()
        save_file(state | {name: torch.full_like(state[name], torch.nan)}, file, metadata)
        with pytest.raises(ValueError, match=rf"{file} has values that are not finite \({name}\)"):
            batches(configure(*job), 1)
        file.write_bytes(whole)


def test_a_damaged_shard_is_named(stored, configure):
    job, folder = stored
    (folder / "train-00000.safetensors").write_bytes(b"cut off")
    with pytest.raises(ValueError, match=r"train-00000\.safetensors cannot be read"):
        batches(configure(*job), 1)
