"""One small member of each classifier family of torchvision and timm, and what Torch-Pruning can prune of it.

Everything here is data: weights are random and seeded, inputs are as small as each family allows, and the layers
to leave alone are named by patterns. timm is imported only where one of its models is built.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

import torch
from torch import nn

N_CLASSES = 7  # of no other layer's width, so that a head is told by it


@dataclass(frozen=True)
class Architecture:
    """A family's smallest member, the side of its input, and how Torch-Pruning 1.6.1 is to treat it."""

    name: str
    library: str
    build: Callable[[], nn.Module]  # random weights, always the same
    size: int  # side of the square input
    ignored: tuple[str, ...] = ()  # fnmatch patterns of modules to leave alone, since the rest cannot be reached else
    cause: str = ""  # why they have to be
    unprunable: str | None = None  # why Torch-Pruning cannot prune the family at all, whatever is left alone

    @property
    def key(self) -> str:
        """Library and name."""
        return f"{self.library}:{self.name}"

    def ignored_layers(self, model: nn.Module) -> list[nn.Module]:
        """The modules of the model that the patterns name."""
        return [m for n, m in model.named_modules() if n and any(fnmatch(n, p) for p in self.ignored)]


ENDLESS = "Torch-Pruning's group building does not come to an end"
ZERO = "Torch-Pruning divides by zero: it takes every 5-d expand for grouped-query attention"
SLOW = "Torch-Pruning needs minutes to build the group"


def _seeded(build: Callable[..., nn.Module], *args: Any, **options: Any) -> Callable[[], nn.Module]:
    """A builder of the same model every time; torch's global generator is left as it was."""

    def seeded() -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return build(*args, **options)

    return seeded


def _from_torchvision(model: str, **options: Any) -> nn.Module:
    from torchvision import models

    return models.get_model(model, weights=None, num_classes=N_CLASSES, **options)


def _from_timm(model: str, **options: Any) -> nn.Module:
    import timm

    return timm.create_model(model, pretrained=False, num_classes=N_CLASSES, **options)


def _from_timm_class(module: str, name: str, **options: Any) -> nn.Module:
    """For families whose registered models fix their own depths."""
    from importlib import import_module

    return getattr(import_module(f"timm.models.{module}"), name)(num_classes=N_CLASSES, **options)


def _shallow(build: Callable[..., nn.Module], *args: Any, **options: Any) -> nn.Module:
    """A model in which a block that repeats the one before it is left out: every kind of block stays, at its width."""
    net = build(*args, **options)
    for stage in [m for m in net.modules() if isinstance(m, nn.Sequential)]:
        # Stochastic depth is the one thing that differs from block to block.
        blocks = [re.sub(r"\((stochastic_depth|drop_path\d?)\).*", "", repr(block)) for block in stage]
        for i in reversed(range(1, len(stage))):
            if blocks[i] == blocks[i - 1] and any(True for _ in stage[i].parameters()):
                del stage[i]
    return net


def _densenet() -> nn.Module:
    from torchvision.models import DenseNet

    return DenseNet(32, (2, 2, 2, 2), 64, num_classes=N_CLASSES)


def _inception() -> nn.Module:
    """An Inception v3 without blocks of the same kind as the one before."""
    net = _from_torchvision("inception_v3", aux_logits=False, init_weights=False)
    for name in ("Mixed_5d", "Mixed_6c", "Mixed_6d", "Mixed_6e", "Mixed_7c"):
        setattr(net, name, nn.Identity())
    return net


def _narrow(model: str) -> nn.Module:
    """An AlexNet or VGG whose hidden linear layers have 64 units instead of 4096."""
    net = _from_torchvision(model)
    for name, layer in list(net.classifier.named_children()):
        if isinstance(layer, nn.Linear):
            hidden = layer.in_features == layer.out_features or layer.out_features == N_CLASSES
            outputs = N_CLASSES if layer.out_features == N_CLASSES else 64
            net.classifier[int(name)] = nn.Linear(64 if hidden else layer.in_features, outputs)
    return net


def _wide_resnet() -> nn.Module:
    from torchvision.models.resnet import Bottleneck, ResNet

    return ResNet(Bottleneck, [1, 1, 1, 1], num_classes=N_CLASSES, width_per_group=128)


