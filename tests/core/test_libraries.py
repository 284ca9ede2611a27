"""Models of libraries: complete and exact, or refused by name. Skipped if the library is missing."""

from __future__ import annotations

import logging
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradext

pytestmark = [pytest.mark.usefixtures("double_precision"), pytest.mark.medium, pytest.mark.filterwarnings("ignore")]
B, T, V = 4, 7, 61
TOLERANCE = 1e-6  # some models normalise in single precision, whatever their type


def transformers():
    logging.getLogger("transformers").setLevel(logging.ERROR)
    return pytest.importorskip("transformers")


def language_losses(output, labels: Tensor) -> Tensor:
    """Mean next-token cross entropy of each sequence; -100 is no token."""
    losses = F.cross_entropy(output.logits[:, :-1].mT, labels[:, 1:], reduction="none", ignore_index=-100)
    return losses.sum(1) / (labels[:, 1:] != -100).sum(1)


def prompted_losses(output, labels: Tensor) -> Tensor:
    """Of the tokens behind the prompt."""
    return F.cross_entropy(output.logits[:, -T:-1].mT, labels[:, 1:], reduction="none").sum(1)


def class_losses(output, labels: Tensor) -> Tensor:
    return F.cross_entropy(output.logits, labels, reduction="none")


def ids(b: int = B, t: int = T) -> Tensor:
    return torch.randint(3, V, (b, t))


SMALL = {"vocab_size": V, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


def encoder(name, b, t, **more):
    tf = transformers()
    options = {**SMALL, "max_position_embeddings": 32, "num_labels": 3, "pad_token_id": 0} | more
    model = getattr(tf, f"{name}ForSequenceClassification")(getattr(tf, f"{name}Config")(**options))
    return model, {"input_ids": ids(b, t)}, class_losses, torch.arange(b) % 3


def decoder(name, b, t, padded=False, **more):
    tf = transformers()
    model = getattr(tf, f"{name}ForCausalLM")(getattr(tf, f"{name}Config")(**({**SMALL, "pad_token_id": 0} | more)))
    tokens = ids(b, t)
    x = {"input_ids": tokens}
    if padded:
        mask = torch.arange(t) < torch.tensor([t, t - 2, t - 1, 2])[:b, None]
        x, tokens = {"input_ids": tokens * mask, "attention_mask": mask.long()}, tokens.masked_fill(~mask, -100)
    return model, x, language_losses, tokens


def gpt2(b, t):
    tf = transformers()
    model = tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=V, n_positions=32, n_embd=16, n_layer=2, n_head=2))
    tokens = ids(b, t)
    return model, {"input_ids": tokens}, language_losses, tokens


def t5(b, t):
    tf = transformers()
    model = tf.T5ForConditionalGeneration(
        tf.T5Config(vocab_size=V, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2)
    )
    tokens = ids(b, t)
    return model, {"input_ids": tokens, "decoder_input_ids": tokens.flip(1)}, language_losses, tokens


def pegasus(b, t):
    tf = transformers()
    config = tf.PegasusConfig(
        vocab_size=V, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=24,
        decoder_attention_heads=2, decoder_ffn_dim=24, max_position_embeddings=32,
    )  # fmt: skip
    tokens = ids(b, t)
    return (
        tf.PegasusForConditionalGeneration(config),
        {"input_ids": tokens, "decoder_input_ids": tokens},
        language_losses,
        tokens,
    )


