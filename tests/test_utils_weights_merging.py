"""utils/weights/merging.py, adapters.py: models in parts say what PEFT's models in memory say, and merge to it.

python -m pytest tests/test_utils_weights_merging.py
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_model
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from utils.data.chat import make_chat
from utils.export.model_folder import write_model
from utils.weights.adapters import Adapter, read_adapter
from utils.weights.layouts import open_weights
from utils.weights.lazy import write_weights
from utils.weights.loading import load_model
from utils.weights.merging import assemble, materialize, merged_weights, offloaded

VOCAB, IDS = 300, torch.arange(5, 45)[None]
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# Name -> (model, LoraConfig's arguments, whether tied embeddings part).
KINDS: dict[str, tuple[str, dict[str, Any], bool]] = {
    "lora": ("llama", {"target_modules": ALL}, False),
    "tied": ("qwen2", {"target_modules": ALL}, False),
    "all-linear": ("qwen3", {"target_modules": "all-linear"}, False),
    "rslora": ("mistral", {"target_modules": ALL, "use_rslora": True}, False),
    "dora": ("gemma3", {"target_modules": ALL, "use_dora": True}, False),
    "patterns": (
        "llama",
        {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"0.+v_proj": 64}},
        False,
    ),
    "bias": ("qwen2", {"target_modules": ["q_proj", "v_proj"], "lora_bias": True}, False),
    "head": ("llama", {"target_modules": ["q_proj", "lm_head"]}, False),
    "tied head": ("qwen2", {"target_modules": ["q_proj", "lm_head"]}, True),
    "embedding": ("llama", {"target_modules": ["q_proj", "embed_tokens"]}, False),
    "tied embedding": ("gemma3", {"target_modules": ["q_proj", "embed_tokens"]}, True),
    "saved": ("qwen3", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head", "norm"]}, False),
    "saved tied embedding": ("qwen2", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}, True),
    "dora embedding": ("llama", {"target_modules": ["embed_tokens", "down_proj"], "use_dora": True}, False),
    "biases": ("qwen2", {"target_modules": ["q_proj", "v_proj"], "bias": "lora_only"}, False),
    "all biases": ("qwen2", {"target_modules": ["q_proj"], "bias": "all"}, False),
    "saved block": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["mlp"]}, False),
    "tied tokens": ("qwen2", {"target_modules": ["q_proj"], "trainable_token_indices": [7, 9]}, False),
    "some tokens": ("llama", {"target_modules": ["q_proj"], "trainable_token_indices": [7, 9, 20]}, False),
    "some layers": ("mistral", {"target_modules": ["down_proj"], "layers_to_transform": [1]}, False),
}


def make_adapter(model: Any, seed: int, **settings: Any) -> Any:
    """Puts an adapter with random numbers, as after training, on a model in memory."""
    adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **settings))
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if weight.requires_grad:
                # Magnitudes (DoRA) and whole layers stay near what they were.
                weight.add_(torch.randn_like(weight) * (0.2 if "lora_A" in name or "lora_B" in name else 0.05))
    return adapted.eval()


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits[0].float()


def write_merged(parts: Any, folder: Path) -> Any:
    """Merges, writes, and reads with transformers alone."""
    from transformers import AutoModelForCausalLM

    tensors = merged_weights(parts, torch.float32, "cpu")
    folder.mkdir()
    write_weights(folder, tensors, "5GB")
    config = parts.plain.config
    config.tie_word_embeddings = config.tie_word_embeddings and not set(tensors) & set(parts.ties)
    config.save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), tensors


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_adapter(tmp_path: Path, name: str) -> None:
    kind, settings, parted = KINDS[name]
    make_model(kind, VOCAB).save_pretrained(tmp_path / "base")
    untrained = logits_of(make_model(kind, VOCAB))
    adapted = make_adapter(make_model(kind, VOCAB), 1, **settings)
    expected = logits_of(adapted)
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    assert (expected - untrained).abs().max() > 0.05
    parts = assemble(tmp_path / "base", torch.float32, None, [read_adapter(tmp_path / "adapter")], False)
    with offloaded(parts, torch.float32, "cpu") as model:
        assert all(parameter.is_meta for parameter in model.parameters())
        assert (logits_of(model) - expected).abs().max() < 1e-5
    merged, tensors = write_merged(parts, tmp_path / "merged")
    assert (logits_of(merged) - expected).abs().max() < 1e-4
    assert bool(set(tensors) & set(parts.ties)) == parted
    # Once more: reading does not use the parts up.
    again = merged_weights(parts, torch.float32, "cpu")
    assert all(torch.equal(again[key].read(), tensor.read()) for key, tensor in tensors.items())
    assert (logits_of(materialize(parts, torch.float32)) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_a_larger_vocabulary(tmp_path: Path, kind: str) -> None:
    """Tools save the embeddings whole when they have made room for new tokens."""
    make_model(kind, VOCAB).save_pretrained(tmp_path / "base")
    model = make_model(kind, VOCAB)
    model.resize_token_embeddings(VOCAB + 12)
    adapted = make_adapter(model, 1, target_modules=ALL)
    with torch.no_grad():
        model.get_input_embeddings().weight[VOCAB:].normal_(std=0.15)
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    parts = assemble(tmp_path / "base", torch.float32, None, [read_adapter(tmp_path / "adapter")], False)
    merged, _ = write_merged(parts, tmp_path / "merged")
    assert merged.config.vocab_size == VOCAB + 12
    ids = torch.arange(VOCAB - 20, VOCAB + 12)[None]
    with torch.no_grad():
        assert (merged(input_ids=ids).logits - adapted(input_ids=ids).logits).abs().max() < 1e-4


def test_several_adapters_are_summed_by_weight(tmp_path: Path) -> None:
    make_model("qwen2", VOCAB).save_pretrained(tmp_path / "base")
    base = load_file(tmp_path / "base/model.safetensors")
    changes = []
    for seed, settings in enumerate(({"target_modules": ALL}, {"target_modules": ["q_proj"], "use_rslora": True})):
        adapted = make_adapter(make_model("qwen2", VOCAB), seed, **settings)
        adapted.save_pretrained(tmp_path / f"adapter{seed}")
        alone = adapted.merge_and_unload().state_dict()
        changes.append({name: alone[name] - tensor for name, tensor in base.items()})
    adapters = [read_adapter(tmp_path / "adapter0", 0.3), read_adapter(tmp_path / "adapter1", -1.5)]
    parts = assemble(tmp_path / "base", torch.float32, None, adapters, False)
    merged, tensors = write_merged(parts, tmp_path / "merged")
    for name, tensor in base.items():
        expected = tensor + 0.3 * changes[0][name] - 1.5 * changes[1][name]
        assert (tensors[name].read() - expected).abs().max() < 1e-5, name
    with offloaded(parts, torch.float32, "cpu") as model:
        assert (logits_of(model) - logits_of(merged)).abs().max() < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_4_bit_weights_are_those_that_transformers_loads(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    make_model(kind, VOCAB).save_pretrained(tmp_path)
    parts = assemble(tmp_path, dtype, 4, [], False)
    loaded = load_model(tmp_path, dtype, 4).dequantize().state_dict()
    original = load_file(tmp_path / "model.safetensors")
    changed = 0
    for name, stored in parts.weights.items():
        assert torch.equal(stored.read(), loaded[name].to(dtype)), name
        changed += not torch.equal(stored.read(), original[name].to(dtype))
    assert changed == 14  # The seven linear layers of two blocks, not the head.


def test_a_base_whose_files_contradict_its_configuration(tmp_path: Path) -> None:
    """Tied by its configuration, but with a head of its own: transformers believes the files."""
    model = make_model("qwen2", VOCAB)
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    same = assemble(tmp_path, torch.float32, None, [], False)
    assert same.ties == {"lm_head.weight": "model.embed_tokens.weight"}
    save_file(state | {"lm_head.weight": state["model.embed_tokens.weight"].clone()}, tmp_path / "model.safetensors")
    assert assemble(tmp_path, torch.float32, None, [], False).ties == same.ties
    save_file(state | {"lm_head.weight": -state["model.embed_tokens.weight"]}, tmp_path / "model.safetensors")
    parts = assemble(tmp_path, torch.float32, None, [], False)
    expected = logits_of(load_model(tmp_path, torch.float32).eval())
    with offloaded(parts, torch.float32, "cpu") as streamed:
        assert (logits_of(streamed) - expected).abs().max() < 1e-5
    merged, _ = write_merged(parts, tmp_path / "merged")
    assert (logits_of(merged) - expected).abs().max() < 1e-5


@pytest.fixture
def base(tmp_path: Path) -> Path:
    make_model("llama", VOCAB).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def spoilt(base: Path, change: Callable[[Path], None], **settings: Any) -> str:
    """What is said of an adapter that is not whole, or does not go with its base."""
    folder = base.parent / "adapter"
    make_adapter(make_model("llama", VOCAB), 1, **({"target_modules": ALL} | settings)).save_pretrained(folder)
    change(folder)
    with pytest.raises((ValueError, OSError)) as error:
        assemble(base, torch.float32, None, [read_adapter(folder)], False)
    return str(error.value)


def rewrite(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / "adapter_model.safetensors")
        change(tensors)
        save_file(tensors, folder / "adapter_model.safetensors")

    return apply


def configure(**settings: Any) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | settings))

    return apply


KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def test_adapters_that_cannot_be_merged(base: Path) -> None:
    assert "has no" in spoilt(base, rewrite(lambda t: t.pop(KEY)))
    elsewhere = rewrite(lambda t: t.update({KEY.replace("0", "7"): t[KEY].clone()}))
    assert "no place in this model" in spoilt(base, elsewhere)
    assert "does not go with" in spoilt(base, rewrite(lambda t: t.update({KEY: t[KEY][:, :32].clone()})))
    assert "does not go with" in spoilt(base, configure(r=8))
    assert "not finite" in spoilt(base, rewrite(lambda t: t[KEY].fill_(float("nan"))))
    assert "changes the base" in spoilt(base, configure(init_lora_weights="pissa"))
    assert "only LoRA" in spoilt(base, configure(peft_type="LOHA"))
    assert "of the kind torch.int32" in spoilt(base, rewrite(lambda t: t.update({KEY: t[KEY].int()})))
    assert "does not go with" in spoilt(base, configure(target_modules="("))
    assert "that is not merged: alora_invocation_tokens" in spoilt(base, configure(alora_invocation_tokens=[1, 2]))
    # For layers without a bias; PEFT's own merge says no as well.
    biased = make_adapter(make_model("llama", VOCAB), 1, target_modules=["q_proj"], lora_bias=True)
    assert "biases (lora_bias)" in spoilt(base, lambda folder: biased.save_pretrained(folder))
    assert "that is not merged: layer_replication" in spoilt(base, configure(layer_replication=[[0, 2], [1, 2]]))
    assert "cannot be read" in spoilt(base, lambda folder: (folder / "adapter_config.json").write_text("{"))
    assert "no adapter_config.json" in spoilt(base, lambda folder: (folder / "adapter_config.json").unlink())
    assert "adapter_model.bin" in spoilt(base, lambda folder: (folder / "adapter_model.safetensors").unlink())


def test_a_layer_that_merges_to_something_else_is_noticed(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever PEFT's layers learn to do beside a sum, 16-bit weights would hide it."""
    from peft.tuners.lora.layer import Linear

    make_adapter(make_model("llama", VOCAB), 1, target_modules=["v_proj"]).save_pretrained(tmp_path / "adapter")
    parts = assemble(base, torch.bfloat16, None, [read_adapter(tmp_path / "adapter")], False)
    right = Linear.forward
    monkeypatch.setattr(Linear, "forward", lambda self, x: right(self, x) * 1.01)
    with pytest.raises(ValueError, match="merged, a layer says something else"):
        [stored.read() for stored in merged_weights(parts, torch.bfloat16, "cpu").values()]


