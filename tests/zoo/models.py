"""The zoo: tiny, randomly initialised configurations of real models, with inputs and a loss for each.

``MODELS`` maps a name to a `Case`. Nothing is downloaded. A library is imported when a model of it is built.
"""

import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

V = 101  # vocabulary


@dataclass(frozen=True)
class Case:
    """A model, its inputs and its loss.

    ``build()`` gives the model. ``data(B)`` gives inputs and target for B samples: in every tensor of both, row b is
    sample b. ``loss(output, target)`` gives the losses ``[B]``; a string is one of gradext's named losses.
    """

    build: Callable[[], nn.Module]
    data: Callable[[int], tuple[Any, Any]]
    loss: Callable[[Any, Any], Tensor] | str
    libraries: tuple[str, ...]
    dtype: torch.dtype = torch.float64
    checkpoint: bool = False  # transformers' gradient checkpointing, without reentrance
    refused: str = ""  # a part of the message of the error that is expected
    quick: bool = False


class Library:
    """A module that is imported when an attribute is first asked for."""

    def __init__(self, name: str):
        self.name = name

    def __getattr__(self, attribute: str):
        return getattr(importlib.import_module(self.name), attribute)


peft, timm, diffusers, smp = map(Library, ("peft", "timm", "diffusers", "segmentation_models_pytorch"))
transformers = Library("transformers")


# Losses: (output, target) -> [B]


def next_token(output, labels: Tensor) -> Tensor:
    """Mean cross entropy of each sequence's next tokens; a label of -100 is not counted."""
    T = labels.shape[1]  # prompts that peft puts in front have logits too
    return tokens_loss(output.logits[:, -T:-1], labels[:, 1:])


def tokens_loss(output, labels: Tensor) -> Tensor:
    """Mean cross entropy of each sequence's tokens; a label of -100 is not counted."""
    logits = getattr(output, "logits", output)
    losses = F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=-100, reduction="none")
    return losses.sum(1) / (labels != -100).sum(1)


def classes(output, labels: Tensor) -> Tensor:
    """Cross entropy of logits ``[B, C]`` or ``[B, C, H, W]``, summed over positions."""
    losses = F.cross_entropy(getattr(output, "logits", output), labels, reduction="none")
    return losses.flatten(1).sum(1) if losses.ndim > 1 else losses


def squares(output, target, key: str | int = 0) -> Tensor:
    """A weighted sum of squares of an output, so that each of its elements has another gradient."""
    value = output if isinstance(output, Tensor) else output[key]
    weights = torch.linspace(0.5, 1.5, math.prod(value.shape[1:])).to(value)
    return (weights * (value.flatten(1) + 0.1) ** 2).sum(1)


def of(key: str) -> Callable[[Any, Any], Tensor]:
    return partial(squares, key=key)


def pairs(output, target) -> Tensor:
    """Each image with its own text, scaled as CLIP does it."""
    return output.logits_per_image.diagonal()


def spans(output, target: Tensor) -> Tensor:
    """Extractive question answering: the cross entropies of a span's start and end."""
    start = F.cross_entropy(output.start_logits, target[:, 0], reduction="none")
    return start + F.cross_entropy(output.end_logits, target[:, 1], reduction="none")


# Inputs: B -> (x, target)


