"""Conversions: nanochat's checkpoints and transformers' native type, both ways; bad input is refused."""

import copy
import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from golden_models import GOLDEN, checkpoint_of, expected_of, golden_file, model_from, per_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, NanoChatConfig, NanoChatForCausalLM

from nanochat_hf import NanoChatHFConfig, NanoChatHFForCausalLM
from nanochat_hf.configs import ConvertConfig
from nanochat_hf.interop import convert, from_nanochat, from_transformers, to_nanochat, to_transformers
from nanochat_hf.interop_checkpoint import (
    NanochatCheckpoint,
    is_vocabulary,
    model_meta,
    nanochat_name,
    padded_vocab_size,
    read_checkpoint,
    write_checkpoint,
)

REPOSITORY = Path(__file__).parents[1]
CONFIG = {"vocab_size": 300, "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
CONFIG |= {"num_key_value_heads": 2, "max_position_embeddings": 64}


def random_model(architecture="2026-07", **fields):
    model = NanoChatHFForCausalLM(NanoChatHFConfig(architecture=architecture, **CONFIG | fields)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def nanochat_folder(folder: Path, model, step=3, prefix="", bf16=False) -> Path:
    """A checkpoint as nanochat writes it: padded vocabulary, embeddings in bf16, names marked by torch.compile."""
    folder.mkdir()
    state = model.state_dict()
    if bf16:
        state = {name: t.bfloat16() if "embed" in name else t for name, t in state.items()}
    meta = {"step": step, "model_config": model_meta(model.config), "user_config": {"run": "dummy"}, "val_bpb": 1.25}
    write_checkpoint(NanochatCheckpoint(step, meta, model.config, state), folder)
    path = folder / f"model_{step:06d}.pt"
    tensors = {prefix + name: tensor for name, tensor in torch.load(path, weights_only=True).items()}
    for name, tensor in tensors.items():
        if tensor.ndim == 2 and len(tensor) > 300:
            tensor[300:] = 7.0  # padding rows are trained along and hold anything
            assert any(part in name for part in ("wte", "lm_head", "value_embeds"))
    torch.save(tensors, path)
    return folder


@pytest.fixture
def folder(tmp_path):
    return nanochat_folder(tmp_path / "checkpoint", random_model())


def change(folder: Path, edit) -> None:
    """Load a checkpoint's tensors, let `edit` change the dict, save it again."""
    path = next(folder.glob("model_*.pt"))
    tensors = torch.load(path, weights_only=True)
    edit(tensors)
    torch.save(tensors, path)


# -- golden checkpoints ----------------------------------------------------------------------------------------------


@per_model("expected.pt")
@torch.no_grad()
def test_imported_golden_model_has_nanochats_logits(folder, tmp_path, capsys):
    from_nanochat(folder, tmp_path / "model")
    assert capsys.readouterr().err.count("warning:") == (not (folder / "tokenizer.pkl").is_file())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    expected = expected_of(folder)
    torch.testing.assert_close(model(expected["input_ids"]).logits, expected["logits"], atol=5e-6, rtol=0)
    assert model.get_input_embeddings().num_embeddings == model.config.vocab_size == model.lm_head.out_features


@per_model()
def test_golden_round_trip_is_the_identity(folder, tmp_path):
    from_nanochat(folder, tmp_path / "model")
    to_nanochat(tmp_path / "model", tmp_path / "back")
    original, back = (sorted(path.glob("model_*.pt"))[-1] for path in (folder, tmp_path / "back"))
    assert original.name == back.name
    before, after = (torch.load(path, weights_only=True) for path in (original, back))
    before = {name.removeprefix("_orig_mod."): tensor for name, tensor in before.items()}
    vocab_size = checkpoint_of(folder).config.vocab_size
    assert set(before) == set(after)
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype and tensor.shape == after[name].shape
        rows = vocab_size if is_vocabulary(name.replace("transformer.wte", "model.embed_tokens")) else None
        rows = vocab_size if name.startswith("value_embeds") else rows
        assert torch.equal(tensor[:rows], after[name][:rows])
    metas = [json.loads(next(path.parent.glob(f"meta_{path.stem[-6:]}.json")).read_text()) for path in (original, back)]
    assert metas[0] == metas[1]


def test_golden_trained_model_converts_by_the_command_with_its_tokenizer(golden, tmp_path):
    golden_file(golden, "core_eval/tokenizer.pkl")  # or skip
    command = [sys.executable, "scripts/convert.py", "from_nanochat"]
    command += ["--checkpoint", str(golden / "core_eval"), "--output", str(tmp_path / "model")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr and "tokenization agrees" in done.stdout and "logits agree" in done.stdout
    names = {path.name for path in (tmp_path / "model").iterdir()}
    assert {"model.safetensors", "tokenizer.json", "chat_template.jinja", "generation_config.json"} <= names
    assert {"config.json", "modeling_nanochat_hf.py", "configuration_nanochat_hf.py"} <= names
    assert not [name for name in names if name.endswith((".pt", ".pkl", ".bin"))]
    stored = load_file(tmp_path / "model/model.safetensors")
    original = torch.load(next((golden / "core_eval").glob("model_*.pt")), weights_only=True)
    for name, tensor in stored.items():
        assert torch.equal(tensor, original[nanochat_name(name)][: len(tensor)])
        assert tensor.dtype == original[nanochat_name(name)].dtype
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    config = AutoConfig.from_pretrained(tmp_path / "model")
    assert len(tokenizer) == config.vocab_size and config.bos_token_id == tokenizer.bos_token_id


@per_model("expected.pt")
@torch.no_grad()
def test_golden_2025_10_model_as_transformers_own_type(folder, tmp_path):
    from_nanochat(folder, tmp_path / "ours")
    if checkpoint_of(folder).config.architecture == "2026-07":
        with pytest.raises(
            ValueError, match="no value embeddings, residual scalars, smear, backout.*trust_remote_code"
        ):
            to_transformers(tmp_path / "ours", tmp_path / "native")
        assert not (tmp_path / "native").exists()
        return
    to_transformers(tmp_path / "ours", tmp_path / "native")
    assert not list((tmp_path / "native").glob("*.py"))
    native = AutoModelForCausalLM.from_pretrained(tmp_path / "native", trust_remote_code=False)
    assert type(native) is NanoChatForCausalLM
    expected = expected_of(folder)
    torch.testing.assert_close(native(expected["input_ids"]).logits, expected["logits"], atol=5e-6, rtol=0)
    from_transformers(tmp_path / "native", tmp_path / "again")
    again = load_file(tmp_path / "again/model.safetensors")
    assert all(torch.equal(tensor, again[name]) for name, tensor in model_from(folder).state_dict().items())


# -- shapes and dtypes nanochat writes -------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["2026-07", "2025-10"])
@pytest.mark.parametrize("prefix, bf16", [("", False), ("_orig_mod.", True)])
@torch.no_grad()
def test_padding_prefixes_and_bf16_embeddings(architecture, prefix, bf16, tmp_path):
    model = random_model(architecture)
    source = nanochat_folder(tmp_path / "checkpoint", model, step=12, prefix=prefix, bf16=bf16)
    from_nanochat(source, tmp_path / "model")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    if bf16:
        for name, parameter in model.named_parameters():
            if "embed" in name:
                parameter.copy_(parameter.bfloat16())
    ids = torch.randint(300, (2, 50))
    assert torch.equal(found(ids).logits, model(ids).logits) and found.lm_head.weight.shape == (300, 48)
    by_default = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert by_default.dtype == torch.float32 and torch.equal(by_default(ids).logits, model(ids).logits)
    to_nanochat(tmp_path / "model", tmp_path / "back")
    before = torch.load(source / "model_000012.pt", weights_only=True)
    after = torch.load(tmp_path / "back/model_000012.pt", weights_only=True)
    assert {name.removeprefix("_orig_mod.") for name in before} == set(after)
    assert padded_vocab_size(model.config) == (320 if architecture == "2026-07" else 300)
    for name, tensor in before.items():
        back = after[name.removeprefix("_orig_mod.")]
        assert back.dtype == tensor.dtype and back.shape == tensor.shape
        rows = 300 if len(tensor) == 320 else None
        assert torch.equal(back[:rows], tensor[:rows]) and (rows is None or not back[rows:].any())
    meta = json.loads((tmp_path / "back/meta_000012.json").read_text())
    assert meta == json.loads((source / "meta_000012.json").read_text())


def test_a_model_of_ours_becomes_a_checkpoint_and_steps_are_chosen(tmp_path):
    for step, seed in ((5, 0), (40, 1)):
        torch.manual_seed(seed)
        random_model().save_pretrained(tmp_path / f"model{step}")
        to_nanochat(tmp_path / f"model{step}", tmp_path / f"step{step}", step=step)
    both = tmp_path / "both"
    both.mkdir()
    for path in [*tmp_path.glob("step*/*")]:
        path.rename(both / path.name)
    assert read_checkpoint(both).step == 40  # the last
    from_nanochat(both, tmp_path / "chosen", step=5)
    for name, tensor in load_file(tmp_path / "chosen/model.safetensors").items():
        assert torch.equal(tensor, load_file(tmp_path / "model5/model.safetensors")[name])
    with pytest.raises(ValueError, match="no step 7 .* it has 5, 40"):
        from_nanochat(both, tmp_path / "other", step=7)


def test_window_patterns_as_nanochat_takes_them(folder, tmp_path):
    """Small letters mean the same; checkpoints from before there were windows have full attention."""
    meta_path = next(folder.glob("meta_*.json"))
    meta = json.loads(meta_path.read_text())
    meta["model_config"]["window_pattern"] = "ssl"
    meta_path.write_text(json.dumps(meta))
    assert read_checkpoint(folder).config.window_pattern == "SSL"
    del meta["model_config"]["window_pattern"]
    meta_path.write_text(json.dumps(meta))
    assert set(read_checkpoint(folder).config.layer_types) == {"full_attention", "hybrid"}


@pytest.mark.parametrize("pattern", ["ssl", None])
def test_meta_files_go_back_as_they_came(tmp_path, pattern):
    """Whatever way they write the pattern, and without a step of their own: the step is then the file name's."""
    source = nanochat_folder(tmp_path / "checkpoint", random_model(window_pattern="SSL" if pattern else "L"), step=12)
    path = source / "meta_000012.json"
    meta = json.loads(path.read_text())
    meta["model_config"]["window_pattern"] = pattern
    meta["model_config"] = {key: value for key, value in meta["model_config"].items() if value is not None}
    del meta["step"]
    path.write_text(json.dumps(meta))
    from_nanochat(source, tmp_path / "model")
    to_nanochat(tmp_path / "model", tmp_path / "back")
    assert json.loads((tmp_path / "back/meta_000012.json").read_text()) == meta
    to_nanochat(tmp_path / "model", tmp_path / "numbered", step=40)
    assert json.loads((tmp_path / "numbered/meta_000040.json").read_text()) == meta | {"step": 40}
    config = json.loads((tmp_path / "model/config.json").read_text())
    (tmp_path / "model/config.json").write_text(json.dumps(config | {"max_position_embeddings": 32}))
    to_nanochat(tmp_path / "model", tmp_path / "shorter")
    assert json.loads((tmp_path / "shorter/meta_000012.json").read_text())["model_config"]["sequence_len"] == 32


@torch.no_grad()
def test_native_settings_survive_or_are_refused(tmp_path):
    """The logits stay equal whatever eps and rotary base a native folder has; what we cannot compute is refused."""
    native = NanoChatForCausalLM(
        NanoChatConfig(**CONFIG, intermediate_size=80, rms_norm_eps=1e-3, rope_parameters={"rope_type": "default",
                       "rope_theta": 5e4}, bos_token_id=1, eos_token_id=2, pad_token_id=3)
    ).eval()  # fmt: skip
    copy.deepcopy(native).to(torch.bfloat16).save_pretrained(tmp_path / "native")
    from_transformers(tmp_path / "native", tmp_path / "ours")
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32)
    assert isinstance(ours, NanoChatHFForCausalLM) and ours.config.eos_token_id == 2
    assert load_file(tmp_path / "ours/model.safetensors")["lm_head.weight"].dtype == torch.bfloat16
    ids = torch.randint(300, (2, 30))
    rounded = copy.deepcopy(native).to(torch.bfloat16).float()
    torch.testing.assert_close(ours(ids).logits, rounded(ids).logits, atol=2e-5, rtol=0)
    with pytest.raises(ValueError, match="no nanochat of 2025-10: intermediate_size=80.*rope_theta"):
        to_nanochat(tmp_path / "ours", tmp_path / "back")
    native.config.dtype = torch.bfloat16  # a wrong note beside fp32 weights must not round them
    native.config.save_pretrained(tmp_path / "native")
    save_file(native.state_dict(), tmp_path / "native/model.safetensors", metadata={"format": "pt"})
    from_transformers(tmp_path / "native", tmp_path / "whole")
    whole = load_file(tmp_path / "whole/model.safetensors")
    assert all(torch.equal(tensor, whole[name]) for name, tensor in native.state_dict().items())
    native.config.attention_bias = True
    native.config.save_pretrained(tmp_path / "native")
    with pytest.raises(ValueError, match="attention_bias=True"):
        from_transformers(tmp_path / "native", tmp_path / "other")


# -- refused ---------------------------------------------------------------------------------------------------------


def test_every_wrong_tensor_is_listed(folder, tmp_path):
    def edit(tensors):
        del tensors["transformer.h.1.attn.c_q.weight"], tensors["smear_lambda"]
        tensors["transformer.h.0.attn.bias"] = torch.zeros(3)
        tensors["transformer.h.2.mlp.c_fc.weight"] = torch.zeros(5, 48)
        tensors["lm_head.weight"] = torch.zeros(301, 48)

    change(folder, edit)
    with pytest.raises(ValueError) as error:
        from_nanochat(folder, tmp_path / "model")
    lines = str(error.value).splitlines()[1:]
    assert [line.strip() for line in lines] == [
        "missing: smear_lambda",
        "missing: transformer.h.1.attn.c_q.weight",
        "unknown: transformer.h.0.attn.bias",
        "of another shape: lm_head.weight (301, 48), not (300, 48)",
        "of another shape: transformer.h.2.mlp.c_fc.weight (5, 48), not (192, 48)",
    ]
    assert not (tmp_path / "model").exists()


def test_generations_between_the_two_are_refused_by_what_they_lack(folder, tmp_path):
    change(
        folder, lambda tensors: [tensors.pop(name) for name in list(tensors) if "smear" in name or "backout" in name]
    )
    with pytest.raises(ValueError, match="missing: backout_lambda"):
        from_nanochat(folder, tmp_path / "model")


class Evil:
    def __reduce__(self):
        return exec, ("open('evil', 'w')",)


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-3000]), "does not load as plain tensors"),
        (lambda path: path.write_bytes(b""), "does not load as plain tensors"),
        (lambda path: path.write_bytes(pickle.dumps(Evil())), "does not load as plain tensors"),
        (lambda path: torch.save({"lm_head.weight": Evil()}, path), "does not load as plain tensors"),
        (lambda path: torch.save([1, 2], path), "must hold names and tensors"),
        (lambda path: torch.save({"lm_head.weight": torch.zeros(3, dtype=torch.int8)}, path), "no floating-point"),
        (lambda path: path.rename(path.with_name("weights.pt")), "no model_<step>.pt"),
    ],
)
def test_damaged_and_hostile_weights_are_refused(folder, tmp_path, monkeypatch, spoil, message):
    monkeypatch.chdir(tmp_path)
    spoil(next(folder.glob("model_*.pt")))
    with pytest.raises(ValueError, match=message):
        from_nanochat(folder, tmp_path / "model")
    assert not (tmp_path / "evil").exists() and not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    "edit, message",
    [
        (lambda meta: meta.pop("model_config"), "has no model_config"),
        (lambda meta: meta["model_config"].pop("n_head"), "n_head=None"),
        (lambda meta: meta["model_config"].update(n_head=5), "num_attention_heads=5 does not divide hidden_size=48"),
        (lambda meta: meta["model_config"].update(n_head=16), "head_dim=3 is odd"),
        (lambda meta: meta["model_config"].update(n_layer="3"), "n_layer='3'"),
        (lambda meta: meta["model_config"].update(n_experts=8), r"n_experts=8 \(unknown\)"),
        (lambda meta: meta["model_config"].update(window_pattern="SXL"), "window_pattern='SXL'"),
        (lambda meta: meta["model_config"].update(vocab_size=200), "of another shape: lm_head.weight"),
        (lambda meta: meta["model_config"].update(n_layer=4), "missing: transformer.h.3"),
        (lambda meta: meta["model_config"].update(n_layer=10**6), "tensors, its meta file announces n_layer=1,000,000"),
        (lambda meta: meta["model_config"].update(n_embd=4 * 10**18), "from 1 to 10,000,000.*n_embd=4000"),
        (lambda meta: meta["model_config"].update(vocab_size=10**7, n_embd=10**7, n_head=2), "of another shape"),
    ],
)
def test_meta_files_that_do_not_fit_are_refused(folder, tmp_path, edit, message):
    path = next(folder.glob("meta_*.json"))
    meta = json.loads(path.read_text())
    edit(meta)
    path.write_text(json.dumps(meta))
    with pytest.raises(ValueError, match=message):
        from_nanochat(folder, tmp_path / "model")
    path.write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        from_nanochat(folder, tmp_path / "model")
    path.unlink()
    with pytest.raises(ValueError, match="no meta_000003.json"):
        from_nanochat(folder, tmp_path / "model")


