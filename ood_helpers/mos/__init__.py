"""MOS: a softmax in each group of classes, with an "others" that says an image is in none of them.

Source: Huang and Li, "MOS: Towards Scaling Out-of-distribution Detection for Large Semantic Space", CVPR 2021, arXiv
2105.01879.
"""