def text(T: int = 7, *, labels: str = "tokens", pad: str = "", index: bool = False, **more):
    """Token indices ``[B, T]``; ``pad`` names the side of the padding. ``index`` gives the bare tensor.

    ``more`` maps an input's name to a function of (generator, B, T).
    """

    def data(B: int):
        draw = torch.Generator().manual_seed(1)
        ids = torch.randint(3, V, (B, T), generator=draw)
        mask = torch.ones(B, T, dtype=torch.long)
        if pad:
            lengths = T - 2 * (torch.arange(B) % (T // 2))
            mask = (torch.arange(T) < lengths[:, None]).long()
            mask = mask.flip(1) if pad == "left" else mask
        ids = ids * mask
        x = {"input_ids": ids} | ({"attention_mask": mask} if pad else {})
        x |= {name: make(draw, B, T) for name, make in more.items()}
        target = {
            "tokens": lambda: ids.masked_fill(mask == 0, -100),
            "decoder": lambda: x["decoder_input_ids"].roll(-1, 1),
            "classes": lambda: torch.arange(B) % 3,
            "spans": lambda: torch.stack([torch.arange(B) % T, (torch.arange(B) + 2) % T], 1),
        }[labels]()
        return (ids if index else x), target

    return data


def integers(high: int, *shape: int, low: int = 0):
    """Integers ``[B, T]``, or ``[B, *shape]``."""
    return lambda draw, B, T: torch.randint(low, high, (B, *(shape or (T,))), generator=draw)


def single(high: int):
    """One integer a sample."""
    return lambda draw, B, T: torch.randint(high, (B,), generator=draw)


def floats(*shape: int):
    return lambda draw, B, T: torch.randn(B, *shape, generator=draw)


def boxes(draw, B: int, T: int) -> Tensor:
    corner = torch.randint(0, 8, (B, T, 2), generator=draw)
    return torch.cat([corner, corner + torch.randint(1, 8, (B, T, 2), generator=draw)], 2)


def sequences(T: int = 5, S: int = 6, *, pad: str = "", **more):
    """Token indices for an encoder ``[B, S]`` and a decoder ``[B, T]``, whose next tokens are the target."""
    return text(S, labels="decoder", pad=pad, decoder_input_ids=integers(V, T, low=3), **more)


def inputs(high: int = 3, **shapes):
    """Inputs by name, each a function of (generator, B, T); the target is a class below ``high``."""

    def data(B: int):
        draw = torch.Generator().manual_seed(1)
        return {name: make(draw, B, 7) for name, make in shapes.items()}, torch.arange(B) % high

    return data


def images(size: int = 32, channels: int = 3, name: str | None = "pixel_values", **more):
    """Images ``[B, channels, size, size]`` by name, or as a bare tensor; the target is a class."""

    def data(B: int):
        x, target = inputs(**{name or "x": floats(channels, size, size)}, **more)(B)
        return (x if name else x["x"]), target

    return data


def maps(size: int = 32):
    """Images ``[B, 3, size, size]`` and a class a pixel."""

    def data(B: int):
        draw = torch.Generator().manual_seed(1)
        return torch.randn(B, 3, size, size, generator=draw), torch.randint(0, 3, (B, size, size), generator=draw)

    return data


def speech(decoder: int = 5, **more):
    """Spectrograms by name, and a decoder's tokens, whose next tokens are the target."""

    def data(B: int):
        x, _ = inputs(**more, decoder_input_ids=integers(V, decoder, low=3))(B)
        return x, x["decoder_input_ids"].roll(-1, 1)

    return data


def pictured(patches: int):
    """Text that begins with as many image tokens, and images of 32 × 32 pixels."""

    def data(B: int):
        x, target = text(patches + 6, pixel_values=floats(3, 32, 32))(B)
        x["input_ids"] = x["input_ids"].clamp(max=V - 2)
        x["input_ids"][:, :patches] = V - 1
        return x, target

    return data


# Builders


def hf(name: str, base: dict[str, Any], **options):
    """transformers' class of that name, configured by ``base`` and ``options``."""

    def build():
        kind = getattr(transformers, name)
        return kind(kind.config_class(**{**base, **options}))

    return build


def tuned(build: Callable[[], nn.Module], config: str, **options):
    """That model with peft's adapter."""
    return lambda: peft.get_peft_model(build(), getattr(peft, config)(**options))


def nystrom(name: str, base: dict[str, Any], **options):
    """A Nyströmformer whose pseudo-inverse begins from each sample's own matrix."""

    def build():
        model = hf(name, base, **options)()
        for module in model.modules():
            if hasattr(module, "init_option"):
                module.init_option = "exact"
        return model

    return build


DECODER = dict(
    vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
EXPERTS = dict(
    DECODER, num_experts=4, num_local_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
    experts_implementation="eager",  # the default is for fp32 and bf16 alone
)  # fmt: skip
GPT = dict(vocab_size=V, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2)
XLNET = dict(vocab_size=V, d_model=32, n_layer=2, n_head=4, d_inner=48, pad_token_id=0)
ENCODER = dict(
    vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    max_position_embeddings=64, pad_token_id=0, num_labels=3,
)  # fmt: skip
BART = dict(
    vocab_size=V, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4,
    encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    decoder_start_token_id=2, forced_eos_token_id=None,
)  # fmt: skip
T5 = dict(
    vocab_size=V, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, pad_token_id=0, decoder_start_token_id=0
)
VIT = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=8,
    num_labels=3,
)  # fmt: skip
SWIN = dict(image_size=32, patch_size=2, embed_dim=16, depths=[1, 1], num_heads=[2, 4], window_size=4, num_labels=3)
STAGES = dict(hidden_sizes=[16, 24], depths=[1, 1], num_stages=2, num_labels=3)
SEGFORMER = dict(
    depths=[1, 1], hidden_sizes=[16, 24], num_attention_heads=[1, 2], num_encoder_blocks=2, sr_ratios=[4, 2],
    strides=[4, 2], patch_sizes=[7, 3], mlp_ratios=[2, 2], num_labels=3,
)  # fmt: skip
CLIP_TEXT = dict(ENCODER, bos_token_id=1, eos_token_id=2, projection_dim=16, projection_size=32)
CLIP = dict(text_config=CLIP_TEXT, vision_config=VIT, projection_dim=16)
WAV = dict(
    vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_labels=3,
    conv_dim=(16, 16), conv_kernel=(5, 3), conv_stride=(4, 2), num_feat_extract_layers=2, num_conv_pos_embeddings=4,
    num_conv_pos_embedding_groups=2, classifier_proj_size=16, apply_spec_augment=False,
)  # fmt: skip
LORA = dict(r=4, lora_alpha=8)

gpt2 = hf("GPT2LMHeadModel", GPT)
llama = hf("LlamaForCausalLM", DECODER)
bert = hf("BertForSequenceClassification", ENCODER)
vit = hf("ViTForImageClassification", VIT)
t5 = hf("T5ForConditionalGeneration", T5)
sentence = text(labels="classes")

MODELS: dict[str, Case] = {}
QUICK = {
    "GPT-2", "Llama", "Gemma 2", "Mixtral", "BERT", "DeBERTa-v2", "T5", "ViT", "Llama, LoRA", "BERT, LoRA", "Mamba",
    "diffusers UNet2D",
}  # fmt: skip


def zoo(libraries: str, loss: Callable | str, models: dict[str, tuple]) -> None:
    for name, (build, data, *options) in models.items():
        MODELS[name] = Case(build, data, loss, tuple(libraries.split()), quick=name in QUICK, **dict(*options))


zoo("transformers", next_token, {
    "GPT-2": (gpt2, text()),
    "GPT-2, padded": (gpt2, text(pad="right")),
    "GPT-2, padded left": (gpt2, text(pad="left")),
    "GPT-2, eager": (hf("GPT2LMHeadModel", GPT, attn_implementation="eager"), text(pad="right")),
    "GPT-2, T = B": (gpt2, text(4)),
    "GPT-2, T = 2 B": (gpt2, text(8)),
    "GPT-2, checkpointed": (hf("GPT2LMHeadModel", GPT), text(), dict(checkpoint=True)),
    "GPT-2, bf16": (gpt2, text(), dict(dtype=torch.bfloat16)),
    "GPT-BigCode": (hf("GPTBigCodeForCausalLM", GPT), text()),
    "GPT-Neo": (
        hf("GPTNeoForCausalLM", DECODER, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]]),
        text(),
    ),
    "GPT-J": (hf("GPTJForCausalLM", GPT, rotary_dim=4), text()),
    "GPT-NeoX": (hf("GPTNeoXForCausalLM", DECODER), text()),
    "OpenAI GPT": (hf("OpenAIGPTLMHeadModel", GPT), text()),
    "OPT": (hf("OPTForCausalLM", DECODER, ffn_dim=48, word_embed_proj_dim=16), text()),
    "OPT, padded left": (hf("OPTForCausalLM", DECODER, ffn_dim=48, word_embed_proj_dim=32), text(pad="left")),
    "BLOOM": (hf("BloomForCausalLM", DECODER, n_layer=2, n_head=4), text()),
    "BLOOM, padded": (hf("BloomForCausalLM", DECODER, n_layer=2, n_head=4), text(pad="right")),
    "Llama": (llama, text()),
    "Llama, padded left": (llama, text(pad="left")),
    "Llama, eager": (hf("LlamaForCausalLM", DECODER, attn_implementation="eager"), text(pad="right")),
    "Llama, T = B": (llama, text(4)),
    "Llama, T = 2 B": (llama, text(8)),
    "Llama, checkpointed": (hf("LlamaForCausalLM", DECODER), text(), dict(checkpoint=True)),
    "Llama, bf16": (llama, text(), dict(dtype=torch.bfloat16)),
    "Llama 4": (hf("Llama4ForCausalLM", EXPERTS, head_dim=8, intermediate_size_mlp=48), text()),
    "Mistral, sliding window": (hf("MistralForCausalLM", DECODER, sliding_window=3), text()),
    "Qwen 2": (hf("Qwen2ForCausalLM", DECODER), text()),
    "Qwen 3": (hf("Qwen3ForCausalLM", DECODER, head_dim=8), text()),
    "Gemma": (hf("GemmaForCausalLM", DECODER, head_dim=8), text()),
    "Gemma 2": (hf("Gemma2ForCausalLM", DECODER, head_dim=8, sliding_window=3), text()),
    "Gemma 3": (hf("Gemma3ForCausalLM", DECODER, head_dim=8, sliding_window=3), text()),
    "Phi": (hf("PhiForCausalLM", DECODER), text()),
    "Phi 3": (hf("Phi3ForCausalLM", DECODER), text()),
    "Falcon": (hf("FalconForCausalLM", DECODER), text()),
    "Falcon, ALiBi": (hf("FalconForCausalLM", DECODER, alibi=True, new_decoder_architecture=True), text(pad="right")),
    "MPT": (hf("MptForCausalLM", DECODER, d_model=32, n_heads=4, n_layers=2, max_seq_len=64), text()),
    "StableLM": (hf("StableLmForCausalLM", DECODER, qk_layernorm=True), text()),
    "Cohere": (hf("CohereForCausalLM", DECODER, use_qk_norm=True), text()),
    "Cohere 2": (hf("Cohere2ForCausalLM", DECODER), text()),
    "OLMo": (hf("OlmoForCausalLM", DECODER), text()),
    "OLMo 2": (hf("Olmo2ForCausalLM", DECODER), text()),
    "Granite": (hf("GraniteForCausalLM", DECODER), text()),
    "StarCoder 2": (hf("Starcoder2ForCausalLM", DECODER), text()),
    "Nemotron": (hf("NemotronForCausalLM", DECODER, head_dim=8), text()),
    "Persimmon": (hf("PersimmonForCausalLM", DECODER), text()),
    "SmolLM 3": (hf("SmolLM3ForCausalLM", DECODER), text()),
    "GLM": (hf("GlmForCausalLM", DECODER, head_dim=8), text()),
    "Helium": (hf("HeliumForCausalLM", DECODER, head_dim=8), text()),
    "DiffLlama": (hf("DiffLlamaForCausalLM", DECODER), text()),
    "MiniCPM 3": (
        hf("MiniCPM3ForCausalLM", DECODER, num_key_value_heads=4, q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8,
           qk_rope_head_dim=8,
           v_head_dim=8),
        text(),
    ),
    "XGLM": (
        hf("XGLMForCausalLM", DECODER, d_model=32, ffn_dim=48, num_layers=2, attention_heads=4),
        text(),
        dict(dtype=torch.float32),  # its attention knows no fp64
    ),
    "CodeGen": (hf("CodeGenForCausalLM", GPT, rotary_dim=4, n_ctx=64), text()),
    "CTRL": (hf("CTRLLMHeadModel", GPT, dff=48), text()),
    "BioGPT": (hf("BioGptForCausalLM", DECODER), text()),
    "XLNet": (hf("XLNetLMHeadModel", XLNET), text()),
    "Mamba": (hf("MambaForCausalLM", DECODER, state_size=4), text()),
    "Mamba 2": (
        hf("Mamba2ForCausalLM", DECODER, state_size=4, num_heads=8, head_dim=8, n_groups=2, chunk_size=4), text()
    ),
    "FalconMamba": (hf("FalconMambaForCausalLM", DECODER, state_size=4), text()),
    "RWKV": (hf("RwkvForCausalLM", DECODER, use_cache=False, attention_hidden_size=32), text()),
    "RecurrentGemma": (hf("RecurrentGemmaForCausalLM", DECODER, lru_width=32, num_hidden_layers=3), text()),
    "Jamba": (
        hf("JambaForCausalLM", EXPERTS, num_hidden_layers=2, attn_layer_period=2, attn_layer_offset=1, mamba_d_state=4,
           use_mamba_kernels=False),
        text(),
    ),
    "LFM 2": (hf("Lfm2ForCausalLM", DECODER, layer_types=["conv", "full_attention"]), text()),
    "Mixtral": (hf("MixtralForCausalLM", EXPERTS), text()),
    "Mixtral, batched experts": (hf("MixtralForCausalLM", EXPERTS, experts_implementation="batched_mm"), text()),
    "Mixtral, grouped experts": (
        hf("MixtralForCausalLM", EXPERTS, experts_implementation="grouped_mm"), text(), dict(dtype=torch.float32)
    ),
    "Mixtral, padded": (hf("MixtralForCausalLM", EXPERTS), text(pad="right")),
    "Qwen 2 MoE": (hf("Qwen2MoeForCausalLM", EXPERTS, shared_expert_intermediate_size=24), text()),
    "Qwen 3 MoE": (hf("Qwen3MoeForCausalLM", EXPERTS, head_dim=8), text()),
    "OLMoE": (hf("OlmoeForCausalLM", EXPERTS), text()),
    "PhiMoE": (hf("PhimoeForCausalLM", EXPERTS), text()),
    "Granite MoE": (hf("GraniteMoeForCausalLM", EXPERTS), text()),
    "GPT-OSS": (hf("GptOssForCausalLM", EXPERTS, head_dim=8, sliding_window=3), text()),
    "DeepSeek V2": (
        hf("DeepseekV2ForCausalLM", EXPERTS, num_key_value_heads=4, n_routed_experts=4, n_group=1, topk_group=1,
           first_k_dense_replace=1,
           q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8),
        text(),
    ),
    "DeepSeek V3": (
        hf("DeepseekV3ForCausalLM", EXPERTS, num_key_value_heads=4, n_routed_experts=4, n_group=2, topk_group=1,
           first_k_dense_replace=1,
           q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8),
        text(),
    ),
    "Bamba": (
        hf("BambaForCausalLM", DECODER, mamba_n_heads=8, mamba_d_head=8, mamba_d_state=4, mamba_n_groups=2,
           mamba_chunk_size=4, attn_layer_indices=[1]),
        text(),
    ),
    "Qwen 3 Next": (
        hf("Qwen3NextForCausalLM", EXPERTS, head_dim=8, linear_num_key_heads=2, linear_num_value_heads=4,
           linear_key_head_dim=8, linear_value_head_dim=8, shared_expert_intermediate_size=24,
           layer_types=["linear_attention", "full_attention"]),
        text(),
    ),
    "LLaVA": (
        hf("LlavaForConditionalGeneration", dict(text_config={**DECODER, "model_type": "llama"},
           vision_config={**VIT, "model_type": "clip_vision_model"}, image_token_index=V - 1)),
        pictured(16),
    ),
})  # fmt: skip

