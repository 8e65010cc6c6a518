"""What the minis are called."""

KINDS = ("flux", "sd3", "wan")
LM_VARIANTS = ("plain", "outlier", "bias")
