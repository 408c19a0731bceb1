"""DFB: dense training on pseudo masks disentangles foreground and background, and the background joins any score.

Source: Ding and Pang, "Improving Out-of-Distribution Detection with Disentangled Foreground and Background Features",
ACM MM 2024, arXiv 2303.08727.
"""