def _swin(block: str, merging: str) -> nn.Module:
    from torchvision.models import swin_transformer as swin

    return swin.SwinTransformer(
        patch_size=[4, 4],
        embed_dim=48,
        depths=[2, 2],
        num_heads=[3, 6],
        window_size=[4, 4],
        num_classes=N_CLASSES,
        block=getattr(swin, block),
        downsample_layer=getattr(swin, merging),
    )


def _vit() -> nn.Module:
    from torchvision.models import VisionTransformer

    return VisionTransformer(32, 8, num_layers=2, num_heads=4, hidden_dim=64, mlp_dim=128, num_classes=N_CLASSES)


def _maxvit() -> nn.Module:
    from torchvision.models import MaxVit

    return MaxVit((64, 64), 32, 4, [32, 64], [1, 1], head_dim=16, stochastic_depth_prob=0.0, num_classes=N_CLASSES)


def _mixer(block: str = "MixerBlock", **layers: Any) -> nn.Module:
    from timm.models import mlp_mixer

    options = {k: getattr(mlp_mixer, v) if isinstance(v, str) else v for k, v in layers.items()}
    return mlp_mixer.MlpMixer(
        img_size=64,
        patch_size=16,
        num_blocks=2,
        embed_dim=64,
        block_layer=getattr(mlp_mixer, block),
        num_classes=N_CLASSES,
        **{"mlp_ratio": 4 if block == "ResBlock" else (0.5, 4.0), **options},
    )


def _mvitv2() -> nn.Module:
    from timm.models.mvitv2 import MultiScaleVit, MultiScaleVitCfg

    return MultiScaleVit(MultiScaleVitCfg(depths=(1, 1, 1, 1), embed_dim=48), img_size=64, num_classes=N_CLASSES)


