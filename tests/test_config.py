"""A config is untrusted input: what is valid goes round, anything else is one typed sentence."""

import json

import pytest

from msa_unet import ConfigError, MSAUnet, MSAUnetConfig


@pytest.mark.parametrize(
    "config",
    [
        MSAUnetConfig(),
        MSAUnetConfig("resnet18", in_channels=1, num_classes=3, class_names=("void", "liver", "tumour")),
        MSAUnetConfig("vit_tiny_patch16_224.augreg_in21k", encoder_kwargs={"drop_rate": 0.1, "img_size": [64, 48]}),
        MSAUnetConfig(
            input_size=(192, 256), temperature=1.5, metrics={"test_dice": 0.9}, decoder_channels=(8, 16, 32, 64)
        ),
    ],
)
def test_round_trip_through_json(config):
    assert MSAUnetConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_defaults_follow_the_encoder():
    assert MSAUnetConfig().mean == (0.5, 0.5, 0.5)
    assert MSAUnetConfig("resnet18").mean == (0.485, 0.456, 0.406)
    assert MSAUnetConfig("resnet18", in_channels=2).mean == pytest.approx((0.449, 0.449))
    assert MSAUnetConfig(num_classes=3).class_names == ("class_0", "class_1", "class_2")
    assert MSAUnet().config.decoder_channels == (64, 128, 256, 512)
    assert len(MSAUnet("resnet10t").config.decoder_channels) == 5


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"encoderr": "msa"}, "did you mean 'encoder'"),
        ({"xyzzy": 1}, "known are encoder"),
        ({"in_channels": 0}, "in_channels is 0"),
        ({"in_channels": True}, "in_channels is True"),
        ({"in_channels": 10**9}, "from 1 to"),
        ({"num_classes": -1}, "num_classes is -1"),
        ({"num_classes": "2"}, "num_classes is '2'"),
        ({"decoder_channels": [64, 0]}, "decoder_channels is 0"),
        ({"decoder_channels": "64"}, "decoder_channels is '64'"),
        ({"attention": "some"}, "finest, all, none"),
        ({"antialias": 1}, "antialias is 1"),
        ({"encoder": "resnet_18"}, "did you mean"),
        ({"encoder": "hf-hub:timm/resnet18"}, "plain timm name"),
        ({"encoder_kwargs": {"pretrained": True}}, "pretrained"),
        ({"encoder_kwargs": {"cache_dir": "/tmp"}}, "cache_dir"),
        ({"encoder_kwargs": {"a": {"b": 1}}}, "only text, numbers"),
        ({"encoder_kwargs": [1]}, "must map argument names"),
        ({"mean": [0.5]}, "3 entries"),
        ({"std": [0.5, 0.5, 0]}, "above 0"),
        ({"mean": [float("nan")] * 3}, "finite"),
        ({"temperature": 0}, "temperature is 0"),
        ({"temperature": "warm"}, "temperature is 'warm'"),
        ({"input_size": [192]}, "2 entries"),
        ({"num_classes": 2, "class_names": ["a", "a"]}, "repeats a name"),
        ({"class_names": ["a", "b"]}, "1 entries"),
        ({"metrics": {"dice": "high"}}, "metrics"),
        ({"licence": 3}, "licence is 3"),
        ({"version": 2}, "schema version 2"),
    ],
)
def test_what_does_not_describe_a_network_is_refused(values, text):
    with pytest.raises(ConfigError, match=text):
        MSAUnetConfig.from_dict(values)


def test_a_config_is_an_object():
    with pytest.raises(ConfigError, match="not list"):
        MSAUnetConfig.from_dict([])


def test_messages_stay_short():
    with pytest.raises(ConfigError) as error:
        MSAUnetConfig.from_dict({"encoder": "x" * 10**6})
    assert len(str(error.value)) < 400
