"""What becomes of each pipeline class of diffusers: a family's adapter streams it, or the rendezvous does, or it is not a
flow, or it is refused, with the reason. Knows names alone; `tests/test_classification.py` compares them with diffusers'."""

from __future__ import annotations

# Names are without the "Pipeline" at their end.
ADAPTER = """
    ChromaImg2Img ChromaInpaint Chroma Flux2Klein Flux2 FluxImg2Img FluxInpaint Flux Lumina2 QwenImageImg2Img
    QwenImageInpaint QwenImage Sana StableDiffusion3Img2Img StableDiffusion3Inpaint StableDiffusion3 ZImageImg2Img
    ZImageInpaint ZImage StableDiffusion3ControlNet FluxControlNet FluxControlNetImg2Img QwenImageControlNet
    SanaSprint SanaSprintImg2Img
"""

# Flows from text to pictures, without an adapter. Asked for by family="rendezvous" where `streamflow.models.PIPELINES` does
# not name the class.
RENDEZVOUS = """
    AuraFlow Bria BriaFibo BriaFibo2 CogView4 ErnieImage HiDreamImage HunyuanImage Kandinsky5T2I Krea2 LongCatImage
    Lumina NucleusMoEImage OmniGen OvisImage PRX QwenImage21 ZImageOmni
"""

# Diffusion (epsilon, v or discrete), consistency models and what belongs to them. A UNet of theirs that was rectified
# streams by a family of its own.
NOT_A_FLOW = """
    Allegro AltDiffusionImg2Img AltDiffusion AmusedImg2Img AmusedInpaint Amused AnimateDiffControlNet AnimateDiffPAG
    AnimateDiff AnimateDiffSDXL AnimateDiffSparseControlNet AnimateDiffVideoToVideoControlNet AnimateDiffVideoToVideo
    AudioDiffusion AudioLDM2 AudioLDM BlipDiffusionControlNet BlipDiffusion CogVideoXFunControl CogVideoXImageToVideo
    CogVideoX CogVideoXVideoToVideo CogView3Plus ConsisID ConsistencyModel CycleDiffusion DDIM DDPM DanceDiffusion DiT
    HunyuanDiTControlNet HunyuanDiTPAG HunyuanDiT I2VGenXL IFImg2Img IFImg2ImgSuperResolution IFInpainting
    IFInpaintingSuperResolution IF IFSuperResolution Kandinsky3Img2Img Kandinsky3 KandinskyCombined
    KandinskyImg2ImgCombined KandinskyImg2Img KandinskyInpaintCombined KandinskyInpaint Kandinsky KandinskyPrior
    KandinskyV22Combined KandinskyV22ControlnetImg2Img KandinskyV22Controlnet KandinskyV22Img2ImgCombined
    KandinskyV22Img2Img KandinskyV22InpaintCombined KandinskyV22Inpaint KandinskyV22 KandinskyV22PriorEmb2Emb
    KandinskyV22Prior KarrasVe KolorsImg2Img KolorsPAG Kolors LDM LDMSuperResolution LDMTextToImage
    LatentConsistencyModelImg2Img LatentConsistencyModel Latte MarigoldDepth MarigoldIntrinsics MarigoldNormals MusicLDM
    OnnxStableDiffusionImg2Img OnnxStableDiffusionInpaint OnnxStableDiffusion OnnxStableDiffusionUpscale PIA PNDM
    PaintByExample PixArtAlpha PixArtSigmaPAG PixArtSigma RePaint ScoreSdeVe SemanticStableDiffusion ShapEImg2Img ShapE
    SpectrogramDiffusion StableAudio StableCascadeCombined StableCascadeDecoder StableCascadePrior
    StableDiffusionAdapter StableDiffusionAttendAndExcite StableDiffusionControlNetImg2Img
    StableDiffusionControlNetInpaint StableDiffusionControlNetPAGInpaint StableDiffusionControlNetPAG
    StableDiffusionControlNet StableDiffusionControlNetXS StableDiffusionDepth2Img StableDiffusionDiffEdit
    StableDiffusionGLIGEN StableDiffusionGLIGENTextImage StableDiffusionImageVariation StableDiffusionImg2Img
    StableDiffusionInpaint StableDiffusionInstructPix2Pix StableDiffusionLDM3D StableDiffusionLatentUpscale
    StableDiffusionModelEditing StableDiffusionOnnx StableDiffusionPAGImg2Img StableDiffusionPAGInpaint
    StableDiffusionPAG StableDiffusionPanorama StableDiffusionParadigms StableDiffusion StableDiffusionPix2PixZero
    StableDiffusionSAG StableDiffusionUpscale StableDiffusionXLAdapter StableDiffusionXLControlNetImg2Img
    StableDiffusionXLControlNetInpaint StableDiffusionXLControlNetPAGImg2Img StableDiffusionXLControlNetPAG
    StableDiffusionXLControlNet StableDiffusionXLControlNetUnionImg2Img StableDiffusionXLControlNetUnionInpaint
    StableDiffusionXLControlNetUnion StableDiffusionXLControlNetXS StableDiffusionXLImg2Img StableDiffusionXLInpaint
    StableDiffusionXLInstructPix2Pix StableDiffusionXLPAGImg2Img StableDiffusionXLPAGInpaint StableDiffusionXLPAG
    StableDiffusionXL StableUnCLIPImg2Img StableUnCLIP StableVideoDiffusion TextToVideoSD TextToVideoZero
    TextToVideoZeroSDXL UnCLIPImageVariation UnCLIP UniDiffuser VQDiffusion VersatileDiffusionDualGuided
    VersatileDiffusionImageVariation VersatileDiffusion VersatileDiffusionTextToImage VideoToVideoSD WuerstchenCombined
    WuerstchenDecoder WuerstchenPrior
"""