def test_two_names_for_one_tensor(tmp_path: Path) -> None:
    """Which of them a library takes is its own affair."""
    make_model("llama", VOCAB).save_pretrained(tmp_path / "base")
    path = tmp_path / "base/model.safetensors"
    tensors = load_file(path)
    name = "model.layers.0.mlp.up_proj.weight"
    save_file(tensors | {name.removeprefix("model."): tensors[name] * 2}, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="which are one tensor"):
        assemble(tmp_path / "base", torch.float32, None, [], False)


def test_adapters_that_cannot_be_summed(base: Path, tmp_path: Path) -> None:
    """Neither with another one nor with a weight."""
    make_adapter(make_model("llama", VOCAB), 1, target_modules=ALL).save_pretrained(tmp_path / "plain")
    plain = read_adapter(tmp_path / "plain")
    for name, settings in {"dora": {"use_dora": True}, "saved": {"modules_to_save": ["lm_head"]}}.items():
        make_adapter(make_model("llama", VOCAB), 1, target_modules=["q_proj"], **settings).save_pretrained(
            tmp_path / name
        )
        other = read_adapter(tmp_path / name)
        for adapters in ([plain, other], [other._replace(weight=0.5)]):
            with pytest.raises(ValueError, match="plain LoRA"):
                assemble(base, torch.float32, None, adapters, False)
    with pytest.raises(ValueError, match="plain LoRA"):
        assemble(base, torch.float32, None, [plain._replace(weight=float("nan"))], False)