zoo("transformers", "cross_entropy", {
    "BERT": (bert, text(labels="classes", pad="right", token_type_ids=integers(2))),
    "BERT, eager": (hf("BertForSequenceClassification", ENCODER, attn_implementation="eager"), sentence),
    "BERT, T = B": (bert, text(4, labels="classes")),
    "BERT, T = 2 B": (bert, text(8, labels="classes")),
    "BERT, checkpointed": (hf("BertForSequenceClassification", ENCODER), sentence, dict(checkpoint=True)),
    "BERT, bf16": (bert, sentence, dict(dtype=torch.bfloat16)),
    "RoBERTa": (hf("RobertaForSequenceClassification", ENCODER), text(labels="classes", pad="right")),
    "RemBERT": (hf("RemBertForSequenceClassification", ENCODER, input_embedding_size=16), sentence),
    "ALBERT": (hf("AlbertForSequenceClassification", ENCODER, embedding_size=16), text(labels="classes", pad="right")),
    "DistilBERT": (
        hf("DistilBertForSequenceClassification", ENCODER, dim=32, hidden_dim=48, n_layers=2, n_heads=4),
        text(labels="classes", pad="right"),
    ),
    "ELECTRA": (hf("ElectraForSequenceClassification", ENCODER, embedding_size=16), sentence),
    "DeBERTa": (
        hf("DebertaForSequenceClassification", ENCODER, relative_attention=True, pos_att_type=["p2c", "c2p"],
           max_relative_positions=16, position_biased_input=False),
        text(labels="classes", pad="right"),
    ),
    "DeBERTa-v2": (
        hf("DebertaV2ForSequenceClassification", ENCODER, relative_attention=True, pos_att_type=["p2c", "c2p"],
           position_buckets=8, max_relative_positions=16, norm_rel_ebd="layer_norm", share_att_key=True,
           position_biased_input=False),
        text(labels="classes", pad="right"),
    ),
    "MPNet": (hf("MPNetForSequenceClassification", ENCODER), sentence),
    "SqueezeBERT": (
        hf("SqueezeBertForSequenceClassification", ENCODER, embedding_size=32, q_groups=2, k_groups=2, v_groups=2,
           post_attention_groups=1, intermediate_groups=2, output_groups=2),
        sentence,
    ),
    "ConvBERT": (hf("ConvBertForSequenceClassification", ENCODER, embedding_size=16, conv_kernel_size=3), sentence),
    "FNet": (hf("FNetForSequenceClassification", ENCODER), sentence),
    # Its default initialisation of the pseudo-inverse takes a maximum over the batch: samples mix.
    "Nyströmformer": (
        nystrom("NystromformerForSequenceClassification", ENCODER, num_landmarks=4, segment_means_seq_len=8,
           conv_kernel_size=3),
        text(8, labels="classes"),
    ),
    "BigBird": (
        hf("BigBirdForSequenceClassification", ENCODER, block_size=2, num_random_blocks=1),
        text(24, labels="classes"),
    ),
    "BigBird, full": (hf("BigBirdForSequenceClassification", ENCODER, attention_type="original_full"), sentence),
    "Longformer": (
        hf("LongformerForSequenceClassification", ENCODER, attention_window=4), text(8, labels="classes")
    ),
    "Funnel": (
        hf("FunnelForSequenceClassification", dict(vocab_size=V, num_labels=3, pad_token_id=0), block_sizes=[1, 1],
           d_model=32, n_head=4, d_head=8, d_inner=48,
           num_decoder_layers=1),
        text(8, labels="classes"),
    ),
    "LayoutLM": (
        hf("LayoutLMForSequenceClassification", ENCODER, max_2d_position_embeddings=32),
        text(labels="classes", bbox=boxes),
    ),
    "LayoutLM v3": (
        hf("LayoutLMv3ForSequenceClassification", ENCODER, max_2d_position_embeddings=32, coordinate_size=4,
           shape_size=8, input_size=16, patch_size=8),
        text(labels="classes", bbox=boxes, pixel_values=floats(3, 16, 16)),
    ),
    "LiLT": (
        hf("LiltForSequenceClassification", ENCODER, hidden_size=48, channel_shrink_ratio=2,
           max_2d_position_embeddings=32),
        text(labels="classes", bbox=boxes),
    ),
    "ModernBERT": (
        hf("ModernBertForSequenceClassification", DECODER, num_labels=3, local_attention=4), text(labels="classes",
           pad="right")
    ),
    "NomicBERT": (hf("NomicBertForSequenceClassification", ENCODER), sentence),
    "RoFormer": (hf("RoFormerForSequenceClassification", ENCODER, embedding_size=16), sentence),
    "I-BERT": (hf("IBertForSequenceClassification", ENCODER), sentence),
    "Megatron-BERT": (hf("MegatronBertForSequenceClassification", ENCODER), sentence),
    "ESM": (hf("EsmForSequenceClassification", ENCODER, position_embedding_type="rotary"), sentence),
    "XLM": (hf("XLMForSequenceClassification", ENCODER, n_words=V, emb_dim=32, n_layers=2, n_heads=4), sentence),
    "Perceiver": (
        hf("PerceiverForSequenceClassification", ENCODER, num_latents=4, d_latents=16, d_model=32, num_blocks=1,
           num_self_attends_per_block=1, num_self_attention_heads=2, num_cross_attention_heads=2),
        lambda B: ({"inputs": sentence(B)[0]["input_ids"]}, sentence(B)[1]),
    ),
    "MobileBERT": (
        hf("MobileBertForSequenceClassification", ENCODER, embedding_size=16, intra_bottleneck_size=16,
           num_feedforward_networks=2, true_hidden_size=16),
        sentence,
    ),
    "GPT-2, classifier": (
        hf("GPT2ForSequenceClassification", GPT, num_labels=3, pad_token_id=0),
        text(labels="classes", pad="right"),
    ),
    "Llama, classifier": (
        hf("LlamaForSequenceClassification", DECODER, num_labels=3),
        text(labels="classes", pad="right"),
    ),
})  # fmt: skip