# Reason, and the classes that it holds for.
REFUSED = {
    "is the base of all pipelines: pass one that draws": "Diffusion",
    "is assembled of blocks and has no call of its own: use the plain pipeline of the same model": """
        AnimaModular Cosmos3DistilledModular Cosmos3OmniModular EchoModular ErnieImageModular Flux2KleinBaseModular
        Flux2KleinModular Flux2Modular Flux3DistilledModular Flux3Modular FluxKontextModular FluxModular HeliosModular
        HeliosPyramidDistilledModular HeliosPyramidModular HunyuanVideo15Modular Ideogram4Modular Krea2Modular
        Krea2TurboModular LTX25Modular LTX2Modular LTXModular MiniMaxH3Modular MiniMaxMusic3Modular Modular
        QwenImage21Modular QwenImage21TurboModular QwenImageEditModular QwenImageEditPlusModular QwenImageLayeredModular
        QwenImageModular StableDiffusion3Modular StableDiffusionXLModular Wan22Image2VideoModular Wan22Modular
        Wan22VaceModular WanAnimate2DistilledModular WanAnimate2Modular WanImage2VideoModular WanModular ZImageModular
    """,
    "draws films, all pictures of one at once; a stream draws single pictures": """
        AnyFlowFAR AnyFlow ChronoEdit Cosmos2VideoToWorld Cosmos2_5_PredictBase Cosmos2_5_Transfer Cosmos3Omni
        CosmosTextToWorld CosmosVideoToWorld EasyAnimateControl EasyAnimateInpaint EasyAnimate Helios HeliosPyramid
        HunyuanSkyreelsImageToVideo HunyuanVideo15ImageToVideo HunyuanVideo15 HunyuanVideoFramepack
        HunyuanVideoImageToVideo HunyuanVideo Kandinsky5I2V Kandinsky5T2V Kandinsky6SR Kandinsky6TI2VA LTX2Condition
        LTX2DFR LTX2DFRTemporalRefine LTX2VideoDiffusionDecode LTX2HDR LTX2InContext LTX2ImageToVideo LTX2 LTXCondition
        LTXI2VLongMultiPrompt LTXImageToVideo LTX LucyEdit Mochi MotifVideoImage2Video MotifVideo SanaImageToVideo
        SanaVideo SanaWM SkyReelsV2DiffusionForcingImageToVideo SkyReelsV2DiffusionForcing
        SkyReelsV2DiffusionForcingVideoToVideo SkyReelsV2ImageToVideo SkyReelsV2 WanAnimate WanImageToVideo Wan WanVACE
        WanVideoToVideo
    """,
    "draws sound": """
        AceStep LongCatAudioDiT StableAudio3AudioToAudio StableAudio3Inpaint StableAudio3
    """,
    (
        "starts from a picture, a mask or a control image, which a whole call of a pipeline takes only at its "
        "start: use the text-to-image pipeline of the same model"
    ): """
        BriaFiboEdit CogView4Control Flux2KleinInpaint FluxControlImg2Img FluxControlInpaint FluxControlNetInpaint
        FluxControl FluxFill FluxKontextInpaint FluxKontext HunyuanImageRefiner JoyImageEdit JoyImageEditPlus
        Kandinsky5I2I LongCatImageEdit QwenImageControlNetInpaint QwenImageEditInpaint QwenImageEdit QwenImageEditPlus
        QwenImageLayered SanaControlNet StableDiffusion3ControlNetInpainting VisualClozeGeneration
        VisualCloze ZImageControlNetInpaint ZImageControlNet
    """,
    (
        "exchanges its network's attention processors while it draws, which frames under way share: use the plain "
        "pipeline of the same model"
    ): """
        SanaPAG StableDiffusion3PAG StableDiffusion3PAGImg2Img Flux2KleinKV
    """,
    "calls two networks in every step, and frames meet at the calls of one": "Ideogram4",
    "takes no latents, or scales those it is given, so that frames cannot be given their noise": """
        DreamLite DreamLiteMobile Cosmos2TextToImage
    """,
    "has no VAE, which every stream decodes with": "PRXPixel",
    "draws what a language model writes, token by token, anew for every frame": "GlmImage",
    "prepares or enlarges latents and draws nothing": """
        FluxPriorRedux LTXLatentUpsample LTX2LatentUpsample
    """,
    "writes text": """
        DiffusionGemma LLaDA2
    """,
    "designs proteins": "RFD4Proteina",
}


