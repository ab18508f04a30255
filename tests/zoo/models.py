"""Which models to try: names, by library. What is done with them does not depend on the name."""

from __future__ import annotations

import json
from pathlib import Path

import torch

import tests.torchvision_stub  # noqa: F401

LARGEST = 100_000_000

# One tiny model of each; every kind of architecture the library has.
TRANSFORMERS = """
albert audio-spectrogram-transformer bamba bart beit bert big_bird bigbird_pegasus biogpt bit blenderbot blip bloom
bridgetower camembert canine clip clipseg cohere conditional_detr convbert convnext convnextv2 ctrl data2vec-audio
data2vec-vision deberta deberta-v2 deepseek_v3 deformable_detr deit detr dinov2 distilbert electra encodec ernie
falcon falcon_mamba flaubert flava fnet focalnet fsmt funnel gemma gemma2 git glpn gpt2 gpt_bigcode gpt_neox gpt_oss
gptj granite granitemoe groupvit hiera hubert ibert imagegpt jamba jetmoe layoutlm led levit lfm2 llama longformer
longt5 luke m2m_100 mamba mamba2 marian maskformer mbart megatron-bert minimax mistral mixtral mobilebert mobilenet_v1
mobilenet_v2 mobilevit mobilevitv2 modernbert moonshine mpnet mpt mt5 nllb-moe nystromformer olmo olmoe opt patchtsmixer
patchtst pegasus phi phi3 phimoe plbart poolformer prophetnet pvt pvt_v2 qwen2 qwen2_moe qwen3 qwen3_moe
recurrent_gemma regnet rembert resnet roberta roformer rwkv segformer sew sew-d siglip speech_to_text speecht5
squeezebert stablelm starcoder2 swiftformer swin swin2sr swinv2 switch_transformers t5 table-transformer timesformer
umt5 unispeech unispeech-sat videomae visual_bert vit vit_mae vit_msn vivit wav2vec2 wav2vec2-conformer wavlm whisper
xclip xglm xlm xlm-roberta xlnet yolos yoso
""".split()


def every(cache: Path) -> list[str]:
    """Specifications of all models to try.

    Args:
        cache: file that remembers which variant of each of timm's files is the smallest, which takes minutes to find.
    """
    return [*torchvision(), *timm(cache), *(f"hf:{name}" for name in TRANSFORMERS)]


def torchvision() -> list[str]:
    """All of torchvision's models below :data:`LARGEST` parameters that can be trained."""
    from torchvision.models import get_model_builder, get_model_weights, list_models

    found = []
    for name in list_models():
        # Quantized ones are for inference only.
        if get_model_builder(name).__module__.split(".")[2] == "quantization":
            continue
        if min(weights.meta["num_params"] for weights in get_model_weights(name)) < LARGEST:
            found.append(f"torchvision:{name}")
    return found


def timm(cache: Path) -> list[str]:
    """The smallest model of each of timm's files."""
    import timm

    if cache.exists():
        known = json.loads(cache.read_text())
        if known["version"] == timm.__version__:
            return [f"timm:{name}" for name in known["smallest"].values()]
    smallest = {}
    for file in timm.list_modules():
        counts = {}
        for name in timm.list_models(module=file):
            try:
                with torch.device("meta"):
                    model = timm.create_model(name)
            except (RuntimeError, NotImplementedError):  # reads values while it is made
                model = timm.create_model(name)
            counts[name] = sum(p.numel() for p in model.parameters())
        if counts:
            smallest[file] = min(counts, key=lambda name: counts[name])
    cache.parent.mkdir(parents=True, exist_ok=True)
    cache.write_text(json.dumps({"version": timm.__version__, "smallest": smallest}, indent=1) + "\n")
    return [f"timm:{name}" for name in smallest.values()]