zoo("transformers", tokens_loss, {
    "BERT, masked LM": (hf("BertForMaskedLM", ENCODER), text(pad="right")),
    "RoBERTa, masked LM": (hf("RobertaForMaskedLM", ENCODER), text()),
    "ModernBERT, masked LM": (hf("ModernBertForMaskedLM", DECODER, local_attention=4), text()),
    "DeBERTa-v2, tokens": (
        hf("DebertaV2ForTokenClassification", ENCODER, num_labels=V, relative_attention=True), text(pad="right")
    ),
    "T5": (t5, sequences(pad="right")),
    "T5, T = B": (t5, sequences(4, 4)),
    "T5, T = 2 B": (t5, sequences(8, 8)),
    "T5 1.1": (
        hf("T5ForConditionalGeneration", T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False),
        sequences(),
    ),
    "LongT5": (hf("LongT5ForConditionalGeneration", T5, local_radius=2), sequences(5, 8)),
    "UMT5": (hf("UMT5ForConditionalGeneration", T5), sequences()),
    "Switch Transformers": (
        hf("SwitchTransformersForConditionalGeneration", T5, num_experts=3, num_sparse_encoder_layers=1,
           num_sparse_decoder_layers=1, num_decoder_layers=2, expert_capacity=64),
        sequences(),
    ),
    "BART": (hf("BartForConditionalGeneration", BART), sequences(pad="right")),
    "BART, T = 2 B": (hf("BartForConditionalGeneration", BART), sequences(8, 8)),
    "mBART": (hf("MBartForConditionalGeneration", BART), sequences()),
    "M2M-100": (hf("M2M100ForConditionalGeneration", BART), sequences()),
    "NLLB-MoE": (
        hf("NllbMoeForConditionalGeneration", BART, num_experts=3, encoder_sparse_step=1, decoder_sparse_step=1,
           expert_capacity=64, moe_eval_capacity_token_fraction=-1.0),
        sequences(),
    ),
    "Pegasus": (hf("PegasusForConditionalGeneration", BART), sequences()),
    "Pegasus-X": (
        hf("PegasusXForConditionalGeneration", BART, block_size=4, num_global_tokens=2), sequences(5, 8)
    ),
    "BigBird-Pegasus": (
        hf("BigBirdPegasusForConditionalGeneration", BART, attention_type="original_full"),
        sequences(),
    ),
    "Marian": (hf("MarianMTModel", BART), sequences()),
    "Blenderbot": (hf("BlenderbotForConditionalGeneration", BART), sequences()),
    "Blenderbot small": (hf("BlenderbotSmallForConditionalGeneration", BART), sequences()),
    "PLBart": (hf("PLBartForConditionalGeneration", BART), sequences()),
    "LED": (
        hf("LEDForConditionalGeneration", BART, attention_window=4, max_encoder_position_embeddings=64,
           max_decoder_position_embeddings=64),
        sequences(5, 8),
    ),
    "ProphetNet": (
        hf("ProphetNetForConditionalGeneration", dict(vocab_size=V, pad_token_id=0, encoder_ffn_dim=48,
           decoder_ffn_dim=48,
           max_position_embeddings=64), hidden_size=32, num_encoder_layers=1, num_decoder_layers=1,
           num_encoder_attention_heads=4, num_decoder_attention_heads=4, ngram=2, num_buckets=8,
              relative_max_distance=16),
        sequences(),
    ),
    "Whisper": (
        hf("WhisperForConditionalGeneration", BART, num_mel_bins=8, max_source_positions=8, max_target_positions=16),
        speech(input_features=floats(8, 16)),
    ),
    "Whisper, T = B": (
        hf("WhisperForConditionalGeneration", BART, num_mel_bins=8, max_source_positions=8, max_target_positions=16),
        speech(4, input_features=floats(8, 16)),
    ),
    "Moonshine": (
        hf("MoonshineForConditionalGeneration", DECODER, encoder_num_hidden_layers=1, decoder_num_hidden_layers=1,
           encoder_num_attention_heads=4, decoder_num_attention_heads=4, encoder_num_key_value_heads=4,
           decoder_num_key_value_heads=4),
        speech(input_values=floats(1200)),
    ),
    "Speech2Text": (
        hf("Speech2TextForConditionalGeneration", BART, input_feat_per_channel=8, input_channels=1, conv_channels=16,
           max_source_positions=64, max_target_positions=16),
        speech(input_features=floats(16, 8)),
    ),
    "Wav2Vec2, characters": (
        hf("Wav2Vec2ForCTC", WAV),
        lambda B: ({"input_values": speech(19, input_values=floats(160))(B)[0]["input_values"]}, text(19)(B)[1]),
    ),
    "TrOCR": (
        hf("TrOCRForCausalLM", DECODER, d_model=32, decoder_layers=1, decoder_attention_heads=4, decoder_ffn_dim=48),
        text(),
    ),
})  # fmt: skip