ARCHITECTURES = [
    Architecture("alexnet", "torchvision", _seeded(_narrow, "alexnet"), 64),
    Architecture("convnext", "torchvision", _seeded(_shallow, _from_torchvision, "convnext_tiny"), 32),
    Architecture("densenet", "torchvision", _seeded(_densenet), 32),
    Architecture("efficientnet", "torchvision", _seeded(_shallow, _from_torchvision, "efficientnet_b0"), 32),
    Architecture("efficientnet_v2", "torchvision", _seeded(_shallow, _from_torchvision, "efficientnet_v2_s"), 32),
    Architecture(
        "googlenet", "torchvision", _seeded(_from_torchvision, "googlenet", aux_logits=False, init_weights=False), 32
    ),
    Architecture("inception", "torchvision", _seeded(_inception), 75),
    Architecture(
        "maxvit",
        "torchvision",
        _seeded(_maxvit),
        64,
        ("classifier.5", "stem.*", "blocks.*.MBconv.*", "*.to_qkv", "*.merge", "*.attn_layer.0"),
        ENDLESS,
    ),
    Architecture("mnasnet", "torchvision", _seeded(_shallow, _from_torchvision, "mnasnet0_5"), 32),
    Architecture("mobilenet_v2", "torchvision", _seeded(_shallow, _from_torchvision, "mobilenet_v2"), 32),
    Architecture("mobilenet_v3", "torchvision", _seeded(_shallow, _from_torchvision, "mobilenet_v3_small"), 32),
    Architecture("regnet_x", "torchvision", _seeded(_shallow, _from_torchvision, "regnet_x_400mf"), 32),
    Architecture("regnet_y", "torchvision", _seeded(_shallow, _from_torchvision, "regnet_y_400mf"), 32),
    Architecture("resnet", "torchvision", _seeded(_from_torchvision, "resnet18"), 32),
    Architecture("resnext", "torchvision", _seeded(_shallow, _from_torchvision, "resnext50_32x4d"), 32),
    Architecture("wide_resnet", "torchvision", _seeded(_wide_resnet), 32),
    Architecture(
        "shufflenet_v2",
        "torchvision",
        _seeded(_from_torchvision, "shufflenet_v2_x0_5"),
        32,
        unprunable="tracing divides by 0 in update_reshape_index_mapping (5-d view of the channel shuffle)",
    ),
    Architecture("squeezenet", "torchvision", _seeded(_from_torchvision, "squeezenet1_1"), 32),
    Architecture(
        "swin",
        "torchvision",
        _seeded(_swin, "SwinTransformerBlock", "PatchMerging"),
        32,
        ("head", "features.0.0", "*.reduction", "*.mlp.3"),
        ENDLESS,
    ),
    Architecture(
        "swin_v2",
        "torchvision",
        _seeded(_swin, "SwinTransformerBlockV2", "PatchMergingV2"),
        32,
        ("head", "features.0.0", "*.reduction", "*.mlp.3", "*.cpb_mlp.*"),
        ENDLESS,
    ),
    Architecture("vgg", "torchvision", _seeded(_narrow, "vgg11"), 32),
    Architecture("vgg_bn", "torchvision", _seeded(_narrow, "vgg11_bn"), 32),
    Architecture("vit", "torchvision", _seeded(_vit), 32),
    Architecture("resnet", "timm", _seeded(_from_timm, "resnet10t"), 32),
    Architecture("resnetv2", "timm", _seeded(_from_timm, "resnetv2_18"), 32),
    Architecture("resnetv2_bit", "timm", _seeded(_from_timm, "resnetv2_50x1_bit"), 32),
    Architecture("resnest", "timm", _seeded(_from_timm, "resnest14d"), 32, ("fc", "*.conv2.*"), SLOW),
    Architecture("res2net", "timm", _seeded(_from_timm, "res2net50_14w_8s", layers=[1, 1, 1, 1]), 32),
    Architecture("regnet", "timm", _seeded(_from_timm, "regnetx_002"), 32),
    Architecture("regnetz", "timm", _seeded(_from_timm, "regnetz_b16"), 32),
    Architecture("densenet", "timm", _seeded(_from_timm, "densenet121", block_config=(2, 2, 2, 2)), 32),
    Architecture("dla", "timm", _seeded(_from_timm, "dla46_c"), 32),
    Architecture("dpn", "timm", _seeded(_from_timm, "dpn48b"), 32),
    Architecture("ese_vovnet", "timm", _seeded(_from_timm, "ese_vovnet19b_slim_dw"), 32),
    Architecture("hrnet", "timm", _seeded(_from_timm, "hrnet_w18_small"), 32),
    Architecture("ghostnet", "timm", _seeded(_shallow, _from_timm, "ghostnet_050"), 32),
    Architecture("ghostnetv2", "timm", _seeded(_from_timm, "ghostnetv2_100"), 64),
    Architecture("ghostnetv3", "timm", _seeded(_from_timm, "ghostnetv3_050"), 64),
    Architecture("mobilenetv3", "timm", _seeded(_shallow, _from_timm, "mobilenetv3_small_050"), 32),
    Architecture("mobilenetv4", "timm", _seeded(_from_timm, "mobilenetv4_conv_small_035"), 32),
    Architecture(
        "mobilenetv4_hybrid",
        "timm",
        _seeded(_from_timm, "mobilenetv4_hybrid_medium"),
        64,
        ("classifier", "conv_stem", "*.pw_proj.conv", "*.attn.*", "blocks.0.*"),
        ENDLESS,
    ),
    Architecture("efficientnet", "timm", _seeded(_from_timm, "test_efficientnet"), 32),
    Architecture("mixnet", "timm", _seeded(_shallow, _from_timm, "mixnet_s"), 32),
    Architecture("efficientvit_mit", "timm", _seeded(_shallow, _from_timm, "efficientvit_b0"), 32),
    Architecture(
        "efficientvit_msra",
        "timm",
        _seeded(_from_timm, "efficientvit_m0"),
        64,
        ("head.linear", "*.mixer.*", "*.pw2.conv", "*.dw*", "patch_embed.*", "*downsample*"),
        ENDLESS,
    ),
    Architecture("convnext", "timm", _seeded(_from_timm, "test_convnext"), 32),
    Architecture("convnextv2", "timm", _seeded(_from_timm, "test_convnext2"), 32),
    Architecture("repvgg", "timm", _seeded(_from_timm, "repvgg_a0"), 32),
    Architecture("nfnet", "timm", _seeded(_from_timm, "test_nfnet"), 32),
    Architecture("xception", "timm", _seeded(_from_timm, "xception41"), 32),
    Architecture("inception_v4", "timm", _seeded(_from_timm, "inception_v4"), 75),
    Architecture("inception_next", "timm", _seeded(_shallow, _from_timm, "inception_next_atto"), 32),
    Architecture("metaformer", "timm", _seeded(_from_timm, "poolformerv2_s12"), 32),
    Architecture("poolformer", "timm", _seeded(_shallow, _from_timm, "poolformer_s12"), 32),
    Architecture("caformer", "timm", _seeded(_from_timm, "caformer_s18"), 32),
    Architecture("mlp_mixer", "timm", _seeded(_mixer), 64),
    Architecture("resmlp", "timm", _seeded(_mixer, "ResBlock", norm_layer="Affine"), 64),
    Architecture("gmlp", "timm", _seeded(_mixer, "SpatialGatingBlock", mlp_layer="GatedMlp", mlp_ratio=6), 64),
    Architecture("vit", "timm", _seeded(_from_timm, "test_vit", img_size=64), 64),
    Architecture(
        "vit_rope",
        "timm",
        _seeded(_from_timm, "vit_small_patch16_rope_224", img_size=64, depth=2, embed_dim=192, num_heads=3),
        64,
    ),
    Architecture("deit", "timm", _seeded(_from_timm, "deit_tiny_patch16_224", img_size=64, depth=2), 64),
    Architecture(
        "deit_distilled", "timm", _seeded(_from_timm, "deit_tiny_distilled_patch16_224", img_size=64, depth=2), 64
    ),
    Architecture("deit3", "timm", _seeded(_from_timm, "deit3_small_patch16_224", img_size=64, depth=2), 64),
    Architecture(
        "beit",
        "timm",
        _seeded(_from_timm, "beit_base_patch16_224", img_size=64, depth=2, embed_dim=192, num_heads=3),
        64,
    ),
    Architecture("eva", "timm", _seeded(_from_timm, "eva02_tiny_patch14_224", img_size=56, depth=2), 56),
    Architecture("cait", "timm", _seeded(_from_timm, "cait_xxs24_224", img_size=64, depth=2), 64),
    Architecture("xcit", "timm", _seeded(_from_timm, "xcit_nano_12_p16_224", img_size=64, depth=2), 64),
    Architecture(
        "swin",
        "timm",
        _seeded(
            _from_timm, "swin_tiny_patch4_window7_224", img_size=64, window_size=4, depths=(1, 1, 1, 1), embed_dim=48
        ),
        64,
    ),
    Architecture(
        "swinv2",
        "timm",
        _seeded(_from_timm, "swinv2_tiny_window8_256", img_size=64, window_size=4, depths=(1, 1, 1, 1), embed_dim=48),
        64,
    ),
    Architecture(
        "swinv2_cr",
        "timm",
        _seeded(_from_timm, "swinv2_cr_tiny_ns_224", img_size=64, depths=(1, 1, 1, 1), embed_dim=48),
        64,
    ),
    Architecture("pit", "timm", _seeded(_from_timm, "pit_ti_224", img_size=64, depth=(1, 1, 1)), 64),
    Architecture("levit", "timm", _seeded(_from_timm, "levit_128s", img_size=64), 64),
    Architecture("tiny_vit", "timm", _seeded(_from_timm, "tiny_vit_5m_224"), 224),
    Architecture(
        "maxvit",
        "timm",
        _seeded(_from_timm, "test_maxvit", img_size=64),
        64,
        ("head.fc", "stem.*", "*.conv3_1x1", "*.shortcut.*", "*.attn.*", "*.mlp.fc2"),
        ENDLESS,
    ),
    Architecture(
        "coatnet",
        "timm",
        _seeded(_from_timm, "test_coatnet", img_size=64),
        64,
        ("head.fc", "stem.*", "*.conv3_1x1", "*.shortcut.*", "*.attn.*", "*.mlp.fc2"),
        ENDLESS,
    ),
    Architecture("maxxvit", "timm", _seeded(_from_timm, "maxxvit_rmlp_nano_rw_256", img_size=64), 64),
    Architecture("mobilevit", "timm", _seeded(_shallow, _from_timm, "mobilevit_xxs"), 64),
    Architecture(
        "mobilevitv2",
        "timm",
        _seeded(_from_timm, "mobilevitv2_050"),
        64,
        ("head.fc", "*.attn.*", "*.mlp.fc2", "*.conv_proj*", "*.conv_1x1*", "*.conv3_1x1*", "stem*"),
        SLOW,
    ),
    Architecture("edgenext", "timm", _seeded(_from_timm, "edgenext_xx_small"), 64),
    Architecture("fastvit", "timm", _seeded(_from_timm, "fastvit_t8"), 64),
    Architecture("mobileone", "timm", _seeded(_from_timm, "mobileone_s0"), 32),
    Architecture("sknet", "timm", _seeded(_from_timm, "skresnet18"), 32),
    Architecture("selecsls", "timm", _seeded(_from_timm, "selecsls42"), 32),
    Architecture("hgnet", "timm", _seeded(_from_timm, "hgnetv2_b0"), 32),
    Architecture(
        "rexnet", "timm", _seeded(_from_timm, "rexnet_100"), 32, ("head.fc", "stem.conv", "*.conv_pwl.conv"), ENDLESS
    ),
    Architecture("tresnet", "timm", _seeded(_from_timm, "tresnet_m", layers=[1, 1, 1, 1]), 64),
    Architecture("cspnet", "timm", _seeded(_shallow, _from_timm, "cspresnet50"), 32),
    Architecture(
        "darknet",
        "timm",
        _seeded(_from_timm, "cs3darknet_s"),
        32,
        unprunable="tracing adds None in update_concat_index_mapping (chunk, then concatenation)",
    ),
    Architecture("cspnext", "timm", _seeded(_from_timm, "cspnext_tiny"), 32),
    Architecture(
        "davit",
        "timm",
        _seeded(_from_timm, "davit_tiny", depths=(1, 1, 1, 1), embed_dims=(48, 96, 96, 192), num_heads=(3, 6, 6, 12)),
        64,
    ),
    Architecture(
        "focalnet",
        "timm",
        _seeded(_from_timm_class, "focalnet", "FocalNet", embed_dim=48, depths=(1, 1, 1, 1)),
        64,
        ("head.fc", "*.mlp.fc2", "*.proj", "*.f", "*.h", "*.focal_layers.*"),
        ENDLESS,
    ),
    Architecture(
        "volo",
        "timm",
        _seeded(
            _from_timm_class,
            "volo",
            "VOLO",
            layers=(1, 1, 1, 1),
            img_size=64,
            embed_dims=(48, 96, 96, 96),
            num_heads=(3, 6, 6, 6),
            mlp_ratio=3.0,
            use_mix_token=False,
        ),
        64,
    ),
    Architecture(
        "crossvit",
        "timm",
        _seeded(
            _from_timm_class,
            "crossvit",
            "CrossVit",
            img_size=48,
            img_scale=(1.0, 1.0),
            patch_size=(12, 16),
            embed_dim=(48, 96),
            depth=((1, 2, 0),),
            num_heads=(3, 3),
            mlp_ratio=(4, 4, 1),
        ),
        48,
    ),
    Architecture("twins_pcpvt", "timm", _seeded(_from_timm, "twins_pcpvt_small", img_size=64, depths=(1, 1, 1, 1)), 64),
    Architecture(
        "twins_svt",
        "timm",
        _seeded(_from_timm, "twins_svt_small", img_size=64, depths=(1, 1, 1, 1)),
        64,
        ("head", "patch_embeds.*", "*.proj", "*.fc2", "*.qkv", "pos_block*"),
        ZERO,
    ),
    Architecture("pvt_v2", "timm", _seeded(_from_timm, "pvt_v2_b0"), 64),
    Architecture(
        "convmixer",
        "timm",
        _seeded(_from_timm_class, "convmixer", "ConvMixer", dim=64, depth=2, kernel_size=7, patch_size=7),
        32,
    ),
    Architecture("lcnet", "timm", _seeded(_from_timm, "lcnet_035"), 32),
    Architecture("tinynet", "timm", _seeded(_from_timm, "tinynet_e"), 32),
    Architecture("hardcorenas", "timm", _seeded(_from_timm, "hardcorenas_a"), 32),
    Architecture(
        "visformer",
        "timm",
        _seeded(_from_timm, "visformer_tiny", img_size=64),
        64,
        ("head", "*.attn.*", "*.mlp.conv3", "patch_embed*", "stem*"),
        ENDLESS,
    ),
    Architecture("efficientformer", "timm", _seeded(_from_timm, "efficientformer_l1"), 224),
    Architecture(
        "efficientformer_v2",
        "timm",
        _seeded(_from_timm, "efficientformerv2_s0", img_size=64),
        64,
        ("head", "head_dist", "stem.*", "*.token_mixer.*", "*.mlp.fc2.*", "*.downsample.*"),
        ENDLESS,
    ),
    Architecture("sequencer2d", "timm", _seeded(_from_timm, "sequencer2d_s", img_size=64, layers=(1, 1, 1, 1)), 64),
    Architecture(
        "nest",
        "timm",
        _seeded(
            _from_timm_class,
            "nest",
            "Nest",
            img_size=64,
            num_levels=3,
            embed_dims=(48, 96, 192),
            num_heads=(3, 6, 12),
            depths=(1, 1, 1),
        ),
        64,
        ("head", "patch_embed.proj", "*.mlp.fc2", "*.pool.conv", "*.qkv", "*.attn.proj"),
        ENDLESS,
    ),
    Architecture("mvitv2", "timm", _seeded(_mvitv2), 64),
    Architecture("convit", "timm", _seeded(_from_timm, "convit_tiny", img_size=64, depth=3), 64),
    Architecture("coat", "timm", _seeded(_from_timm, "coat_lite_tiny", img_size=64), 64),
    Architecture(
        "gcvit",
        "timm",
        _seeded(_from_timm, "gcvit_xxtiny", img_size=64),
        64,
        ("head.fc", "stem*", "*.proj", "*.fc2", "*.qkv", "*.reduction", "*conv*"),
        ZERO,
    ),
    Architecture("repvit", "timm", _seeded(_from_timm, "repvit_m0_9", depth=(1, 1, 2, 1)), 32),
    Architecture("repghost", "timm", _seeded(_from_timm, "repghostnet_050"), 32),
    Architecture("starnet", "timm", _seeded(_from_timm, "starnet_s050"), 32),
    Architecture("fasternet", "timm", _seeded(_from_timm, "fasternet_t0"), 32),
    Architecture(
        "shvit",
        "timm",
        _seeded(_from_timm, "shvit_s1"),
        64,
        unprunable="tracing divides by 0 in update_reshape_index_mapping (3-d view of the attention)",
    ),
    Architecture("mambaout", "timm", _seeded(_from_timm, "test_mambaout"), 32),
    Architecture("rdnet", "timm", _seeded(_from_timm, "rdnet_tiny"), 32),
    Architecture(
        "hiera",
        "timm",
        _seeded(_from_timm, "hiera_tiny_224", img_size=64),
        64,
        ("head.fc", "patch_embed*", "*.proj", "*.fc2", "*.qkv"),
        ZERO,
    ),
    Architecture("nextvit", "timm", _seeded(_from_timm, "nextvit_small"), 64),
    Architecture("tnt", "timm", _seeded(_from_timm, "tnt_s_legacy_patch16_224", img_size=64, depth=2), 64),
    Architecture(
        "botnet", "timm", _seeded(_from_timm, "botnet26t_256", img_size=64), 64, ("head.fc", "*.self_attn.*"), ENDLESS
    ),
    Architecture(
        "lambda_resnet",
        "timm",
        _seeded(_from_timm, "lambda_resnet26t"),
        64,
        ("head.fc", "*.self_attn.*", "*.conv1_1x1.conv"),
        ENDLESS,
    ),
    Architecture("swiftformer", "timm", _seeded(_from_timm, "swiftformer_xs"), 64),
    Architecture("vitamin", "timm", _seeded(_from_timm, "vitamin_small_224", img_size=64), 64),
    Architecture("vovnet", "timm", _seeded(_from_timm, "vovnet39a"), 32),
    Architecture("senet", "timm", _seeded(_from_timm, "legacy_seresnet18"), 32),
    Architecture("byobnet", "timm", _seeded(_from_timm, "test_byobnet"), 32),
    Architecture("xception_legacy", "timm", _seeded(_from_timm, "legacy_xception"), 75),
    Architecture(
        "efficientvim",
        "timm",
        _seeded(_from_timm, "efficientvim_m1"),
        64,
        unprunable="building a group does not end: views of the state-space mixer taken for flattening",
    ),
    Architecture("cpubone", "timm", _seeded(_from_timm, "cpubone_nano"), 64),
    Architecture(
        "naflexvit", "timm", _seeded(_from_timm, "naflexvit_base_patch16_gap", depth=2, embed_dim=192, num_heads=3), 64
    ),
    Architecture(
        "vitdet_samvit",
        "timm",
        _seeded(_from_timm, "samvit_base_patch16_224", img_size=64, depth=2, embed_dim=192, num_heads=3),
        64,
    ),
]
