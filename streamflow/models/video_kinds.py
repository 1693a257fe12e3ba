"""Why the video pipelines of diffusers that are not in `VIDEO_PIPELINES` cannot be streamed, by the names of their classes
without "Pipeline". docs/families.md has the same as a table."""

from __future__ import annotations

from collections.abc import Iterable

REASONS = {
    "denoises all frames of a clip together, so that its first image depends on its last one": (
        "AnyFlow ChronoEdit Cosmos2VideoToWorld Cosmos2_5_PredictBase Cosmos3Omni CosmosTextToWorld "
        "CosmosVideoToWorld EasyAnimate EasyAnimateControl EasyAnimateInpaint HunyuanSkyreelsImageToVideo "
        "HunyuanVideo HunyuanVideo15 HunyuanVideo15ImageToVideo HunyuanVideoImageToVideo Kandinsky5I2V Kandinsky5T2V "
        "Kandinsky6TI2VA LTX LTX2 LTX2Condition LTX2DFR LTX2HDR LTX2ImageToVideo LTX2InContext LTXCondition "
        "LTXImageToVideo LucyEdit Mochi MotifVideo MotifVideoImage2Video SanaImageToVideo SanaVideo SanaWM SkyReelsV2 "
        "SkyReelsV2ImageToVideo Wan WanImageToVideo WanVACE WanVideoToVideo"
    ),
    "decodes, enlarges or refines a whole video that is drawn already": (
        "Kandinsky6SR LTX2DFRTemporalRefine LTX2VideoDiffusionDecode"
    ),
    "draws its last section first; with its other sampling it blends the last images of a section with the next one, and "
    "its call takes no history": "HunyuanVideoFramepack",
    "draws window after window, but its call takes no history, and decodes the clip at once": "LTXI2VLongMultiPrompt",
    "draws segment after segment along control videos, which its call takes whole": "Cosmos2_5_Transfer WanAnimate",
}


def why_not(cls: type, streamed: Iterable[str]) -> str:
    """The message for a pipeline class that no video stream draws with. streamed: the names of those that are."""
    for base in cls.__mro__:
        name = base.__name__.removesuffix("Pipeline")
        for reason, names in REASONS.items():
            if name in names.split():
                return f"{base.__name__} {reason}"
    return (
        f"{cls.__name__} is no video pipeline that is streamed: these are {', '.join(streamed)}. StreamFlow(pipe) "
        f"streams images"
    )