def test_experts_are_written_as_they_were(tmp_path: Path) -> None:
    """A layer's experts are tensors of their own in files, and one tensor in the model."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "qwen3_moe", vocab_size=VOCAB, hidden_size=64, intermediate_size=128, moe_intermediate_size=32,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16, num_experts=4,
        num_experts_per_tok=2, decoder_sparse_step=1, tie_word_embeddings=False,
    )  # fmt: skip

    def make() -> Any:
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config)

    make().save_pretrained(tmp_path / "base")
    base = load_file(tmp_path / "base/model.safetensors")
    assert "model.layers.0.mlp.experts.3.up_proj.weight" in base
    adapted = make_adapter(make(), 1, target_modules=["q_proj", "v_proj"])
    expected = logits_of(adapted)
    adapted.save_pretrained(tmp_path / "adapter")
    parts = assemble(tmp_path / "base", torch.float32, None, [read_adapter(tmp_path / "adapter")], False)
    with offloaded(parts, torch.float32, "cpu") as model:
        assert (logits_of(model) - expected).abs().max() < 1e-5
    merged, _ = write_merged(parts, tmp_path / "merged")
    assert (logits_of(merged) - expected).abs().max() < 1e-4
    written = load_file(tmp_path / "merged/model.safetensors")
    assert written.keys() == base.keys()
    assert all(torch.equal(written[name], base[name]) for name in base if "expert" in name)


def test_a_base_of_several_precisions_is_not_rounded(tmp_path: Path) -> None:
    """16-bit layers and norms in fp32, where nobody says that training rounded them."""
    make_model("llama", VOCAB).save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    mixed = {name: tensor + 1e-4 if "norm" in name else tensor.bfloat16() for name, tensor in state.items()}
    save_file(mixed, tmp_path / "model.safetensors")
    tensors = merged_weights(assemble(tmp_path, None, None, [], False), torch.float32, "cpu")
    assert all(torch.equal(tensors[name].read(), tensor.float()) for name, tensor in mixed.items())


def test_4_bit_layers_of_gpt2(tmp_path: Path) -> None:
    """They hold their weights the other way round, and are quantised turned."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model("gpt2", vocab_size=VOCAB, n_embd=64, n_layer=2, n_head=4, n_positions=64)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    parts = assemble(tmp_path, torch.float32, 4, [], False)
    loaded = load_model(tmp_path, torch.float32, 4).dequantize()
    name = "transformer.h.0.mlp.c_fc"
    assert torch.equal(parts.find(f"{name}.weight").read(), loaded.get_submodule(name).weight.T)


