"""Unleashing Mask: a trained classifier forgets the atypical images that it has memorised.

Source: Zhu et al., "Unleashing Mask: Explore the Intrinsic Out-of-Distribution Detection Capability", ICML 2023, arXiv
2306.03715.
"""