def whisper(b, t):
    tf = transformers()
    config = tf.WhisperConfig(
        vocab_size=V, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=24,
        decoder_attention_heads=2, decoder_ffn_dim=24, max_source_positions=t, max_target_positions=16, num_mel_bins=8,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    tokens = ids(b, 4)
    x = {"input_features": torch.randn(b, 8, 2 * t), "decoder_input_ids": tokens}
    return tf.WhisperForConditionalGeneration(config), x, language_losses, tokens


def mamba(b, t):
    tf = transformers()
    model = tf.MambaForCausalLM(tf.MambaConfig(vocab_size=V, hidden_size=16, num_hidden_layers=2, state_size=4))
    tokens = ids(b, t)
    return model, {"input_ids": tokens}, language_losses, tokens


def mixtral(b, t):
    model, *rest = decoder("Mixtral", b, t, num_key_value_heads=1, num_local_experts=3, num_experts_per_tok=2)
    model.set_experts_implementation("eager")  # the grouped product takes no float64
    return model, *rest


def lora(name, **options):
    peft = pytest.importorskip("peft")
    model, x, loss, target = decoder("Llama", B, T, num_key_value_heads=1)
    config = {
        "lora": lambda: peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **options),
        "prompt": lambda: peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
        "ia3": lambda: peft.IA3Config(
            target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"
        ),
    }[name]()
    model = peft.get_peft_model(model, config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
    if name == "prompt":
        x["attention_mask"] = torch.ones_like(x["input_ids"])
        loss = prompted_losses
    return model, x, loss, target


def unet():
    smp = pytest.importorskip("segmentation_models_pytorch")
    model = smp.create_model("Unet", encoder_name="resnet18", encoder_weights=None, classes=1)
    return model, torch.randn(2, 3, 32, 32), lambda output, target: output.square().flatten(1).sum(1), torch.zeros(2)


def timm(name, **options):
    library = pytest.importorskip("timm")
    model = library.create_model(name, num_classes=3, **options)
    size = options.get("img_size", 32)
    return (
        model,
        torch.randn(B, 3, size, size),
        lambda o, y: F.cross_entropy(o, y, reduction="none"),
        torch.arange(B) % 3,
    )


MODELS = {
    **{
        f"{kind.__name__}, B={b}, T={t}": lambda kind=kind, b=b, t=t: kind(b, t)
        for kind in (gpt2, t5, pegasus, whisper)
        for b, t in ((4, 7), (4, 4), (4, 8))
    },
    **{
        f"Bert, B={b}, T={t}": lambda b=b, t=t: encoder("Bert", b, t)
        for b, t in ((4, 7), (4, 4), (4, 8), (1, 3))
    },
    "Llama, padded": lambda: decoder("Llama", B, T, padded=True, num_key_value_heads=1),
    "Llama, padded, eager": lambda: decoder("Llama", B, T, padded=True, attn_implementation="eager"),
    "Gemma, tied": lambda: decoder("Gemma", B, T, num_key_value_heads=1, head_dim=8),
    "Mamba": lambda: mamba(B, T),
    "Mamba, T = B": lambda: mamba(B, B),
    "Mixtral": lambda: mixtral(B, T),
    "Mixtral, T = B": lambda: mixtral(B, B),
    "DeBERTa": lambda: encoder("DebertaV2", B, T, relative_attention=True, pos_att_type=["p2c", "c2p"]),
    "LoRA": lambda: lora("lora"),
    "DoRA": lambda: lora("lora", use_dora=True),
    "prompts": lambda: lora("prompt"),
    "IA3": lambda: lora("ia3"),
    "SMP Unet": unet,
    "NFNet": lambda: timm("nf_resnet26"),
    "ViT": lambda: timm("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=16, depth=1, num_heads=2),
    "Swin V2": lambda: timm(
        "swinv2_tiny_window8_256", img_size=32, patch_size=4, window_size=4, embed_dim=8, depths=(1,), num_heads=(2,)
    ),
}  # fmt: skip


def made(name):
    torch.manual_seed(0)
    model, x, loss, target = MODELS[name]()
    x = {k: v.double() if v.is_floating_point() else v for k, v in x.items()} if isinstance(x, dict) else x.double()
    return model.double().eval(), x, loss, target


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_of_a_model(name, judge):
    def case():
        model, x, loss, target = made(name)
        return {"model": model, "x": x, "loss": loss, "target": target, "tolerance": TOLERANCE, "frozen": False}

    judge(case)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant, judge):
    def case():
        model, x, loss, target = decoder("Llama", B, T, num_key_value_heads=1)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        outcome = "right or refused" if reentrant else "right"
        return {"model": model.train(), "x": x, "loss": loss, "target": target, "outcome": outcome}

    transformers()
    judge(case)


def test_a_contrastive_loss_of_two_towers(judge):
    """CLIP's: to one tower alone the other's samples are constants; together they mix."""
    tf = transformers()

    def case():
        tower = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
        text = {**tower, "vocab_size": V, "max_position_embeddings": 8, "eos_token_id": V - 1, "bos_token_id": V - 2}
        vision = {**tower, "image_size": 16, "patch_size": 8}
        model = tf.CLIPModel(tf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).double().eval()
        tokens = ids(B, 5).clamp_max(V - 3)
        tokens[:, -1] = V - 1
        x = {"input_ids": tokens, "pixel_values": torch.randn(B, 3, 16, 16)}
        loss = lambda o, t: F.cross_entropy(o.logits_per_image, torch.arange(B), reduction="none")  # noqa: E731
        return {"model": model, "x": x, "loss": loss, "oracle": "batch", "frozen": False}

    names = {name for name, _ in case()["model"].named_parameters() if name.startswith("vis")}
    judge(lambda: {**case(), "names": names, "options": {"layers": ["vision_model", "visual_projection"]}})
    judge(lambda: {**case(), "options": {"mixing": "allow"}})
    judge(lambda: {**case(), "outcome": "refused"})


def test_a_quantised_weight_is_left_out_by_name(right):
    torchao = pytest.importorskip("torchao.quantization")
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3)), torch.randn(B, 64)
    torchao.quantize_(model[0], torchao.Int8WeightOnlyConfig())
    y = torch.tensor([0, 1, 2, 1])
    found = gradext.batch_layer_grads(model, x, loss="cross_entropy", target=y)
    assert set(found) == {"0.bias", "2.weight", "2.bias"} - (
        {"0.bias"} if "0.bias" in found.coverage.left_out else set()
    )
    assert "0.weight" in found.coverage.left_out
    losses = F.cross_entropy(model(x), y, reduction="none")
    for b in range(B):
        want = torch.autograd.grad(losses[b], model[2].weight, retain_graph=True)[0]
        right({"": found["2.weight"][b]}, {"": want}, 1e-5)
    with pytest.raises(gradext.UnsupportedLayerError, match=r"0\.weight"):
        gradext.batch_layer_grads(model, x, layers="0.weight")