def test_an_adapter_saved_as_bin(base: Path, tmp_path: Path) -> None:
    """XTuner and older tools write adapter_model.bin."""
    adapted = make_adapter(make_model("llama", VOCAB), 1, target_modules=ALL)
    adapted.save_pretrained(tmp_path / "adapter")
    torch.save(load_file(tmp_path / "adapter/adapter_model.safetensors"), tmp_path / "adapter/adapter_model.bin")
    (tmp_path / "adapter/adapter_model.safetensors").unlink()
    parts = assemble(base, torch.float32, None, [read_adapter(tmp_path / "adapter")], False)
    with offloaded(parts, torch.float32, "cpu") as model:
        assert (logits_of(model) - logits_of(adapted)).abs().max() < 1e-5


def test_bases_that_are_not_what_their_configuration_says(base: Path) -> None:
    def refusal() -> str:
        with pytest.raises(ValueError) as error:
            assemble(base, torch.float32, None, [], False)
        return str(error.value)

    state, config = load_file(base / "model.safetensors"), json.loads((base / "config.json").read_text())
    norm = "model.layers.1.input_layernorm.weight"
    save_file(state | {"model.layers.1.extra.weight": state[norm].clone()}, base / "model.safetensors")
    assert "has no such tensor" in refusal()
    save_file({name: tensor for name, tensor in state.items() if name != norm}, base / "model.safetensors")
    assert f"{norm} is missing" in refusal()
    save_file(state | {norm: state[norm].int()}, base / "model.safetensors")
    assert f"{norm} holds numbers of the kind torch.int32" in refusal()
    save_file(state | {norm: state[norm][:32].clone()}, base / "model.safetensors")
    assert f"{norm} has the shape (32,), the configuration expects (64,)" in refusal()
    save_file(state | {norm: torch.full_like(state[norm], float("inf"))}, base / "model.safetensors")
    with pytest.raises(ValueError, match="not finite"):
        write_merged(assemble(base, torch.float32, None, [], False), base.parent / "infinite")
    save_file(state, base / "model.safetensors")
    (base / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    assert "stored quantised" in refusal()
    # Old files hold what positions are turned by, which is computed today.
    (base / "config.json").write_text(json.dumps(config))
    old = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    save_file(state | old, base / "model.safetensors")
    assert len(assemble(base, torch.float32, None, [], False).weights) == len(open_weights(base)) - 1


def test_the_image_part_of_a_model_is_written_back_untouched(tmp_path: Path, tokenizer: Any) -> None:
    """The text's part takes the adapter; the whole loads as it was published, with the settings of its images."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    size = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, head_dim=16)
    text = size | dict(
        num_key_value_heads=1, vocab_size=len(tokenizer), layer_types=["linear_attention", "full_attention"],
        linear_num_key_heads=1, linear_num_value_heads=2, linear_key_head_dim=16, linear_value_head_dim=16,
    )  # fmt: skip
    vision = dict(depth=1, hidden_size=32, intermediate_size=64, num_heads=2, out_hidden_size=32)
    config = AutoConfig.for_model("qwen3_5", text_config=text, vision_config=vision, image_token_id=5)
    base = tmp_path / "base"
    AutoModelForImageTextToText.from_config(config).save_pretrained(base)
    (base / "preprocessor_config.json").write_text('{"patch_size": 16}', encoding="utf-8")
    language = AutoModelForCausalLM.from_pretrained(base)
    make_adapter(language, 1, target_modules=["q_proj", "down_proj"]).save_pretrained(tmp_path / "adapter")
    trained = assemble(base, torch.float32, None, [Adapter(*read_adapter(tmp_path / "adapter"))], False)
    write_model(trained, base, make_chat(tokenizer), "fp32", "1GB", "cpu", tmp_path / "merged")
    before, after = load_file(base / "model.safetensors"), load_file(tmp_path / "merged/model.safetensors")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(".language_model." in name for name in changed)
    assert all(name.endswith(("q_proj.weight", "down_proj.weight")) for name in changed)
    whole, told = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert type(whole).__name__ == "Qwen3_5ForConditionalGeneration" and not any(map(len, told.values()))
    assert (tmp_path / "merged/preprocessor_config.json").is_file()
    logits = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(IDS).logits
    torch.testing.assert_close(logits, language(IDS).logits, rtol=1e-4, atol=1e-5)
