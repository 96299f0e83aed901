"""Models of packages that build Keras 3 models with batch normalization: small, with random weights.

`benchmarks/packages.txt` lists the packages. Each entry builds its model when it is called; nothing is downloaded.
"""

import importlib
from collections.abc import Callable
from typing import Any

SIZE = (64, 64, 3)


def makers() -> dict[str, Callable[[], Any]]:
    """Returns a function for each model, by "package model"."""
    found: dict[str, Callable[[], Any]] = {}
    for package, models in _PACKAGES.items():
        found |= {f"{package} {name}": make for name, make in models().items()}
    return found


def _keras_hub() -> dict[str, Callable[[], Any]]:
    def models() -> Any:
        return importlib.import_module("keras_hub").models

    def resnet(block: str, filters: list[int], size: int = 64) -> Any:
        return models().ResNetBackbone(
            input_conv_filters=[64],
            input_conv_kernel_sizes=[7],
            stackwise_num_filters=filters,
            stackwise_num_blocks=[1] * len(filters),
            stackwise_num_strides=[1] + [2] * (len(filters) - 1),
            block_type=block,
            image_shape=(size, size, 3),
        )

    def mobilenet() -> Any:
        return models().MobileNetBackbone(
            stackwise_expansion=[[40, 56], [64, 144]],
            stackwise_num_blocks=[2, 2],
            stackwise_num_filters=[[16, 16], [24, 24]],
            stackwise_kernel_size=[[3, 5], [5, 5]],
            stackwise_num_strides=[[2, 1], [2, 1]],
            stackwise_se_ratio=[[None, 0.25], [0.25, 0.25]],
            stackwise_activation=[["relu", "hard_swish"], ["hard_swish", "hard_swish"]],
            stackwise_padding=[[1, 2], [2, 2]],
            output_num_filters=64,
            input_activation="hard_swish",
            output_activation="hard_swish",
            input_num_filters=16,
            image_shape=(32, 32, 3),
            depthwise_filters=8,
            depthwise_stride=2,
            depthwise_residual=False,
            squeeze_and_excite=0.5,
            last_layer_filter=32,
        )

    def efficientnet() -> Any:
        return models().EfficientNetBackbone(
            stackwise_width_coefficients=[1.0] * 3,
            stackwise_depth_coefficients=[1.0] * 3,
            stackwise_block_types=["fused", "unfused", "fused"],
            stackwise_kernel_sizes=[3, 3, 3],
            stackwise_num_repeats=[2, 1, 1],
            stackwise_input_filters=[8, 8, 8],
            stackwise_output_filters=[8, 8, 8],
            stackwise_expansion_ratios=[1, 2, 2],
            stackwise_squeeze_and_excite_ratios=[0.25] * 3,
            stackwise_strides=[1, 2, 2],
            stackwise_force_input_filters=[0] * 3,
            stackwise_nores_option=[False] * 3,
            dropout=0.2,
            input_shape=(32, 32, 3),
        )

    def hgnet() -> Any:
        return models().HGNetV2Backbone(
            depths=[1, 1],
            embedding_size=8,
            hidden_sizes=[8, 16],
            stem_channels=[3, 8, 8],
            hidden_act="relu",
            use_learnable_affine_block=True,
            num_channels=3,
            stackwise_stage_filters=[[8, 8, 16, 1, 3, 3], [16, 8, 32, 1, 3, 3]],
            apply_downsample=[False, True],
            use_lightweight_conv_block=[False, True],
            image_shape=(32, 32, 3),
        )

    def deeplab() -> Any:
        return models().DeepLabV3Backbone(
            image_encoder=resnet("bottleneck_block", [64, 16, 16, 16]),
            low_level_feature_key="P2",
            spatial_pyramid_pooling_key="P4",
            dilation_rates=[6, 12],
            upsampling_size=4,
            image_shape=SIZE,
        )

    def retinanet() -> Any:
        return models().RetinaNetBackbone(
            image_encoder=resnet("bottleneck_block", [64, 16, 16, 16]),
            min_level=3,
            max_level=5,
            use_p5=False,
            use_fpn_batch_norm=True,
            image_shape=SIZE,
        )

    def basnet() -> Any:
        encoder = models().ResNetBackbone(
            input_conv_filters=[64],
            input_conv_kernel_sizes=[7],
            stackwise_num_filters=[64, 16, 16, 16],
            stackwise_num_blocks=[2, 2, 2, 2],
            stackwise_num_strides=[1, 2, 2, 2],
            block_type="basic_block",
        )
        backbone = models().BASNetBackbone(image_encoder=encoder, num_classes=1, image_shape=SIZE)
        return models().BASNetImageSegmenter(backbone=backbone)

    def classifier() -> Any:
        return models().ImageClassifier(
            backbone=resnet("basic_block", [64, 128]), num_classes=3, preprocessor=None
        )

    def segmenter() -> Any:
        return models().DeepLabV3ImageSegmenter(
            backbone=deeplab(), num_classes=2, activation="softmax", preprocessor=None
        )

    return {
        "ResNetBackbone": lambda: resnet("basic_block", [64, 128]),
        "MobileNetBackbone": mobilenet,
        "EfficientNetBackbone": efficientnet,
        "HGNetV2Backbone": hgnet,
        "DenseNetBackbone": lambda: models().DenseNetBackbone(
            stackwise_num_repeats=[1, 1], image_shape=(32, 32, 3)
        ),
        "XceptionBackbone": lambda: models().XceptionBackbone(
            stackwise_conv_filters=[[8, 8], [16, 16]],
            stackwise_pooling=[True, False],
            image_shape=SIZE,
        ),
        "DeepLabV3Backbone": deeplab,
        "RetinaNetBackbone": retinanet,
        "ImageClassifier": classifier,
        "MobileNetImageClassifier": lambda: models().MobileNetImageClassifier(
            backbone=mobilenet(), num_classes=3
        ),
        "DeepLabV3ImageSegmenter": segmenter,
        "BASNetImageSegmenter": basnet,
    }


