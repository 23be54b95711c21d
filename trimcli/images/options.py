"""What the options that name pictures are for: one wording for every command that has them."""

FORM = (
    "a folder of pictures (a folder for each class, or one for all), a .parquet with a column `image`, or an .npz with "
    "`images`, uint8 [N, H, W] or [N, H, W, C]"
)
IMAGES = f"For image classifiers: {FORM}. They pass the model's own image processor."
LABELLED = (
    f"For image classifiers: top-1 and top-5 on {FORM}, with the classes as folders, `label` or `labels`. Names of "
    "classes are looked up in the model's; where it knows none, they count in order."
)
AUGMENT = "Pictures are cut at random and mirrored first, as for training."
