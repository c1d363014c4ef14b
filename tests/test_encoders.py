"""Every family of encoders, by one set of checks: forty architectures, two or more for each pattern of strides."""

import os
import subprocess
import sys

import pytest
import timm
import torch
from safetensors.torch import save_file

from msa_unet import ConfigError, EncoderError, MSAUnet, list_encoders
from msa_unet.encoders import make_plan

ENCODERS = {
    "2..32": [
        "resnet18", "tf_efficientnet_lite0", "mobilenetv3_small_050", "mobilenetv4_conv_small", "hrnet_w18_small",
        "regnetx_002", "ghostnet_050", "cspresnet50", "legacy_xception", "botnet26t_256", "halonet26t",
        "bat_resnext26ts", "maxvit_pico_rw_256" if timm.is_model("maxvit_pico_rw_256") else "coatnet_pico_rw_224",
    ],
    "4..32": [
        "convnext_atto", "swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256", "mvitv2_tiny", "pvt_v2_b0",
        "poolformer_s12", "edgenext_xx_small", "efficientformer_l1", "coat_lite_tiny", "mambaout_femto",
    ],
    "1, 2, 4, ..": ["darknet17", "cspdarknet53"],
    "flat 16": ["vit_tiny_patch16_224", "deit_tiny_patch16_224", "mixer_s16_224"],
    "flat 14": ["vit_small_patch14_dinov2", "vit_small_patch14_reg4_dinov2"],
    "flat 8": ["xcit_nano_12_p8_224", "vit_small_patch8_224"],
    "flat 32": ["mixer_s32_224", "vit_tiny_r_s16_p8_224"],
    "flat 7": ["convmixer_768_32"],
    "16, 32, 64": ["efficientvit_m0", "levit_128s"],
    "8, 16, 32(, 64)": ["pit_ti_224", "visformer_tiny" if timm.is_model("visformer_tiny") else "pit_s_224", "csatv2"],
    "7, 14, ..": ["pit_b_224", "sequencer2d_s"],
    "12, 17": ["crossvit_tiny_240", "crossvit_9_240"],
    "4, 8, 16": ["nest_tiny", "nest_tiny_jx"],
}  # fmt: skip
NAMES = [name for names in ENCODERS.values() for name in names]


def test_the_sample_is_large_enough():
    assert len(set(NAMES)) >= 40
    assert timm.__version__ != "1.0.31" or all(timm.is_model(name) for name in NAMES)


@pytest.mark.parametrize("encoder", NAMES)
def test_any_size_and_gradients(encoder):
    model = MSAUnet(encoder, in_channels=3, num_classes=2).eval()
    with torch.no_grad():
        for size in ((33, 47), (1, 1), (70, 130)):
            x = torch.randn(1, 3, *size)
            logits = model(x)
            assert logits.shape == (1, 2, *size)
            assert logits.isfinite().all()
        levels = model.forward_levels(x)
        assert all(level.shape == logits.shape for level in levels)
        assert len(levels) == len(model.encoder.strides)
        assert torch.allclose(sum(levels), logits, atol=1e-5)
    model.train()
    model(torch.randn(2, 3, 40, 33)).square().mean().backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.backbone.parameters())
    assert all(p.grad is not None for p in (*model.decoder.parameters(), *model.head.parameters()))


@pytest.mark.parametrize("encoder", NAMES)
def test_fusing_is_exact(encoder):
    # in float64, since some of these networks amplify float32 rounding by 1e3 while their weights are random
    model = MSAUnet(encoder).double().train()
    model(torch.randn(2, 3, 64, 64, dtype=torch.float64))  # so that the batch norms are not the identity
    model.eval()
    fused = model.fuse()
    x = torch.randn(1, 3, 64, 80, dtype=torch.float64)
    with torch.no_grad():
        wanted = model(x)
        assert (fused(x) - wanted).abs().max() <= 1e-9 * wanted.abs().max()
    left = [name for name, m in fused.named_modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert not any(name.startswith(("decoder", "head", "encoder.fuse")) for name in left)
    assert not any(p.requires_grad for p in fused.parameters())


@pytest.mark.parametrize("encoder", ["msa", "resnet18", "tf_efficientnet_lite0"])
def test_fused_networks_agree_in_float32(encoder):
    model = MSAUnet(encoder, decoder_channels=(16, 32, 64, 128) if encoder == "msa" else ()).eval()
    fused = model.fuse()
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in fused.modules())
    x = torch.randn(1, 3, 90, 100)
    with torch.no_grad():
        wanted = model(x)
        assert (fused(x) - wanted).abs().max() <= 1e-4 * wanted.abs().max()


def test_levels_of_each_pattern():
    def plan(name):
        return make_plan(name)

    assert plan("resnet18").levels == (2, 4, 8, 16, 32)
    assert plan("convnext_atto").levels == (4, 8, 16, 32)
    assert plan("darknet17").skip == 1
    assert plan("vit_tiny_patch16_224").levels == (4, 8, 16, 32)
    assert plan("vit_tiny_patch16_224").options["out_indices"] == (2, 5, 8, 11)
    assert plan("vit_small_patch14_dinov2").numerator / plan("vit_small_patch14_dinov2").denominator == 14 / 16
    assert plan("sequencer2d_s").levels == (8, 16, 16)
    assert plan("mambaout_femto").channels_last
    assert plan("mixer_s16_224").split
    assert plan("mixer_s16_224").unit == (224, 224)
    assert plan("halonet26t").unit == (256, 256)
    assert not plan("halonet26t").split