zoo("transformers", spans, {
    "BERT, spans": (
        hf("BertForQuestionAnswering", ENCODER, num_labels=2),
        text(labels="spans", token_type_ids=integers(2)),
    ),
    "XLNet, spans": (
        hf("XLNetForQuestionAnsweringSimple", XLNET),
        text(labels="spans"),
    ),
    "Splinter": (hf("SplinterForQuestionAnswering", ENCODER), text(labels="spans")),
})  # fmt: skip

zoo("transformers", "cross_entropy", {
    "ViT": (vit, images()),
    "ViT, eager": (hf("ViTForImageClassification", VIT, attn_implementation="eager"), images()),
    "ViT, checkpointed": (hf("ViTForImageClassification", VIT), images(), dict(checkpoint=True)),
    "ViT, bf16": (vit, images(), dict(dtype=torch.bfloat16)),
    "DeiT": (hf("DeiTForImageClassificationWithTeacher", VIT), images()),
    "BEiT": (
        hf("BeitForImageClassification", VIT, use_relative_position_bias=True, layer_scale_init_value=0.1,
           use_absolute_position_embeddings=True),
        images(),
    ),
    "Data2Vec vision": (
        hf("Data2VecVisionForImageClassification", VIT, use_shared_relative_position_bias=True),
        images(),
    ),
    "ViT-MSN": (hf("ViTMSNForImageClassification", VIT), images()),
    "DINOv2": (hf("Dinov2ForImageClassification", VIT, mlp_ratio=2), images()),
    "DINOv2, registers": (
        hf("Dinov2WithRegistersForImageClassification", VIT, mlp_ratio=2, use_swiglu_ffn=True),
        images(),
    ),
    "Swin": (hf("SwinForImageClassification", SWIN), images()),
    "Swin v2": (hf("Swinv2ForImageClassification", SWIN), images()),
    "ConvNeXT": (hf("ConvNextForImageClassification", STAGES, patch_size=4), images()),
    "ConvNeXT v2": (hf("ConvNextV2ForImageClassification", STAGES, patch_size=4), images()),
    "ResNet": (hf("ResNetForImageClassification", STAGES, embedding_size=8), images()),
    "ResNet, bottleneck": (
        hf("ResNetForImageClassification", STAGES, embedding_size=8, layer_type="bottleneck", hidden_sizes=[16, 32]),
           images()
    ),
    "RegNet": (hf("RegNetForImageClassification", STAGES, embedding_size=8, groups_width=4), images()),
    "BiT": (hf("BitForImageClassification", STAGES, embedding_size=8, num_groups=4), images()),
    "MobileNet v1": (hf("MobileNetV1ForImageClassification", dict(depth_multiplier=0.25, num_labels=3)), images()),
    "MobileNet v2": (hf("MobileNetV2ForImageClassification", dict(depth_multiplier=0.25, num_labels=3)), images()),
    "EfficientNet": (
        hf("EfficientNetForImageClassification", dict(image_size=32, out_channels=[8, 16], kernel_sizes=[3, 5],
           in_channels=[32, 8], strides=[1, 2], num_block_repeats=[1, 1], expand_ratios=[1, 6], depthwise_padding=[],
           width_coefficient=1.0, depth_coefficient=1.0, hidden_dim=1280, num_labels=3)),
        images(),
    ),
    "MobileViT": (
        hf("MobileViTForImageClassification", dict(image_size=64, hidden_sizes=[16, 16, 16],
           neck_hidden_sizes=[8, 8, 8, 16, 16, 16, 32], num_attention_heads=2, num_labels=3, expand_ratio=2.0)),
        images(64),
    ),
    "PoolFormer": (
        hf("PoolFormerForImageClassification", dict(hidden_sizes=[8, 12, 16, 24], depths=[1, 1, 1, 1], num_labels=3)),
        images(64),
    ),
    "SegFormer": (
        hf("SegformerForImageClassification", SEGFORMER),
        images(),
    ),
    "CvT": (
        hf("CvtForImageClassification", dict(embed_dim=[8, 16], depth=[1, 2], num_heads=[1, 2], cls_token=[False,
           True], num_labels=3)),
        images(64),
    ),
    "PVT": (
        hf("PvtForImageClassification", dict(image_size=64, depths=[1, 1, 1, 1], hidden_sizes=[8, 8, 16, 16],
           num_attention_heads=[1, 1, 2, 2], mlp_ratios=[2, 2, 2, 2], num_labels=3)),
        images(64),
    ),
    "LeViT": (
        hf("LevitForImageClassification", dict(image_size=64, hidden_sizes=[16, 24, 32], num_attention_heads=[2, 2, 2],
           depths=[1, 1, 1], key_dim=[4, 4, 4], num_labels=3)),
        images(64),
    ),
    "FocalNet": (
        hf("FocalNetForImageClassification", dict(image_size=32, embed_dim=16, depths=[1, 1], hidden_sizes=[16, 32],
           focal_levels=[2, 2], focal_windows=[3, 3], use_layerscale=True, num_labels=3)),
        images(),
    ),
    "SwiftFormer": (
        hf("SwiftFormerForImageClassification", dict(depths=[1, 1, 1, 1], embed_dims=[8, 12, 16, 24], num_labels=3)),
        images(64),
    ),
    "ImageGPT": (
        hf("ImageGPTForImageClassification", GPT, vocab_size=V, num_labels=3), sentence
    ),
    "ViViT": (
        hf("VivitForVideoClassification", VIT, num_frames=4, tubelet_size=[2, 8, 8]),
        inputs(pixel_values=floats(4, 3, 32, 32)),
    ),
    "VideoMAE": (
        hf("VideoMAEForVideoClassification", VIT, num_frames=4, tubelet_size=2), inputs(pixel_values=floats(4, 3, 32,
           32))
    ),
    "TimeSformer": (
        hf("TimesformerForVideoClassification", VIT, num_frames=2),
        inputs(pixel_values=floats(2, 3, 32, 32)),
    ),
    "SigLIP, classifier": (hf("SiglipForImageClassification", dict(vision_config=VIT, num_labels=3)), images()),
    "Wav2Vec2": (hf("Wav2Vec2ForSequenceClassification", WAV), inputs(input_values=floats(160))),
    "Wav2Vec2, layer norm": (
        hf("Wav2Vec2ForSequenceClassification", WAV, feat_extract_norm="layer", do_stable_layer_norm=True,
           use_weighted_layer_sum=True),
        inputs(input_values=floats(160)),
    ),
    "HuBERT": (hf("HubertForSequenceClassification", WAV), inputs(input_values=floats(160))),
    "WavLM": (
        hf("WavLMForSequenceClassification", WAV, num_buckets=8, max_bucket_distance=16),
        inputs(input_values=floats(160)),
    ),
    "SEW": (hf("SEWForSequenceClassification", WAV, squeeze_factor=2), inputs(input_values=floats(160))),
    "AST": (
        hf("ASTForAudioClassification", VIT, patch_size=4, num_mel_bins=8, max_length=12, frequency_stride=4,
           time_stride=4),
        inputs(input_values=floats(12, 8)),
    ),
    "ViLT": (hf("ViltForImagesAndTextClassification", {**VIT, **ENCODER}, num_images=1, modality_type_vocab_size=3),
        text(labels="classes", pixel_values=floats(1, 3, 32, 32))),
})  # fmt: skip

