# SPDX-License-Identifier: Apache-2.0
"""How each bundle is made small enough for tests. A new bundle gets an entry here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

NUM_VOLUMES = 6
# of the volumes in turn; the first five of the phantom, which is used without data, have these two as well
CLASSES = ("plain", "venous")
VOLUME_SIZE = (40, 32, 36)
# a part of every file name and of nothing else, to be searched for in what a bundle writes
PATIENT = "PATIENT_00"
# bundles whose encoder is this package's own, since MONAI has none like it
OWN_ENCODER = ("sam_resnet18_ct", "samreg_unet_ct")


@dataclass(frozen=True)
class BundleSettings:
    """Overrides that make a bundle's runs seconds long.

    Args:
        train: overrides of train.yaml: its own network, as narrow as it goes, for one epoch of two iterations.
        quick_files: train.yaml and a variant with a network that costs nothing, for all tests that train more.
        quick: overrides of these: two epochs of two iterations.
        two_processes: overrides beyond `quick` for the run with two processes.
        inference: overrides of inference.yaml, for weights that `train` gave.
        encoder: the arguments of `ssl.encoder` in metadata.json that `train` changes.
        encoder_file: the name of the weights that pretraining is for, and the prefix of their names in `model.pt`.
        network_input: shape of a batch that `network_def` takes.
        variants: for a variant, the files between it and train.yaml, and overrides beyond `train`.
        same_grid: inference writes each volume's own grid, else a coarser one over the same space.
        table: inference writes no volumes but this table, with a row of probabilities for each.
    """

    train: dict[str, Any] = field(default_factory=dict)
    quick_files: tuple[str, ...] = ("train.yaml",)
    quick: dict[str, Any] = field(default_factory=dict)
    two_processes: dict[str, Any] = field(default_factory=dict)
    inference: dict[str, Any] = field(default_factory=dict)
    encoder: dict[str, Any] = field(default_factory=dict)
    encoder_file: tuple[str, str] = ("encoder.pt", "encoder.")
    network_input: tuple[int, ...] = (1, 1, 32, 32, 64)
    variants: dict[str, tuple[list[str], dict[str, Any]]] = field(default_factory=dict)
    same_grid: bool = False
    table: str = ""


CPU = {"device": "$torch.device('cpu')", "num_workers": 0}
TINY = {**CPU, "batch_size": 2, "val_interval": 1, "log_interval": 1, "checkpoint_epochs": 1}
# Swin-UNETR needs two voxels on its coarsest level, thus 64 on one axis. The first spacing gives volumes that are
# larger than a crop, the second such that one crop holds them whole.
SWIN = {"feature_size": 12, "roi_size": [32, 32, 64]}
LARGER, WHOLE = [11.0, 9.0, 5.5], [12.5, 10.5, 6.2]

VOCO = {**TINY, "val_fraction": 0.33, "monitor_interval": 1, "preview_interval": 2, "hidden_dim": 16, "out_dim": 8}
SEGMENTATION = {**TINY, "val_fraction": 0.33, "test_fraction": 0.17, "num_samples": 1, "num_overlays": 1}
# a volume of each class for validation, none for testing, so that evaluate.yaml takes these
CLASSIFICATION = {**TINY, "val_fraction": 0.33, "test_fraction": 0.0, "class_names": list(CLASSES)}

SAM = {**TINY, "val_fraction": 0.33, "monitor_interval": 1, "preview_interval": 2, "base_channels": 8, "embed_dim": 16}
SAM |= {"spacing": [10.0] * 3, "pixdim": [10.0] * 3, "roi_size": [16, 32, 32], "warmup_steps": 2}

SLICES = {**TINY, "val_fraction": 0.33, "monitor_interval": 1, "preview_interval": 2, "channels": [8, 16, 32, 64]}
SLICES |= {"pixdim": [10.0] * 2, "plane_size": [64, 64], "hidden_channels": 16, "out_channels": 8}

REGISTRATION = {
    **CPU,
    "batch_size": 1,
    "val_interval": 1,
    "log_interval": 1,
    "checkpoint_epochs": 1,
    "val_fraction": 0.33,
}
REGISTRATION |= {"pixdim": [14.0] * 3, "embedder_file": "random", "prealign": [], "num_pairs": 2}
REGISTRATION |= {"base_channels": 8, "embed_dim": 8, "channels": [4, 4, 4, 4], "up_channels": [4, 4, 4, 4, 4]}

# The patch pretexts: patches that leave two voxels on the coarsest level of SegResNet; what a wider stride needs is
# given with the variant.
PATCHES = {**TINY, "val_fraction": 0.33, "monitor_interval": 1, "preview_interval": 2, "pixdim": [6.0, 6.0, 6.0]}
PATCHES_OF_32 = {"roi_size": [96, 96, 96], "pixdim": [4.0, 4.0, 4.0], "jitter": 0, "gap": 0, "feature_size": 12}


def patch_pretext(variants: dict[str, tuple[list[str], dict[str, Any]]], **more: Any) -> BundleSettings:
    return BundleSettings(
        train={**PATCHES, "init_filters": 8, "roi_size": [48, 48, 48], "max_epochs": 1} | more,
        quick_files=("train.yaml", "small.yaml"),
        quick={**PATCHES, "max_epochs": 2},
        inference={**CPU, "init_filters": 8, "roi_size": [32, 32, 32], "pixdim": WHOLE, "overlap": 0.0},
        encoder={"init_filters": 8},
        network_input=(1, 1, 32, 32, 16),
        variants=variants,
    )


SETTINGS = {
    "rpl_segresnet_ct": patch_pretext(
        {
            "unet.yaml": ([], {"roi_size": [72, 72, 72]}),
            "swin_unetr.yaml": ([], {**PATCHES_OF_32, "grid_size": [3, 1, 1], "roi_size": [96, 32, 32]}),
        }
    ),
    "jigsaw_segresnet_ct": patch_pretext(
        {
            "unet.yaml": ([], {"roi_size": [72, 72, 72]}),
            "swin_unetr.yaml": ([], {**PATCHES_OF_32, "grid_size": [2, 1, 2], "roi_size": [64, 32, 64]}),
        },
        num_permutations=8,
    ),
    "rotation_segresnet_ct": patch_pretext({"swin_unetr.yaml": ([], {"roi_size": [64, 64, 64], "feature_size": 12})}),
    "cpc_segresnet_ct": patch_pretext(
        {
            "published.yaml": ([], {"roi_size": [64, 64, 64], "features": 512}),
            "unet.yaml": ([], {"roi_size": [80, 80, 80], "jitter": 0, "gap": 2}),
            "swin_unetr.yaml": ([], {**PATCHES_OF_32, "grid_size": [4, 2, 2], "roi_size": [128, 64, 64]}),
        }
    ),
    "exemplar_segresnet_ct": patch_pretext(
        {"swin_unetr.yaml": ([], {"feature_size": 12})}, view_size=[32, 32, 32], embed_dim=16
    ),
    "pgl_segresnet_ct": patch_pretext(
        {
            "small.yaml": ([], {"hidden_channels": 16}),
            "byol.yaml": ([], {}),
            "lars.yaml": ([], {}),
            "published.yaml": ([], {"roi_size": [8, 32, 32], "scale_range": [1.0, 1.0]}),
            # two features per axis: without much overlap none is shared
            "unet.yaml": ([], {"roi_size": [32, 32, 32], "min_overlap": 0.45}),
            "swin_unetr.yaml": ([], {"feature_size": 12, "roi_size": [32, 32, 64], "min_overlap": 0.45}),
        },
        roi_size=[24, 24, 32],
        hidden_channels=16,
        out_channels=8,
    ),
    "global_local_unet_mr": BundleSettings(
        train={**SLICES, "max_iterations": 2},
        quick_files=("train.yaml", "small.yaml"),
        quick={**SLICES, "max_iterations": 4},
        inference={**CPU, "channels": [8, 16, 32, 64], "pixdim": [10.0] * 2, "plane_size": [64, 64]},
        encoder={"channels": [8, 16, 32, 64], "strides": [2, 2, 2]},
        encoder_file=("unet_encoder.pt", "network."),
        network_input=(1, 1, 64, 64),
        variants={
            "decoder.yaml": ([], {"num_decoder_blocks": 2, "pretrained": ""}),
            "basic_unet.yaml": ([], {}),
            "crops_3d.yaml": ([], {"plane_size": [32, 24], "thickness": 16, "slice_distance": -1.0}),
        },
    ),
    "sam_resnet18_ct": BundleSettings(
        train={**SAM, "max_iterations": 2},
        quick_files=("train.yaml", "small.yaml"),
        quick={**SAM, "max_iterations": 4},
        inference={**CPU, "base_channels": 8, "embed_dim": 16, "pixdim": [10.0] * 3},
        encoder={"base_channels": 8},
        network_input=(1, 1, 16, 32, 32),
        variants={"segresnet.yaml": ([], {"init_filters": 8})},
    ),
    "multi_task_pretraining": patch_pretext(
        {
            "add_exemplar.yaml": ([], {"view_size": [32, 32, 32], "embed_dim": 16}),
            "unet.yaml": ([], {"roi_size": [72, 72, 72]}),
            # patches of 32
            "swin_unetr.yaml": (
                [],
                {**PATCHES_OF_32, "roi_size": [64] * 3, "grid_size": [2] * 3, "voco_grid": [2, 2, 1]},
            ),
        },
        num_permutations=8,
        hidden_dim=16,
        out_dim=8,
    ),
    "voco_swinunetr_ct": BundleSettings(
        train={**VOCO, **SWIN, "max_epochs": 1, "pixdim": LARGER, "grid_size": [1, 2, 1], "num_samples": 1},
        quick_files=("train.yaml", "small.yaml"),
        quick={**VOCO, "max_epochs": 2},
        inference={**CPU, **SWIN, "pixdim": WHOLE, "overlap": 0.0},
        encoder={"feature_size": 12},
        variants={
            "small.yaml": ([], {"roi_size": [16, 16, 16], "grid_size": [2, 3, 2]}),
            "released_v1.yaml": ([], {"crop_resize#spatial_size": [32, 32, 64]}),
            "released_cvpr.yaml": ([], {"crop_resize#spatial_size": [32, 32, 64], "embed_dim": 192}),
        },
    ),
    "samreg_unet_ct": BundleSettings(
        train={**REGISTRATION, "max_epochs": 1},
        quick={**REGISTRATION, "max_epochs": 2},
        inference={
            **{key: REGISTRATION[key] for key in (*CPU, "pixdim", "prealign", "channels", "up_channels")},
            **{key: REGISTRATION[key] for key in ("base_channels", "embed_dim")},
        },
        network_input=(1, 2, 16, 32, 32),
        variants={"published.yaml": ([], {"num_pairs": 2}), "small.yaml": ([], {})},
        same_grid=True,
    ),
    "segmentation_finetuning": BundleSettings(
        train={**SEGMENTATION, **SWIN, "max_epochs": 1, "pixdim": WHOLE},
        quick_files=("train.yaml", "small.yaml"),
        quick={**SEGMENTATION, "max_epochs": 2, "pixdim": [12.0, 12.0, 12.0]},
        two_processes={"val_fraction": 0.17},  # one validation volume for two processes
        inference={**CPU, **SWIN, "pixdim": WHOLE, "overlap": 0.0},
        variants={"segresnet_ds.yaml": ([], {"init_filters": 8})},
        same_grid=True,
    ),
    "classification_finetuning": BundleSettings(
        train={**CLASSIFICATION, "init_filters": 4, "roi_size": [32, 32, 64], "pixdim": WHOLE, "max_epochs": 1},
        quick_files=("train.yaml", "small.yaml"),
        quick={**CLASSIFICATION, "max_epochs": 2, "pixdim": [12.0, 12.0, 12.0], "roi_size": [32, 24, 32]},
        inference={**CPU, "class_names": list(CLASSES), "init_filters": 4, "roi_size": [32, 32, 64], "pixdim": WHOLE},
        variants={"swin_vit.yaml": ([], {"feature_size": 12}), "swin_unetr.yaml": ([], {"feature_size": 12})},
        table="predictions.csv",
    ),
}