def test_names_that_people_type():
    """Of LoRA's parameters: keys, patterns, parameters, predicates; a part of a name is answered."""
    torch.manual_seed(0)
    model, x, loss, target = lora("lora")
    model = model.double()
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    choices = {
        "keys": trainable,
        "a pattern": "*lora*",
        "modules": [name.removesuffix(".weight") for name in trainable],
        "a predicate": lambda name, p: "lora" in name,
        "parameters": [p for p in model.parameters() if p.requires_grad],
        "trainable": "trainable",
        "the default": None,
    }
    for what, choice in choices.items():
        found = gradext.batch_layer_factors(model, x, loss=loss, target=target, layers=choice)
        assert set(found) == set(trainable), what
    for wrong in ("lora_A", ["q_proj"]):
        with pytest.raises(ValueError, match=r"\*\."):
            gradext.batch_layer_factors(model, x, loss=loss, target=target, layers=wrong)


def test_the_coverage_of_gpt2_is_complete():
    """Its Conv1D holds half of its matrices; the norm of all parameters is that of plain torch."""
    model, x, loss, target = made("gpt2, B=4, T=7")
    factors = gradext.batch_layer_factors(model, x, loss=loss, target=target)
    assert set(factors) == {name for name, _ in model.named_parameters()}
    assert factors.coverage.left_out == {}
    assert not any("backward" in rule for rule in factors.coverage.rules.values())
    for b, norm in enumerate(factors.norm()):
        value = loss(model(input_ids=x["input_ids"][b : b + 1]), target[b : b + 1]).sum()
        grads = torch.autograd.grad(value, list(model.parameters()))
        torch.testing.assert_close(norm, sum(g.square().sum() for g in grads).sqrt())


@pytest.mark.parametrize("name", [*MODELS])
def test_no_model_needs_a_backward_a_sample(name):
    """Silence: nothing in these models is beyond the rules."""
    model, x, loss, target = made(name)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        factors = gradext.batch_layer_factors(model, x, loss=loss, target=target)
    slow = [key for key, rule in factors.coverage.rules.items() if "backward" in rule]
    assert not slow