zoo("transformers", squares, {
    "CLIP, text tower": (hf("CLIPTextModelWithProjection", CLIP_TEXT), text(pad="right")),
    "CLIP, vision tower": (hf("CLIPVisionModelWithProjection", VIT, projection_dim=16), images()),
    "MobileViT v2": (
        hf("MobileViTV2Model", dict(image_size=64, width_multiplier=0.25, base_attn_unit_dims=[8, 12, 16],
           n_attn_blocks=[1, 1, 1])),
        images(64),
    ),
    "DPT": (
        hf("DPTForDepthEstimation", VIT, num_hidden_layers=4, backbone_out_indices=[0, 1, 2, 3], neck_hidden_sizes=[8,
           8, 8, 8],
           fusion_hidden_size=8, is_hybrid=False),
        images(),
    ),
    "YOLOS": (hf("YolosForObjectDetection", VIT, image_size=[32, 32], num_detection_tokens=4), images()),
    "Time series transformer": (
        hf("PatchTSTForPrediction", dict(num_input_channels=2, context_length=16, patch_length=4, patch_stride=4,
           d_model=16, num_attention_heads=2, ffn_dim=24, num_hidden_layers=1, prediction_length=4, loss="mse",
           scaling="mean")),
        inputs(past_values=floats(16, 2)),
    ),
})  # fmt: skip

zoo("transformers", of("logits"), {
    "ViT-MAE": (
        hf("ViTMAEForPreTraining", VIT, decoder_hidden_size=16, decoder_num_hidden_layers=1,
           decoder_num_attention_heads=2, decoder_intermediate_size=24),
        images(noise=floats(16)),
    ),
    "CLIPSeg": (
        hf("CLIPSegForImageSegmentation", CLIP, reduce_dim=16, extract_layers=[0, 1], decoder_num_attention_heads=2,
           decoder_intermediate_size=24, conditional_layer=0),
        text(pad="right", pixel_values=floats(3, 32, 32)),
    ),
})  # fmt: skip

zoo("transformers", of("pooler_output"), {
    "SigLIP, text tower": (hf("SiglipTextModel", CLIP_TEXT), text()),
    "SigLIP, vision tower": (hf("SiglipVisionModel", VIT), images()),
})  # fmt: skip

zoo("transformers", pairs, {
    "CLIP, own pairs": (hf("CLIPModel", CLIP), text(pad="right", pixel_values=floats(3, 32, 32))),
    "SigLIP, own pairs": (hf("SiglipModel", CLIP), text(pixel_values=floats(3, 32, 32))),
})  # fmt: skip

zoo("transformers", classes, {
    "SegFormer, segmentation": (
        hf("SegformerForSemanticSegmentation", SEGFORMER, decoder_hidden_size=16),
        lambda B: ({"pixel_values": maps(32)(B)[0]}, maps(32)(B)[1][:, ::4, ::4]),
    ),
    "UPerNet": (
        hf("UperNetForSemanticSegmentation", dict(hidden_size=16, num_labels=3, use_auxiliary_head=False),
           backbone_config=dict(
            STAGES, model_type="convnext", hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], num_stages=4,
            out_features=["stage1", "stage2", "stage3", "stage4"])),
        lambda B: ({"pixel_values": maps(32)(B)[0]}, maps(32)(B)[1]),
    ),
})  # fmt: skip

