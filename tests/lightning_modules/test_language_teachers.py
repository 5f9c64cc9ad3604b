"""Language models as teachers: three kinds of files, their tokenizers, and what is refused."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.language import VOCABULARY, tiny_llama, tiny_tokens
from support.networks import same_tensors
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from datamodules.readers.base import MissingData
from datamodules.texts.tokenizers import convert_sentencepiece, load_tokenizer
from datamodules.texts.tokens import find_text
from lightning_modules.backbones.diffusion.load import load_teacher
from lightning_modules.backbones.files import find_model, list_weight_files
from lightning_modules.backbones.language.load import load_language_model
from lightning_modules.backbones.loading import load_network

WEIGHTS = "model.safetensors"
TOKENS = tiny_tokens()["tokens"]
each_head = pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])


# Folders


@pytest.fixture
def folder(tmp_path) -> Path:
    tiny_llama().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def words(folder: Path) -> Path:
    """A folder with a tokenizer of whole words, w0 to w63."""
    vocabulary = {f"w{i}": i for i in range(VOCABULARY)}
    model = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=model, unk_token="w0").save_pretrained(folder)
    return folder


def damage(folder: Path, change: dict[str, torch.Tensor], drop: str = "") -> None:
    state = {key: value for key, value in load_file(folder / WEIGHTS).items() if key != drop}
    save_file(state | change, folder / WEIGHTS, metadata={"format": "pt"})


@each_head
@torch.no_grad()
def test_a_folder_loads_with_the_same_bits_and_is_written_again(tie, folder, tmp_path):
    tiny_llama(tie=tie).save_pretrained(folder)
    saved = AutoModelForCausalLM.from_pretrained(folder)
    backbone = load_language_model(str(folder), length=8)
    assert same_tensors(backbone.network.state_dict(), saved.state_dict()) and not backbone.network.training
    assert torch.equal(backbone.predict({"sample": TOKENS}), saved(TOKENS).logits)
    assert backbone.tokenizer is None and backbone.length == 8
    backbone.save(tmp_path / "again")
    assert str(tmp_path) not in (tmp_path / "again" / "config.json").read_text()
    assert same_tensors(load_network(tmp_path / "again").state_dict(), saved.state_dict())
    assert list_weight_files(str(folder)) == [folder / n for n in ("config.json", "generation_config.json", WEIGHTS)]


def test_half_precision_is_read_as_float32(folder):
    saved = tiny_llama().half()
    saved.save_pretrained(folder)
    network = load_network(folder)
    assert network.dtype == network.config.dtype == torch.float32
    assert same_tensors(network.state_dict(), {key: value.float() for key, value in saved.state_dict().items()})


def test_the_tokenizer_beside_the_weights_can_be_replaced(folder, tmp_path):
    words(folder)
    for given in (None, str(folder)):
        backbone = load_language_model(str(folder), given, length=8)
        assert backbone.tokenizer.encode("w5 w63 w1") == [5, 63, 1]
    other = words(tmp_path / "other")
    files = list_weight_files(str(folder), str(other))
    assert set(files) - set(list_weight_files(str(folder))) == {
        other / "tokenizer.json",
        other / "tokenizer_config.json",
    }
    assert files == sorted(files) and list_weight_files(str(folder), str(folder)) == list_weight_files(str(folder))
    with pytest.raises(MissingData, match=r"none of the files tokenizer\.json"):
        load_tokenizer(str(tmp_path))


def test_a_tokenizer_with_more_tokens_than_the_network_is_refused(tmp_path):
    network = tiny_llama()
    network.resize_token_embeddings(VOCABULARY - 1)
    network.save_pretrained(words(tmp_path))
    with pytest.raises(ValueError, match=r"teacher\.tokenizer='.*' has 64 tokens, .* has 63"):
        load_language_model(str(tmp_path), length=8)


@pytest.mark.parametrize("length", [1, 65])
def test_a_length_out_of_range_is_refused(tmp_path, length):
    tiny_llama().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"teacher\.length={length} is out of range; choose 2 to 64"):
        load_language_model(str(tmp_path), length=length)


def test_weights_that_do_not_fit_their_configuration_are_refused(folder):
    tiny_llama(tie=False).save_pretrained(folder)
    whole = (folder / WEIGHTS).read_bytes()
    key = "model.layers.2.mlp.up_proj.weight"
    for change, drop, message in (
        ({}, key, rf"missing_keys: {key}"),
        ({}, "lm_head.weight", r"missing_keys: lm_head\.weight"),
        ({"model.layers.4.mlp.up_proj.weight": torch.zeros(24, 16)}, "", r"unexpected_keys: model\.layers\.4\.mlp"),
        ({key: torch.zeros(23, 16)}, "", rf"mismatched_keys: .*{key}"),
        ({key: torch.full((24, 16), torch.nan)}, "", rf"not finite: {key}"),
    ):
        (folder / WEIGHTS).write_bytes(whole)
        damage(folder, change, drop)
        with pytest.raises(ValueError, match=message) as caught:
            load_network(folder)
        assert str(folder) in str(caught.value)


def test_a_truncated_file_among_several_is_named(tmp_path):
    tiny_llama().save_pretrained(tmp_path, max_shard_size="10KB")
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 1
    shards[1].write_bytes(shards[1].read_bytes()[:-8])
    with pytest.raises(ValueError, match=rf"\({shards[1].name}\) cannot be read"):
        load_language_model(str(tmp_path), length=8)
    shards[1].unlink()
    with pytest.raises(ValueError, match=shards[1].name):
        load_language_model(str(tmp_path), length=8)


class Bomb:
    def __reduce__(self):
        return print, ("executed",)


def test_pickled_weights_are_read_as_weights_only(folder, capsys):
    state = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    torch.save(state, folder / "pytorch_model.bin")
    assert all(torch.equal(load_network(folder).state_dict()[key], value) for key, value in state.items())
    torch.save(state | {"bomb": Bomb()}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin is pickled .* refused\. Convert it to safetensors"):
        load_network(folder)
    assert "executed" not in capsys.readouterr().out


def test_an_adapter_beside_whole_weights_is_refused(folder):
    """transformers would put it into the network, and the student would be saved as an adapter."""
    load_language_model(str(folder), length=8)
    (folder / "adapter_config.json").write_text("{}")
    for read in (lambda path: load_language_model(path, length=8), list_weight_files):
        with pytest.raises(ValueError, match=rf"{folder} holds an adapter .*merge_and_unload.* adapter_\* files"):
            read(str(folder))


def test_other_architectures_are_refused_by_name(tmp_path):
    small = {"vocab_size": 8, "n_embd": 8, "n_layer": 1, "n_head": 1}
    GPT2LMHeadModel(GPT2Config(**small)).save_pretrained(tmp_path / "gpt2")
    with pytest.raises(ValueError, match=r"gpt2 is a GPT2LMHeadModel: choose a decoder-only .* in `model\.layers`"):
        load_language_model(str(tmp_path / "gpt2"))
    config = BertConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    BertForMaskedLM(config).save_pretrained(tmp_path / "bert")
    with pytest.raises(ValueError, match=r"bert is a Bert\w+: choose a decoder-only"):
        load_language_model(str(tmp_path / "bert"))


def test_a_quantized_folder_is_refused(folder):
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": {"quant_method": "gptq"}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="its weights are quantized; choose those that were not"):
        load_language_model(str(folder))


def test_a_diffusion_network_is_not_taken_for_a_language_model(folder, teacher_folder):
    with pytest.raises(ValueError, match=r"not that of a causal language model: it describes a UNet2DModel"):
        load_language_model(str(teacher_folder))
    with pytest.raises(ValueError, match=r"is a LlamaForCausalLM: choose the configuration of a language model"):
        load_teacher(str(folder))


# The hub


def test_the_error_of_a_missing_hub_model_says_how_to_get_it():
    for read in (load_language_model, list_weight_files):
        wanted = r"run `hf download nobody/no-model --local-dir FOLDER`, then set teacher\.path to FOLDER"
        with pytest.raises(MissingData, match=wanted):
            read("nobody/no-model")
    with pytest.raises(MissingData, match=r"tokenizer='nobody/no-model' .* then set tokenizer to FOLDER"):
        load_tokenizer("nobody/no-model")


@pytest.mark.parametrize(
    ("weights", "wanted"),
    [
        (["model.safetensors", "pytorch_model.bin"], ["model.safetensors"]),  # never pickles beside safetensors
        (["pytorch_model-1.bin", "pytorch_model-2.bin"], ["pytorch_model-1.bin", "pytorch_model-2.bin"]),
    ],
)
def test_only_the_files_that_are_needed_are_downloaded(weights, wanted, tmp_path, monkeypatch):
    beside = ["config.json", "tokenizer.model"]
    names = [*beside, *weights, "README.md", "original/params.json", "original/consolidated.00.pth"]
    asked = []

    def download(path: str, allow_patterns: list[str], local_files_only: bool) -> str:
        asked.append((path, allow_patterns, local_files_only))
        return str(tmp_path)

    monkeypatch.setattr("datamodules.readers.hub_files.snapshot_download", download)
    monkeypatch.setattr("lightning_modules.backbones.files.hub_files", lambda path: names)
    assert find_model("somebody/large") == tmp_path
    assert asked == [("somebody/large", [], False), ("somebody/large", [*beside, *wanted], False)]


def test_a_model_in_the_cache_of_the_hub_is_found_offline(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repository, commit = tmp_path / "models--somebody--tiny", "0" * 40
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    tiny_llama().save_pretrained(words(repository / "snapshots" / commit))
    backbone = load_language_model("somebody/tiny", "somebody/tiny", length=8)
    assert backbone.params() == sum(p.numel() for p in tiny_llama().parameters()) and backbone.tokenizer is not None
    assert {file.parent.name for file in list_weight_files("somebody/tiny", "somebody/tiny")} == {commit}


# Checkpoints of llama2.c


def write_llama2c(network: LlamaForCausalLM, file: Path) -> Path:
    """A network as llama2.c (version 0) writes it: tensors of all layers together, rotated rows in pairs."""
    config, state = network.config, network.state_dict()

    def stacked(name: str, paired: bool = False) -> np.ndarray:
        weights = np.stack([state[f"model.layers.{i}.{name}.weight"].numpy() for i in range(layers)])
        if not paired:
            return weights
        rows = [half * (size // 2) + pair for pair in range(size // 2) for half in range(2)]
        return weights.reshape(layers, -1, size, config.hidden_size)[:, :, rows]

    layers, size = config.num_hidden_layers, config.hidden_size // config.num_attention_heads
    header = [
        config.hidden_size,
        config.intermediate_size,
        layers,
        config.num_attention_heads,
        config.num_key_value_heads,
        config.vocab_size if config.tie_word_embeddings else -config.vocab_size,
        config.max_position_embeddings,
    ]
    parts = [
        state["model.embed_tokens.weight"].numpy(),
        stacked("input_layernorm"),
        stacked("self_attn.q_proj", paired=True),
        stacked("self_attn.k_proj", paired=True),
        *(stacked(f"self_attn.{name}_proj") for name in "vo"),
        stacked("post_attention_layernorm"),
        *(stacked(f"mlp.{name}_proj") for name in ("gate", "down", "up")),
        state["model.norm.weight"].numpy(),
        np.full((2, config.max_position_embeddings, size // 2), np.nan, np.float32),  # tables that are not read
        *([] if config.tie_word_embeddings else [state["lm_head.weight"].numpy()]),
    ]
    content = np.concatenate([part.ravel() for part in parts]).astype("<f4").tobytes()
    file.write_bytes(np.array(header, "<i4").tobytes() + content)
    return file


@each_head
@torch.no_grad()
def test_a_checkpoint_of_llama2c_gives_the_original_network(tie, tmp_path, monkeypatch):
    network = tiny_llama(tie=tie)
    monkeypatch.setenv("SECATEUR_DATA", str(tmp_path))
    write_llama2c(network, tmp_path / "tiny.bin")
    before = torch.get_rng_state()
    backbone = load_language_model("tiny.bin", length=8)
    assert torch.equal(torch.get_rng_state(), before)
    assert same_tensors(backbone.network.state_dict(), network.state_dict())
    assert backbone.params() == sum(p.numel() for p in network.parameters())  # tied weights are counted once
    assert torch.equal(backbone.predict({"sample": TOKENS}), network(TOKENS).logits)
    backbone.save(tmp_path / "saved")
    assert same_tensors(load_network(tmp_path / "saved").state_dict(), network.state_dict())
    words(tmp_path / "words")
    assert list_weight_files("tiny.bin") == [tmp_path / "tiny.bin"]
    assert list_weight_files("tiny.bin", "words") == sorted([tmp_path / "tiny.bin", *(tmp_path / "words").iterdir()])


def test_a_damaged_checkpoint_of_llama2c_is_refused(tmp_path):
    whole = write_llama2c(tiny_llama(), tmp_path / "tiny.bin").read_bytes()

    def refusal(content: bytes) -> str:
        (tmp_path / "tiny.bin").write_bytes(content)
        with pytest.raises(ValueError, match=r"tiny\.bin") as caught:
            load_language_model(str(tmp_path / "tiny.bin"))
        return str(caught.value)

    message = refusal(whole[:-8])
    assert f"has {len(whole) - 8:,} bytes" in message
    assert f"'vocab_size': 64, 'seq_len': 64}} needs {len(whole):,}" in message
    assert "damaged?" in refusal(whole + b"\0" * 4)
    for content in (b"", whole[:20], b"ak42" + whole[4:], b"PK\x03\x04" * 100):
        assert "no checkpoint of llama2.c" in refusal(content)
    values = np.frombuffer(whole[28:], "<f4").copy()
    values[VOCABULARY * 16] = np.inf
    assert "not finite: model.layers.0.input_layernorm.weight" in refusal(whole[:28] + values.tobytes())


def test_files_of_other_kinds_are_refused(tmp_path):
    (tmp_path / "model.onnx").touch()
    with pytest.raises(ValueError, match=r"model\.onnx is no language model: choose a folder or one of: \.gguf, \.bin"):
        load_language_model(str(tmp_path / "model.onnx"))
    with pytest.raises(ValueError, match=r"choose a folder, a hub id, a \.gguf or a SentencePiece \.model file"):
        load_tokenizer(str(tmp_path / "model.onnx"))
    (tmp_path / "tokenizer.model").write_bytes(b"no model")
    with pytest.raises(ValueError, match=r"tokenizer\.model is no SentencePiece model"):
        load_tokenizer(str(tmp_path / "tokenizer.model"))


# The models at hand

STORY = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park with her dog. One "
    'day, she saw a big, red ball.  "Can I play with it?" she asked.\n\n\tHer mom said “yes”, but after lunch… 🙂 '
)
BEGINNING = "Once upon a time, there was a little dog. He liked to run and play in the park with his friends."
ODD = ("", " ", " a", "  a  b ", "<s> hi </s> <unk>", "x\n", "\u2581a", "ﬁ é e\u0301 \u3000y\0z", "a" + " " * 77 + "b")


def at_hand(name: str) -> str:
    try:
        return str(find_text(name))
    except MissingData:
        pytest.skip(f"$SECATEUR_DATA has no {name}")


@pytest.mark.data
def test_the_converted_tokenizer_of_llama_gives_the_original_ids(tmp_path):
    from sentencepiece import SentencePieceProcessor

    file = at_hand("llama_tokenizer.model")
    pieces, tokenizer = SentencePieceProcessor(model_file=file), convert_sentencepiece(Path(file))
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, len(tokenizer)) == (1, 2, 32000)
    assert tokenizer.encode("hi")[0] == 1
    texts = [Path(at_hand("wikitext2_test.txt")).read_text()[:20_000], STORY, *ODD]
    expected = [pieces.encode(text) for text in texts]
    assert [tokenizer.encode(text, add_special_tokens=False) for text in texts] == expected
    assert [tokenizer.decode(ids) for ids in expected] == [pieces.decode(ids) for ids in expected]

    tokenizer.save_pretrained(tmp_path)
    tiny_llama().config.save_pretrained(tmp_path)  # as in an export, where it could suggest another class
    (tmp_path / "texts.json").write_text(json.dumps(texts))
    clean = (
        "import json; from transformers import AutoTokenizer; t = AutoTokenizer.from_pretrained('.'); "
        "print(json.dumps([t.encode(text) for text in json.load(open('texts.json'))]))"
    )
    done = subprocess.run([sys.executable, "-c", clean], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [[1, *ids] for ids in expected]


@pytest.mark.data
@torch.no_grad()
def test_stories15m_continues_a_story_in_english():
    backbone = load_language_model(at_hand("stories15M.bin"), at_hand("llama_tokenizer.model"))
    tokens = backbone.tokenizer(BEGINNING, return_tensors="pt")["input_ids"]
    assert backbone.losses(backbone.predict({"sample": tokens}), {"sample": tokens}).item() < 1.5
    (text,) = backbone.write(["Once upon a time"], 60, torch.device("cpu"))
    assert "there was a little girl named Lily" in text


@pytest.mark.data
@torch.no_grad()
def test_smollm2_has_its_known_perplexity_on_wikitext2(tmp_path):
    """The first 4,096 tokens of the test text in eight windows of 512, without a token before the first of each."""
    backbone = load_language_model(at_hand("SmolLM2-135M-Instruct.Q4_1.gguf"))
    assert backbone.params() == 134_515_008 and {p.dtype for p in backbone.parameters()} == {torch.float32}
    backbone.tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.encode(STORY) == backbone.tokenizer.encode(STORY) and again.decode(again.encode(STORY)) == STORY
    text = Path(at_hand("wikitext2_test.txt")).read_text()[:30_000]
    tokens = torch.tensor(backbone.tokenizer.encode(text, add_special_tokens=False)[:4096]).view(8, 512)
    losses = [backbone.losses(backbone.predict({"sample": row}), {"sample": row}) for row in tokens.split(1)]
    assert math.exp(torch.cat(losses).mean()) == pytest.approx(27.6, rel=0.02)