def golden_tokenizer() -> Path:
    path = GOLDEN / "tokenizer" / "tokenizer.pkl"
    if not path.is_file():
        pytest.skip(f"no {path}")
    return path


def test_a_tokenizer_of_another_vocabulary_is_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="tokens, the model 300: they are not of the same run"):
        from_nanochat(folder, tmp_path / "model", tokenizer=golden_tokenizer())
    with pytest.raises(ValueError, match="no file"):
        from_nanochat(folder, tmp_path / "model", tokenizer=tmp_path)
    (folder / "tokenizer.pkl").write_bytes(golden_tokenizer().read_bytes()[:500])
    with pytest.raises(ValueError, match="is not a nanochat tokenizer"):
        from_nanochat(folder, tmp_path / "model")
    (folder / "tokenizer.pkl").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ValueError, match="is not a nanochat tokenizer"):
        from_nanochat(folder, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_folder_with_a_tokenizer_of_another_vocabulary_is_refused(tiny_tokenizer, tmp_path):
    random_model("2025-10").save_pretrained(tmp_path / "ours")
    NanoChatForCausalLM(NanoChatConfig(**CONFIG)).save_pretrained(tmp_path / "native")
    for conversion, name in ((to_transformers, "ours"), (from_transformers, "native")):
        tiny_tokenizer.save_pretrained(tmp_path / name)
        with pytest.raises(ValueError, match=f"{name} has 512 tokens, the model 300"):
            conversion(tmp_path / name, tmp_path / "converted")


def test_token_bytes_of_another_tokenizer_are_refused(tmp_path):
    pickled = golden_tokenizer()
    from nanochat_hf.interop_tokenizer import from_tiktoken_pickle

    folder = nanochat_folder(tmp_path / "checkpoint", random_model(vocab_size=len(from_tiktoken_pickle(pickled))))
    (folder / "tokenizer.pkl").write_bytes(pickled.read_bytes())
    torch.save(torch.ones(17, dtype=torch.int32), folder / "token_bytes.pt")
    with pytest.raises(ValueError, match="token_bytes.pt does not fit the tokenizer"):
        from_nanochat(folder, tmp_path / "model")


def test_nothing_is_overwritten_and_nothing_half_written_stays(folder, tmp_path, monkeypatch):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="exists already"):
        from_nanochat(folder, tmp_path / "taken")
    assert (tmp_path / "taken/notes.txt").read_text() == "mine"

    written = NanoChatHFForCausalLM.save_pretrained

    def spoiled(model, target, **kwargs):
        written(model, target, **kwargs)
        tensors = load_file(target / "model.safetensors")
        tensors["model.layers.1.mlp.fc2.weight"] *= 1.5
        save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(NanoChatHFForCausalLM, "save_pretrained", spoiled)
    with pytest.raises(ValueError, match="logits differ"):
        from_nanochat(folder, tmp_path / "model")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "taken"]