zoo("transformers peft", next_token, {
    "GPT-2, LoRA": (tuned(gpt2, "LoraConfig", **LORA), text()),
    "GPT-2, LoRA on all, biases": (
        tuned(gpt2, "LoraConfig", **LORA, target_modules=["c_attn", "c_proj", "c_fc"], bias="all"), text()
    ),
    "GPT-2, prompt tuning": (tuned(gpt2, "PromptTuningConfig", num_virtual_tokens=3, task_type="CAUSAL_LM"), text()),
    "Llama, LoRA": (tuned(llama, "LoraConfig", **LORA, target_modules="all-linear"), text(pad="right")),
    "Llama, LoRA, T = B": (tuned(llama, "LoraConfig", **LORA), text(4)),
    "Llama, LoRA, embeddings": (
        tuned(llama, "LoraConfig", **LORA, target_modules=["embed_tokens", "q_proj"], modules_to_save=["lm_head"]),
        text(),
    ),
    "Llama, rsLoRA": (tuned(llama, "LoraConfig", **LORA, use_rslora=True), text()),
    "Llama, DoRA": (tuned(llama, "LoraConfig", **LORA, use_dora=True), text()),
    "Llama, IA3": (tuned(llama, "IA3Config"), text()),
    "Llama, AdaLoRA": (tuned(llama, "AdaLoraConfig", init_r=4, target_r=2, total_step=10), text()),
    "Llama, LoHa": (tuned(llama, "LoHaConfig", r=4, alpha=8, target_modules=["q_proj", "v_proj"]), text()),
    "Llama, LoKr": (tuned(llama, "LoKrConfig", r=4, alpha=8, target_modules=["q_proj", "v_proj"]), text()),
    "Llama, OFT": (tuned(llama, "OFTConfig", r=4, oft_block_size=0, target_modules=["q_proj", "v_proj"]), text()),
    "Llama, BOFT": (tuned(llama, "BOFTConfig", boft_block_size=4, target_modules=["q_proj", "v_proj"]), text()),
    "Llama, VeRA": (tuned(llama, "VeraConfig", r=4, target_modules=["q_proj", "o_proj"]), text()),
    "Llama, layer norm tuning": (tuned(llama, "LNTuningConfig"), text()),
    "Llama, adaption prompt": (
        tuned(llama, "AdaptionPromptConfig", adapter_len=3, adapter_layers=1, task_type="CAUSAL_LM"), text()
    ),
    "Llama, prefix tuning": (tuned(llama, "PrefixTuningConfig", num_virtual_tokens=3, task_type="CAUSAL_LM"), text()),
    "Llama, p-tuning": (
        tuned(llama, "PromptEncoderConfig", num_virtual_tokens=3, encoder_hidden_size=16, task_type="CAUSAL_LM"), text()
    ),
    "Mixtral, LoRA on experts": (
        tuned(hf("MixtralForCausalLM", EXPERTS), "LoraConfig", **LORA, target_modules=["q_proj"],
              target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]),
        text(),
    ),
})  # fmt: skip

zoo("transformers peft", tokens_loss, {
    "T5, LoRA": (tuned(t5, "LoraConfig", **LORA, task_type="SEQ_2_SEQ_LM"), sequences(pad="right")),
    "T5, IA3": (tuned(t5, "IA3Config", task_type="SEQ_2_SEQ_LM"), sequences()),
})  # fmt: skip

zoo("transformers peft", "cross_entropy", {
    "BERT, LoRA": (tuned(bert, "LoraConfig", **LORA, task_type="SEQ_CLS"), text(labels="classes", pad="right")),
    "BERT, DoRA": (tuned(bert, "LoraConfig", **LORA, use_dora=True, task_type="SEQ_CLS"), sentence),
    "BERT, prompt tuning": (
        tuned(bert, "PromptTuningConfig", num_virtual_tokens=3, task_type="SEQ_CLS"), text(labels="classes",
           pad="right")
    ),
    "ViT, LoRA": (
        tuned(vit, "LoraConfig", **LORA, target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"]), images()
    ),
    "ConvNeXT, LoRA": (
        tuned(hf("ConvNextForImageClassification", STAGES), "LoraConfig", **LORA, target_modules=["pwconv1",
           "downsampling_layer.1"]),
        images(),
    ),
})  # fmt: skip

zoo("diffusers", squares, {
    "diffusers UNet2D": (
        lambda: diffusers.UNet2DModel(
            sample_size=8, in_channels=2, out_channels=2, block_out_channels=(8, 16), layers_per_block=1,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            norm_num_groups=4, attention_head_dim=8),
        inputs(sample=floats(2, 8, 8), timestep=single(100)),
    ),
    "diffusers UNet2D, conditional": (
        lambda: diffusers.UNet2DConditionModel(
            sample_size=8, in_channels=2, out_channels=2, block_out_channels=(8, 16), layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D",
               "UpBlock2D"),
            norm_num_groups=4, attention_head_dim=4, cross_attention_dim=12),
        inputs(sample=floats(2, 8, 8), timestep=single(100), encoder_hidden_states=floats(5, 12)),
    ),
    "diffusers UNet1D": (
        lambda: diffusers.UNet1DModel(
            sample_size=16, in_channels=2, out_channels=2, block_out_channels=(32, 32), layers_per_block=1,
            down_block_types=("DownBlock1DNoSkip", "DownBlock1D"), up_block_types=("UpBlock1D", "UpBlock1DNoSkip"),
            mid_block_type="UNetMidBlock1D", extra_in_channels=64, norm_num_groups=4),
        inputs(sample=floats(2, 16), timestep=single(100)),
    ),
    "diffusers DiT": (
        lambda: diffusers.DiTTransformer2DModel(
            num_attention_heads=2, attention_head_dim=8, in_channels=2, out_channels=2, num_layers=2, sample_size=8,
            patch_size=2, num_embeds_ada_norm=10, norm_num_groups=2),
        inputs(hidden_states=floats(2, 8, 8), timestep=single(100), class_labels=single(10)),
    ),
    "diffusers PixArt": (
        lambda: diffusers.PixArtTransformer2DModel(
            num_attention_heads=2, attention_head_dim=8, in_channels=2, out_channels=2, num_layers=2, sample_size=8,
            patch_size=2, cross_attention_dim=16, caption_channels=12, norm_num_groups=2,
            use_additional_conditions=False),
        inputs(hidden_states=floats(2, 8, 8), timestep=single(100), encoder_hidden_states=floats(5, 12)),
    ),
    "diffusers SD3": (
        lambda: diffusers.SD3Transformer2DModel(
            sample_size=8, patch_size=2, in_channels=2, num_layers=2, attention_head_dim=8, num_attention_heads=2,
            joint_attention_dim=12, caption_projection_dim=16, pooled_projection_dim=10, out_channels=2,
            pos_embed_max_size=8),
        inputs(hidden_states=floats(2, 8, 8), timestep=single(100), encoder_hidden_states=floats(5, 12),
               pooled_projections=floats(10)),
    ),
    "diffusers transformer 2D": (
        lambda: diffusers.Transformer2DModel(
            num_attention_heads=2, attention_head_dim=8, in_channels=4, num_layers=1, cross_attention_dim=12,
            norm_num_groups=2),
        inputs(hidden_states=floats(4, 6, 6), encoder_hidden_states=floats(5, 12)),
    ),
    "diffusers prior": (
        lambda: diffusers.PriorTransformer(num_attention_heads=2, attention_head_dim=8, num_layers=1, embedding_dim=12,
            num_embeddings=5, additional_embeddings=4),
        inputs(hidden_states=floats(12), timestep=single(100), proj_embedding=floats(12),
               encoder_hidden_states=floats(5, 12)),
    ),
    "diffusers VAE": (
        lambda: diffusers.AutoencoderKL(
            in_channels=2, out_channels=2, down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2, block_out_channels=(8, 16), latent_channels=2, norm_num_groups=4,
            sample_size=8),
        inputs(sample=floats(2, 8, 8)),
    ),
    "diffusers VQ": (
        lambda: diffusers.VQModel(
            in_channels=2, out_channels=2, down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2, block_out_channels=(8, 16), latent_channels=2, norm_num_groups=4,
            sample_size=8, num_vq_embeddings=12),
        inputs(sample=floats(2, 8, 8)),
    ),
})  # fmt: skip


