"""What tables call the rows that `digits` and `cifar10_npz` have."""

LABELS = [
    "MSP", "MaxLogit", "Energy", "GEN", "KL matching", "ODIN", "GradNorm", "Mahalanobis", "Mahalanobis (ensemble)",
    "KNN", "ViM", "ReAct", "DICE", "DICE + ReAct", "ASH-P", "ASH-B", "ASH-S", "SCALE", "HIMPLoS", "LINe", "MOS",
    "MSP (flat)", "ODIN (flat)", "Energy (flat)", "Mahalanobis (ensemble, flat)", "KL matching (flat)",
    "MSP (T = 2)", "MSP (dfb)", "MSP (T = 2, dfb)", "ODIN (dfb)", "Energy (dfb)", "ViM (dfb)", "DFB background",
    "MSP + DFB", "MSP (T = 2) + DFB", "ODIN + DFB", "Energy + DFB", "ViM + DFB",
    "MSP + UM", "ODIN + UM", "Energy + UM", "Mahalanobis + UM", "ReAct + UM", "DICE + UM", "ASH-S + UM",
    "MSP + UMAP", "ODIN + UMAP", "Energy + UMAP", "Mahalanobis + UMAP", "ReAct + UMAP", "DICE + UMAP", "ASH-S + UMAP",
]  # fmt: skip