def _table() -> dict[str, tuple[str, str]]:
    kinds = {("adapter", ""): ADAPTER, ("rendezvous", ""): RENDEZVOUS, ("not a flow", ""): NOT_A_FLOW}
    kinds.update({("refused", reason): names for reason, names in REFUSED.items()})
    return {f"{name}Pipeline": kind for kind, names in kinds.items() for name in names.split()}


CLASSES = _table()
"""Class name to (kind, reason). Kinds: "adapter", "rendezvous", "not a flow", "refused", which alone has a reason."""


def kind_of(cls: type) -> str | None:
    """The kind of a pipeline class, or of the nearest of its bases that is listed; None for a class of no known kind."""
    return next((CLASSES[name][0] for name in _names(cls) if name in CLASSES), None)


def check_drawable(cls: type) -> None:
    """Raise ValueError, with the reason, for a pipeline class that no stream can draw with."""
    name = next((name for name in _names(cls) if name in CLASSES), None)
    if name is not None and CLASSES[name][0] == "refused":
        raise ValueError(f"{name} {CLASSES[name][1]}")


def _names(cls: type) -> list[str]:
    """Its name and its bases', but for the base that all pipelines share, which says nothing of a class derived from it."""
    return [base.__name__ for base in cls.__mro__ if base is cls or base.__name__ != "DiffusionPipeline"]