def tiny(name: str, **options):
    """timm's model of that name, made small by ``options``."""
    return lambda: timm.create_model(name, pretrained=False, num_classes=3, **options)


MIXER = dict(num_classes=3, img_size=32, patch_size=8, embed_dim=32, num_blocks=2)
PATCHES = dict(img_size=32, patch_size=8, embed_dim=32, depth=2)

zoo("timm", "cross_entropy", {
    "timm ViT": (tiny("vit_tiny_patch16_224", **PATCHES, num_heads=4), images(name=None)),
    "timm ViT, layer scale, registers": (
        tiny("vit_tiny_patch16_224", **PATCHES, num_heads=4, init_values=0.1, reg_tokens=2, qk_norm=True),
           images(name=None)
    ),
    "timm DeiT, distilled": (tiny("deit_tiny_distilled_patch16_224", **PATCHES, num_heads=4), images(name=None)),
    "timm BEiT": (tiny("beit_base_patch16_224", **PATCHES, num_heads=4), images(name=None)),
    "timm BEiT v2": (tiny("beitv2_base_patch16_224", **PATCHES, num_heads=4), images(name=None)),
    "timm EVA-02": (tiny("eva02_tiny_patch14_224", **PATCHES, num_heads=4), images(name=None)),
    "timm CaiT": (tiny("cait_xxs24_224", **PATCHES, num_heads=4), images(name=None)),
    "timm XCiT": (tiny("xcit_nano_12_p16_224", **PATCHES, num_heads=4), images(name=None)),
    "timm MLP-Mixer": (lambda: timm.models.mlp_mixer.MlpMixer(**MIXER), images(name=None)),
    "timm gMLP": (
        lambda: timm.models.mlp_mixer.MlpMixer(**MIXER, block_layer=timm.models.mlp_mixer.SpatialGatingBlock,
           mlp_layer=timm.layers.GatedMlp, mlp_ratio=2),
        images(name=None),
    ),
    "timm ResMLP": (
        lambda: timm.models.mlp_mixer.MlpMixer(**MIXER, mlp_ratio=2, block_layer=timm.models.mlp_mixer.ResBlock,
           norm_layer=timm.models.mlp_mixer.Affine),
        images(name=None),
    ),
    "timm NFNet": (
        tiny("dm_nfnet_f0", channels=(8, 8, 16, 16), depths=(1, 1, 1, 1), stem_chs=8, group_size=4, num_features=16),
        images(name=None),
    ),
    "timm EfficientNet": (tiny("tinynet_e"), images(name=None)),
    "timm MobileNet v3": (tiny("mobilenetv3_small_050"), images(name=None)),
    "timm ConvNeXt": (tiny("convnext_atto", depths=(1, 1, 1, 1), dims=(8, 8, 16, 16)), images(name=None)),
    "timm ConvNeXt v2": (tiny("convnextv2_atto", depths=(1, 1, 1, 1), dims=(8, 8, 16, 16)), images(name=None)),
    "timm Swin": (
        tiny("swin_tiny_patch4_window7_224", img_size=32, patch_size=2, embed_dim=16, depths=(2, 2), num_heads=(2, 4),
           window_size=4),
        images(name=None),
    ),
    "timm Swin v2": (
        tiny("swinv2_tiny_window8_256", img_size=32, patch_size=2, embed_dim=16, depths=(2, 2), num_heads=(2, 4),
           window_size=4),
        images(name=None),
    ),
    "timm MaxViT": (
        tiny("maxvit_tiny_rw_224", img_size=64, embed_dim=(32, 32), depths=(1, 1), stem_width=(8, 16)), images(64,
           name=None)
    ),
    "timm CoAtNet": (
        tiny("coatnet_nano_rw_224", img_size=64, embed_dim=(16, 32, 32, 32), depths=(1, 1, 1, 1), stem_width=(8, 16)),
        images(64, name=None),
    ),
    "timm LeViT": (
        tiny("levit_128s", img_size=64, embed_dim=(16, 24, 32), num_heads=(2, 2, 2), key_dim=4, depth=(1, 1, 1)),
        images(64, name=None),
    ),
    "timm ResNetV2, BiT": (lambda: timm.models.resnetv2.ResNetV2(
        (1, 1), (32, 64), num_classes=3, stem_chs=32, stem_type="fixed", conv_layer=timm.layers.StdConv2d,
        norm_layer=partial(timm.layers.GroupNormAct, num_groups=4)), images(name=None)),
    "timm ResNet": (tiny("resnet10t", channels=(8, 16, 16, 16)), images(name=None)),
    "timm RegNet": (tiny("regnety_002"), images(name=None)),
    "timm VOLO": (
        lambda: timm.models.volo.VOLO(num_classes=3, img_size=32, layers=(1, 1), embed_dims=(16, 32), num_heads=(2,
           2), downsamples=(True, False),
             outlook_attention=(True, False), mlp_ratio=2.0, stem_hidden_dim=8),
        images(name=None),
    ),
    "timm PiT": (
        tiny("pit_ti_224", img_size=32, patch_size=8, stride=4, base_dims=(8, 8, 8), depth=(1, 1, 1), heads=(1, 2, 2)),
        images(name=None),
    ),
    "timm CrossViT": (
        tiny("crossvit_tiny_240", img_size=48, img_scale=(1.0, 1.0), embed_dim=(16, 24), depth=((1, 1, 0),),
           num_heads=(2, 2)),
        images(48, name=None),
    ),
    "timm ConViT": (tiny("convit_tiny", **PATCHES, num_heads=4, local_up_to_layer=1), images(name=None)),
    "timm EdgeNeXt": (
        tiny("edgenext_xx_small", dims=(8, 16, 16, 16), depths=(1, 1, 2, 2), heads=(2, 2, 2, 2)),
        images(name=None),
    ),
    "timm GhostNet": (tiny("ghostnet_050"), images(name=None)),
    "timm GCViT": (
        lambda: timm.models.gcvit.GlobalContextVit(num_classes=3, img_size=64, embed_dim=8, depths=(1, 1, 1, 1),
           num_heads=(1, 2, 2, 2), window_ratio=(16, 16, 16, 32)),
        images(64, name=None),
    ),
})  # fmt: skip

MOBILENET = dict(encoder_name="timm-mobilenetv3_small_minimal_100", encoder_weights=None, classes=3)

zoo("segmentation_models_pytorch", classes, {
    "smp U-Net": (lambda: smp.Unet(**MOBILENET, decoder_channels=(16, 16, 8, 8, 8)), maps()),
    "smp U-Net++": (lambda: smp.UnetPlusPlus(**MOBILENET, encoder_depth=3, decoder_channels=(16, 8, 8)), maps()),
    "smp FPN": (lambda: smp.FPN(**MOBILENET, decoder_pyramid_channels=32, decoder_segmentation_channels=32), maps(64)),
    "smp Linknet": (lambda: smp.Linknet(**MOBILENET, encoder_depth=3), maps()),
    "smp SegFormer": (lambda: smp.Segformer(**MOBILENET, decoder_segmentation_channels=16), maps()),
})  # fmt: skip