def _kimm() -> dict[str, Callable[[], Any]]:
    def make(name: str, **arguments: Any) -> Callable[[], Any]:
        return lambda: getattr(importlib.import_module("kimm.models"), name)(
            input_shape=SIZE, weights=None, **arguments
        )

    names = ["MobileNetV3W050Small", "GhostNetW050", "RepVGGA0", "MobileViTV2W050"]
    keys = ["BLOCK0_S4", "BLOCK1_S8"]
    features = make("ResNet18", include_top=False, feature_extractor=True, feature_keys=keys)
    return {name: make(name, classes=3) for name in names} | {"ResNet18 features": features}


def _medicai() -> dict[str, Callable[[], Any]]:
    def make(name: str, **arguments: Any) -> Callable[[], Any]:
        return lambda: getattr(importlib.import_module("medicai.models"), name)(
            input_shape=SIZE, num_classes=2, **arguments
        )

    encoded = ["UNet", "DeepLabV3Plus", "TransUNet"]
    plain = ["ResNet18"]
    return {name: make(name, encoder_name="resnet18") for name in encoded} | {
        name: make(name) for name in plain
    }


def _tcn() -> dict[str, Callable[[], Any]]:
    def make() -> Any:
        import keras

        layer = importlib.import_module("tcn").TCN
        x = keras.Input((16, 3))
        y = layer(8, dilations=(1, 2), use_batch_norm=True, return_sequences=True)(x)
        return keras.Model(x, keras.layers.Dense(2)(y))

    return {"TCN": make}


def _k3im() -> dict[str, Callable[[], Any]]:
    return {
        "ConvMixer": lambda: importlib.import_module("k3im.convmixer").ConvMixer(32, 8, 2, 3, 4, 3)
    }


def _zeromodels() -> dict[str, Callable[[], Any]]:
    def make(module: str, name: str, size: int = 64, **arguments: Any) -> Callable[[], Any]:
        return lambda: getattr(importlib.import_module(f"zeromodels.models.{module}"), name)(
            image_size=size, num_classes=3, **arguments
        )

    return {
        "DenseNet": make("densenet", "DenseNetImageClassify", depths=(2, 2), growth_rate=8),
        "Res2Net": make("res2net", "Res2NetImageClassify"),
        "MobileNetV4": make("mobilenetv4", "MobileNetV4ImageClassify"),
        "MobileViT": make("mobilevit", "MobileViTImageClassify"),
        "LeViT": make("levit", "LevitImageClassify", 224),
    }


def _kyolo() -> dict[str, Callable[[], Any]]:
    def make(name: str) -> Callable[[], Any]:
        return lambda: getattr(importlib.import_module("kyolo"), name)(nc=3)

    return {name: make(name) for name in ("yolov8n",)}


def _keras_vision() -> dict[str, Callable[[], Any]]:
    def fastvit() -> Any:
        return importlib.import_module("keras_vision.fastvit").fastvit_t8(
            num_classes=3, input_shape=SIZE
        )

    def mobilevit(version: int, **variant: Any) -> Callable[[], Any]:
        module = f"keras_vision.MobileViT_v{version}"
        return lambda: getattr(importlib.import_module(module), f"build_MobileViT_v{version}")(
            num_classes=3, input_shape=SIZE, pretrained=False, **variant
        )

    return {
        "FastViT-T8": fastvit,
        "MobileViT": mobilevit(1, model_type="XXS"),
        "MobileViTV2": mobilevit(2, width_multiplier=0.5),
    }


def _keras_climate() -> dict[str, Callable[[], Any]]:
    def make(module: str, name: str, **arguments: Any) -> Callable[[], Any]:
        return lambda: getattr(importlib.import_module(f"keras_climate.{module}"), name)(
            **arguments
        )

    deeplab = {"backbone_layers": (1, 1, 1, 1), "aspp_filters": 16, "decoder_filters": 8}
    metnet = {"base_filters": 8, "attn_dim": 16, "attn_layers": 1, "num_heads": 2}
    return {
        "UNet": make("remote_sensing.unet", "UNet", input_shape=SIZE, depth=2, base_filters=8),
        "DeepLabV3Plus": make(
            "remote_sensing.deeplabv3plus", "DeepLabV3Plus", input_shape=SIZE, **deeplab
        ),
        "MetNet": make("weather.metnet", "MetNet", input_shape=(3, 32, 32, 1), **metnet),
        "Informer": make("forecasting.informer", "Informer", seq_len=24, d_model=16, d_ff=16),
    }


def _classification_models_3d() -> dict[str, Callable[[], Any]]:
    def make(name: str) -> Callable[[], Any]:
        def build() -> Any:
            factory = importlib.import_module("classification_models_3D.kkeras").Classifiers
            network, _ = factory.get(name)
            return network(input_shape=(32, 32, 32, 1), weights=None, include_top=False)

        return build

    return {name: make(name) for name in ("resnet18",)}


_PACKAGES: dict[str, Callable[[], dict[str, Callable[[], Any]]]] = {
    "keras-hub": _keras_hub,
    "kimm": _kimm,
    "medicai": _medicai,
    "keras-tcn": _tcn,
    "k3im": _k3im,
    "zeromodels": _zeromodels,
    "kyolo": _kyolo,
    "keras-vision": _keras_vision,
    "keras-climate": _keras_climate,
    "classification-models-3D": _classification_models_3d,
}