def test_folders_of_ours_that_do_not_fit_are_refused(tmp_path):
    model = random_model()
    model.save_pretrained(tmp_path / "model")
    tensors = load_file(tmp_path / "model/model.safetensors")
    tensors["extra"] = tensors.pop("model.backout_lambda")
    save_file(tensors, tmp_path / "model/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="missing: model.backout_lambda\n  unknown: extra"):
        to_nanochat(tmp_path / "model", tmp_path / "back")
    with pytest.raises(ValueError, match="is of model type nanochat_hf, not nanochat"):
        from_transformers(tmp_path / "model", tmp_path / "back")
    with pytest.raises(ValueError, match="not a model folder"):
        to_transformers(tmp_path, tmp_path / "back")
    config = json.loads((tmp_path / "model/config.json").read_text())
    (tmp_path / "model/config.json").write_text(json.dumps(config | {"hidden_size": "wide"}))
    with pytest.raises(ValueError, match="config.json has a wrong value.*hidden_size.*expected int"):
        to_nanochat(tmp_path / "model", tmp_path / "back")
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    (tmp_path / "model/model.safetensors").write_bytes(b"\x08" + b"\0" * 7 + b"{}")
    with pytest.raises(ValueError, match="damaged"):
        to_nanochat(tmp_path / "model", tmp_path / "back")


@pytest.mark.parametrize(
    "direction, fields, message",
    [
        (None, {}, "the first argument names the conversion: from_nanochat"),
        ("from_nanohcat", {}, "did you mean from_nanochat"),
        ("from_nanochat", {"checkpoint": "x"}, "needs --output"),
        ("to_transformers", {"checkpoint": "x", "output": "y", "tokenizer": "z"}, "takes no --tokenizer"),
        ("from_nanochat", {"checkpoint": "nowhere", "output": "y"}, "no model_<step>.pt in nowhere"),
    ],
)
def test_the_command_says_what_is_missing(direction, fields, message):
    with pytest.raises(ValueError, match=message):
        convert(direction, ConvertConfig(**fields))