def test_a_split_backbone_sees_each_unit_once():
    model = MSAUnet("mixer_s32_224").eval()
    x = torch.randn(2, 3, 448, 224)
    with torch.no_grad():
        whole = model.encoder.taps(x)
        for i, rows in enumerate((slice(0, 224), slice(224, 448))):
            alone = model.encoder.taps(x[:, :, rows])
            for a, b in zip(whole, alone, strict=True):
                half = a.shape[2] // 2
                assert torch.allclose(a[:, :, i * half : (i + 1) * half], b, atol=1e-5)


@pytest.fixture(scope="module")
def resnet_file(tmp_path_factory):
    torch.manual_seed(5)
    path = tmp_path_factory.mktemp("weights") / "resnet10t.safetensors"
    weights = timm.create_model("resnet10t").state_dict()
    save_file(weights, path)
    return path, weights


def test_weights_from_a_file(resnet_file):
    path, weights = resnet_file
    model = MSAUnet("resnet10t", encoder_weights=path)
    for name, tensor in model.backbone.state_dict().items():
        assert torch.equal(tensor, weights[name]), name


@pytest.mark.parametrize("channels", [1, 2, 4, 7, 16])
def test_the_stem_takes_other_channels_as_timm_does(resnet_file, channels):
    path, weights = resnet_file
    model = MSAUnet("resnet10t", in_channels=channels, encoder_weights=str(path))
    wanted = timm.models.adapt_input_conv(channels, weights["conv1.0.weight"])
    assert torch.equal(model.backbone.conv1[0].weight, wanted)
    assert model.eval()(torch.randn(1, channels, 40, 40)).shape == (1, 1, 40, 40)
    assert len(model.config.mean) == channels


def test_a_file_that_does_not_fit_is_listed(resnet_file, tmp_path):
    weights = dict(resnet_file[1])
    del weights["layer1.0.conv1.weight"]
    weights["surprise"] = torch.zeros(1)
    weights["layer2.0.conv1.weight"] = torch.zeros(3, 3)
    save_file(weights, tmp_path / "bad.safetensors")
    with pytest.raises(EncoderError) as error:
        MSAUnet("resnet10t", encoder_weights=tmp_path / "bad.safetensors")
    for text in ("missing layer1.0.conv1.weight", "unexpected surprise", "layer2.0.conv1.weight is [3, 3] instead of"):
        assert text in str(error.value)


def test_a_headless_file_is_enough(resnet_file, tmp_path):
    weights = {name: t for name, t in resnet_file[1].items() if not name.startswith("fc.")}
    save_file(weights, tmp_path / "headless.safetensors")
    model = MSAUnet("resnet10t", encoder_weights=tmp_path / "headless.safetensors")
    assert torch.equal(model.backbone.conv1[0].weight, weights["conv1.0.weight"])


@pytest.mark.parametrize("file", ["weights.bin", "absent.safetensors", "text.safetensors"])
def test_a_file_that_is_no_safetensors(tmp_path, file):
    (tmp_path / "text.safetensors").write_text("not a tensor in sight")
    with pytest.raises(EncoderError, match="safetensors"):
        MSAUnet("resnet10t", encoder_weights=tmp_path / file)


def test_weights_that_cannot_be_fetched(tmp_path):
    code = (
        "from msa_unet import EncoderError, MSAUnet\n"
        "try: MSAUnet('resnet18', encoder_weights=True)\n"
        "except EncoderError as error: print(error)\n"
    )
    home = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "TORCH_HOME": str(tmp_path)}  # read when it is imported
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **home}, check=True)
    assert result.stdout.startswith("timm's weights of 'resnet18' could not be fetched: ")
    assert "give a .safetensors file" in result.stdout


def test_encoder_kwargs_reach_timm_and_unknown_ones_are_refused():
    model = MSAUnet("convnext_atto", encoder_kwargs={"drop_path_rate": 0.3})
    rates = [m.drop_prob for m in model.backbone.modules() if type(m).__name__ == "DropPath"]
    assert max(rates) == pytest.approx(0.3)
    with pytest.raises(EncoderError, match="drop_pathrate"):
        MSAUnet("convnext_atto", encoder_kwargs={"drop_pathrate": 0.3})
    with pytest.raises(ConfigError, match="checkpoint_path"):
        MSAUnet("convnext_atto", encoder_kwargs={"checkpoint_path": "/etc/passwd"})


@pytest.mark.parametrize(
    "text", ["hf-hub:timm/resnet18", "local-dir:/tmp", "../resnet18", "resnet18x", "", 3, "resnet18.no_tag"]
)
def test_only_plain_names_of_timm(text):
    with pytest.raises(ConfigError, match="encoder"):
        MSAUnet(text)


def test_wrong_number_of_widths():
    with pytest.raises(EncoderError, match=r"has 5\s+levels"):
        MSAUnet("resnet18", decoder_channels=(16, 32))
    with pytest.raises(EncoderError, match="four"):
        MSAUnet(decoder_channels=(16, 32))


def test_names_are_listed():
    names = list_encoders()
    assert names[0] == "msa"
    assert set(names[1:]) == set(timm.list_models())
    assert list_encoders("convnext_a*") == timm.list_models("convnext_a*")
